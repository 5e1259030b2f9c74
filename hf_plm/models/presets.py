"""The sizes of ESM-2, and a demo size, as configurations of transformers' own `EsmForMaskedLM`.

There is no model class of ours: a preset is three numbers, and everything else is what the published checkpoints have,
so that what is trained here is a model that others already know how to open.
"""

import difflib
import re
from typing import NamedTuple

import torch
from transformers import EsmConfig, EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.proteins.vocabulary import CLS_ID, EOS_ID, MASK_ID, PAD_ID, VOCABULARY_SIZE


class Preset(NamedTuple):
    num_layers: int
    width: int
    num_heads: int


PRESETS = {
    "demo": Preset(4, 128, 4),
    "8m": Preset(6, 320, 20),
    "35m": Preset(12, 480, 20),
    "150m": Preset(30, 640, 20),
    "650m": Preset(33, 1280, 20),
    "3b": Preset(36, 2560, 40),
    "15b": Preset(48, 5120, 40),
}
"""Layers, width, heads. Source: ESM-2's model table (facebookresearch/esm, README.md; Lin et al. 2023, table S1) and
the `config.json` of `facebook/esm2_t6_8M_UR50D` to `facebook/esm2_t48_15B_UR50D`; `demo` is ours."""


def esm_config(
    preset: str,
    *,
    token_dropout: bool = True,
    num_layers: int | None = None,
    width: int | None = None,
    num_heads: int | None = None,
) -> EsmConfig:
    """The configuration of a preset, with every field of the published ESM-2 configurations.

    A preset is a name of `PRESETS` or a size such as `6x320x20`: layers, width, heads. `num_layers`, `width` and
    `num_heads` replace the preset's own where they are given. Raises `UserError` for a name
    that is no preset, and for a width that the heads do not divide into even parts (rotary positions turn pairs).
    """
    size = PRESETS.get(preset)
    if size is None and (given := re.fullmatch(r"(\d{1,4})x(\d{1,5})x(\d{1,4})", preset)):
        size = Preset(*map(int, given.groups()))
    if size is None:
        closest = difflib.get_close_matches(preset.lower(), PRESETS, n=1, cutoff=0.3)
        hint = f"; did you mean {closest[0]!r}?" if closest else "."
        raise UserError(f"model.preset is {preset!r}, but the presets are {', '.join(PRESETS)}{hint}")
    num_layers = size.num_layers if num_layers is None else num_layers
    width = size.width if width is None else width
    num_heads = size.num_heads if num_heads is None else num_heads
    if min(num_layers, width, num_heads) < 1 or width % (2 * num_heads):
        raise UserError(
            f"A model of {num_layers} layers, width {width} and {num_heads} heads cannot be built: all three must be "
            "positive and the width a multiple of twice the number of heads."
        )
    return EsmConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
        initializer_range=0.02,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=token_dropout,
        is_folding_model=False,
        esmfold_config=None,
        vocab_list=None,
        classifier_dropout=None,
        use_cache=True,
        tie_word_embeddings=True,
        bos_token_id=CLS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        mask_token_id=MASK_ID,
        dtype="float32",
        architectures=["EsmForMaskedLM"],
    )


def preset_of(config: EsmConfig) -> str:
    """The preset that a configuration is of: its name, or its size such as `6x320x20`."""
    size = Preset(config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    return next((name for name, preset in PRESETS.items() if preset == size), "x".join(map(str, size)))


def build_model(config: EsmConfig, seed: int) -> EsmForMaskedLM:
    """A new model on the CPU in fp32, its weights a function of `config` and `seed` alone.

    The global generators are left as they were. The contact head is frozen: the masked-language-model loss gives it no
    gradient, which DDP would take for a fault; it stays in the model because the published files have it.
    """
    # torch.manual_seed would also reseed every accelerator, whose states fork_rng is not asked to keep here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = EsmForMaskedLM(config)
    model.esm.contact_head.requires_grad_(False)
    return model


def num_parameters(config: EsmConfig) -> int:
    """Parameters of a model of this configuration, tied ones once, found without allocating them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = EsmForMaskedLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops(config: EsmConfig, num_tokens: int, num_targets: int, sum_of_squares: int) -> int:
    """Floating-point operations of forward and backward that no implementation can leave out.

    Two for each weight and token in the forward pass and twice as many in the backward one; the head at targets alone;
    attention by `sum_of_squares`, the sum of squared sequence lengths, where padding would count its slots. Layer
    norms, GELU, softmax and what activation checkpointing repeats are left out, as is usual (PaLM, Chowdhery et al.
    2022, appendix B).
    """
    width, num_layers = config.hidden_size, config.num_hidden_layers
    layer = 4 * width * width + 2 * width * config.intermediate_size
    head = width * width + width * config.vocab_size
    return 6 * (num_layers * layer * num_tokens + head * num_targets) + 12 * num_layers * width * sum_of_squares
