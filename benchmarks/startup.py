"""How long a person waits: for help, and from the start of a process to its first finished step.

    python benchmarks/startup.py --out startup.json
    python benchmarks/startup.py --index /scratch/resume --out startup.json

Every measurement is a process of its own, whose clock starts before its interpreter. The runs are those of the recipe
demo on simulated proteins whose corpus was prepared before, so that all files are in memory. A run is at its first
finished step when metrics.jsonl has a line of one (`--run.log_every 1`), which is looked for every 10 ms; the run is
then killed. The trainer writes the line of a step when two more were sent, so the true time is two steps less. Each
case but help has the CPU seconds beside it, all processes and threads together, which other work on the machine hardly
changes. The training process of `accelerate launch` starts when the system says that it did, to 10 ms.

The stages of a run are timed in a process that calls the same program with a clock around each function that
`pretrain` calls; no stage is a validation or a measurement of speed, since the recipe has neither before its first step
(one with `schedule.budget` measures for 5 s). What the imports take is asked of `python -X importtime`, which slows
them by a fifth: seconds of each package itself, without what it imports. The time to the first batch on a large index
is the case rank0of1 of resume.py, in the folder that it made; `not measured` without --index.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
COMMANDS = ("pretrain", "launch", "prepare", "inspect", "push", "export", "simulate")
STAGES = {
    "start_accelerator": "accelerator",
    "open_corpora": "corpora",
    "build_model": "model",
    "resolve_on": "resolve",
    "begin": "config",
    "configure": "engine",
    "_resume": "optimizer",
    "Meter": "trackers",
    "_announce": "announcement",
    "run_steps": "steps",
}
"""Functions that `hf_plm.training.pretrain` calls before the first step, in order, and the names of their rows."""
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.01
Found = dict[str, float]


def help_seconds(words: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run([BIN / "hf-plm", *words, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def last_step(folder: Path) -> int:
    """The last whole line of metrics.jsonl that tells of a step; 0 where there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return max((content["step"] for content in map(json.loads, lines) if "loss" in content), default=0)


def first_step(command: Sequence[str | Path], folder: Path, ending: signal.Signals = signal.SIGKILL) -> Found:
    """Start a run in `folder`, wait for a step that was not there before, and end it with all its processes.

    Returns seconds from the start of the process that trains, from that of its launcher if there is one, and of CPU.
    """
    before = last_step(folder)
    began = time.perf_counter()
    log = open(folder.with_suffix(".log"), "w+", encoding="utf-8")  # noqa: SIM115 (closed below)
    with log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True) as started:
        try:
            while last_step(folder) <= before:
                if started.poll() is not None or time.perf_counter() - began > WAIT_SECONDS:
                    log.seek(0)
                    raise RuntimeError(f"No step in {time.perf_counter() - began:.0f} s: {log.read()[-2000:]}")
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - began
            first = psutil.Process(started.pid)
            processes = [first, *first.children(recursive=True)]
            cpu = sum(sum(process.cpu_times()[:2]) for process in processes)
            if "launch" not in command:
                return {"first_step": seconds, "cpu": cpu}
            later = processes[1].create_time() - first.create_time()
            return {"first_step": seconds - later, "first_step_from_launcher": seconds, "cpu": cpu}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, ending)


def stages(flags: list[str], started: float) -> None:
    """The other side of `run_stages`: the program with a clock around each stage, until the first line is written."""
    found: Found = {"interpreter": time.time() - started}
    entered: Found = {}
    from hf_plm import cli

    began = time.time()
    with cli.quick_imports():
        from hf_plm.training import meter, pretrain
    found["imports"] = time.time() - began

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            entered[name] = time.time()
            result = function(*given, **named)
            found[name] = time.time() - entered[name]
            return result

        return call

    def tell(self: meter.Meter, line: Mapping[str, Any]) -> None:
        write(self, line)
        now = time.time()
        found["steps"] = now - entered["steps"]
        found["rest"] = now - started - sum(found.values())
        print(json.dumps(found), flush=True)
        os._exit(0)

    for name, stage in STAGES.items():
        setattr(pretrain, name, timed(getattr(pretrain, name), stage))
    write, meter.Meter.write = meter.Meter.write, tell  # type: ignore[method-assign]
    cli.main(["pretrain", "demo", *flags])


def run_stages(flags: Sequence[str | Path]) -> Found:
    call = json.dumps([[str(flag) for flag in flags], time.time()])
    done = subprocess.run([sys.executable, __file__, "--call", call], stdout=subprocess.PIPE, text=True, check=True)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def import_seconds() -> Found:
    """Seconds of the seven packages that take longest to import, and of all others together."""
    statement = "import transformers.models, hf_plm.training.pretrain, datasets"
    command = [sys.executable, "-X", "importtime", "-c", statement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    seconds: defaultdict[str, float] = defaultdict(float)
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", done.stderr, re.MULTILINE):
        seconds[name] += int(own) / 1e6
    longest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:7])
    return {**longest, "others": sum(seconds.values()) - sum(longest.values())}


def num_sequences(index: Path) -> int:
    from hf_plm.data.manifest import read_manifest

    return read_manifest(index).splits["train"].sequences


def first_batch(index: Path) -> float:
    """Seconds to the first batch of step 1,000,000, as resume.py measures them on the corpus it made in `index`."""
    import resume

    plan = resume._in_its_own_process(index, "plan", num_steps=20)
    cursor = divmod(round(resume.STEP * plan["sequences_per_step"]), num_sequences(index))
    found = resume._in_its_own_process(index, "first_step", cursor=cursor, **resume.CASES["rank0of1"])
    return found["first_step_seconds"]


def measure(folder: Path, repeats: int, index: Path | None) -> dict[str, list[float]]:
    """Every value of each row, in the order of the rows."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    fasta = folder / "simulated.fasta.gz"
    subprocess.run([BIN / "hf-plm", "simulate", fasta], check=True, stdout=subprocess.DEVNULL)
    files: list[str | Path] = ["--data.train", fasta, "--data.cache", folder / "corpora"]
    flags = [*files, "--run.log_every", "1", "--run.folder"]
    in_process = [BIN / "hf-plm", "pretrain", "demo", *flags]
    config = ["--config_file", "accelerate_configs/cpu.yaml", "--quiet"]
    launched = [BIN / "accelerate", "launch", *config, "launch/pretrain.py", "demo", *flags]
    stopped = folder / "stopped"
    first_step([*in_process, stopped], stopped, signal.SIGTERM)  # prepares the corpus, and leaves a checkpoint

    found: dict[str, list[float]] = {}

    def note(values: Found, name: str) -> None:
        for key, value in values.items():
            found.setdefault(f"{name}.{key}", []).append(value)

    for repeat in range(repeats):  # in turns, so that other work on the machine falls on all cases
        note({"all": help_seconds([]), "slowest_command": max(help_seconds([name]) for name in COMMANDS)}, "help")
        for name, command in (("pretrain", in_process), ("resume", in_process), ("launch", launched)):
            run = folder / f"{name}-{repeat}"
            if name == "resume":
                shutil.copytree(stopped, run)
            note(first_step([*command, run], run), name)
        note(run_stages([*flags, folder / f"stages-{repeat}"]), "stage")
    note(import_seconds(), "import")
    if index is not None and (index / "made").exists():
        for _ in range(repeats):
            note({"first_batch": first_batch(index.resolve())}, "index")
    return found


def report(found: dict[str, list[float]], index: Path | None, out: Path | None) -> None:
    import outcome  # here, since it imports torch, which the stages of a run are to be seen doing

    lines: list[list[str]] = []
    rows: list[outcome.Row] = []
    for name, values in found.items():
        lines.append([name, *(f"{value:.2f}" for value in (median(values), min(values), max(values)))])
        rows.append((f"startup.{name}", median(values), "s"))
    if index is None or "index.first_batch" not in found:
        rows.append(("startup.index.first_batch", None, "s"))
    else:
        rows.append(("startup.index.sequences", num_sequences(index), ""))
    outcome.finish(outcome.table(("", "median s", "shortest", "longest"), lines), rows, out, measured=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--index", type=Path, help="the folder of resume.py, for the time to its first batch")
    parser.add_argument("--out", type=Path, help="a JSON file with every measurement")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        stages(*json.loads(arguments.call))
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), arguments.repeats, arguments.index)
    report(found, arguments.index, arguments.out)


if __name__ == "__main__":
    main()
