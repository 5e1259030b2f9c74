"""Some faults after one another in one run, and it ends as if nothing had happened: the part of the drills for CI.

On two processes: a NaN on one rank, a rank killed, a worker process killed. The drills in full: `make faults`.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from drill import (
    FAULTY,
    SMALL,
    TWO,
    Drill,
    check_mistake,
    checkpoints,
    copy_of,
    difference,
    is_same_to_the_bit,
    is_whole,
    last_step,
    newest_checkpoint,
)
from safetensors.torch import load_file, save_file

import hf_plm
from hf_plm.training.checkpoint import checksum, sync_and_hash

WORKERS = {"data.workers": "2"}
LOST_WITHIN_SECONDS = 60.0
"""A collective's own timeout is 30 minutes; torch's launcher gives a process that it ends 30 seconds."""


@pytest.fixture(scope="module")
def hurt(drill: Drill, rows: dict[str, float]) -> Path:
    """The folder of the run that met them all; what each said is checked on the way."""
    folder = drill.folder / "hurt"
    job = drill.start(folder, TWO, WORKERS, FAULTY, {"HF_PLM_FAULT": "nan:1:7"})
    told = check_mistake(
        job, r"The loss of step 7 is nan and its gradient norm nan: the run stopped, the last checkpoint"
    )
    assert f"hf-plm inspect {folder} --step 7" in told
    assert newest_checkpoint(folder) == 5

    job = drill.start(folder, TWO, WORKERS)
    ranks = job.ranks()
    job.wait_for_step(12)
    began = time.monotonic()
    ranks[1].kill()
    check_mistake(job, r"Process 0 lost another process of the run .* the last checkpoint is whole")
    rows["seconds_until_the_job_ended_after_a_lost_rank"] = round(job.ended - began, 1)
    rows["seconds_until_its_last_worker_had_ended"] = round(time.monotonic() - began, 1)
    assert time.monotonic() - began < LOST_WITHIN_SECONDS
    assert newest_checkpoint(folder) == 10

    job = drill.start(folder, TWO, WORKERS)
    workers = job.workers(1)
    job.wait_for_step(12)
    workers[0].kill()
    check_mistake(job, r"Reading the next step failed .* a checkpoint was written, and the same command goes on")
    assert newest_checkpoint(folder) == last_step(folder) >= 12
    assert all(map(is_whole, checkpoints(folder)))
    drill.start(folder, TWO, WORKERS).finish()
    return folder


def test_a_run_that_met_a_nan_a_lost_rank_and_a_dead_worker_ends_as_if_nothing_had_happened(
    hurt: Path, drill: Drill
) -> None:
    whole = drill.whole(TWO)
    assert difference(hurt, whole) <= 1e-5
    assert is_same_to_the_bit(hurt, whole)


def test_twin_moments_that_were_lost_in_a_resume_are_seen(hurt: Path, drill: Drill, tmp_path: Path) -> None:
    """What the comparison above would miss, had it no power. In this process: it needs no launcher."""
    folder = copy_of(hurt, tmp_path / "run")
    newest = checkpoints(folder)[-2]
    state = json.loads((newest / "state.json").read_text())
    for path in newest.glob("optimizer-*.safetensors"):
        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
        state["sha256"][path.name] = sync_and_hash(path)
    del state["checksum"]
    (newest / "state.json").write_text(json.dumps({**state, "checksum": checksum(state)}))
    later = checkpoints(folder)[-1]
    later.rename(tmp_path / later.name)
    hf_plm.pretrain(hf_plm.load_recipe("demo", {**SMALL, "data.train": str(drill.train), "run.folder": str(folder)}))
    assert difference(folder, hurt) > 1e-5
