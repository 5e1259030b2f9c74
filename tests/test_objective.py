"""The loss of a step is the mean over its targets, however they fall into micro-batches.

Dimensions: T tokens of a micro-batch, K targets, V vocabulary, D width, L tokens of one sequence.
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from hf_plm.models.objective import PackedMaskedLM
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.vocabulary import CLS_ID, IGNORED_LABEL, MASK_ID

# Targets of each sequence; the third micro-batch has none.
MICRO_BATCHES = (((30, 12), (25, 9)), ((18, 1),), ((40, 0), (3, 0)), ((60, 3), (5, 0)))


def new_model():
    model = build_model(esm_config("demo", num_layers=2, width=32, num_heads=2), 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def random_sequence(length, num_targets, generator):
    """Ids and labels of one sequence; two thirds of the targets are masked, the rest stay visible."""
    ids_L = torch.randint(4, 24, (length,), generator=generator)
    labels_L = torch.full((length,), IGNORED_LABEL)
    targets_K = torch.randperm(length, generator=generator)[:num_targets]
    labels_L[targets_K] = ids_L[targets_K]
    ids_L[targets_K[: math.ceil(num_targets * 2 / 3)]] = MASK_ID
    return ids_L, labels_L


def random_step(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[random_sequence(*size, generator) for size in sizes] for sizes in MICRO_BATCHES]


def pack(sequences):
    if not sequences:
        nothing = torch.zeros(0, dtype=torch.long)
        return nothing, nothing, nothing, torch.zeros(1, dtype=torch.int32), 0, nothing
    lengths = torch.tensor([len(ids_L) for ids_L, _ in sequences])
    position_ids_T = torch.cat([torch.arange(length) for length in lengths.tolist()])
    ids_T, labels_T = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    cu_seqlens, targets_K = pad(lengths.cumsum(0), (1, 0)).int(), (labels_T != IGNORED_LABEL).nonzero().squeeze(1)
    return ids_T, labels_T, position_ids_T, cu_seqlens, int(lengths.max()), targets_K


def gradient(module):
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.requires_grad])


def stock_gradient(step):
    """Of the mean over all targets, each sequence in a forward of its own through the stock model."""
    model = new_model().train()
    losses = [
        cross_entropy(model(ids_L[None]).logits[0], labels_L, reduction="sum")
        for batch in step
        for ids_L, labels_L in batch
    ]
    count = sum(int((labels_L != IGNORED_LABEL).sum()) for batch in step for _, labels_L in batch)
    (sum(losses) / count).backward()
    model.esm.contact_head.requires_grad_(False)
    return gradient(model)


def engine_gradient(step, world_size, mean_of_means=False):
    """What an engine makes of it: each rank divides by its accumulation, and the ranks are averaged."""
    module = PackedMaskedLM(new_model()).train()
    accumulation = math.ceil(len(step) / world_size)
    rounds = [*step, *[[]] * (world_size * accumulation - len(step))]  # idle ranks of the last round
    count = sum(int((pack(batch)[1] != IGNORED_LABEL).sum()) for batch in step)
    for batch in rounds:
        loss_sum, num_targets, _ = module(*pack(batch))
        weight = 1 / max(1, int(num_targets)) if mean_of_means else world_size * accumulation / count
        (loss_sum * weight / accumulation / world_size).backward()
    return gradient(module)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_loss_is_the_global_mean(world_size):
    expected = stock_gradient(random_step())
    found = engine_gradient(random_step(), world_size)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_the_global_mean_twin():
    expected = stock_gradient(random_step())
    found = engine_gradient(random_step(), 1, mean_of_means=True)
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("sequences", [random_step()[2], []], ids=["no targets", "no tokens"])
def test_without_targets_the_loss_is_zero_and_every_gradient_is_there(sequences):
    module = PackedMaskedLM(new_model())
    loss_sum, num_targets, num_correct = module(*pack(sequences))
    assert (loss_sum.item(), num_targets.item(), num_correct.item()) == (0.0, 0, 0)
    loss_sum.backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_every_trained_parameter_gets_a_gradient():
    module = PackedMaskedLM(new_model())
    module(*pack(random_step()[0]))[0].backward()
    untouched = [name for name, p in module.named_parameters() if p.requires_grad and not p.grad.any()]
    assert untouched == []
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == [
        "model.esm.contact_head.regression.weight",
        "model.esm.contact_head.regression.bias",
    ]


def test_per_target_is_the_same_forward_in_parts():
    module = PackedMaskedLM(new_model())
    batch = pack(random_step()[0])
    loss_sum, num_targets, num_correct = module(*batch)
    losses_K, is_correct_K, sequence_index_K, input_ids_K, labels_K = module(*batch, per_target=True)
    assert torch.equal(losses_K.sum(), loss_sum)
    assert len(losses_K) == num_targets == 21
    assert is_correct_K.sum() == num_correct
    assert sequence_index_K.tolist() == [0] * 12 + [1] * 9
    is_target_T = batch[1] != IGNORED_LABEL
    assert torch.equal(input_ids_K, batch[0][is_target_T])
    assert torch.equal(labels_K, batch[1][is_target_T])
    assert (input_ids_K == MASK_ID).sum() == 8 + 6


def test_the_head_runs_on_targets_only():
    module = PackedMaskedLM(new_model())
    rows = []
    module.model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(len(inputs[0])))
    module(*pack(random_step()[0]))
    assert rows == [21]


def test_loss_is_fp32_under_autocast():
    module = PackedMaskedLM(new_model())
    exact = module(*pack(random_step()[0]))[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum = module(*pack(random_step()[0]))[0]
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_prediction_is_a_residue():
    module = PackedMaskedLM(new_model())
    ids_T, labels_T, *rest = pack(random_step()[0])
    expected = module(ids_T, labels_T, *rest)[2]
    module.model.lm_head.bias.data[CLS_ID] += 100
    assert expected > 0
    assert module(ids_T, labels_T, *rest)[2] == expected
