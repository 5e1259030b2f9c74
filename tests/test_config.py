"""A recipe is read once, checked, and a misspelt knob is refused in the file as on the command line."""

from pathlib import Path

import pytest
import yaml

from hf_plm.cli import parse_knobs
from hf_plm.config import KNOBS, Recipe, UserError, parse_duration
from hf_plm.recipe import load_recipe, recipe_names


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def test_every_packaged_recipe_loads() -> None:
    assert {"demo", "mine", "esm2_8m", "esm2_35m", "esm2_150m", "esm2_650m", "esm2_3b", "esm2_15b"} == set(
        recipe_names()
    )
    for name in recipe_names():
        load_recipe(name)


@pytest.mark.parametrize("name", ["esm2_8m", "esm2_650m"])
def test_published_recipes_see_a_trillion_tokens(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.batch.micro_batches is not None
    tokens = recipe.schedule.steps * recipe.batch.micro_batches * recipe.batch.tokens
    assert tokens == pytest.approx(1.05e12, rel=0.01)


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "model: {preset: 35m}\nschedule: {steps: 1_000}\nmask: {rate: 0.2}\n")
    recipe = load_recipe(path, {"schedule.steps": "20", "model.activation_checkpointing": "true"})
    assert (recipe.model.preset, recipe.schedule.steps, recipe.mask.rate) == ("35m", 20, 0.2)
    assert recipe.model.activation_checkpointing is True
    assert recipe.optimizer.learning_rate == Recipe().optimizer.learning_rate


def test_a_recipe_survives_its_own_yaml(tmp_path: Path) -> None:
    recipe = load_recipe("mine", {"data.train": ["a.fasta", "b.fasta"], "run.trackers": "none"})
    assert load_recipe(recipe_file(tmp_path, recipe.to_yaml())) == recipe
    assert yaml.safe_load(recipe.to_yaml())["batch"]["micro_batches"] == "auto"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {crap: 3}", "unknown knob data.crap; did you mean data.crop?"),
        ("date: {crop: 3}", "unknown section 'date'; did you mean data?"),
        ("data: 3", "Section 'data' of .* should hold 'knob: value' lines"),
        ("data: [", "is not valid YAML"),
        ("- a", "should hold sections"),
        ("data: {crop: many}", "data.crop takes a whole number, not 'many'"),
        ("data: {crop: 1.5}", "data.crop takes a whole number, not 1.5"),
        ("data: {crop: true}", "data.crop takes a whole number, not True"),
        ("mask: {rate: '15%'}", "mask.rate takes a number"),
        ("mask: {rate: 1.5}", "mask.rate is a share"),
        ("mask: {mask: 0.9, random: 0.2}", "sum to at most 1"),
        ("model: {token_dropout: perhaps}", "model.token_dropout takes true or false"),
        ("data: {crop: 9000}", r"data.crop \(9000\) must not exceed batch.tokens \(8192\)"),
        ("schedule: {budget: tomorrow}", "A duration such as 30m"),
        ("schedule: {steps: 0}", "schedule.steps must be above 0"),
        ("run: {trackers: [tensorbord]}", "run.trackers knows"),
        ("optimizer: {clip: -1}", "optimizer.clip must lie between 0 and"),
        ("optimizer: {beta1: 1.5}", "optimizer.beta1 must lie between"),
        ("run: {seed: 4294967296}", "run.seed must lie between"),
        ("schedule: {warmup: -5}", "schedule.warmup must lie between"),
        ("data: {illegal: ignore}", "data.illegal is one of reject, x"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(recipe_file(tmp_path, text))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.trian", "x"], "Unknown flag --data.trian; did you mean --data.train"),
        (["--crop", "5"], "did you mean --data.crop"),
        (["--data.crop", "5", "6"], "takes one value, not 2"),
        (["--data.crop"], "takes one value, not 0"),
        (["--data.crop", "5", "--data.crop", "6"], "given twice"),
        (["stray"], "'stray' is not a flag"),
        (["--data.train"], "--data.train needs a value"),
    ],
)
def test_mistakes_in_flags(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe("demo", parse_knobs(flags))


def test_flags_as_people_write_them() -> None:
    flags = ["--data.train", "a.fasta", "b.fasta", "--data.crop=64", "--model.activation_checkpointing"]
    recipe = load_recipe("demo", parse_knobs([*flags, "--schedule.budget", "1h30m", "--run.trackers", "none"]))
    assert recipe.data.train == ("a.fasta", "b.fasta")
    assert recipe.data.crop == 64
    assert recipe.model.activation_checkpointing is True
    assert recipe.budget_seconds == 5400
    assert recipe.run.trackers == ()


def test_steps_on_the_command_line_replace_the_budget_of_the_recipe(tmp_path: Path) -> None:
    assert load_recipe("mine", {"schedule.steps": "100"}).schedule.budget is None
    with pytest.raises(UserError, match="not both"):
        load_recipe("mine", {"schedule.steps": "100", "schedule.budget": "1h"})


def test_the_config_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("demo", {"mask.rate": "0.3"})
    assert load_recipe(recipe_file(tmp_path, recipe.to_yaml() + "corpus: {folder: /x, train: a}\n")) == recipe


def test_sequences_in_place_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.fasta").write_text(">a\nMKV\n")
    with pytest.raises(
        UserError, match=r"is no recipe \(\.yaml\): name one, such as mine, and give sequences as --data"
    ):
        load_recipe(tmp_path / "mine.fasta")


def test_whole_numbers_are_not_rounded(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "schedule: {steps: 9007199254740993}")
    assert load_recipe(path).schedule.steps == 9007199254740993
    assert load_recipe(path, {"schedule.steps": "5e5"}).schedule.steps == 500_000


def test_an_unknown_recipe_is_named_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="no recipe 'esm2_8n'; did you mean esm2_8m"):
        load_recipe("esm2_8n")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), ("2d", 172800), ("1h30m", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["8", "h", "-3h", "8 hours", "0h", ""])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError):
        parse_duration(text)


def test_every_knob_says_what_it_means() -> None:
    assert all(item.meaning for item in KNOBS.values())
    assert len(KNOBS) < 60
