"""Runs killed with SIGKILL at random moments, again and again until they finish, also inside a save.

HF_PLM_KILLS says how many kills in all (50), HF_PLM_KILL_SEED which moments. A kill counts as inside a save where it
left a `.partial-step-*` folder newer than every checkpoint, and as inside a removal where it left an older one; what an
earlier kill had left, and this one was too early to have swept away, does not count again.
"""

import os
import random
import time

import pytest
from drill import (
    ONE,
    TWO,
    Drill,
    Engine,
    Job,
    checkpoints,
    difference,
    is_same_to_the_bit,
    is_whole,
    left_half_done,
    newest_checkpoint,
)

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("HF_PLM_KILLS", "50"))
SEED = int(os.environ.get("HF_PLM_KILL_SEED", str(time.time_ns() % 1_000_000)))
KNOBS = {"schedule.steps": "150", "checkpoint.every": "3", "checkpoint.keep": "2", "validation.every": "10"}
MOMENTS = {"start": 2, "training": 3, "save": 5}
"""What a kill waits for, and how often: some moment since the launch, since the first step, since a save began."""
LONGEST_SECONDS = {"start": 12.0, "training": 3.0, "save": 0.03}


def kill_at(job: Job, moment: str, generator: random.Random) -> bool:
    """Whether the job was still running when its moment came."""

    def has_begun() -> bool:
        if moment == "start":
            return True
        if "\nrun   " not in job.output:
            return False
        if not job.ranks():
            return False
        return moment == "training" or any((job.folder / "checkpoints").glob(".partial-step-*"))

    while not has_begun():
        if job.launcher.poll() is not None:
            return False
        time.sleep(0.001 if moment == "save" else 0.05)
    time.sleep(generator.uniform(0, LONGEST_SECONDS[moment]))
    if job.launcher.poll() is not None:
        return False
    job.kill()
    return True


@pytest.mark.parametrize(("engine", "quota"), [(ONE, (KILLS + 1) // 2), (TWO, KILLS // 2)], ids=["one", "two"])
def test_killed_runs_end_as_if_nothing_had_happened(
    drill: Drill, rows: dict[str, float], engine: Engine, quota: int
) -> None:
    generator = random.Random(f"{SEED} {engine}")
    whole = drill.whole(engine, KNOBS)
    counts = dict.fromkeys(("kills", "kills_inside_a_save", "kills_inside_a_removal", "resumes_bit_identical"), 0)
    counts |= {f"kills_{moment}": 0 for moment in MOMENTS}
    largest, chain = 0.0, 0
    while counts["kills"] < quota or chain == 0:
        folder, kills_of_chain = drill.folder / f"killed_{engine}_{chain}", 0
        chain += 1
        while True:
            left_before = left_half_done(folder)
            job = drill.start(folder, engine, KNOBS)
            (moment,) = generator.choices(list(MOMENTS), list(MOMENTS.values()))
            if counts["kills"] == quota or not kill_at(job, moment, generator):
                job.finish()
                break
            kills_of_chain += 1
            left = [step for step, _ in left_half_done(folder) - left_before]
            newest = newest_checkpoint(folder)
            counts["kills"] += 1
            counts[f"kills_{moment}"] += 1
            counts["kills_inside_a_save"] += any(step > newest for step in left)
            counts["kills_inside_a_removal"] += any(step <= newest for step in left)
            assert all(map(is_whole, checkpoints(folder))), f"{SEED}: kill {counts['kills']}"
        assert (folder / "summary.json").exists(), job.output
        largest = max(largest, difference(folder, whole))
        counts["resumes_bit_identical"] += kills_of_chain * is_same_to_the_bit(folder, whole)
    rows["kill_seed"] = SEED
    for name, count in counts.items():
        rows[name] = rows.get(name, 0) + count
        rows[f"{name}_{engine}"] = count
    rows[f"killed_runs_finished_{engine}"] = chain
    rows[f"largest_difference_after_kills_{engine}"] = largest
    assert largest == 0 if engine == ONE else largest <= 1e-5
    assert engine != ONE or counts["resumes_bit_identical"] == counts["kills"]
    assert counts["kills_inside_a_save"] > 0 or quota < 5
