"""Jobs that are broken on purpose: started, watched, hurt and compared.

A job is a real `accelerate launch` with a file of `accelerate_configs`; the recipe is `demo` made small. Its processes
are found by a variable of their environment, not by their group: torch's launcher puts each rank in a session of its
own, and what was killed must leave nobody behind.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"
FAULTY = Path(__file__).with_name("faulty.py")
TAG = "HF_PLM_DRILL"
SMALL = {
    "schedule.steps": "24",
    "batch.tokens": "256",
    "batch.micro_batches": "2",
    "data.crop": "128",
    "checkpoint.every": "5",
    "checkpoint.keep": "9",
    "validation.every": "6",
    "run.log_every": "1",
    "run.trackers": "none",
}
HANG_SECONDS = 180
"""More than any job of this folder takes on a busy machine: whoever waits so long, hangs."""


@dataclass(frozen=True)
class Engine:
    """A file of `accelerate_configs` and a number of processes."""

    config: str
    processes: int

    @property
    def environment(self) -> dict[str, str]:
        """What takes the place of GPUs on a machine without them."""
        if self.config.startswith("zero"):
            return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return {"ACCELERATE_USE_CPU": "true"} if self.processes > 1 else {}

    def __str__(self) -> str:
        return f"{self.config}_x{self.processes}"


ONE, TWO, ZERO2 = Engine("cpu", 1), Engine("ddp", 2), Engine("zero2", 2)


class Job:
    """A launched run. All its processes are gone after `kill`, whatever became of their parents."""

    def __init__(self, engine: Engine, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.engine, self.folder = engine, folder
        self.ended = math.inf
        self._ranks: list[psutil.Process] = []
        self.tag = uuid.uuid4().hex
        self.log = folder.with_name(f"{folder.name}.{self.tag[:8]}.log")
        with open(self.log, "w", encoding="utf-8") as output:
            self.launcher = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", **engine.environment, **environment, TAG: self.tag},
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that are alive, the launcher among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == self.tag:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes by rank; waits until there are as many as were asked for."""

        def found() -> list[psutil.Process]:
            ranks = {}
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self.launcher.pid).children():
                    if "--run.folder" in child.cmdline():
                        ranks[int(child.environ().get("RANK", 0))] = child
            return [ranks[rank] for rank in sorted(ranks)] if len(ranks) == self.engine.processes else []

        self._ranks = self._ranks or self.until(found, "all ranks")
        return self._ranks

    def workers(self, rank: int) -> list[psutil.Process]:
        """The processes that read ahead for one rank, two: forks of it, with its own command line."""
        parent = self.ranks()[rank]

        def found() -> list[psutil.Process]:
            with contextlib.suppress(psutil.Error):
                forks = [child for child in parent.children() if child.cmdline() == parent.cmdline()]
                return forks if len(forks) == 2 else []
            return []

        return self.until(found, "both workers")

    def until(self, found: Callable[[], Any], what: str, seconds: float = HANG_SECONDS, every: float = 0.02) -> Any:
        """What `found` gives once it is true; AssertionError where the job ends before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not (result := found()):
            assert self.launcher.poll() is None, f"the job ended before {what} came:\n{self.output}"
            assert time.monotonic() < deadline, f"{what} never came:\n{self.output}"
            time.sleep(every)
        return result

    def wait_for_step(self, step: int) -> None:
        self.until(lambda: last_step(self.folder) >= step, f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        self.until(lambda: step <= newest_checkpoint(self.folder), f"the checkpoint of step {step}")

    def wait_for_text(self, text: str) -> None:
        self.until(lambda: text in self.output, repr(text))

    def wait(self, seconds: float = HANG_SECONDS) -> int:
        """The launcher's exit code, once every process of the job has ended; AssertionError where one hangs.

        `ended` is then when the launcher did: workers whose rank was killed notice within five seconds.
        """
        deadline = time.monotonic() + seconds
        try:
            self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job hangs after {seconds} s:\n{self.output}") from None
        self.ended = time.monotonic()
        while alive := self.processes():
            assert time.monotonic() < deadline, f"{len(alive)} processes outlived their launcher:\n{self.output}"
            time.sleep(0.05)
        return self.launcher.returncode

    def finish(self) -> str:
        """What a run said that ended well."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.output}"
        return self.output

    def kill(self) -> None:
        """SIGKILL to every process, as a power cut would, the known ones first: to find all takes a while."""
        if self.launcher.poll() is None:
            self.launcher.kill()
            signal_all(signal.SIGKILL, self._ranks)
        while alive := self.processes():
            signal_all(signal.SIGKILL, alive)
        self.launcher.wait()


def signal_all(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


@dataclass
class Drill:
    """Starts jobs in a folder on one corpus, remembers uninterrupted runs, and leaves no process behind."""

    folder: Path
    train: Path
    jobs: list[Job] = field(default_factory=list)
    _whole: dict[tuple[Any, ...], Path] = field(default_factory=dict)

    def start(
        self,
        folder: Path,
        engine: Engine,
        knobs: dict[str, str] | None = None,
        script: Path = PRETRAIN,
        environment: dict[str, str] | None = None,
    ) -> Job:
        """Start, or go on with, the run in `folder`."""
        asked = {**SMALL, "data.train": str(self.train), "run.folder": str(folder), **(knobs or {})}
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        launch += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine.config}.yaml")]
        if engine.config != "cpu":
            launch += ["--num_processes", str(engine.processes), "--mixed_precision", "no"]
            launch += ["--main_process_port", str(free_port())]  # 0 is for the launcher to choose, and some hang then
        training = ["demo", *(word for name, value in asked.items() for word in (f"--{name}", value))]
        job = Job(engine, folder, [*launch, str(script), *training], environment or {})
        self.jobs.append(job)
        return job

    def whole(self, engine: Engine, knobs: dict[str, str] | None = None, train: Path | None = None) -> Path:
        """The folder of the run that was left alone, made when it is first asked for."""
        key = (engine, tuple(sorted((knobs or {}).items())), train)
        if key not in self._whole:
            folder = self.folder / f"whole_{engine}_{len(self._whole)}"
            self.start(folder, engine, {**(knobs or {}), **({"data.train": str(train)} if train else {})}).finish()
            summary = json.loads((folder / "summary.json").read_text())
            # Two processes that do not find each other are two runs of one, silently.
            assert summary["processes"] == engine.processes
            assert summary["engine"] == {"cpu": "one process", "ddp": "DDP", "zero2": "ZeRO-2"}[engine.config]
            self._whole[key] = folder
        return self._whole[key]

    def clear(self) -> None:
        for job in self.jobs:
            job.kill()
        self.jobs.clear()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, also while they are written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines_of(folder) if "loss" in line), default=0)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics, without what a clock put there."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines_of(folder)]


def difference(folder: Path, other: Path) -> float:
    """The largest difference of a loss or validation loss, in nats, or of a gradient norm, relative to the other's.

    Raises AssertionError where the two do not have the same lines, each once.
    """
    mine, theirs = numbers(folder), numbers(other)
    assert [(line["step"], sorted(line)) for line in mine] == [(line["step"], sorted(line)) for line in theirs]
    largest = 0.0
    for line, its in zip(mine, theirs, strict=True):
        for name in ("loss", "validation_loss", "gradient_norm"):
            if name in line:
                value, expected = line[name], its[name]
                assert (value is None) == (expected is None)  # an update that was dropped has no gradient norm
                scale = expected if name == "gradient_norm" else 1.0
                largest = max(largest, 0.0 if value is None else abs(value - expected) / scale)
    return largest


def is_same_to_the_bit(folder: Path, other: Path) -> bool:
    """Losses, gradient norms, validations, and the weights that were left at the end."""
    weights = [path / "hub" / "model.safetensors" for path in (folder, other)]
    return numbers(folder) == numbers(other) and weights[0].read_bytes() == weights[1].read_bytes()


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def newest_checkpoint(folder: Path) -> int:
    """Its step; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints(folder)), default=0)


def is_whole(checkpoint: Path) -> bool:
    """Whether its files are as state.json says, told without the code that is under test."""
    import hashlib

    wanted = json.loads((checkpoint / "state.json").read_text())["sha256"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}
    return found == wanted


def left_half_done(folder: Path) -> set[tuple[int, int]]:
    """(step, inode) of each folder that is half written or half removed; a new run makes a new inode of it."""
    found = (folder / "checkpoints").glob(".partial-step-*")
    return {(int(path.name.rsplit("-", 1)[1]), path.stat().st_ino) for path in found}


def sentences(output: str) -> list[str]:
    """What the program said of a mistake, each time it said so."""
    return [line for line in output.splitlines() if line.startswith("hf-plm: ")]


def has_our_traceback(output: str) -> bool:
    """Whether a traceback goes through our code; torch's launcher prints one of its own when a rank has failed."""
    return bool(re.search(r'File "[^"]*/(hf_plm|launch|faults)/[^"]*\.py", line', output))


def check_mistake(job: Job, wanted: str, count: int = 1) -> str:
    """That the job ended with exit code 1 and one sentence which `wanted` matches."""
    code = job.wait()
    told = sentences(job.output)
    assert code == 1, job.output
    assert len(told) == count, job.output
    assert all(re.search(wanted, line) for line in told), job.output
    assert not has_our_traceback(job.output), job.output
    return told[0]


@contextlib.contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many KiB at `folder`; what is yielded gives it another size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def copy_of(folder: Path, to: Path, steps: int | None = None) -> Path:
    """A copy of a finished run as a crash would have left it, with checkpoints up to step `steps` only."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("hub", "summary.json", "curves.png", ".lock"))
    for checkpoint in checkpoints(to):
        if steps is not None and int(checkpoint.name.removeprefix("step-")) > steps:
            shutil.rmtree(checkpoint)
    return to
