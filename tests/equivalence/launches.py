"""Runs of one recipe under every engine, each made once, and how far two of them are apart.

What a run is made of is written here: the recipe is `demo` made small, 30 steps of 4 micro-batches over corpora of
about 14 steps, so that two epochs end in it. A member of a class varies one thing. It goes through `accelerate launch`
and a file of `accelerate_configs`; on the launcher's command line stand only the precision, the number of processes,
and where they meet.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

import hf_plm

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"
WATCHED = Path(__file__).with_name("watched.py")
STEPS, EVERY = 30, 10
SMALL = {
    "data.crop": "128",
    "batch.tokens": "512",
    "batch.micro_batches": "4",
    "schedule.steps": str(STEPS),
    "validation.every": "5",
    "checkpoint.every": str(EVERY),
    "checkpoint.keep": str(STEPS),
    "run.log_every": "1",
    "run.trackers": "none",
}
ENGINES = {
    "cpu": "one process",
    "ddp": "DDP",
    "multi_node_ddp": "DDP",
    "multi_node_zero2": "ZeRO-2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3",
}
"""What summary.json calls the engine of each file."""
LAUNCH_SECONDS = 300
EXTENSIONS = "extensions"
"""Folder where torch would build kernels for DeepSpeed."""


@dataclass(frozen=True)
class Member:
    """One way to execute the canonical run."""

    name: str
    config: str
    processes: int = 1
    machines: int = 1
    precision: str = "no"
    knobs: tuple[tuple[str, str], ...] = ()

    @property
    def engine(self) -> str:
        return ENGINES[self.config]


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    folder: Path
    log: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def hub_weights(self) -> dict[str, Any]:
        return load_file(self.folder / "hub" / "model.safetensors")

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))


@dataclass(frozen=True)
class Launch:
    """A run under way: one launcher for each machine."""

    launchers: list[subprocess.Popen[str]]
    log: Path
    """Output of the first machine's."""

    def finish(self) -> str:
        """What the run printed, once all its launchers have ended well."""
        try:
            for launcher in self.launchers:
                launcher.wait(timeout=LAUNCH_SECONDS)
        finally:
            self.kill()
        assert not any(launcher.returncode for launcher in self.launchers), self.log.read_text()
        return self.log.read_text()

    def kill(self) -> None:
        """End all processes at once, as a power cut would; torch's launcher has put each in a session of its own."""
        for launcher in self.launchers:
            if launcher.poll() is None:
                family = psutil.Process(launcher.pid)
                for process in [family, *family.children(recursive=True)]:
                    process.kill()
                launcher.wait()


class Runs:
    """Makes the run of a member when it is first asked for."""

    def __init__(self, folder: Path, fasta: Path) -> None:
        self.folder, self.fasta = folder, fasta
        self._made: dict[str, Run | Exception] = {}

    def __call__(self, member: Member) -> Run:
        if member.name not in self._made:
            folder = self.folder / member.name
            try:
                self._made[member.name] = Run(folder, start(member, folder, self.fasta).finish())
            except (AssertionError, subprocess.TimeoutExpired) as error:  # the next test need not wait for it again
                self._made[member.name] = error
        made = self._made[member.name]
        if isinstance(made, Exception):
            raise made
        return made

    def resumed(self, source: Member, target: Member) -> Run:
        """The run of `source` up to its first checkpoint, and from there on as `target`."""
        folder = cut_after_first_checkpoint(self(source).folder, self.folder / f"{source.name}_to_{target.name}")
        return Run(folder, start(target, folder, self.fasta).finish())


def start(member: Member, folder: Path, fasta: Path, small: dict[str, str] = SMALL) -> Launch:
    """Start, or go on with, the run in `folder`; `small` are the knobs on which the recipe demo is changed."""
    words = ["--mixed_precision", member.precision]
    if member.config != "cpu":
        port = free_port() if member.machines > 1 else 0  # 0: the launcher takes a free one
        words += ["--num_processes", str(member.processes), "--main_process_port", str(port)]
    if member.machines > 1:
        words += ["--main_process_ip", "127.0.0.1"]
    knobs = {"data.train": str(fasta), "run.folder": str(folder), **small, **dict(member.knobs)}
    training = ["demo", *(word for name, value in knobs.items() for word in (f"--{name}", value))]
    script = WATCHED if member.engine.startswith("ZeRO") else PRETRAIN
    logs = [folder.with_suffix(f".{machine}.log" if machine else ".log") for machine in range(member.machines)]
    variables = environment(member, folder.parent / EXTENSIONS)
    launchers = []
    for machine, log in enumerate(logs):
        rank = ["--machine_rank", str(machine)] if member.machines > 1 else []
        config = ["--config_file", str(ROOT / "accelerate_configs" / f"{member.config}.yaml")]
        command = [sys.executable, "-m", "accelerate.commands.launch", *config, *words, *rank, str(script), *training]
        with open(log, "w", encoding="utf-8") as output:
            launchers.append(
                subprocess.Popen(command, stdout=output, stderr=output, text=True, env=variables, cwd=ROOT)
            )
    return Launch(launchers, logs[0])


def environment(member: Member, extensions: Path) -> dict[str, str]:
    """What takes the place of GPUs on a machine without them; the YAML files are for GPUs."""
    # Threads of several processes on few cores would wait for each other, and another number sums in another order.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if member.engine.startswith("ZeRO"):
        variables["DS_ACCELERATOR"] = "cpu"
        variables["TORCH_EXTENSIONS_DIR"] = str(extensions)
    elif member.config != "cpu":
        variables["ACCELERATE_USE_CPU"] = "true"
    return variables


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def cut_after_first_checkpoint(finished: Path, folder: Path) -> Path:
    """A copy of a finished run, as if it had been killed right after its first checkpoint."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("hub", "summary.json", "curves.png"))
    for checkpoint in Run(folder, "").checkpoints[1:]:
        shutil.rmtree(checkpoint)
    return folder


def train_here(folder: Path, fasta: Path, changed: dict[str, str] | None = None, small: dict[str, str] = SMALL) -> Run:
    """The canonical run in this process, where its parts can be broken, with some knobs changed."""
    here = {**small, "data.train": str(fasta), "run.folder": str(folder), "run.precision": "fp32", **(changed or {})}
    hf_plm.pretrain(hf_plm.load_recipe("demo", here))
    return Run(folder, "")


@dataclass(frozen=True)
class Difference:
    """How far a run is from another of the same recipe, at the first step, by the largest and by the mean over steps.

    Losses in nats, norms of the gradient relative to the other's, weights of the Hub folder as they are. The first step
    begins from the same weights, so it shows what one step rounds differently; later ones what has come of it.
    """

    first_loss: float
    first_gradient_norm: float
    loss_max: float
    loss_mean: float
    gradient_norm_max: float
    gradient_norm_mean: float
    validation_loss_max: float
    weights_max: float

    def beyond(self, tolerance: "Difference") -> list[str]:
        """Names of the numbers that are larger than they may be."""
        return [name for name, value in vars(self).items() if not value <= getattr(tolerance, name)]


def difference(run: Run, other: Run) -> Difference:
    """Raises AssertionError where the two did not take the same steps with the same tokens, each once."""
    mine, theirs = training_lines(run), training_lines(other)
    exact = ("step", "tokens", "epoch", "place", "learning_rate", "padding_share")
    assert [[line[name] for name in exact] for line in mine] == [[line[name] for name in exact] for line in theirs]
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    losses = far([line["loss"] for line in mine], [line["loss"] for line in theirs])
    norms = [line["gradient_norm"] for line in theirs]
    ratios = far([line["gradient_norm"] / norm for line, norm in zip(mine, norms, strict=True)], [1.0] * STEPS)
    validated, others = validation_losses(run), validation_losses(other)
    assert validated.keys() == others.keys()
    weights, others_weights = run.hub_weights, other.hub_weights
    assert weights.keys() == others_weights.keys()
    return Difference(
        first_loss=losses[0],
        first_gradient_norm=ratios[0],
        loss_max=max(losses),
        loss_mean=sum(losses) / STEPS,
        gradient_norm_max=max(ratios),
        gradient_norm_mean=sum(ratios) / STEPS,
        validation_loss_max=max(far(list(validated.values()), list(others.values()))),
        weights_max=max(float(abs(weights[name] - others_weights[name]).max()) for name in weights),
    )


def far(values: list[float], others: list[float]) -> list[float]:
    return [abs(value - other) for value, other in zip(values, others, strict=True)]


def training_lines(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.lines if "loss" in line]


def validation_losses(run: Run) -> dict[tuple[int, bool], float]:
    """By step and whether it is the final one; a validation that was written twice is an error."""
    lines = [line for line in run.lines if "validation_loss" in line]
    by_step = {(line["step"], bool(line.get("final"))): line["validation_loss"] for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def without_clock(run: Run) -> list[dict[str, Any]]:
    """All lines of metrics, without what a clock put there."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in run.lines]
