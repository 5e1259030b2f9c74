"""A loss spike is told from noise, and dropped or gone back from as the recipe says."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hf_plm
from hf_plm.config import UserError
from hf_plm.training.inspection import inspect_folder
from hf_plm.training.spikes import MAX_IN_A_ROW, MIN_STEPS, Trend


def trend_of(losses: list[float]) -> Trend:
    trend = Trend()
    for loss in losses:
        trend = trend.then(loss)
    return trend


def test_noise_is_no_spike_and_a_jump_is() -> None:
    losses = (2.9 + 0.05 * np.random.default_rng(0).standard_normal(500)).tolist()
    assert not any(trend_of(losses[:end]).is_spike(losses[end], 6.0) for end in range(450, 499))
    trend = trend_of(losses)
    assert trend.mean == pytest.approx(2.9, abs=0.03)
    assert math.sqrt(trend.variance) == pytest.approx(0.05, rel=0.3)
    assert trend.is_spike(3.3, 6.0)
    assert not trend.is_spike(2.5, 6.0)  # lower is better


def test_a_falling_loss_is_no_spike() -> None:
    losses = [3.5 - 0.01 * step for step in range(80)]
    assert not any(trend_of(losses[:end]).is_spike(losses[end], 1.0) for end in range(80))


def test_the_first_losses_cannot_be_judged_unless_they_are_not_finite() -> None:
    trend = trend_of([2.9] * (MIN_STEPS - 1))
    assert not trend.is_spike(100.0, 6.0)
    assert trend.then(2.9).is_spike(100.0, 6.0)
    assert trend.is_spike(math.nan, 6.0)
    assert Trend().is_spike(math.inf, 6.0)


@pytest.fixture(scope="module")
def odd_fasta(family_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated families and a few sequences of tryptophan alone, whose loss is far above all others."""
    import gzip

    path = tmp_path_factory.mktemp("odd") / "odd.fasta"
    odd = "".join(f">odd{number}\n{'W' * (150 + number)}\n" for number in range(12))
    path.write_text(gzip.decompress(family_fasta.read_bytes()).decode() + odd)
    return path


def run(fasta: Path, folder: Path, **knobs: str) -> list[dict[str, Any]]:
    """A run whose steps hold one window or two each; its lines."""
    small = {
        "data.train": str(fasta),
        "run.folder": str(folder),
        "run.trackers": "none",
        "run.log_every": "1",
        "data.crop": "128",
        "batch.tokens": "128",
        "batch.micro_batches": "1",
        "schedule.steps": "60",
        "checkpoint.every": "10",
        "checkpoint.keep": "9",
        "validation.every": "60",
        "spike.deviations": "4",
        "optimizer.learning_rate": "3e-3",
    }
    hf_plm.pretrain(hf_plm.load_recipe("demo", {**small, **{k.replace("__", "."): v for k, v in knobs.items()}}))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(odd_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    lines = run(odd_fasta, tmp_path_factory.mktemp("plain") / "run")
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def skipping(odd_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skip") / "run"
    run(odd_fasta, folder, spike__action="skip")
    return folder


def training_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines if "loss" in line]


def test_a_spike_is_dropped_and_counted(plain: list[dict[str, Any]], skipping: Path) -> None:
    lines = training_lines(skipping)
    dropped = [line["step"] for line in lines if line["gradient_norm"] is None]
    assert dropped
    assert lines[-1]["skipped"] == len(dropped)
    assert [line["place"] for line in lines] == [line["place"] for line in plain]  # the same sequences at each step
    first = dropped[0]
    same = [(a["loss"], b["loss"]) for a, b in zip(lines, plain, strict=True) if a["step"] <= first]
    assert all(a == b for a, b in same)
    assert lines[first]["loss"] != plain[first]["loss"]  # the step after it has weights that never saw the spike


def test_a_run_that_drops_updates_resumes_bit_for_bit(skipping: Path, odd_fasta: Path, tmp_path: Path) -> None:
    """The count of updates and the trend of the losses are in the checkpoint."""
    shutil.copytree(skipping, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    first = next(line["step"] for line in training_lines(skipping) if line["gradient_norm"] is None)
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > math.ceil(first / 10) * 10:
            shutil.rmtree(checkpoint)
    run(odd_fasta, tmp_path / "run", spike__action="skip")
    assert training_lines(tmp_path / "run") == training_lines(skipping)


def test_a_spike_is_gone_back_from_and_its_sequences_passed_over(
    plain: list[dict[str, Any]], odd_fasta: Path, tmp_path: Path
) -> None:
    lines = run(odd_fasta, tmp_path / "run", spike__action="rollback")
    returns = [line for line in lines if "rolled_back_from" in line]
    assert returns
    steps = [line["step"] for line in lines if "place" in line]
    assert steps == list(range(1, 61))
    first = returns[0]
    after_spike = next(line for line in plain if line["step"] == first["rolled_back_from"] + 1)
    after_return = next(line for line in lines if line["step"] == first["step"] + 1 and "place" in line)
    assert (after_return["epoch"], after_return["place"]) >= (after_spike["epoch"], after_spike["place"])
    last = [line for line in returns if line["step"] == first["step"]][-1]
    assert (after_return["epoch"], after_return["place"]) == (last["to_epoch"], last["to_place"])
    shown = inspect_folder(tmp_path / "run", first["step"])
    assert f"begins at epoch {last['to_epoch']}, place {last['to_place']}:" in shown


def test_losses_that_stay_nan_stop_the_run(odd_fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"losses of {MAX_IN_A_ROW} steps in a row, up to step \d+, are spikes"):
        run(odd_fasta, tmp_path / "skip", spike__action="skip", optimizer__learning_rate="1e30")
    with pytest.raises(UserError, match=r"is a spike: nan\. There is no checkpoint yet to go back to"):
        run(odd_fasta, tmp_path / "rollback", spike__action="rollback", optimizer__learning_rate="1e30")
