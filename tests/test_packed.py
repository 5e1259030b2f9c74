"""The packed forward against stock models. Dimensions: T tokens of a micro-batch, D width, B sequences, L of a row."""

from itertools import pairwise

import pytest
import torch
from transformers.models.esm import modeling_esm

from hf_plm.config import UserError
from hf_plm.models import layers
from hf_plm.models.attention import SDPA_ROUTE, VARLEN_ROUTE, attention_route
from hf_plm.models.layers import EsmLayer, packed_layer, use_packed_layers
from hf_plm.models.packed import packed_hidden_states, packed_logits, sequence_index
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.vocabulary import CLS_ID, EOS_ID, MASK_ID, PAD_ID

TOLERANCE = 1e-4
LENGTHS = (40, 7, 40, 1, 93)


def spread(model, scale=0.15):
    """Weights large enough that a mistake shows: fresh ones give logits near zero whatever the input."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def new_model(**sizes):
    return spread(build_model(esm_config("demo", **sizes), 0))


def random_sequences(lengths=LENGTHS, masked_share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        ids_L = torch.randint(4, 29, (length,), generator=generator)
        ids_L[torch.rand(length, generator=generator) < masked_share] = MASK_ID
        if length > 2:
            ids_L[0], ids_L[-1], ids_L[1] = CLS_ID, EOS_ID, 20
        else:
            ids_L[:] = 20
        sequences.append(ids_L)
    return sequences


def pack(sequences):
    lengths = torch.tensor([len(ids_L) for ids_L in sequences])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    position_ids_T = torch.cat([torch.arange(length) for length in lengths.tolist()])
    return torch.cat(sequences), position_ids_T, cu_seqlens, int(lengths.max())


@pytest.mark.parametrize("stock_attention", ["sdpa", "eager"])
@pytest.mark.parametrize("token_dropout", [True, False])
@torch.no_grad()
def test_each_sequence_is_as_if_alone_at_every_layer(token_dropout, stock_attention):
    model, stock = new_model(token_dropout=token_dropout), new_model(token_dropout=token_dropout)
    stock.set_attn_implementation(stock_attention)
    sequences = random_sequences()
    hidden = packed_hidden_states(model, *pack(sequences), output_hidden_states=True)
    logits_TV = packed_logits(model, *pack(sequences))
    assert len(hidden) == model.config.num_hidden_layers + 1
    bounds = pack(sequences)[2].tolist()
    for ids_L, start, end in zip(sequences, bounds[:-1], bounds[1:], strict=True):
        alone = stock(ids_L[None], output_hidden_states=True)
        assert alone.logits.std() > 0.5
        for layer_TD, layer_1LD in zip(hidden, alone.hidden_states, strict=True):
            torch.testing.assert_close(layer_TD[start:end], layer_1LD[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(logits_TV[start:end], alone.logits[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("broken", ["one sequence", "positions", "stock row"])
@torch.no_grad()
def test_as_if_alone_twin(broken):
    model = new_model()
    input_ids_T, position_ids_T, cu_seqlens, max_seqlen = pack(random_sequences())
    right_TV = packed_logits(model, input_ids_T, position_ids_T, cu_seqlens, max_seqlen)
    if broken == "one sequence":
        cu_seqlens, max_seqlen = cu_seqlens[[0, -1]], len(input_ids_T)
        wrong_TV = packed_logits(model, input_ids_T, position_ids_T, cu_seqlens, max_seqlen)
    elif broken == "positions":
        # Rotary positions are relative, so running on without a restart would change nothing.
        wrong_TV = packed_logits(model, input_ids_T, 2 * position_ids_T, cu_seqlens, max_seqlen)
    else:
        wrong_TV = new_model()(input_ids_T[None], position_ids=position_ids_T[None]).logits[0]
    assert (wrong_TV - right_TV).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_order_in_the_pack_does_not_matter():
    model, sequences = new_model(), random_sequences()
    bounds = pack(sequences)[2].tolist()
    forward_TV = packed_logits(model, *pack(sequences))
    backward_TV = packed_logits(model, *pack(sequences[::-1]))
    parts = [forward_TV[start:end] for start, end in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(parts[::-1]), backward_TV, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_sequence_of_masks_alone_is_finite_and_disturbs_nobody():
    model, sequences = new_model(), random_sequences()
    all_masks_L = torch.full((9,), MASK_ID)
    with_masks_TV = packed_logits(model, *pack([all_masks_L, *sequences]))
    assert with_masks_TV.isfinite().all()
    torch.testing.assert_close(with_masks_TV[9:], packed_logits(model, *pack(sequences)), rtol=0, atol=TOLERANCE)
    assert new_model()(all_masks_L[None]).logits.isnan().all()  # the twin: what stock makes of it


def test_token_dropout_has_a_gain_per_sequence():
    model = new_model()
    masked_L = torch.tensor([20, MASK_ID, MASK_ID, 7])
    hidden = packed_hidden_states(model, *pack([masked_L, torch.tensor([20, 7])]), output_hidden_states=True)
    raw_D = model.esm.embeddings.word_embeddings.weight[20]
    torch.testing.assert_close(hidden[0][0], raw_D * 0.88 / 0.5)
    torch.testing.assert_close(hidden[0][4], raw_D * 0.88)
    assert hidden[0][1].abs().max() == 0


def test_sequence_index():
    assert sequence_index(torch.tensor([0, 2, 3, 6], dtype=torch.int32), 6).tolist() == [0, 0, 1, 2, 2, 2]


def gradients(model, sequences, recompute):
    model.train()
    model.zero_grad()
    if recompute:
        # transformers 5.23 has the second name and warns of the first; 5.17 has the first alone.
        older, newer = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model, newer if hasattr(model, newer) else older)({"use_reentrant": False})
    loss = packed_logits(model, *pack(sequences)).square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_activation_checkpointing_gives_the_same_gradients():
    expected = gradients(new_model(), random_sequences(), recompute=False)
    found = gradients(new_model(), random_sequences(), recompute=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_runs_each_layer_twice(recompute, monkeypatch):
    runs = []
    monkeypatch.setattr(layers, "packed_layer", lambda *arguments: runs.append(1) or packed_layer(*arguments))
    model = new_model()
    gradients(model, random_sequences(), recompute)
    assert len(runs) == model.config.num_hidden_layers * (1 + recompute)


def test_gradients_are_those_of_the_stock_model():
    model, stock, sequences = new_model(), new_model(), random_sequences()
    found = gradients(model, sequences, recompute=False)
    stock.train()
    total = sum(len(ids_L) for ids_L in sequences) * 33
    sum(stock(ids_L[None]).logits.square().sum() / total for ids_L in sequences).backward()
    expected = torch.cat([p.grad.flatten() for p in stock.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_bf16_autocast_is_near_fp32():
    model, packed = new_model(), pack(random_sequences())
    exact_TV = packed_logits(model, *packed)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_TV = packed_logits(model, *packed)
    assert 0 < (rounded_TV - exact_TV).abs().mean() < 0.05 * exact_TV.std()


def padded_logits(model):
    rows = random_sequences((30, 12))
    input_ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    with torch.no_grad():
        return model(input_ids_BL, attention_mask=(input_ids_BL != PAD_ID).long()).logits[1, :12]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ordinary_calls_are_as_before(attention):
    model, stock = new_model(), new_model()
    for each in (model, stock):
        each.set_attn_implementation(attention)
    packed_logits(model, *pack(random_sequences()))
    assert all(type(layer) is EsmLayer for layer in model.esm.encoder.layer)
    assert type(stock.esm.encoder.layer[0]) is modeling_esm.EsmLayer
    assert torch.equal(padded_logits(model), padded_logits(stock))
    assert model.config.to_json_string() == stock.config.to_json_string()
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    ids_BL = torch.stack(random_sequences((30, 30)))
    found, expected = model(ids_BL, **asked), stock(ids_BL, **asked)
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1
    for name in ("hidden_states", "attentions")[: 1 + (attention == "eager")]:
        assert all(map(torch.equal, found[name], expected[name]))


def test_layers_have_the_name_that_engines_look_for():
    """accelerate_configs/fsdp2.yaml names the class whose objects are shared out; `fully_shard` keeps the methods."""
    model = new_model()
    use_packed_layers(model)
    assert type(model.esm.encoder.layer[0]).__name__ == "EsmLayer"
    assert isinstance(model.esm.encoder.layer[0], modeling_esm.EsmLayer)


def fair_esm_twin_of(model):
    """A fair-esm ESM2 with the model's weights; its names come from esm/model/esm2.py and esm/modules.py."""
    from esm.model.esm2 import ESM2

    config = model.config
    reference = ESM2(config.num_hidden_layers, config.hidden_size, config.num_attention_heads).eval()
    names = {
        "esm.embeddings.word_embeddings": "embed_tokens",
        "esm.encoder.emb_layer_norm_after": "emb_layer_norm_after",
        "esm.encoder.layer": "layers",
        "esm.contact_head": "contact_head",
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.LayerNorm": "self_attn_layer_norm",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
        "LayerNorm": "final_layer_norm",
        "lm_head.decoder": "lm_head",
    }
    weights = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor
    inv_freq = weights.pop("esm.rotary_embeddings.inv_freq")
    for layer in range(config.num_hidden_layers):
        weights[f"layers.{layer}.self_attn.rot_emb.inv_freq"] = inv_freq
    reference.load_state_dict(weights)
    return reference


@torch.no_grad()
def test_parity_with_fair_esm():
    model = new_model()
    reference, sequences = fair_esm_twin_of(model), random_sequences((60, 25, 60))
    logits_TV = packed_logits(model, *pack(sequences))
    expected_TV = torch.cat([reference(ids_L[None])["logits"][0] for ids_L in sequences])
    assert expected_TV.std() > 0.5
    torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=TOLERANCE)
    reference.layers[0].fc1.bias += 0.1  # the twin: parity sees a small change of one bias
    changed_TV = torch.cat([reference(ids_L[None])["logits"][0] for ids_L in sequences])
    assert (logits_TV - changed_TV).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("field", [{"position_embedding_type": "absolute"}, {"attention_probs_dropout_prob": 0.1}])
def test_other_models_are_refused(field):
    config = esm_config("demo", num_layers=1)
    for key, value in field.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match="takes models with rotary positions and no attention dropout"):
        packed_logits(build_model(config, 0), *pack(random_sequences()))


def test_the_cpu_takes_the_exact_route():
    assert attention_route(torch.device("cpu"), torch.bfloat16) == SDPA_ROUTE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_routes_agree_on_a_gpu(monkeypatch):
    device = torch.device("cuda:0")
    model = new_model().to(device, torch.bfloat16)
    packed = [x.to(device) if isinstance(x, torch.Tensor) else x for x in pack(random_sequences())]
    if attention_route(device, torch.bfloat16, 32) != VARLEN_ROUTE:
        pytest.skip("this device does not run the variable-length kernel")
    fast_TV = packed_logits(model, *packed).float()
    monkeypatch.setattr("hf_plm.models.packed.attention_route", lambda *arguments: SDPA_ROUTE)
    exact_TV = packed_logits(model, *packed).float()
    assert (fast_TV - exact_TV).abs().mean() < 0.05 * exact_TV.std()
