"""Training on a GPU: real tokens/s and MFU of each preset, packed against padded, compiled and not.

    python benchmarks/gpu_train.py --out gpu_train.json

One process a preset, and in it four contestants that share weights and optimizer and take turns of a few whole steps
(forward, backward, clipping, fused AdamW; bf16 autocast over fp32 weights): hf_plm's module, compiled or not, and the
stock `EsmForMaskedLM` on rows padded to the crop, compiled or not. Sequences are real proteins (HF_PLM_DATA,
default `../shared/data`), or random letters of a natural length distribution where these are absent, the same for all.
tokens/s count real tokens; the operations behind MFU are those of `training_flops`, over the GPU's dense bf16 rate as
its maker gives it. Last, real runs of `hf-plm pretrain` with four workers, data and logging included.

Without a GPU every row reads `not measured`; what proves the script there:

    python benchmarks/gpu_train.py --device cpu --presets 2x64x4 --tokens 512 --crop 128 --steps 2 --runs demo
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from outcome import Row, finish, table

from hf_plm.config import Mask
from hf_plm.data.order import Cursor
from hf_plm.data.pack import MicroBatch, Packing, build_micro_batch, plan_step
from hf_plm.models.objective import PackedMaskedLM, Shape
from hf_plm.models.presets import build_model, esm_config, training_flops
from hf_plm.proteins.fasta import read_fasta
from hf_plm.proteins.vocabulary import IGNORED_LABEL, PAD_ID, STANDARD_RESIDUES

TOKENS = {"8m": 131_072, "35m": 65_536, "150m": 32_768, "650m": 16_384, "3b": 8_192}
"""Of a micro-batch: enough to fill the device, and little enough for the contestant that takes most memory."""
FLOORS = {"8m": 2_000_000, "35m": 1_000_000, "150m": 350_000, "650m": 110_000}
"""Tokens/s that the compiled module should reach on one H200."""
CONTESTANTS = ("packed.compiled", "padded.compiled", "packed.eager", "padded.eager")
# Dense bf16 rates in FLOP/s, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
NUM_BATCHES, WARM_UP = 12, 20


class Proteins:
    """Sequences in memory, read as a corpus is."""

    def __init__(self, num_sequences: int) -> None:
        fasta = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "corpus" / "train.fasta.gz"
        self.are_real = fasta.exists()
        if self.are_real:
            records = [record.sequence for _, record in zip(range(num_sequences), read_fasta(fasta), strict=False)]
            self.sequences = [np.frombuffer(record.encode(), dtype=np.uint8) for record in records]
        else:  # lengths: a log-normal fit to natural proteins
            generator = np.random.default_rng(0)
            letters = np.frombuffer(STANDARD_RESIDUES.encode(), dtype=np.uint8)
            lengths = generator.lognormal(5.678, 0.762, num_sequences).clip(30, 16_000).astype(int)
            self.sequences = [generator.choice(letters, length) for length in lengths]
        self.lengths = np.array([len(sequence) for sequence in self.sequences], dtype=np.int32)

    def read(self, indices: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spans = zip(indices, begins, ends, strict=True)
        pieces = [self.sequences[index][begin:end] for index, begin, end in spans]
        return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])


def packed_batches(proteins: Any, packing: Packing, count: int) -> list[MicroBatch]:
    batches, cursor = [], Cursor()
    for step in range(count):
        plan = plan_step(proteins.lengths, packing, step, cursor)
        cursor = plan.next_cursor
        batches.append(build_micro_batch(proteins, plan, 0, packing.seed, Mask()))
    return batches


def padded_batch(batch: MicroBatch, crop: int, num_rows: int) -> dict[str, torch.Tensor]:
    """The first rows of a packed micro-batch, padded to the crop."""
    rows = [slice(begin, end) for begin, end in pairwise(batch.cu_seqlens.tolist())][:num_rows]
    padded = {
        "input_ids": torch.full((num_rows, crop), PAD_ID),
        "labels": torch.full((num_rows, crop), IGNORED_LABEL),
    }
    for number, row in enumerate(rows):
        padded["input_ids"][number, : row.stop - row.start] = batch.input_ids[row]
        padded["labels"][number, : row.stop - row.start] = batch.labels[row]
    return {**padded, "attention_mask": (padded["input_ids"] != PAD_ID).long()}


class Contestant:
    """A way to take the steps of one model."""

    def __init__(self, call: Callable[[Any], torch.Tensor], batches: list[Any], tokens: list[int], flops: list[int]):
        self.call, self.batches, self.tokens, self.flops = call, batches, tokens, flops
        self.warm_up(True)

    def warm_up(self, is_first: bool) -> None:
        """The first half of the batches is for warming up alone: what is counted has shapes not seen before."""
        half = len(self.batches) // 2
        self.places = cycle(range(half) if is_first else range(half, len(self.batches)))

    def turn(
        self, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, device: torch.device
    ) -> tuple[float, float]:
        """Tokens/s and FLOP/s over so many steps."""
        synchronize(device)
        num_tokens = num_flops = 0
        began = time.perf_counter()
        for place in (next(self.places) for _ in range(steps)):
            with torch.autocast(device.type, torch.bfloat16):
                loss = self.call(self.batches[place])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            num_tokens += self.tokens[place]
            num_flops += self.flops[place]
        synchronize(device)
        seconds = time.perf_counter() - began
        return num_tokens / seconds, num_flops / seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compete(preset: str, tokens: int, crop: int, rounds: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Speeds, MFU, memory and recompilations of every contestant for one preset."""
    proteins = Proteins(20_000)
    config = esm_config(preset)
    model = build_model(config, 0).to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.98), fused=device.type == "cuda")
    packed = packed_batches(proteins, Packing(crop, tokens, 1, 0), NUM_BATCHES)
    padded = [padded_batch(batch, crop, tokens // crop) for batch in packed]

    def flops_of(lengths: torch.Tensor, num_targets: int) -> int:
        return training_flops(config, int(lengths.sum()), num_targets, int(lengths.long().square().sum()))

    def packed_call(module: PackedMaskedLM) -> Callable[[Any], torch.Tensor]:
        def call(batch: MicroBatch) -> torch.Tensor:
            return module(*batch.inputs())[0]

        return call

    def padded_call(stock: Callable[..., Any]) -> Callable[[Any], torch.Tensor]:
        return lambda batch: stock(**batch).loss

    packed_counts = [len(batch.input_ids) for batch in packed]
    packed_flops = [flops_of(batch.cu_seqlens.diff(), batch.num_targets) for batch in packed]
    lengths = [batch["attention_mask"].sum(1) for batch in padded]
    padded_counts = [int(each.sum()) for each in lengths]
    padded_flops = [
        flops_of(each, int((batch["labels"] >= 0).sum())) for each, batch in zip(lengths, padded, strict=True)
    ]
    packed = [batch.to(device) for batch in packed]
    padded = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in padded]
    calls = {
        "packed.compiled": lambda: packed_call(PackedMaskedLM(model, Shape(tokens, crop))),
        "packed.eager": lambda: packed_call(PackedMaskedLM(model)),
        "padded.compiled": lambda: padded_call(torch.compile(model)),
        "padded.eager": lambda: padded_call(model),
    }
    found: dict[str, Any] = {"real proteins": proteins.are_real}
    contestants: dict[str, Contestant] = {}
    for name in CONTESTANTS:
        is_packed = name.startswith("packed")
        each = Contestant(
            calls[name](),
            packed if is_packed else padded,
            packed_counts if is_packed else padded_counts,
            packed_flops if is_packed else padded_flops,
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            each.turn(parameters, optimizer, 1, device)
            first = time.perf_counter() - began
            each.turn(parameters, optimizer, min(WARM_UP, 4 * steps), device)
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            print(f"{preset} {name}: out of memory", file=sys.stderr, flush=True)
            continue
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        found[name] = {"first_step_seconds": first, "peak_bytes": peak, "tokens_per_second": [], "flops": []}
        contestants[name] = each
    found["recompilations"] = 0
    for each in contestants.values():
        each.warm_up(False)
    for _ in range(rounds):
        for name, each in contestants.items():
            before = graphs()
            speed, flops = each.turn(parameters, optimizer, steps, device)
            if name == "packed.compiled":
                found["recompilations"] += graphs() - before
            found[name]["tokens_per_second"].append(speed)
            found[name]["flops"].append(flops)
    return found


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product: what the machine gives to anybody."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        synchronize(device)
        began = time.perf_counter()
        torch.matmul(left, right)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / median(seconds)


def real_run(preset: str, tokens: int, crop: int, seconds: int) -> float | None:
    """Tokens/s of `hf-plm pretrain`: the median of its lines of metrics, without the first half; None if it failed."""
    fasta = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "corpus" / "train.fasta.gz"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not fasta.exists():
            fasta = folder / "simulated.fasta.gz"
            subprocess.run([sys.executable, "-m", "hf_plm.cli", "simulate", str(fasta)], check=True)
        knobs = {
            "model.preset": preset,
            "data.train": fasta,
            "data.crop": crop,
            "data.cache": folder,
            "batch.tokens": tokens,
            "batch.micro_batches": 4,
            "schedule.budget": f"{seconds}s",
            "validation.every": 100_000,
            "validation.final_sequences": 20,
            "checkpoint.every": 100_000,
            "run.trackers": "none",
            "run.log_every": 5,
            "run.folder": folder / "run",
        }
        flags = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "hf_plm.cli", "pretrain", "demo", *flags]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            return None
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return median(speeds[len(speeds) // 2 :])


def rows_of(preset: str, found: dict[str, Any] | None, peak: float | None) -> Iterator[Row]:
    for name in CONTESTANTS:
        of_contestant = (found or {}).get(name)
        speeds = of_contestant["tokens_per_second"] if of_contestant else []
        yield f"gpu.{preset}.{name}", median(speeds) if speeds else None, "tokens/s"
        mfu = 100 * median(of_contestant["flops"]) / peak if of_contestant and peak else None
        yield f"gpu.{preset}.{name}.mfu", mfu, "%"
        memory = of_contestant["peak_bytes"] / 2**30 if of_contestant and peak else None
        yield f"gpu.{preset}.{name}.peak_memory", memory, "GiB"
    both = [(found or {}).get(name) for name in ("packed.compiled", "padded.compiled")]
    ratio = None
    if all(both):
        pairs = zip(*(each["tokens_per_second"] for each in both if each), strict=True)
        ratio = median(ours / theirs for ours, theirs in pairs)
    yield f"gpu.{preset}.ratio.packed.over.padded.compiled", ratio, "x"
    over_floor = None
    if found and "packed.compiled" in found and preset in FLOORS:
        over_floor = median(found["packed.compiled"]["tokens_per_second"]) / FLOORS[preset]
    yield f"gpu.{preset}.over_floor", over_floor, "x"
    yield f"gpu.{preset}.recompilations", found["recompilations"] if found else None, "graphs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "none")
    parser.add_argument("--presets", nargs="+", default=list(TOKENS))
    parser.add_argument("--tokens", type=int, help="of a micro-batch (by preset)")
    parser.add_argument("--crop", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn (5)")
    parser.add_argument("--runs", nargs="*", help="presets of real runs (8m 650m on a GPU)")
    parser.add_argument("--run-seconds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.device == "none" else arguments.device)
    if arguments.child:
        tokens = arguments.tokens or TOKENS[arguments.child]
        sizes = (tokens, arguments.crop, arguments.rounds, arguments.steps)
        print(json.dumps(compete(arguments.child, *sizes, device)))
        return
    is_measured = arguments.device != "none"
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    rate = matrix_rate(device) if is_measured else None
    peak = next((value for key, value in PEAKS.items() if key in name), rate)
    rows: list[Row] = [("gpu.matrix_rate", rate / 1e12 if rate else None, "TFLOP/s")]
    lines: list[list[str]] = []
    everything: dict[str, Any] = {}
    for preset in arguments.presets:
        found: dict[str, Any] | None = None
        if is_measured:
            command = [sys.executable, __file__, "--child", preset, *sys.argv[1:], "--device", arguments.device]
            outcome = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if outcome.returncode == 0:
                found = everything[preset] = json.loads(outcome.stdout.splitlines()[-1])
            print(f"{preset}: {'done' if found else 'failed'}", file=sys.stderr, flush=True)
            if arguments.out:  # what is there stays, whatever fails later
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(everything, indent=1) + "\n")
        rows += rows_of(preset, found, peak)
        for contestant in CONTESTANTS:
            of_contestant = (found or {}).get(contestant)
            if of_contestant:
                speed, flops = median(of_contestant["tokens_per_second"]), median(of_contestant["flops"])
                share = f"{flops / peak:.1%}" if peak else ""
                memory = f"{of_contestant['peak_bytes'] / 2**30:.1f}"
                lines.append([preset, contestant, f"{speed:,.0f}", share, memory])
            else:
                lines.append([preset, contestant, "not measured", "", ""])
    runs = ["8m", "650m"] if arguments.device != "cpu" else []
    for preset in runs if arguments.runs is None else arguments.runs:
        tokens = arguments.tokens or TOKENS[preset]
        speed = real_run(preset, tokens, arguments.crop, arguments.run_seconds) if is_measured else None
        rows.append((f"gpu.{preset}.run", speed, "tokens/s"))
    text = table(["preset", "contestant", "tokens/s", "MFU", "peak GiB"], lines)
    finish(text, rows, arguments.out, found=everything, floors=FLOORS, peak=peak)


if __name__ == "__main__":
    main()
