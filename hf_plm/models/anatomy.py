"""The parts of stock encoders by one set of names: what an ONNX graph is built from, whatever transformers calls them.

Dimensions: M positions, V vocabulary, D width, H heads, K width of a head, N squares of S x S.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertModel, EsmcModel, EsmModel, T5EncoderModel

from hf_plm.config import UserError
from hf_plm.models.packed import TOKEN_DROPOUT_GAIN

SQUARE = 64
"""Tokens, to both sides, of the squares that T5's bias is put together from."""
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "silu": ("QuickGelu", {"alpha": 1.0}),  # x sigmoid(alpha x)
}
"""The operator and its attributes, by the configuration's name of an activation."""


@dataclass(frozen=True)
class Layer:
    """The modules of a layer, whatever its model calls them."""

    attention_norm: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    feed_norm: nn.Module
    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None = None  # what comes of it is activated and multiplied with what comes of `up`
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None

    @classmethod
    def of(cls, layer: nn.Module, names: str) -> "Layer":
        return cls(*(layer.get_submodule(name) for name in names.split()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Encoder:
    """What a graph is built from."""

    embedding_VD: torch.Tensor
    layers: list[Layer]
    num_heads: int
    scale: float  # of scores
    activation: str
    final_norm: nn.Module | None
    embedding_norm: nn.Module | None = None
    positions_MD: torch.Tensor | None = None  # added to the embeddings
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None  # (M, K / 2) each, of rotary positions
    bias_HNSS: torch.Tensor | None = None  # added to scores, in squares: see `_bias_squares`
    divisor: float = 1.0  # of what attention and feed-forward add
    is_pre_norm: bool = True

    @property
    def width(self) -> int:
        return self.embedding_VD.shape[1]


_ESM = (
    "attention.LayerNorm attention.self.query attention.self.key attention.self.value attention.output.dense "
    "LayerNorm intermediate.dense output.dense"
)
_BERT = _ESM.replace("LayerNorm", "output.LayerNorm")
_ESMC = (
    "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "post_attention_layernorm mlp.up_proj mlp.down_proj mlp.gate_proj self_attn.q_norm self_attn.k_norm"
)
_T5 = (
    "layer.0.layer_norm layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
    "layer.0.SelfAttention.o layer.1.layer_norm layer.1.DenseReluDense."
)
_T5_RELU = _T5 + "wi layer.1.DenseReluDense.wo"
_T5_GATED = _T5 + "wi_1 layer.1.DenseReluDense.wo layer.1.DenseReluDense.wi_0"


def describe(model: nn.Module, num_positions: int) -> Encoder:
    """The parts of a model and its tables for that many tokens. Raises `UserError` for a kind it does not know."""
    kinds = {EsmModel: _esm, EsmcModel: _esmc, T5EncoderModel: _t5, BertModel: _bert}
    for kind, describe_kind in kinds.items():
        if isinstance(model, kind) and not getattr(model.config, "is_decoder", False):
            encoder = describe_kind(model, num_positions)
            if encoder.activation not in ACTIVATIONS:
                raise UserError(f"ONNX graphs have {', '.join(ACTIVATIONS)}, but the model {encoder.activation!r}.")
            if encoder.positions_MD is not None and len(encoder.positions_MD) < num_positions:
                raise UserError(
                    f"The model has {len(encoder.positions_MD)} positions, but {num_positions} are asked for."
                )
            return encoder
    names = ", ".join(kind.__name__ for kind in kinds)
    raise UserError(f"ONNX graphs are made of {names}, not of {type(model).__name__}, which torch alone can run.")


def _esm(model: EsmModel, num_positions: int) -> Encoder:
    config, embeddings = model.config, model.embeddings
    embedding_VD = embeddings.word_embeddings.weight
    is_rotary = config.position_embedding_type == "rotary"
    return Encoder(
        # No protein to be embedded has <mask> in it, so that token dropout multiplies all of them by the same.
        embedding_VD * TOKEN_DROPOUT_GAIN if embeddings.token_dropout else embedding_VD,
        [Layer.of(layer, _ESM) for layer in model.encoder.layer],
        num_heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation="gelu",  # whatever the configuration says (transformers, EsmIntermediate)
        final_norm=model.encoder.emb_layer_norm_after,
        embedding_norm=embeddings.layer_norm,
        # The first position follows the padding's id (transformers, create_position_ids_from_input_ids).
        positions_MD=None
        if is_rotary
        else embeddings.position_embeddings.weight[config.pad_token_id + 1 :][:num_positions],
        cos_sin=_angles(model.rotary_embeddings, num_positions) if is_rotary else None,
    )


def _esmc(model: EsmcModel, num_positions: int) -> Encoder:
    return Encoder(
        model.embed_tokens.weight,
        [Layer.of(layer, _ESMC) for layer in model.layers],
        num_heads=model.config.num_attention_heads,
        scale=model.layers[0].self_attn.scaling,
        activation=model.config.hidden_act,
        final_norm=model.norm,
        cos_sin=_angles(model.rotary_emb, num_positions),
        divisor=model.layers[0].scaling_factor,
    )


def _t5(model: T5EncoderModel, num_positions: int) -> Encoder:
    config, stack = model.config, model.encoder
    return Encoder(
        stack.embed_tokens.weight,
        [Layer.of(block, _T5_GATED if config.is_gated_act else _T5_RELU) for block in stack.block],
        num_heads=config.num_heads,
        scale=1.0,
        activation=config.dense_act_fn,
        final_norm=stack.final_layer_norm,
        bias_HNSS=_bias_squares(stack.block[0].layer[0].SelfAttention),
    )


def _bias_squares(first: Any) -> torch.Tensor:
    """(H, N, SQUARE, SQUARE) of the first layer, whose bias is that of all: by query and key, for squares on the
    diagonal of all scores (the middle of N), and next to it to both sides, until the bias is the same everywhere.
    """
    farthest = math.ceil((first.relative_attention_max_distance + SQUARE - 1) / SQUARE)
    places_S, squares_N = torch.arange(SQUARE), torch.arange(-farthest, farthest + 1)
    buckets_NSS = first._relative_position_bucket(
        SQUARE * squares_N[:, None, None] + places_S - places_S[:, None],
        bidirectional=True,
        num_buckets=first.relative_attention_num_buckets,
        max_distance=first.relative_attention_max_distance,
    )
    return first.relative_attention_bias(buckets_NSS).permute(3, 0, 1, 2)


def _bert(model: BertModel, num_positions: int) -> Encoder:
    config, embeddings = model.config, model.embeddings
    return Encoder(
        embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight[0],
        [Layer.of(layer, _BERT) for layer in model.encoder.layer],
        num_heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=config.hidden_act,
        final_norm=None,
        embedding_norm=embeddings.LayerNorm,
        positions_MD=embeddings.position_embeddings.weight[:num_positions],
        is_pre_norm=False,
    )


def _angles(rotary: nn.Module, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model's own module, which gives each angle twice, once for either half of a head."""
    cos_1MK, sin_1MK = rotary(torch.empty(0), torch.arange(num_positions)[None])
    return cos_1MK[0].chunk(2, dim=-1)[0], sin_1MK[0].chunk(2, dim=-1)[0]
