"""The layers of a stock ESM over packed sequences: the same parameters and the same numbers in fewer passes.

transformers' layer writes its GELU as five passes over the widest tensor of the model and its rotation as ten. Here
GELU is torch's own, which makes a training step on a CPU at least 5 to 10% faster, and the rotation has its backward
pass written out. On GPUs the layer is compiled on top of that, as one graph. docs/benchmarks has what else was tried.

The layers stay transformers' own objects with a `forward` put before theirs: what shards them, recomputes them or looks
for them by name (FSDP2, activation checkpointing, DeepSpeed) sees an `EsmLayer`. A call without a packing goes on to
the stock forward, and nothing of this is written to any file.

Dimensions: T tokens of a packed micro-batch, P of them that are asked for, B sequences, D width, H heads, K width of a
head.
"""

import functools
from collections.abc import Callable
from subprocess import SubprocessError
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import EsmConfig
from transformers.models.esm import modeling_esm

from hf_plm.models.attention import (
    VARLEN_ROUTE,
    Packing,
    attention_at,
    attention_by_sequence,
    attention_route,
    varlen_attention,
)


class EsmLayer(modeling_esm.EsmLayer):
    """transformers' layer, which takes packed sequences too. Engines find the layers to shard by this name."""

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, packing: Packing | None = None, **options: Any
    ) -> torch.Tensor:
        """(T, D) from (T, D) with a `packing`; without one what transformers does, which chose the signature."""
        if packing is None:
            return super().forward(hidden_states, *arguments, **options)
        run = packed_layer
        if packing.is_compiled:
            run = compiled_layer()
            # The number of sequences is the one size that differs from micro-batch to micro-batch.
            torch._dynamo.maybe_mark_dynamic(packing.cu_seqlens, 0)
            if packing.cu_seqlens_cpu is not None:
                torch._dynamo.maybe_mark_dynamic(packing.cu_seqlens_cpu, 0)
        bounds = (packing.cu_seqlens, packing.cu_seqlens_cpu, packing.max_seqlen)
        return run(self, hidden_states, packing.cos_THK, packing.sin_THK, *bounds)


def use_packed_layers(model: nn.Module) -> None:
    """Let the layers of a stock model take a `packing`.

    The switch stays on: activation checkpointing runs the layers again in the backward pass, after any context manager
    around the forward has ended.
    """
    for module in model.modules():
        if type(module) is modeling_esm.EsmLayer:
            module.__class__ = EsmLayer


@functools.cache
def compiled_layer(backend: Any = "inductor") -> Callable[..., torch.Tensor]:
    """`packed_layer`, compiled once for all layers of a model, since they differ in their weights alone.

    Sizes are constants of the graph, but for those marked: left to itself, torch would make every size variable once it
    has seen two, a trial's and the run's, or the training's and another model's.
    """
    return torch.compile(packed_layer, backend=backend, dynamic=False)


def compile_obstacle(device: torch.device) -> str:
    """Why the layers cannot be compiled for this device here; empty where they can. Tried on a small one."""
    # A layer is a graph already, so that DDP needs none of it cut to send gradients while others are computed.
    torch._dynamo.config.optimize_ddp = False
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            config = EsmConfig(hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=33)
            layer, hidden_TD = EsmLayer(config), torch.ones(64, 64, requires_grad=True)
            cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32)
            tables = (torch.ones(64, 1, 32), torch.zeros(64, 1, 32))
        with torch.autocast(device.type, torch.bfloat16):
            has_kernel = attention_route(device, torch.bfloat16, 32) == VARLEN_ROUTE
            packing = Packing(cu_seqlens, None if has_kernel else cu_seqlens.cpu(), 40, *tables, is_compiled=True)
            layer(hidden_TD, packing=packing).sum().backward()
    except (RuntimeError, ImportError, OSError, SubprocessError) as error:  # no compiler, no Triton, an older GPU
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return ""


def packed_layer(
    layer: modeling_esm.EsmLayer,
    hidden_TD: torch.Tensor,
    cos_THK: torch.Tensor,
    sin_THK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor | None,
    max_seqlen: int,
) -> torch.Tensor:
    """(T, D): one layer. Attention goes sequence by sequence where `cu_seqlens_cpu` is given, else by the kernel."""
    attention = layer.attention
    heads = attention.self
    normed_TD = attention.LayerNorm(hidden_TD)
    query_THK, key_THK, value_THK = (
        project(normed_TD).unflatten(-1, (-1, heads.attention_head_size))
        for project in (heads.query, heads.key, heads.value)
    )
    # ESM scales the query and then rotates it; a rotation keeps the factor, so the kernel may apply it.
    scale = heads.attention_head_size**-0.5
    # The rotation leaves fp32. On a CPU attention stays in it under autocast, because its backward pass takes 3.9 ms in
    # fp32 and 7.5 ms in bf16 (330 residues, 20 heads of 16, two cores).
    dtype = torch.float32 if hidden_TD.device.type == "cpu" else value_THK.dtype
    query_THK, key_THK = (Rotate.apply(x_THK, cos_THK, sin_THK).to(dtype) for x_THK in (query_THK, key_THK))
    if cu_seqlens_cpu is None:
        attended_THK = varlen_attention(query_THK, key_THK, value_THK, cu_seqlens, max_seqlen, scale)
    else:
        attended_THK = attention_by_sequence(query_THK, key_THK, value_THK.to(dtype), cu_seqlens_cpu, scale)
    hidden_TD = attention.output(attended_THK.flatten(1).to(value_THK.dtype), hidden_TD)
    raised_TF = gelu(layer.intermediate.dense(layer.LayerNorm(hidden_TD)))
    return layer.output(raised_TF, hidden_TD)


def packed_layer_at(
    layer: modeling_esm.EsmLayer, hidden_TD: torch.Tensor, packing: Packing, rows_P: torch.Tensor, counts_B: list[int]
) -> torch.Tensor:
    """(P, D): what `packed_layer` gives at the tokens `rows_P`, `counts_B` of each sequence, ascending.

    The last layer of a model of which few positions are asked costs a fifth so: keys and values of all, and no more.
    """
    attention = layer.attention
    heads = attention.self
    normed_TD = attention.LayerNorm(hidden_TD)
    key_THK, value_THK = (
        project(normed_TD).unflatten(-1, (-1, heads.attention_head_size)) for project in (heads.key, heads.value)
    )
    query_PHK = heads.query(normed_TD[rows_P]).unflatten(-1, (-1, heads.attention_head_size))
    dtype = torch.float32 if hidden_TD.device.type == "cpu" else value_THK.dtype
    query_PHK = Rotate.apply(query_PHK, packing.cos_THK[rows_P], packing.sin_THK[rows_P]).to(dtype)
    key_THK = Rotate.apply(key_THK, packing.cos_THK, packing.sin_THK).to(dtype)
    scale = heads.attention_head_size**-0.5
    attended_PHK = attention_at(query_PHK, key_THK, value_THK.to(dtype), packing, counts_B, scale)
    hidden_PD = attention.output(attended_PHK.flatten(1).to(value_THK.dtype), hidden_TD[rows_P])
    return layer.output(gelu(layer.intermediate.dense(layer.LayerNorm(hidden_PD))), hidden_PD)


class Rotate(torch.autograd.Function):
    """Rotary positions: (T, H, K) turned by the angles of the tables, in fp32 whatever comes in.

    A number and its partner in the other half of the head turn together, by angles that the two halves share. The
    backward pass turns back; autograd by itself would keep intermediate tensors for it.
    """

    @staticmethod
    def forward(ctx: Any, x_THK: torch.Tensor, cos_THK: torch.Tensor, sin_THK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_THK, sin_THK)
        ctx.dtype = x_THK.dtype
        return (x_THK * cos_THK).addcmul_(x_THK.roll(x_THK.shape[-1] // 2, -1), sin_THK)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos_THK, sin_THK = ctx.saved_tensors
        (gradient_THK,) = gradients
        partner_THK = gradient_THK.roll(gradient_THK.shape[-1] // 2, -1)
        return (gradient_THK * cos_THK).addcmul_(partner_THK, sin_THK, value=-1).to(ctx.dtype), None, None
