"""Attention over packed sequences: each attends to itself only, and no slot is spent on padding.

Two routes compute the same thing. Where the device and the precision allow it (asked by trying, not guessed), torch's
own variable-length kernel takes the whole micro-batch in one launch: fp16 or bf16 on Ampere and newer. Everywhere else
scaled-dot-product attention takes one sequence after the other.

Dimensions: T tokens of a packed micro-batch, P of them that are asked for, H heads, K width of a head, B sequences.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

VARLEN_ROUTE = "variable-length kernel (torch.nn.attention.varlen)"
SDPA_ROUTE = "SDPA, sequence by sequence"


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a micro-batch lie, and the rotary tables of their positions.

    The kernel reads `cu_seqlens` on the device; for the route by sequence they are needed on the CPU too. Compiled
    layers run as one graph each, for which every micro-batch must have the same T and `max_seqlen`.
    """

    cu_seqlens: torch.Tensor  # (B+1,) int32
    cu_seqlens_cpu: torch.Tensor | None  # None where the kernel runs
    max_seqlen: int
    cos_THK: torch.Tensor  # fp32; H is 1 or the number of heads
    sin_THK: torch.Tensor  # with a minus in the first half of each head
    is_compiled: bool = False


def attention_route(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The route that attention takes there, `VARLEN_ROUTE` or `SDPA_ROUTE`; tried once, then remembered."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _varlen_works(device, dtype, head_dim):
        return VARLEN_ROUTE
    return SDPA_ROUTE


@functools.cache
def _varlen_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel runs forward and backward on this device and agrees with SDPA, on two short sequences."""
    try:
        # Also where it is first asked by somebody who only wants vectors: the answer is kept for training.
        with torch.inference_mode(False), torch.enable_grad():
            generator = torch.Generator().manual_seed(0)
            query_THK, key_THK, value_THK = (
                torch.randn(24, 2, head_dim, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)
            )
            cu_seqlens = torch.tensor([0, 16, 24], dtype=torch.int32, device=device)
            out_THK = varlen_attention(query_THK, key_THK, value_THK, cu_seqlens, 16, 0.125)
            out_THK.float().sum().backward()
            exact_THK = attention_by_sequence(query_THK, key_THK, value_THK, cu_seqlens.cpu(), 0.125)
        return query_THK.grad is not None and torch.allclose(out_THK.float(), exact_THK.float(), atol=0.05)
    except (ImportError, AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError):
        # An older torch, an older GPU, or a head width that the kernel does not take: the exact route serves.
        return False


def varlen_attention(
    query_THK: torch.Tensor,
    key_THK: torch.Tensor,
    value_THK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """(T, H, K): each sequence's attention over itself, all of them in one launch."""
    # Imported here because torch before 2.10 does not have it.
    from torch.nn.attention.varlen import varlen_attn

    out_THK = varlen_attn(query_THK, key_THK, value_THK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)
    assert isinstance(out_THK, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return out_THK


# A graph of it would hold for one combination of lengths alone.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_by_sequence(
    query_THK: torch.Tensor, key_THK: torch.Tensor, value_THK: torch.Tensor, cu_seqlens_cpu: torch.Tensor, scale: float
) -> torch.Tensor:
    """(T, H, K): each sequence's attention over itself, one sequence after the other.

    Batching sequences of equal length was no faster (8m shapes, 26 sequences in 8,159 tokens, one core: 98 + 202 ms
    forward and backward per layer batched, 96 + 213 ms one by one; medians of 6).
    """
    lengths = cu_seqlens_cpu.diff().tolist()
    # One split has one concatenation as its backward; slices would each write a gradient of the whole micro-batch.
    pieces = zip(*(x_THK.split(lengths) for x_THK in (query_THK, key_THK, value_THK)), strict=True)
    attended = []
    # Autocast, left on, would cast what comes in fp32.
    with torch.autocast(value_THK.device.type, enabled=False):
        for piece in pieces:
            query_1HLK, key_1HLK, value_1HLK = (x_LHK.transpose(0, 1)[None] for x_LHK in piece)
            out_1HLK = scaled_dot_product_attention(query_1HLK, key_1HLK, value_1HLK, scale=scale)
            attended.append(out_1HLK[0].transpose(0, 1))
    return torch.cat(attended)


def attention_at(
    query_PHK: torch.Tensor,
    key_THK: torch.Tensor,
    value_THK: torch.Tensor,
    packing: Packing,
    counts_B: list[int],
    scale: float,
) -> torch.Tensor:
    """(P, H, K): attention of some tokens of each sequence, `counts_B` of them, over all of it; no gradients."""
    if packing.cu_seqlens_cpu is None:
        from torch.nn.attention.varlen import varlen_attn

        counts = torch.tensor([0, *counts_B], device=query_PHK.device).cumsum(0, dtype=torch.int32)
        bounds = (counts, packing.cu_seqlens, max(counts_B), packing.max_seqlen)
        out_PHK = varlen_attn(query_PHK, key_THK, value_THK, *bounds, scale=scale)
        assert isinstance(out_PHK, torch.Tensor)
        return out_PHK
    lengths = packing.cu_seqlens_cpu.diff().tolist()
    pieces = zip(query_PHK.split(counts_B), key_THK.split(lengths), value_THK.split(lengths), strict=True)
    attended = []
    with torch.autocast(value_THK.device.type, enabled=False):
        for piece in pieces:
            query_1HLK, key_1HLK, value_1HLK = (x_LHK.transpose(0, 1)[None] for x_LHK in piece)
            out_1HLK = scaled_dot_product_attention(query_1HLK, key_1HLK, value_1HLK, scale=scale)
            attended.append(out_1HLK[0].transpose(0, 1))
    return torch.cat(attended)
