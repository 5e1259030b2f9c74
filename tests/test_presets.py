"""The presets against the published configurations and fair-esm's parameter counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import EsmConfig

from hf_plm.config import UserError
from hf_plm.models.presets import PRESETS, build_model, esm_config, num_parameters, training_flops

SMALL = {"num_layers": 2, "width": 32, "num_heads": 4}


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("8m", (6, 320, 20)),
        ("35m", (12, 480, 20)),
        ("150m", (30, 640, 20)),
        ("650m", (33, 1280, 20)),
        ("3b", (36, 2560, 40)),
        ("15b", (48, 5120, 40)),
    ],
)
def test_presets_are_the_published_ones(preset, size):
    config = esm_config(preset)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == size
    assert config.intermediate_size == 4 * size[1]
    # The fields of facebook/esm2_*'s config.json; what EsmConfig does not default to is in the twin.
    published = {
        "model_type": "esm",
        "architectures": ["EsmForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "emb_layer_norm_before": False,
        "esmfold_config": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "is_folding_model": False,
        "layer_norm_eps": 1e-5,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "dtype": "float32",
        "use_cache": True,
        "vocab_list": None,
        "vocab_size": 33,
    }
    found = config.to_dict()
    assert {key: found.get(key, "absent") for key in published} == published


def test_published_fields_twin():
    """Transformers' defaults are not ESM-2: what the test above checks has to be set."""
    defaults = EsmConfig().to_dict()
    ours = esm_config("8m").to_dict()
    keys = ("hidden_dropout_prob", "layer_norm_eps", "position_embedding_type", "token_dropout", "mask_token_id")
    assert all(defaults[key] != ours[key] for key in keys)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_number_of_parameters_is_that_of_fair_esm(preset):
    from esm.model.esm2 import ESM2

    num_layers, width, num_heads = PRESETS[preset]
    with torch.device("meta"):
        reference = ESM2(num_layers, width, num_heads)
    assert num_parameters(esm_config(preset)) == sum(parameter.numel() for parameter in reference.parameters())


def test_demo_is_under_a_million():
    assert num_parameters(esm_config("demo")) < 1_000_000


def test_overrides():
    config = esm_config("8m", token_dropout=False, **SMALL)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 4)
    assert (config.intermediate_size, config.token_dropout) == (128, False)


def test_unknown_preset_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r"is '650', but the presets are .*did you mean '650m'"):
        esm_config("650")


@pytest.mark.parametrize("sizes", [{"width": 36}, {"num_heads": 0}, {"num_layers": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="cannot be built"):
        esm_config("demo", **sizes)


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator():
    config = esm_config("demo", **SMALL)
    torch.manual_seed(1)
    first = build_model(config, 7).state_dict()
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    second = build_model(config, 7).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build_model(config, 8).state_dict()  # the twin
    assert not torch.equal(first["lm_head.dense.weight"], other["lm_head.dense.weight"])


def test_initial_weights_have_the_configured_spread():
    model = build_model(esm_config("demo"), 0)
    weight = model.esm.encoder.layer[0].intermediate.dense.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.decoder.weight is model.esm.embeddings.word_embeddings.weight


def test_the_contact_head_is_frozen_and_nothing_else():
    frozen = [
        name
        for name, parameter in build_model(esm_config("demo", **SMALL), 0).named_parameters()
        if not parameter.requires_grad
    ]
    assert frozen == ["esm.contact_head.regression.weight", "esm.contact_head.regression.bias"]


@pytest.mark.parametrize(("num_tokens", "num_targets"), [(24, 24), (40, 6)])
def test_operations_are_those_that_torch_counts(num_tokens, num_targets):
    """Of the stock model on one sequence, forward and backward, with the head at the targets."""
    config = esm_config("demo")
    model = build_model(config, 0)
    model.set_attn_implementation("eager")
    ids_1L = torch.full((1, num_tokens), 5)
    with FlopCounterMode(display=False) as counter:
        model.lm_head(model.esm(ids_1L)[0][:, :num_targets]).sum().backward()
    assert counter.get_total_flops() == training_flops(config, num_tokens, num_targets, num_tokens**2)
    assert counter.get_total_flops() != training_flops(config, num_tokens, num_targets, 2 * num_tokens**2)  # the twin
