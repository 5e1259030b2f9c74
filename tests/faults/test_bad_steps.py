"""Steps that go wrong on one process: all of them stop, drop the update or go back, at the same step."""

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from drill import (
    FAULTY,
    ONE,
    TWO,
    ZERO2,
    Drill,
    Engine,
    check_mistake,
    checkpoints,
    has_our_traceback,
    is_same_to_the_bit,
    is_whole,
    last_step,
    lines_of,
    newest_checkpoint,
    numbers,
)

pytestmark = pytest.mark.slow

WORKERS = {"data.workers": "2"}
SPIKES = {
    "batch.tokens": "128",
    "schedule.steps": "60",
    "checkpoint.every": "10",
    "validation.every": "60",
    "spike.deviations": "3",
    "optimizer.learning_rate": "3e-3",
}


@pytest.mark.parametrize(
    ("engine", "knobs"), [(ZERO2, {}), (TWO, {"checkpoint.every": "1"}), (TWO, WORKERS)], ids=["zero2", "saved", "read"]
)
def test_a_nan_on_one_rank_stops_all(drill: Drill, tmp_path: Path, engine: Engine, knobs: dict[str, str]) -> None:
    """Also where a checkpoint is due right after it, which must not take it in."""
    folder = tmp_path / "run"
    job = drill.start(folder, engine, knobs, FAULTY, {"HF_PLM_FAULT": "nan:1:7"})
    check_mistake(job, r"The loss of step 7 is nan and its gradient norm \S+: the run stopped, the last checkpoint")
    assert newest_checkpoint(folder) == (7 if knobs.get("checkpoint.every") == "1" else 5)
    assert last_step(folder) == 7
    assert all(map(is_whole, checkpoints(folder)))
    assert "Going on from" in drill.start(folder, engine, knobs).finish()
    assert is_same_to_the_bit(folder, drill.whole(engine))


def test_twin_the_script_with_the_fault_changes_nothing_but_by_the_fault(drill: Drill, tmp_path: Path) -> None:
    drill.start(tmp_path / "run", TWO, {}, FAULTY, {"HF_PLM_FAULT": "nan:1:1000"}).finish()
    assert is_same_to_the_bit(tmp_path / "run", drill.whole(TWO))


@pytest.mark.parametrize(("engine", "rank"), [(ONE, 0), (TWO, 0)], ids=["one", "two"])
def test_a_dead_worker_is_told_after_a_checkpoint(drill: Drill, tmp_path: Path, engine: Engine, rank: int) -> None:
    folder = tmp_path / "run"
    job = drill.start(folder, engine, WORKERS)
    workers = job.workers(rank)
    job.wait_for_step(7)
    workers[1].kill()
    check_mistake(job, r"Reading the next step failed .* a checkpoint was written, and the same command goes on")
    assert newest_checkpoint(folder) == last_step(folder) >= 7
    assert all(map(is_whole, checkpoints(folder)))
    assert "Going on from" in drill.start(folder, engine, WORKERS).finish()
    assert is_same_to_the_bit(folder, drill.whole(engine))


def test_twin_without_the_sentence_a_dead_worker_is_a_traceback(drill: Drill, tmp_path: Path) -> None:
    job = drill.start(tmp_path / "run", ONE, WORKERS, FAULTY, {"HF_PLM_FAULT": "unguarded"})
    workers = job.workers(0)
    job.wait_for_step(7)
    workers[1].kill()
    assert job.wait() != 0
    assert has_our_traceback(job.output)
    assert not re.search("Reading the next step failed", job.output)


@pytest.fixture(scope="module")
def odd_fasta(drill: Drill) -> Path:
    """The simulated families and a few sequences of tryptophan alone, whose loss is far above all others."""
    path = drill.folder / "odd.fasta"
    odd = "".join(f">odd{number}\n{'W' * (150 + number)}\n" for number in range(12))
    path.write_text(gzip.decompress(drill.train.read_bytes()).decode() + odd)
    return path


def spikes(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if "rolled_back_from" in line or line.get("gradient_norm", 0) is None]


@pytest.mark.parametrize(
    ("engine", "action"), [(TWO, "skip"), (TWO, "rollback"), (ZERO2, "rollback")], ids=["skip", "rollback", "zero2"]
)
def test_all_ranks_agree_on_a_spike_and_on_what_was_done_after_a_kill(
    drill: Drill, tmp_path: Path, odd_fasta: Path, engine: Engine, action: str
) -> None:
    """Killed twice: right after the first spike, and once more when a checkpoint has followed."""
    knobs = {**SPIKES, "spike.action": action}
    whole = drill.whole(engine, knobs, odd_fasta)
    assert spikes(whole), "the recipe of this drill makes no spike any more"
    folder = tmp_path / "run"
    for is_later in (False, True):
        job = drill.start(folder, engine, {**knobs, "data.train": str(odd_fasta)})
        job.ranks()
        job.until(lambda: spikes(folder), "a spike")
        if is_later:
            job.wait_for_checkpoint(spikes(folder)[0]["step"] // 10 * 10 + 20)
        job.kill()
        assert not (folder / "summary.json").exists()
    drill.start(folder, engine, {**knobs, "data.train": str(odd_fasta)}).finish()
    trained, expected = ([line for line in numbers(run) if "rolled_back_from" not in line] for run in (folder, whole))
    assert trained == expected
    assert is_same_to_the_bit(folder, whole)
