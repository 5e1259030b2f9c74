"""Disks that are full, checkpoints and corpora that are damaged: told in one sentence, and nothing else is lost."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from drill import (
    ONE,
    TWO,
    ZERO2,
    Drill,
    Engine,
    check_mistake,
    checkpoints,
    copy_of,
    is_same_to_the_bit,
    is_whole,
    last_step,
    lines_of,
    signal_all,
    small_disk,
)

pytestmark = pytest.mark.slow

needs_mount = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="only root can mount a small disk"
)
KEEP_2 = {"checkpoint.keep": "2"}


@needs_mount
@pytest.mark.parametrize("engine", [ONE, TWO, ZERO2], ids=str)
def test_a_disk_that_is_full_in_a_save(drill: Drill, tmp_path: Path, engine: Engine) -> None:
    """Room for two checkpoints of 10 MB and for most of a third."""
    folder = tmp_path / "run"
    knobs = {**KEEP_2, "run.trackers": "tensorboard"}
    with small_disk(folder, 27 * 1024) as resize:
        job = drill.start(folder, engine, knobs)
        check_mistake(job, r"The checkpoint of step 15 could not be written to .*No space left .* are whole")
        assert [path.name for path in checkpoints(folder)] == ["step-00000005", "step-00000010"]
        assert all(map(is_whole, checkpoints(folder)))
        assert not list(folder.rglob(".partial-*"))
        resize(200 * 1024)
        assert "step-00000010 (step 10" in drill.start(folder, engine, knobs).finish()
        assert is_same_to_the_bit(folder, drill.whole(engine))


@needs_mount
@pytest.mark.parametrize("engine", [ONE, TWO], ids=str)
def test_a_disk_that_is_full_between_saves(drill: Drill, tmp_path: Path, engine: Engine) -> None:
    """Somebody else fills it: the line of a step is what cannot be written, on the main process alone."""
    folder = tmp_path / "run"
    knobs = {"checkpoint.every": "1000", "run.trackers": "tensorboard"}
    with small_disk(folder, 40 * 1024) as resize:
        job = drill.start(folder, engine, knobs)
        job.wait_for_step(4)
        fill_the_disk(folder / "ballast.log")
        check_mistake(job, r"[Dd]isk is full|No space left")
        assert last_step(folder) < 24
        (folder / "ballast.log").unlink()
        resize(200 * 1024)
        drill.start(folder, engine, knobs).finish()
        assert is_same_to_the_bit(folder, drill.whole(engine))


def fill_the_disk(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def flip_a_bit(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("engine", [ONE, TWO], ids=str)
@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (truncate, "model-*"),
        (flip_a_bit, "optimizer-*"),
        (Path.unlink, "optimizer-*"),
        (lambda path: path.write_text(path.read_text()[:100]), "state.json"),
        (None, ""),
    ],
    ids=["truncated", "flipped", "missing", "state", "twin"],
)
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(
    drill: Drill, tmp_path: Path, engine: Engine, damage: Callable[[Path], object] | None, pattern: str
) -> None:
    """In the share of the last process; the twin is not damaged, and goes on from the newest."""
    folder = copy_of(drill.whole(engine), tmp_path / "run", 15)
    newest = checkpoints(folder)[-1]
    if damage:
        victims = sorted(newest.glob(pattern))
        assert len(victims) == (engine.processes if pattern.endswith("*") else 1)
        damage(victims[-1])
    output = drill.start(folder, engine).finish()
    assert output.count(f"The checkpoint {newest} is damaged (") == bool(damage)
    assert output.count(f"it is now called damaged-{newest.name}.") == bool(damage)
    assert f"{'step-00000010 (step 10' if damage else 'step-00000015 (step 15'}, " in output
    assert is_same_to_the_bit(folder, drill.whole(engine))


@pytest.mark.parametrize("engine", [ONE, TWO], ids=str)
@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_shard_of_the_corpus_is_refused_before_anything_is_trained(
    drill: Drill, tmp_path: Path, engine: Engine, damage: Callable[[Path], object]
) -> None:
    from hf_plm.data.prepare import prepare

    corpus, folder = tmp_path / "corpus", tmp_path / "run"
    prepare([drill.train], corpus, show_progress=False)
    knobs = {"data.train": str(corpus)}
    job = drill.start(folder, engine, knobs)
    job.ranks()
    job.wait_for_checkpoint(5)
    signal_all(signal.SIGKILL, job.processes())
    job.kill()
    before = lines_of(folder)

    (shard,) = [path for path in corpus.rglob("*.parquet") if "train" in path.as_posix().removeprefix(str(corpus))]
    shutil.copy(shard, tmp_path / "copy")
    damage(shard)
    job = drill.start(folder, engine, knobs)
    check_mistake(job, rf"{shard} (has [\d,]+ bytes|is missing) where corpus\.json says [\d,]+; prepare the corpus")
    assert "Going on" not in job.output
    assert lines_of(folder) == before

    shutil.copy(tmp_path / "copy", shard)
    drill.start(folder, engine, knobs).finish()
    stored = yaml.safe_load((folder / "config.yaml").read_text())["corpus"]
    assert stored["train"] == yaml.safe_load((drill.whole(engine) / "config.yaml").read_text())["corpus"]["train"]
    assert is_same_to_the_bit(folder, drill.whole(engine))
