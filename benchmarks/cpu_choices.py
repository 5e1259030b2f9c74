"""What each choice of the CPU step is worth: one thing changed at a time, whole training steps in turn in one process.

    python benchmarks/cpu_choices.py --threads 2 --precision bf16

The 8m preset on real proteins, crop 512, micro-batches of 4,096 tokens. `chosen` is what a run does; every other row is
that with one thing done otherwise, as tokens/s over those of `chosen` in the same round (medians of the rounds).
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from gpu_train import Proteins, packed_batches
from outcome import Row, finish, table
from torch.nn.functional import scaled_dot_product_attention

from hf_plm.data.pack import MicroBatch, Packing
from hf_plm.models import layers
from hf_plm.models.attention import attention_by_sequence
from hf_plm.models.objective import PackedMaskedLM, Shape
from hf_plm.models.presets import build_model, esm_config

CROP, TOKENS = 512, 4096


def gelu_in_steps(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def layer_with_one_product(layer: Any, hidden_TD: torch.Tensor, *others: Any) -> torch.Tensor:
    """Query, key and value by one product with their joined weights."""
    heads = layer.attention.self
    parts = (heads.query, heads.key, heads.value)
    joined: list[torch.Tensor] = []

    def project(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(normed_TD: torch.Tensor) -> torch.Tensor:
            if number == 0:
                weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
                joined.extend(torch.nn.functional.linear(normed_TD, weight, bias).chunk(3, dim=-1))
            return joined[number]

        return call

    with ExitStack() as held:
        for number, part in enumerate(parts):
            held.enter_context(patch.object(part, "forward", project(number)))
        return chosen_layer(layer, hidden_TD, *others)


class RotateInSteps:
    """As transformers writes it, with autograd's own backward pass."""

    @staticmethod
    def apply(x_THK: torch.Tensor, cos_THK: torch.Tensor, sin_THK: torch.Tensor) -> torch.Tensor:
        x_THK, half = x_THK.float(), x_THK.shape[-1] // 2
        first_THK, second_THK = x_THK.chunk(2, dim=-1)
        turned_THK = torch.cat([-second_THK, first_THK], dim=-1)
        sin_T1K = torch.cat([-sin_THK[:, :1, :half], sin_THK[:, :1, half:]], dim=-1)
        return x_THK * cos_THK[:, :1] + turned_THK * sin_T1K


def attention_in_bf16(*arguments: Any) -> torch.Tensor:
    query_THK, key_THK, value_THK, cu_seqlens, scale = arguments
    half = (x_THK.bfloat16() for x_THK in (query_THK, key_THK, value_THK))
    return attention_by_sequence(*half, cu_seqlens, scale).float()


def attention_padded(*arguments: Any) -> torch.Tensor:
    """All sequences of the micro-batch as one padded batch."""
    query_THK, key_THK, value_THK, cu_seqlens, scale = arguments
    lengths = cu_seqlens.diff()
    query_BHLK, key_BHLK, value_BHLK = (
        torch.nn.utils.rnn.pad_sequence(x_THK.split(lengths.tolist()), batch_first=True).transpose(1, 2)
        for x_THK in (query_THK, key_THK, value_THK)
    )
    mask_B11L = (torch.arange(int(lengths.max())) < lengths[:, None])[:, None, None]
    with torch.autocast("cpu", enabled=False):
        out_BHLK = scaled_dot_product_attention(query_BHLK, key_BHLK, value_BHLK, attn_mask=mask_B11L, scale=scale)
    return out_BHLK.transpose(1, 2)[mask_B11L[:, 0, 0]]


def attention_dense(*arguments: Any) -> torch.Tensor:
    """One long row, with a mask that keeps the sequences apart."""
    query_THK, key_THK, value_THK, cu_seqlens, scale = arguments
    sequence_T = torch.repeat_interleave(cu_seqlens.diff())
    mask_TT = sequence_T[:, None] == sequence_T
    query_1HTK, key_1HTK, value_1HTK = (x.transpose(0, 1)[None] for x in (query_THK, key_THK, value_THK))
    with torch.autocast("cpu", enabled=False):
        out_1HTK = scaled_dot_product_attention(query_1HTK, key_1HTK, value_1HTK, attn_mask=mask_TT, scale=scale)
    return out_1HTK[0].transpose(0, 1)


chosen_layer = layers.packed_layer
CHOICES: dict[str, dict[str, Any]] = {
    "chosen": {},
    "GELU in steps, as in transformers": {"gelu": gelu_in_steps},
    "query, key, value by one product": {"packed_layer": layer_with_one_product},
    "rotation in steps, by autograd": {"Rotate": RotateInSteps},
    "attention in bf16": {"attention_by_sequence": attention_in_bf16},
    "attention as one padded batch": {"attention_by_sequence": attention_padded},
    "attention with a dense mask": {"attention_by_sequence": attention_dense},
    "AdamW in steps (foreach)": {"foreach": True},
    "compiled": {"compiled": True},
}


def contestant(name: str, precision: str) -> Callable[[MicroBatch], None]:
    """A function that takes one step."""
    changed = dict(CHOICES[name])
    is_foreach, is_compiled = changed.pop("foreach", False), changed.pop("compiled", False)
    model = build_model(esm_config("8m"), 0)
    module = PackedMaskedLM(model, Shape(TOKENS, CROP) if is_compiled else None).train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kind = {"foreach": True} if is_foreach else {"fused": True}
    optimizer = torch.optim.AdamW(parameters, 1e-4, betas=(0.9, 0.98), **kind)

    def step(batch: MicroBatch) -> None:
        with ExitStack() as held:
            for attribute, value in changed.items():
                held.enter_context(patch.object(layers, attribute, value))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = module(*batch.inputs())[0] / batch.num_targets
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=list(CHOICES), choices=CHOICES, metavar="CHOICE")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = packed_batches(Proteins(4000), Packing(CROP, TOKENS, 1, 0), 2 * arguments.rounds)
    names = list(dict.fromkeys(["chosen", *arguments.only]))
    steps = {name: contestant(name, arguments.precision) for name in names}
    first: dict[str, float] = {}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    turns = cycle(batches)
    for count in range(arguments.rounds + 2):
        batch = next(turns)
        for name, step in steps.items():
            began = time.perf_counter()
            step(batch)
            seconds = time.perf_counter() - began
            if count == 0:
                first[name] = seconds
            elif count > 1:
                speeds[name].append(len(batch.input_ids) / seconds)
    rows: list[Row] = []
    lines = []
    for name, values in speeds.items():
        ratio = median(one / chosen for one, chosen in zip(values, speeds["chosen"], strict=True))
        label = name.replace(",", "").replace(" ", "_")
        rows.append((f"choices.{arguments.precision}.{arguments.threads}_threads.{label}", ratio, "of chosen"))
        lines.append([name, f"{median(values):,.0f}", f"{ratio:.3f}", f"{first[name]:.1f}"])
    heading = ["one thing otherwise", "tokens/s", "of chosen", "first step, s"]
    title = f"8m, crop {CROP}, {TOKENS} tokens, {arguments.precision}, {arguments.threads} threads"
    finish(f"{title}\n\n{table(heading, lines)}", rows, arguments.out, speeds=speeds, first=first)


if __name__ == "__main__":
    main()
