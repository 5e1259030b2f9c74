"""Attention over packed sequences: each attends to itself only, and no slot is spent on padding.

Two routes compute the same thing. Where the device and the precision allow it (asked by trying, not guessed), torch's
own variable-length kernel takes the whole micro-batch in one launch: fp16 or bf16 on Ampere and newer. Everywhere else
scaled-dot-product attention takes one sequence after the other. Both hang under one name in transformers' attention
registry, so the model stays transformers' own; for a call that is not packed that name is SDPA, with SDPA's masks.

Dimensions: T tokens of a packed micro-batch, H heads, K width of a head, B sequences.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# transformers looks for "flash", "sdpa" and "flex" inside the name and would treat a name with one of them as its own.
IMPLEMENTATION = "hf_plm_packed"

VARLEN_ROUTE = "variable-length kernel (torch.nn.attention.varlen)"
SDPA_ROUTE = "SDPA, sequence by sequence"


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a micro-batch lie. `lengths` is None where the kernel reads `cu_seqlens` on the device."""

    cu_seqlens: torch.Tensor  # (B+1,) int32
    max_seqlen: int
    lengths: tuple[int, ...] | None


def attention_route(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The route that attention takes there, `VARLEN_ROUTE` or `SDPA_ROUTE`; tried once, then remembered."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _varlen_works(device, dtype, head_dim):
        return VARLEN_ROUTE
    return SDPA_ROUTE


@functools.cache
def _varlen_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel runs forward and backward on this device and agrees with SDPA, on two short sequences."""
    try:
        generator = torch.Generator().manual_seed(0)
        query_THK, key_THK, value_THK = (
            torch.randn(24, 2, head_dim, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)
        )
        cu_seqlens = torch.tensor([0, 16, 24], dtype=torch.int32, device=device)
        with torch.enable_grad():
            out_THK = _varlen(query_THK, key_THK, value_THK, Packing(cu_seqlens, 16, None), 0.125)
            out_THK.float().sum().backward()
        query, key, value = (x_THK.transpose(0, 1)[None] for x_THK in (query_THK, key_THK, value_THK))
        exact_THK = _sdpa_per_sequence(query, key, value, (16, 8), 0.125)[0]
        return query_THK.grad is not None and torch.allclose(out_THK.float(), exact_THK.float(), atol=0.05)
    except (ImportError, AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError):
        # An older torch, an older GPU, or a head width that the kernel does not take: the exact route serves.
        return False


def _varlen(
    query_THK: torch.Tensor, key_THK: torch.Tensor, value_THK: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    # Imported here because torch before 2.10 does not have it.
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = packing.cu_seqlens, packing.max_seqlen
    out_THK = varlen_attn(query_THK, key_THK, value_THK, cu, cu, longest, longest, scale=scale)
    assert isinstance(out_THK, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return out_THK


def _sdpa_per_sequence(
    query_1HTK: torch.Tensor,
    key_1HTK: torch.Tensor,
    value_1HTK: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """(1, T, H, K): each sequence's attention over itself.

    Batching sequences of equal length was no faster (8m shapes, 26 sequences in 8,159 tokens, one core: 98 + 202 ms
    forward and backward per layer batched, 96 + 213 ms one by one; medians of 6).
    """
    # One split has one concatenation as its backward; slices would each write a gradient of the whole micro-batch.
    pieces = zip(*(x_1HTK.split(list(lengths), dim=2) for x_1HTK in (query_1HTK, key_1HTK, value_1HTK)), strict=True)
    return torch.cat([scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2) for q, k, v in pieces], dim=1)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function that transformers calls in each layer; it chose the signature, the open end of it included."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert scaling == 1.0  # ESM has scaled the query by now
    assert (attention_mask, len(query)) == (None, 1)
    if packing.lengths is None:
        query_THK, key_THK, value_THK = (x[0].transpose(0, 1) for x in (query, key, value))
        return _varlen(query_THK, key_THK, value_THK, packing, scaling)[None], None
    if query.device.type == "cpu":
        # On a CPU the backward pass is slower in bf16 than in fp32 (157 against 99 ms a layer, 8m, 4,216 tokens);
        # autocast, left on, would cast back.
        with torch.autocast("cpu", enabled=False):
            attended = _sdpa_per_sequence(query.float(), key.float(), value.float(), packing.lengths, scaling)
        return attended.to(query.dtype), None
    return _sdpa_per_sequence(query, key, value, packing.lengths, scaling), None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Lets the model's layers take a `packing`; calls without one go on as SDPA did. Not written to any saved file.

    The switch stays on: activation checkpointing runs the layers again in the backward pass, after any context manager
    around the forward has ended, and without it would attend across sequences there.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, packed_attention)
        # Without a mask function of the same name transformers drops the padding mask of an ordinary batch.
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)
