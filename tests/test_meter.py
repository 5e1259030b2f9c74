"""What a person sees: durations, the plan and its warning, and metrics without repeats."""

import json
from pathlib import Path

import pytest

from hf_plm.recipe import load_recipe
from hf_plm.training.meter import Meter, keep_lines_until


def meter(folder: Path, **knobs: str) -> Meter:
    overrides = {name.replace("__", "."): value for name, value in knobs.items()}
    recipe = load_recipe("demo", {"run.trackers": "none", "run.folder": str(folder), **overrides})
    return Meter(recipe, folder, step=0, seconds=0.0, is_main=True)


@pytest.mark.parametrize(("steps", "is_long"), [("100", False), ("100000000", True)])
def test_a_long_run_is_warned_of_with_the_flag_that_shortens_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, steps: str, is_long: bool
) -> None:
    own = meter(tmp_path, schedule__steps=steps)
    own.began -= 10.0  # ten steps took ten seconds
    own.say_plan(10, tokens_per_step=2000, epoch_tokens=1_000_000)
    own.close()
    printed = capsys.readouterr().out
    assert f"Plan: {int(steps):,} steps of 2,000 tokens" in printed
    assert "epochs; ends" in printed
    assert ("Warning: " in printed and "--schedule.budget 8h" in printed) is is_long


def test_a_budget_is_planned_in_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = meter(tmp_path, schedule__budget="110s")
    own.began -= 10.0
    own.say_plan(10, tokens_per_step=2000, epoch_tokens=1_000_000)
    own.close()
    assert "Plan: about 110 steps of 2,000 tokens, " in capsys.readouterr().out


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1}, {"step": 2}, {"step": 2, "validation_loss": 1.0, "final": True}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    keep_lines_until(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_a_line_is_json_even_where_a_number_is_not(tmp_path: Path) -> None:
    own = meter(tmp_path)
    own.write({"step": 1, "validation_loss_masked": float("nan")})
    own.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "validation_loss_masked": None}
