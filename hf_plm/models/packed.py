"""The packed forward of a stock `EsmForMaskedLM`: sequences end to end, each as if it were alone.

Stock ESM cannot pack: its rows attend across sequences and its token-dropout gain is one per row. Here the embeddings
are computed outside (the gain is one per sequence), the rotary positions restart, and attention gets the boundaries.
To rounding, each sequence has the hidden states that the stock model gives it alone.

Dimensions: T tokens of a packed micro-batch, P of them that are asked for, B sequences, D width, V vocabulary.
"""

import torch
from torch.nn.functional import pad
from transformers import EsmForMaskedLM, EsmModel

from hf_plm.config import UserError
from hf_plm.models.attention import VARLEN_ROUTE, Packing, attention_route
from hf_plm.models.layers import packed_layer_at, use_packed_layers

# transformers' EsmEmbeddings and fair-esm's ESM2 scale by 1 - 0.15 * 0.8 whatever the recipe's rates: a constant gain.
TOKEN_DROPOUT_GAIN = 1 - 0.15 * 0.8


def sequence_index(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """int64 (T,): which sequence of the micro-batch each token belongs to."""
    positions_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions_T, right=True)


def compute_dtype(esm: EsmModel) -> torch.dtype:
    """The precision that attention will see: autocast's where it is on, else that of the weights."""
    weight = esm.embeddings.word_embeddings.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _embed(esm: EsmModel, input_ids_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(T, D): token embeddings with `<mask>` zeroed and the rest scaled by 0.88 / (1 - share of `<mask>`)."""
    embeddings = esm.embeddings
    embedded_TD = embeddings.word_embeddings(input_ids_T)
    if embeddings.token_dropout:
        is_mask_T = input_ids_T == embeddings.mask_token_id
        # Differences of a running count: exact, and without the atomic additions of a scatter.
        masks_before = pad(is_mask_T.cumsum(0), (1, 0))
        bounds = cu_seqlens.long()
        share_B = (masks_before[bounds[1:]] - masks_before[bounds[:-1]]).float() / bounds.diff()
        # A sequence of masks alone is zero everywhere; its gain would be infinite, and zero times that is NaN.
        gain_B = torch.where(share_B < 1, TOKEN_DROPOUT_GAIN / (1 - share_B), 0.0)
        gain_T = gain_B[sequence_index(cu_seqlens, len(input_ids_T))].masked_fill(is_mask_T, 0.0)
        embedded_TD = (embedded_TD * gain_T[:, None]).to(embedded_TD.dtype)
    if embeddings.layer_norm is not None:
        embedded_TD = embeddings.layer_norm(embedded_TD)
    return embedded_TD


def packed_hidden_states(
    model: EsmForMaskedLM | EsmModel,
    input_ids_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    output_hidden_states: bool = False,
    is_compiled: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Hidden states (T, D): of the last layer alone, or of the embeddings and every layer (`num_layers` + 1).

    `position_ids_T` restart at 0 in each sequence; `cu_seqlens` int32 (B+1,) runs from 0 to T; `max_seqlen` is the
    longest sequence. Raises `UserError` for a model with absolute positions or attention dropout. Tolerance against the
    stock model on each sequence alone: 1e-4 in fp32, at every layer.
    """
    hidden_TD, packing = _begin(model, input_ids_T, position_ids_T, cu_seqlens, max_seqlen, is_compiled)
    esm = model if isinstance(model, EsmModel) else model.esm
    hidden = [hidden_TD]
    for layer in esm.encoder.layer:
        hidden.append(layer(hidden[-1], packing=packing))
        if not output_hidden_states:
            del hidden[0]
    # As in transformers, what the last layer gives is what is left of it after the layer norm.
    hidden[-1] = esm.encoder.emb_layer_norm_after(hidden[-1])
    return tuple(hidden)


def packed_hidden_states_at(
    model: EsmForMaskedLM | EsmModel,
    input_ids_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    rows_P: torch.Tensor,
    counts_B: list[int],
) -> torch.Tensor:
    """(P, D): of the last layer, at the tokens `rows_P` alone, `counts_B` of each sequence, ascending; no gradients.

    The other arguments and errors as `packed_hidden_states`. The last layer does what these tokens need and no more.
    """
    hidden_TD, packing = _begin(model, input_ids_T, position_ids_T, cu_seqlens, max_seqlen, is_compiled=False)
    esm = model if isinstance(model, EsmModel) else model.esm
    for layer in esm.encoder.layer[:-1]:
        hidden_TD = layer(hidden_TD, packing=packing)
    hidden_PD = packed_layer_at(esm.encoder.layer[-1], hidden_TD, packing, rows_P, counts_B)
    return esm.encoder.emb_layer_norm_after(hidden_PD)


def _begin(
    model: EsmForMaskedLM | EsmModel,
    input_ids_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    is_compiled: bool,
) -> tuple[torch.Tensor, Packing]:
    """What the first layer is given: the embeddings (T, D), the boundaries and the rotary tables."""
    config = model.config
    if config.position_embedding_type != "rotary" or config.attention_probs_dropout_prob:
        raise UserError(
            "The packed forward takes models with rotary positions and no attention dropout (ESM-2), but this one has "
            f"{config.position_embedding_type!r} positions and attention dropout {config.attention_probs_dropout_prob}."
        )
    use_packed_layers(model)
    esm = model if isinstance(model, EsmModel) else model.esm
    hidden_TD = _embed(esm, input_ids_T, cu_seqlens)
    head_dim = config.hidden_size // config.num_attention_heads
    on_device = attention_route(input_ids_T.device, compute_dtype(esm), head_dim) == VARLEN_ROUTE
    cu_seqlens_cpu = None if on_device else cu_seqlens.cpu()
    # The first argument says which device and precision; each angle is there for both halves of a head.
    tables = esm.rotary_embeddings(hidden_TD.new_empty(0, dtype=torch.float32), position_ids_T[None])
    cos_THK, sin_THK = (table_1TK[0, :, None] for table_1TK in tables)
    sin_THK = torch.cat([-sin_THK[..., : head_dim // 2], sin_THK[..., head_dim // 2 :]], dim=-1)
    if hidden_TD.device.type == "cpu":
        # Written out for every head: heads are narrow, and a CPU is three times as fast along one long row.
        cos_THK, sin_THK = (
            table.expand(-1, config.num_attention_heads, -1).contiguous() for table in (cos_THK, sin_THK)
        )
    return hidden_TD, Packing(cu_seqlens, cu_seqlens_cpu, max_seqlen, cos_THK, sin_THK, is_compiled)


def packed_logits(
    model: EsmForMaskedLM,
    input_ids_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """Logits (T, V) at every position; arguments and errors as `packed_hidden_states`."""
    return model.lm_head(packed_hidden_states(model, input_ids_T, position_ids_T, cu_seqlens, max_seqlen)[-1])
