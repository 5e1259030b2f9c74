"""What a checkpoint costs a run, written behind the training or while it waits.

    python benchmarks/saving.py --preset 8m --out saving.json

Runs of the real trainer on simulated proteins, in turn with and without --checkpoint.background. What a save costs is
the time of the steps after it beyond that many median steps: waiting, copying, and sharing the cores with the thread
that writes. A run that saves every 200 steps pays that once in 200 median steps. The last lines are rows of `name value
unit`.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

STEPS_BETWEEN = 15
STEPS_AFTER = 8
"""Steps over which a save is charged; the thread that writes is long done by then."""
SAVE_EVERY = 200


def step_seconds(folder: Path) -> list[float]:
    """Seconds of each step from the second on, whatever was done after the step before included."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in lines if "place" in line]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def run(fasta: Path, folder: Path, preset: str, tokens: int, steps: int, background: bool) -> list[float]:
    knobs = {
        "model.preset": preset,
        "data.train": str(fasta),
        "data.crop": "512",
        "batch.tokens": str(tokens),
        "batch.micro_batches": "1",
        "schedule.steps": str(steps),
        "checkpoint.every": str(STEPS_BETWEEN),
        "checkpoint.background": str(background).lower(),
        "validation.every": str(steps),
        "validation.final_sequences": "20",
        "run.log_every": "1",
        "run.trackers": "none",
        "run.folder": str(folder),
    }
    flags = [word for name, value in knobs.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "hf_plm.cli", "pretrain", "demo", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return step_seconds(folder)


def costs_of_saves(seconds: list[float]) -> tuple[float, list[float]]:
    """Median step, and for each save the seconds that the steps after it took beyond as many median steps."""
    # seconds[i] is step i + 2; a save follows steps 15, 30, ..., so the first step after the first is seconds[14].
    starts = list(range(STEPS_BETWEEN - 1, len(seconds) - STEPS_AFTER, STEPS_BETWEEN))
    charged = {place for start in starts for place in range(start, start + STEPS_AFTER)}
    usual = median(value for place, value in enumerate(seconds) if place > 2 and place not in charged)
    return usual, [sum(seconds[start : start + STEPS_AFTER]) - STEPS_AFTER * usual for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="8m")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step (2048)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind (5)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    usual: dict[bool, list[float]] = {True: [], False: []}
    costs: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_PLM_CACHE"] = str(folder / "cache")
        fasta = folder / "simulated.fasta.gz"
        subprocess.run([sys.executable, "-m", "hf_plm.cli", "simulate", str(fasta)], check=True)
        for repeat in range(arguments.repeats):
            for background in (True, False):
                where = folder / f"{repeat}-{background}"
                seconds = run(fasta, where, arguments.preset, arguments.tokens, 4 * STEPS_BETWEEN, background)
                step, found = costs_of_saves(seconds)
                usual[background].append(step)
                costs[background] += found
                print(f"background {background}: step {step:.3f} s, saves {[round(x, 3) for x in found]} s", flush=True)
    rows: list[tuple[str, float, str]] = []
    for background, kind in ((True, "background"), (False, "waiting")):
        step, cost = median(usual[background]), median(costs[background])
        rows += [
            (f"saving.{kind}.step", step, "s"),
            (f"saving.{kind}.save", cost, "s"),
            (f"saving.{kind}.share_every_{SAVE_EVERY}", 100 * cost / (SAVE_EVERY * step + cost), "%"),
        ]
    facts = {
        "preset": arguments.preset,
        "tokens": arguments.tokens,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        **{name: version(name) for name in ("hf_plm", "torch", "transformers", "accelerate")},
    }
    if arguments.out:
        result = {"facts": facts, "rows": rows, "costs": {str(key): value for key, value in costs.items()}}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for row_name, value, unit in rows:
        print(f"{row_name} {value:.4f} {unit}")


if __name__ == "__main__":
    main()
