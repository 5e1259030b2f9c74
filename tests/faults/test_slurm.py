"""launch/slurm.sbatch under a real Slurm: stopped runs are requeued and lose nothing, mistakes are not requeued."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm import Job, Slurm, missing, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

SMALL = {
    "schedule.steps": "60",
    "batch.tokens": "512",
    "batch.micro_batches": "4",
    "data.crop": "128",
    "checkpoint.every": "5",
    "validation.every": "30",
    "run.log_every": "1",
    "run.trackers": "none",
}
ONE_NODE = ("--nodes=1", "--cpus-per-task=2"), {"PROCESSES_PER_NODE": "2"}
TWO_NODES = ("--nodes=2", "--cpus-per-task=1"), {"PROCESSES_PER_NODE": "1"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.close()


def submit(
    slurm: Slurm, where: tuple[tuple[str, ...], dict[str, str]], fasta: Path, folder: Path, *more: str, **knobs: str
) -> Job:
    """`more` goes to sbatch."""
    every = {**SMALL, "data.train": str(fasta), "run.folder": str(folder)}
    every |= {name.replace("__", "."): value for name, value in knobs.items()}
    flags = [word for name, value in every.items() for word in (f"--{name}", value)]
    options, variables = where
    return slurm.submit(*options, *more, "launch/slurm.sbatch", "demo", *flags, ACCELERATE_USE_CPU="true", **variables)


def lines(folder: Path, key: str) -> list[dict[str, float]]:
    """Lines of metrics.jsonl that have `key`."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for line in map(json.loads, text.splitlines()) if key in line]


def wait_for_step(folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}")


def workers(folder: Path) -> list[int]:
    """Process ids of the trainers of a run, without their launchers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if {"launch/pretrain.py", str(folder)} <= set(words) and "launch/slurm_node.py" not in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def whole_run(slurm: Slurm, family_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, as two processes of one node."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    job = submit(slurm, ONE_NODE, family_fasta, folder)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), job.output()
    assert "1 x 2 processes, accelerate_configs/ddp.yaml" in job.output()
    assert "machine    2 x cpu" in job.output()
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    """Every step once, with the losses of the other run."""
    for key in ("loss", "validation_loss"):
        one, other = lines(folder, key), lines(whole, key)
        assert [line["step"] for line in one] == [line["step"] for line in other]
        assert [line[key] for line in one] == pytest.approx([line[key] for line in other], abs=1e-4)
    assert [line["step"] for line in lines(folder, "loss")] == list(range(1, 61))
    assert (folder / "summary.json").exists()
    assert (folder / "hub" / "model.safetensors").exists()


def test_twin_another_seed_has_other_losses(slurm: Slurm, whole_run: Path, family_fasta: Path, tmp_path: Path) -> None:
    """Two nodes, one process each; with the seed of the other run they are the same run."""
    job = submit(slurm, TWO_NODES, family_fasta, tmp_path / "run", run__seed="1")
    assert job.end()["JobState"] == "COMPLETED", job.output()
    assert "2 x 1 processes, accelerate_configs/multi_node_ddp.yaml" in job.output()
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", whole_run)


def test_the_time_limit(slurm: Slurm, whole_run: Path, family_fasta: Path, tmp_path: Path) -> None:
    """A real one: of a minute, the shortest there is. The workers are frozen until Slurm has signalled them."""
    folder = tmp_path / "run"
    job = submit(slurm, ONE_NODE, family_fasta, folder, "--time=1", "--signal=USR1@5")
    wait_for_step(folder, 8)
    for pid in workers(folder):
        os.kill(pid, signal.SIGSTOP)
    # Slurm looks at time limits every 30 seconds and signals up to a minute early.
    hours, minutes, seconds = map(int, job.facts()["RunTime"].split(":"))
    time.sleep(60 - (3600 * hours + 60 * minutes + seconds))
    for pid in workers(folder):
        os.kill(pid, signal.SIGCONT)
    facts = job.end()
    assert "SIGUSR1: finishing this step and writing a checkpoint" in job.output()
    assert "Stopped ahead of the time limit: requeued, to go on from step-0000" in job.output()
    assert facts["JobState"] == "COMPLETED", job.output()
    assert 1 <= int(facts["Restarts"]) <= 4  # the limit is that of each attempt
    assert_same_run(folder, whole_run)


@pytest.mark.parametrize(
    ("where", "names"), [(ONE_NODE, ["TERM"]), (TWO_NODES, ["USR1", "TERM"])], ids=["one node", "two nodes"]
)
def test_signals(
    slurm: Slurm, whole_run: Path, family_fasta: Path, tmp_path: Path, where: tuple, names: list[str]
) -> None:
    """As Slurm sends them before a time limit and at it, and at a preemption with grace. The first one counts."""
    folder = tmp_path / "run"
    job = submit(slurm, where, family_fasta, folder)
    wait_for_step(folder, 8)
    for name in names:
        slurm.call("scancel", f"--signal={name}", job.number)
    facts = job.end()
    why = {"USR1": "ahead of the time limit", "TERM": "by SIGTERM"}[names[0]]
    assert f"SIG{names[0]}: finishing this step and writing a checkpoint" in job.output()
    assert f"Stopped {why}: requeued, to go on from step-0000" in job.output()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert_same_run(folder, whole_run)


def test_a_preemption(slurm: Slurm, whole_run: Path, family_fasta: Path, tmp_path: Path) -> None:
    """By a job of a higher partition, with a minute's grace: it begins as soon as the checkpoint is written."""
    folder = tmp_path / "run"
    job = submit(slurm, TWO_NODES, family_fasta, folder)
    wait_for_step(folder, 8)
    urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    assert urgent.end()["JobState"] == "COMPLETED"
    facts = job.end()
    assert "Stopped by SIGTERM: requeued" in job.output()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert_same_run(folder, whole_run)


def test_requeued_by_an_administrator(slurm: Slurm, whole_run: Path, family_fasta: Path, tmp_path: Path) -> None:
    """As a preemption without grace: Slurm requeues by itself, and kills after KillWait, 30 seconds."""
    folder = tmp_path / "run"
    job = submit(slurm, ONE_NODE, family_fasta, folder)
    wait_for_step(folder, 8)
    slurm.call("scontrol", "requeue", job.number)
    facts = job.end()
    assert "SIGTERM: finishing this step and writing a checkpoint" in job.output()
    assert "Slurm decides what becomes of the job" in job.output()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert_same_run(folder, whole_run)


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, family_fasta: Path, tmp_path: Path) -> None:
    """Its checkpoint is written all the same. `scontrol requeue` would bring it back to life."""
    folder = tmp_path / "run"
    job = submit(slurm, ONE_NODE, family_fasta, folder)
    wait_for_step(folder, 8)
    slurm.call("scancel", job.number)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), job.output()
    assert max(int(path.name[-8:]) for path in (folder / "checkpoints").iterdir()) >= 8


def test_too_short_a_time_limit_is_not_requeued(slurm: Slurm, family_fasta: Path, tmp_path: Path) -> None:
    """Told to stop before the first step, it would be told so again each time."""
    folder = tmp_path / "run"
    job = submit(slurm, ONE_NODE, family_fasta, folder)
    wait_until(lambda: len(workers(folder)) == 2, "two workers")
    slurm.call("scancel", "--signal=USR1", job.number)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), job.output()
    assert "Not one step before the time limit: not requeued" in job.output()


def test_requeues_have_a_limit(slurm: Slurm, family_fasta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options, variables = ONE_NODE
    job = submit(slurm, (options, {**variables, "MAX_REQUEUES": "0"}), family_fasta, folder)
    wait_for_step(folder, 8)
    slurm.call("scancel", "--signal=USR1", job.number)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), job.output()
    assert "requeued 0 times before: not again" in job.output()


def test_a_mistake_is_not_requeued(slurm: Slurm, family_fasta: Path, tmp_path: Path) -> None:
    misspelt = submit(slurm, TWO_NODES, family_fasta, tmp_path / "run", schedule__stepz="60")
    absent = submit(slurm, TWO_NODES, tmp_path / "absent.fasta", tmp_path / "run")
    for job in (misspelt, absent):
        facts = job.end()
        assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "1:0"), job.output()
    assert misspelt.output().startswith("hf-plm: ")
    assert misspelt.output().count("\n") == 1
    assert "absent.fasta" in absent.output()
    assert "Failed (status 255): not requeued" in absent.output()


def test_a_killed_worker_is_no_preemption_and_tried_again(
    slurm: Slurm, whole_run: Path, family_fasta: Path, tmp_path: Path
) -> None:
    """One node fails, as by lack of memory, and srun sends the other SIGTERM; there are new checkpoints."""
    folder = tmp_path / "run"
    job = submit(slurm, TWO_NODES, family_fasta, folder)
    wait_for_step(folder, 8)
    os.kill(workers(folder)[0], signal.SIGKILL)
    facts = job.end()
    assert "Stopped by a failure (status 255): requeued, to go on from step-0000" in job.output()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert_same_run(folder, whole_run)
