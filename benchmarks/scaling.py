"""What more processes cost: bytes on paper and as counted, and the speed of one and two processes on this machine.

    python benchmarks/scaling.py --paper                          # the tables of docs/scaling.md
    python benchmarks/scaling.py --out scaling.json --repeats 5   # what this machine can measure of them

The paper is a count of elements: what each engine gathers and reduces in a step as this package sets it up, in fp32,
each collective as a ring (all-reduce 2(W-1)/W of its size, all-gather and reduce-scatter (W-1)/W; doc/PERFORMANCE.md
of NVIDIA/nccl-tests). It is checked by running each engine on gloo, in bf16: the collectives of a step are recorded as
they are called, and what a process wrote to its sockets (`wchar` of /proc/self/io) is compared with them. gloo sends a
reduce-scatter as an all-reduce, which that comparison allows for.

Speed is that of real runs under `accelerate launch`, one thread per process: in turn one process, two, and two that
know nothing of each other, which shows what they share without communicating: memory and the processor's clock.
"""

import argparse
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from outcome import Row, finish, table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EsmForMaskedLM

import hf_plm
from hf_plm.cli import run_command
from hf_plm.cli.process import leave
from hf_plm.models.presets import esm_config
from hf_plm.training.meter import Meter

ROOT = Path(__file__).parents[1]
ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
SIZES = ("8m", "35m", "150m", "650m", "3b", "15b")
RECOMPUTED = ("3b", "15b")
"""Presets whose recipes recompute activations, a second forward pass."""
MICRO_BATCH, MICRO_BATCHES, CONTEXT = 8192, 256, 1024
"""Tokens of a micro-batch, micro-batches of a step, and the longest sequence of ESM-2's recipes."""
PEAK, USED = 989e12, 0.4
"""bf16 FLOP/s of an H200 without sparsity (NVIDIA H200 data sheet), and the share that training is assumed to reach."""
RATES = {"NVLink": 370e9, "NDR": 50e9, "HDR": 25e9, "25 GbE": 3.125e9}
"""Bytes/s in one direction; docs/scaling.md names the sources."""
LIVE, PERSISTENT = 1_000_000_000, 100_000
"""DeepSpeed 0.19.8 at stage 3: parameters that stay whole between their uses, and the largest that always do."""


@dataclass(frozen=True)
class Sizes:
    """Elements of a model: all, those of its transformer layers, and the trained ones; `each` parameter's."""

    all: int
    layers: int
    trained: int
    each: tuple[int, ...]
    num_layers: int
    width: int


@functools.cache
def sizes_of(preset: str) -> Sizes:
    config = esm_config(preset)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = EsmForMaskedLM(config)
    each = tuple(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.esm.encoder.layer.parameters())
    frozen = sum(parameter.numel() for parameter in model.esm.contact_head.parameters())
    return Sizes(sum(each), layers, sum(each) - frozen, each, config.num_hidden_layers, config.hidden_size)


def bytes_per_step(
    engine: str, sizes: Sizes, world_size: int, rounds: float, live: int = LIVE, persistent: int = PERSISTENT
) -> float:
    """Bytes that a process sends in a step of `rounds` micro-batches of its own; it receives as many."""
    trained, root = sizes.trained, sizes.all - sizes.layers
    small = sum(numel for numel in sizes.each if numel <= persistent)
    gathered_again = max(0.0, 1 - live / sizes.all)  # in backward
    elements = {
        "DDP": 2 * trained,
        "ZeRO-1": 3 * trained,
        "ZeRO-2": (2 * rounds + 1) * trained,
        "ZeRO-3": rounds * ((sizes.all - small) * (1 + gathered_again) + trained) + small,
        "FSDP2": rounds * (3 * sizes.layers + 2 * root),  # the root stays whole from forward to backward
    }[engine]
    return 4 * elements * (world_size - 1) / world_size


def flops_per_token(preset: str) -> float:
    """Forward and backward: 6 for each weight of the layers, 12 x layers x width x context for attention."""
    sizes = sizes_of(preset)
    flops = 6 * sizes.layers + 12 * sizes.num_layers * sizes.width * CONTEXT
    return flops * 4 / 3 if preset in RECOMPUTED else flops


def compute_seconds(preset: str, num_tokens: float) -> float:
    return flops_per_token(preset) * num_tokens / (PEAK * USED)


def rounds_of(world_size: int) -> float:
    """Micro-batches of a process in a step; with more processes than micro-batches, these are cut."""
    return max(1.0, MICRO_BATCHES / world_size)


def bound_at(engine: str, preset: str, rate: float, largest: int = 4096) -> str:
    """The smallest number of GPUs at which a step sends for longer than it computes."""
    sizes, seconds = sizes_of(preset), compute_seconds(preset, MICRO_BATCH * MICRO_BATCHES)
    for world_size in range(2, largest + 1):
        if bytes_per_step(engine, sizes, world_size, rounds_of(world_size)) / rate > seconds / world_size:
            return str(world_size)
    return f">{largest}"


def memory(engine: str, sizes: Sizes, world_size: int) -> float:
    """Bytes a GPU of weights, gradients and moments (accelerate_configs/README.md), and what ZeRO-3 keeps whole."""
    per_parameter = {
        "DDP": 16.0,
        "ZeRO-1": 8 + 12 / world_size,
        "ZeRO-2": 4 + 16 / world_size,
        "ZeRO-3": 20 / world_size,
        "FSDP2": 16 / world_size,
    }[engine]
    return per_parameter * sizes.all + (4 * min(sizes.all, LIVE) if engine == "ZeRO-3" else 0)


def figures(value: float) -> str:
    """Three figures, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def paper() -> dict[str, str]:
    """The tables of docs/scaling.md by the name that their markers have there."""
    sizes = {preset: sizes_of(preset) for preset in SIZES}
    step = MICRO_BATCH * MICRO_BATCHES
    presets = [
        (
            preset,
            f"{sizes[preset].all:,}",
            figures(4 * sizes[preset].all / 1e9),
            figures(flops_per_token(preset) / 1e9),
            figures(compute_seconds(preset, step)),
            figures(1000 * compute_seconds(preset, MICRO_BATCH)),
        )
        for preset in SIZES
    ]
    moved = [
        (
            preset,
            world_size,
            figures(rounds_of(world_size)),
            *(
                figures(bytes_per_step(name, sizes[preset], world_size, rounds_of(world_size)) / 1e9)
                for name in ENGINES
            ),
        )
        for preset in SIZES
        for world_size in (8, 64, 512)
    ]
    bound = [
        (preset, *(" / ".join(bound_at(engine, preset, rate) for rate in RATES.values()) for engine in ENGINES))
        for preset in SIZES
    ]
    buys = [(rounds, *(_share(engine, rounds) for engine in ENGINES)) for rounds in (1, 2, 4, 8, 16, 32)]
    held = [
        (preset, *(" / ".join(figures(memory(engine, sizes[preset], w) / 1e9) for w in (8, 64)) for engine in ENGINES))
        for preset in SIZES
    ]
    return {
        "presets": table(
            ("preset", "parameters", "fp32 GB", "GFLOP/token", "s/step, 1 GPU", "ms/micro-batch"), presets
        ),
        "moved": table(("preset", "W", "rounds", *ENGINES), moved),
        "bound": table(("preset", *ENGINES), bound),
        "accumulation": table(("rounds", *ENGINES), buys),
        "memory": table(("preset", *ENGINES), held),
    }


def _share(engine: str, rounds: int) -> str:
    """Seconds of sending at NDR's rate for each second of computing: 650m on 64 GPUs, whole micro-batches."""
    sent = bytes_per_step(engine, sizes_of("650m"), 64, rounds) / RATES["NDR"]
    return f"{sent / compute_seconds('650m', rounds * MICRO_BATCH):.2f}"


# What follows runs in the processes of a launch.


class Collectives(TorchDispatchMode):
    """Adds up the sizes in bytes of what is handed to torch's collectives, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            whole = args[1] if name.startswith("reduce_scatter") else args[0]  # what is scattered, or was gathered
            tensors = torch.utils._pytree.tree_leaves(whole)
            self.bytes[name] += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def written_bytes() -> int | None:
    """What this process has written, to sockets too; None where the system does not say."""
    try:
        return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])
    except OSError:
        return None


def count_in_this_process(engine: str, note: Path, scaled: float, training: list[str]) -> None:
    """A run whose collectives are counted; `note` gets the mean of its steps 4 to 6."""
    from hf_plm.training import engine as engines

    collectives = Collectives()
    snapshots: list[tuple[Counter[str], int | None]] = []
    count, configure = Meter.count, engines._configure_deepspeed

    def counted(meter: Meter, num_tokens: int) -> None:
        snapshots.append((collectives.bytes.copy(), written_bytes()))
        count(meter, num_tokens)

    def configure_scaled(plugin: Any, *others: Any) -> None:
        configure(plugin, *others)
        plugin.deepspeed_config["zero_optimization"].update(
            stage3_max_reuse_distance=int(scaled * LIVE),
            stage3_max_live_parameters=int(scaled * LIVE),
            stage3_prefetch_bucket_size=int(scaled * 50_000_000),
            stage3_param_persistence_threshold=int(scaled * PERSISTENT),
        )

    patches: list[Any] = [mock.patch.object(Meter, "count", counted)]
    if scaled != 1:
        patches.append(mock.patch.object(engines, "_configure_deepspeed", configure_scaled))
    for patch in patches:
        patch.start()
    with collectives:
        if engine == "FSDP2":
            sys.argv[1:] = training
            runpy.run_path(str(ROOT / "tests" / "support" / "fsdp2_run.py"), run_name="sharded")
        else:
            run_command(["pretrain", *training])
    if os.environ["RANK"] == "0":
        (before, written), (after, written_after) = snapshots[3], snapshots[6]
        sockets = None if written is None or written_after is None else (written_after - written) / 3
        sizes = {name: (size - before[name]) / 3 for name, size in after.items()}
        note.write_text(json.dumps({"bytes": sizes, "sockets": sockets}))


def run_in_this_process(series: Path) -> None:
    """Several runs, one after another, in processes that have been started once."""
    with mock.patch.object(Accelerator, "end_training"):
        for knobs in json.loads(series.read_text()):
            hf_plm.pretrain(hf_plm.load_recipe("demo", knobs))
    if dist.is_initialized():
        dist.destroy_process_group()


# What follows launches them.

SHARED = {
    "validation.final_sequences": "8",
    "run.log_every": "1",
    "run.trackers": "none",
}
RINGS = {"allreduce": 2, "allgather_base": 1, "reduce_scatter_base": 1}
"""A process of a ring sends so many times (W-1)/W of the size."""
GLOO_RINGS = {**RINGS, "reduce_scatter_base": 2}
COUNTED = "2x320x20"
"""Layers of 1.2 M parameters, so that ZeRO-3 does not keep all of them whole for being small."""
DEEP, SCALE = "12x64x4", 1 / 4800
"""ZeRO-3 again with its thresholds scaled as DEEP is to the 3b model."""
WARM_UP = 3
SERIES = {1: 11, 2: 8, 4: 7}
"""Steps of a run, by its rounds."""


def launch(engine: str, processes: int, words: Sequence[str], folder: Path, precision: str) -> subprocess.Popen[str]:
    """Start this file in so many processes; FSDP2 by torchrun, because Accelerate starts it on GPUs only."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables["HF_PLM_CACHE"] = str(folder / "cache")
    if engine.startswith("ZeRO"):
        variables |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    elif processes > 1:
        variables["ACCELERATE_USE_CPU"] = "true"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if engine != "FSDP2":
        config = engine.lower().replace("-", "") if processes > 1 else "cpu"
        start = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision]
        start += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
        if processes > 1:
            start += ["--num_processes", str(processes), "--main_process_port", "0"]
    return subprocess.Popen(
        [*start, __file__, *words], env=variables, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait(launched: subprocess.Popen[str]) -> None:
    output = launched.communicate(timeout=300)[0]
    if launched.returncode:
        raise SystemExit(f"A launch failed.\n{output[-4000:]}")


def count_bytes(folder: Path, fasta: Path, processes: int, rounds: int) -> tuple[str, list[Row]]:
    """What the engines send in a step, beside what the paper says."""
    lines, rows = [], list[Row]()
    cases = [(engine, engine, COUNTED, 1.0) for engine in ENGINES] + [("ZeRO-3 scaled", "ZeRO-3", DEEP, SCALE)]
    for name, engine, preset, scaled in cases:
        note = folder / f"{name}.json".replace(" ", "_")
        knobs = SHARED | {"model.preset": preset, "data.train": str(fasta), "run.folder": str(note.with_suffix(""))}
        knobs |= {"schedule.steps": "8", "checkpoint.every": "8", "validation.every": "8", "run.precision": "bf16"}
        knobs |= {"data.crop": "128", "batch.tokens": "256", "batch.micro_batches": str(rounds * processes)}
        flags = [word for knob, value in knobs.items() for word in (f"--{knob}", value)]
        words = ["--counted", engine, str(note), str(scaled), "demo", *flags]
        wait(launch(engine, processes, words, folder, "bf16"))
        found = json.loads(note.read_text())
        counted, by_gloo = (
            sum(rings.get(kind, 0) * size for kind, size in found["bytes"].items()) * (processes - 1) / processes
            for rings in (RINGS, GLOO_RINGS)
        )
        limits = int(scaled * LIVE), int(scaled * PERSISTENT)
        predicted = bytes_per_step(engine, sizes_of(preset), processes, rounds, *limits)
        ratio = None if found["sockets"] is None else found["sockets"] / by_gloo
        megabytes = [f"{size / 1e6:.3f}" for size in (predicted, counted)]
        lines.append((name, preset, *megabytes, f"{counted / predicted:.4f}", f"{ratio:.4f}" if ratio else "-"))
        print(*lines[-1], flush=True)
        label = f"scaling.bytes.{note.stem}"
        rows += [(f"{label}.counted_by_predicted", counted / predicted, "ratio")]
        rows += [(f"{label}.sockets_by_counted", ratio, "ratio")]
    heading = ("engine", "model", "predicted MB", "counted MB", "counted/predicted", "sockets/counted")
    return table(heading, lines), rows


def speeds(
    folder: Path, fasta: Path, name: str, processes: int, presets: Sequence[str], all_rounds: Sequence[int]
) -> subprocess.Popen[str]:
    """Start runs of each preset and each number of rounds; `folder / name` will have a folder for each."""
    series = []
    for preset in presets:
        for rounds in all_rounds:
            steps = str(SERIES[rounds])
            knobs = {"model.preset": preset, "data.train": str(fasta), "data.crop": "256", "batch.tokens": "512"}
            knobs |= {"batch.micro_batches": str(rounds * processes), "schedule.steps": steps}
            knobs |= {"checkpoint.every": steps, "validation.every": steps, "run.precision": "fp32"}
            series.append(SHARED | knobs | {"run.folder": str(folder / name / f"{preset}-{rounds}")})
    (folder / name).mkdir()
    (folder / name / "series.json").write_text(json.dumps(series))
    return launch("DDP", processes, ["--series", str(folder / name / "series.json")], folder, "no")


def speed(folder: Path) -> float:
    """Median tokens/s of the steps after the warm-up."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return median(line["tokens_per_second"] for line in lines if "loss" in line and line["step"] > WARM_UP)


def measure_speeds(folder: Path, fasta: Path, presets: Sequence[str], repeats: int) -> tuple[str, list[Row]]:
    """Tokens/s of one and two processes, and their efficiency, each of the same turn."""
    kinds = {  # what it shows: where and with how many rounds, of two processes and of one
        "weak, 1 round": ("two", 1, 1),
        "weak, 4 rounds": ("two", 4, 4),
        "strong, 4 micro-batches": ("two", 2, 4),
        "two that are apart": ("apart", 1, 1),
    }
    alone: dict[tuple[str, str], list[float]] = {}
    together: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats):
        wait(speeds(folder, fasta, f"{turn}-one", 1, presets, (1, 4)))
        wait(speeds(folder, fasta, f"{turn}-two", 2, presets, (1, 2, 4)))
        pair = [speeds(folder, fasta, f"{turn}-apart{which}", 1, presets, (1,)) for which in (0, 1)]
        for launched in pair:
            wait(launched)
        for preset in presets:
            for kind, (where, rounds, rounds_alone) in kinds.items():
                names = ["apart0", "apart1"] if where == "apart" else ["two"]
                both = sum(speed(folder / f"{turn}-{name}" / f"{preset}-{rounds}") for name in names)
                one = speed(folder / f"{turn}-one" / f"{preset}-{rounds_alone}")
                alone.setdefault((preset, kind), []).append(one)
                together.setdefault((preset, kind), []).append(both)
                print(f"turn {turn}: {preset}, {kind}: {one:,.0f} and {both:,.0f} tokens/s", flush=True)
    lines, rows = [], list[Row]()
    for (preset, kind), ones in alone.items():
        twos = together[preset, kind]
        ratios = [two / (2 * one) for two, one in zip(twos, ones, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append((f"{preset}, {kind}", f"{median(ones):,.0f}", f"{median(twos):,.0f}", spread))
        label = f"scaling.{preset}.{kind.replace(',', '').replace(' ', '_')}"
        rows += [(f"{label}.one", median(ones), "tokens/s"), (f"{label}.two", median(twos), "tokens/s")]
        rows += [(f"{label}.efficiency", median(ratios), "ratio")]
    return table(("", "1 process, tokens/s", "2 processes, tokens/s", "efficiency"), lines), rows


def main() -> None:
    if sys.argv[1:2] == ["--counted"]:
        count_in_this_process(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
        leave(0)
    if sys.argv[1:2] == ["--series"]:
        run_in_this_process(Path(sys.argv[2]))
        leave(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="print the tables of docs/scaling.md and measure nothing")
    parser.add_argument(
        "--presets", nargs="+", default=["demo", "8m"], help="presets whose speed is measured (demo 8m)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of one process and two (5); 0 counts bytes only")
    parser.add_argument("--processes", type=int, default=2, help="processes of which bytes are counted (2)")
    parser.add_argument("--rounds", type=int, default=4, help="micro-batches of a process in a counted step (4)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if arguments.paper:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in paper().items()))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fasta = folder / "simulated.fasta.gz"
        run_command(["simulate", str(fasta)])
        text, rows = count_bytes(folder, fasta, arguments.processes, arguments.rounds)
        if arguments.repeats:
            more_text, more_rows = measure_speeds(folder, fasta, arguments.presets, arguments.repeats)
            text, rows = f"{text}\n\n{more_text}", rows + more_rows
    counted = {"processes": arguments.processes, "rounds": arguments.rounds}
    finish(text, rows, arguments.out, counted=counted, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
