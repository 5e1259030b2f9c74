"""Processes that are lost, stopped, or asked to stop: the others notice, and the same command goes on."""

import re
import signal
import time
from pathlib import Path

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
    newest_checkpoint,
    signal_all,
)

pytestmark = pytest.mark.slow

LOST = r"Process \d lost another process of the run .* the last checkpoint is whole, and the same command goes on"


def check_goes_on(drill: Drill, folder: Path, engine: Engine) -> None:
    assert all(map(is_whole, checkpoints(folder)))
    assert "Going on from" in drill.start(folder, engine).finish()
    assert is_same_to_the_bit(folder, drill.whole(engine))


@pytest.mark.parametrize(
    ("engine", "rank", "is_waited_for"),
    [(TWO, 0, False), (TWO, 0, True), (TWO, 1, True), (ZERO2, 0, True), (ZERO2, 1, False)],
)
def test_a_lost_rank_ends_the_job_in_seconds_with_one_sentence(
    drill: Drill, rows: dict[str, float], tmp_path: Path, engine: Engine, rank: int, is_waited_for: bool
) -> None:
    """Lost while the other computes, or while it waits in a collective, which is when it notices at once."""
    job = drill.start(tmp_path / "run", engine)
    ranks = job.ranks()
    job.wait_for_step(7)
    if is_waited_for:
        ranks[rank].suspend()
        time.sleep(2)
    began = time.monotonic()
    ranks[rank].kill()
    check_mistake(job, LOST)
    name = f"seconds_until_the_job_ended_{engine}_rank_{rank}" + "_waited_for" * is_waited_for
    rows[name] = round(job.ended - began, 1)
    assert job.ended - began < 60
    check_goes_on(drill, tmp_path / "run", engine)


def test_twin_without_the_sentence_there_is_a_traceback(drill: Drill, tmp_path: Path) -> None:
    job = drill.start(tmp_path / "run", TWO, script=FAULTY, environment={"HF_PLM_FAULT": "unguarded"})
    ranks = job.ranks()
    job.wait_for_step(7)
    ranks[1].kill()
    assert job.wait() != 0
    assert has_our_traceback(job.output)
    assert not re.search(LOST, job.output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("engine", "to"), [(ONE, "all"), (TWO, "all"), (TWO, "rank 0"), (TWO, "rank 1"), (ZERO2, "rank 1")]
)
def test_a_signal_stops_all_ranks_at_the_same_step(
    drill: Drill, tmp_path: Path, engine: Engine, number: signal.Signals, to: str
) -> None:
    """To all: a scheduler signals every process, and a launcher that was signalled asks its ranks once more."""
    folder = tmp_path / "run"
    job = drill.start(folder, engine)
    ranks = job.ranks()
    job.wait_for_step(7)
    if to == "all":
        signal_all(number, ranks)
        job.wait_for_text("finishing this step and writing a checkpoint")
        job.launcher.send_signal(number)
        time.sleep(0.02)
        signal_all(signal.SIGTERM, ranks)
    else:
        signal_all(number, [ranks[int(to[-1])]])
    assert job.wait() != 0
    told = re.findall(r"Stopped by (.*) after step (\d+); the same command goes on from there\.", job.output)
    assert told, job.output
    assert {int(step) for _, step in told} == {newest_checkpoint(folder)} == {last_step(folder)}, job.output
    # Rank 0 alone says it, and may know no more than that another was asked.
    assert {name for name, _ in told} <= {number.name, "a signal to another process"}
    assert f"{number.name}: finishing this step and writing a checkpoint." in job.output
    assert not has_our_traceback(job.output), job.output
    check_goes_on(drill, folder, engine)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_stopped_for_five_seconds_changes_nothing(drill: Drill, tmp_path: Path, rank: int) -> None:
    job = drill.start(tmp_path / "run", TWO)
    ranks = job.ranks()
    job.wait_for_step(7)
    ranks[rank].suspend()
    time.sleep(1)
    before = last_step(tmp_path / "run")
    time.sleep(4)
    assert last_step(tmp_path / "run") == before < 24  # it was stopped, and the other waited for it
    ranks[rank].resume()
    job.finish()
    assert is_same_to_the_bit(tmp_path / "run", drill.whole(TWO))
