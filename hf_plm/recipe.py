"""Recipes as people write them: YAML files and flags, read once into a frozen `Recipe`.

What is misspelt, of the wrong kind or at odds with another value is refused in one sentence that says where it stands.
"""

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_plm.config import KNOBS, Recipe, UserError, parse_duration


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:  # the right knob of the wrong section
        close = [name for name in known if name.split(".")[-1] == word.split(".")[-1]][:1]
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}."


def _whole_number(value: Any) -> int:
    """500000, "500_000" and "5e5" alike; digits are never sent through a float, which would round long ones."""
    if isinstance(value, bool):
        raise ValueError
    try:
        return int(str(value))
    except ValueError:
        number = float(str(value))
        if not number.is_integer():
            raise ValueError from None
        return int(number)


def _convert(name: str, value: Any, where: str) -> Any:
    """The value of a knob from YAML or from a flag's text, checked against the knob's type."""
    wanted = KNOBS[name].type
    is_optional = isinstance(wanted, types.UnionType)
    if is_optional:
        if value is None or (isinstance(value, str) and value.lower() in ("auto", "none", "null")):
            return None
        wanted = next(kind for kind in typing.get_args(wanted) if kind is not types.NoneType)
    if typing.get_origin(wanted) is tuple:
        if value is None or value == "none":
            return ()
        return tuple(str(item) for item in value) if isinstance(value, list | tuple) else (str(value),)
    try:
        if wanted is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if wanted is int:
            return _whole_number(value)
        if wanted is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        also = " or auto" if is_optional else ""
        raise UserError(f"{name} takes {kinds[wanted]}{also}, not {value!r} ({where}).") from None
    if isinstance(value, dict | list):
        raise UserError(f"{name} takes one word, not {value!r} ({where}).")
    return str(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"The recipe {path} is not valid YAML: {detail}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The recipe {path} is not a text file.") from None
    if not isinstance(content, dict | None):
        raise UserError(f"The recipe {path} should hold sections such as 'data:', not {type(content).__name__}.")
    return content or {}


def recipe_names() -> list[str]:
    return sorted(path.stem for path in _recipe_folder().glob("*.yaml"))


def _recipe_folder() -> Path:
    """The recipes that a wheel carries, or `launch/recipes` of the clone that this package is imported from."""
    packaged = Path(str(resources.files("hf_plm"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "launch" / "recipes"


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name (`esm2_8m`)."""
    if Path(name).is_file():
        if Path(name).suffix not in (".yaml", ".yml"):
            raise UserError(
                f"{name} is no recipe (.yaml): name one, such as mine, and give sequences as --data.train {name}."
            )
        return Path(name)
    packaged = _recipe_folder() / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if packaged.is_file() and (packaged.stem == name or not Path(name).parent.is_dir()):
        return packaged
    raise UserError(f"There is no recipe {name!r}{_suggestion(name, recipe_names())}")


def load_recipe(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file, or of a name such as `demo`, with knobs overridden by full name.

    Raises `UserError` for an unknown section or knob, a value of the wrong type, or values that do not fit together.
    """
    path = find_recipe(str(recipe))
    values: dict[str, Any] = {}
    sections = [section.name for section in fields(Recipe)]
    for section, knobs in _read_yaml(path).items():
        if section == "corpus":  # config.yaml of a run is a recipe too, and says what it ran on
            continue
        if section not in sections:
            raise UserError(f"{path} has an unknown section {section!r}{_suggestion(str(section), sections)}")
        if not isinstance(knobs, dict):
            raise UserError(f"Section {section!r} of {path} should hold 'knob: value' lines, not {knobs!r}.")
        for name, value in knobs.items():
            if f"{section}.{name}" not in KNOBS:
                raise UserError(
                    f"{path} has an unknown knob {section}.{name}{_suggestion(f'{section}.{name}', list(KNOBS))}"
                )
            values[f"{section}.{name}"] = _convert(f"{section}.{name}", value, str(path))
    for name, value in (overrides or {}).items():
        if name not in KNOBS:
            known = [f"--{known}" for known in KNOBS]
            raise UserError(f"Unknown flag --{name}{_suggestion(f'--{name}', known)}")
        values[name] = _convert(name, value, f"flag --{name}")
    if overrides and "schedule.steps" in overrides:
        if "schedule.budget" in overrides:
            raise UserError(
                "A run has a length in steps or in time: give --schedule.steps or --schedule.budget, not both."
            )
        values["schedule.budget"] = None  # the flag is nearer than the recipe's budget
    is_size_given = "model.preset" in values and "init.from" not in (overrides or {})
    if values.get("init.from") and "model.preset" not in (overrides or {}) and not is_size_given:
        values["model.preset"] = "auto"  # the size is that of the weights
    loaded = Recipe().replace(**{name.replace(".", "__"): value for name, value in values.items()})
    _check(loaded)
    return loaded


_MUST_BE_POSITIVE = (
    "data.crop",
    "batch.tokens",
    "batch.micro_batches",
    "schedule.steps",
    "checkpoint.keep",
    "checkpoint.every",
    "hub.every",
    "validation.every",
    "validation.sequences",
    "validation.final_sequences",
    "run.log_every",
    "optimizer.learning_rate",
    "spike.deviations",
)


_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_RANGES = {
    "data.max_rejected": (0, 1),
    "data.workers": (0, 1024),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.epsilon": (1e-30, 1),
    "optimizer.weight_decay": (0, 10),
    "optimizer.clip": (0, 1e9),
    "schedule.warmup": (0, 10**9),
    "schedule.decay_share": (1e-6, 1),
    "schedule.final_ratio": (0, 1),
    "run.seed": (0, 2**32 - 1),
}


def _check(recipe: Recipe) -> None:
    def require(is_right: bool, sentence: str) -> None:
        if not is_right:
            raise UserError(sentence)

    for name in _MUST_BE_POSITIVE:
        value = recipe[name]
        require(value is None or value > 0, f"{name} must be above 0, not {value}.")
    require(recipe.data.crop >= 3, f"data.crop must be at least 3 tokens, not {recipe.data.crop}.")
    require(
        recipe.data.crop <= recipe.batch.tokens,
        f"data.crop ({recipe.data.crop}) must not exceed batch.tokens ({recipe.batch.tokens}): "
        "a window has to fit into a micro-batch.",
    )
    mask = recipe.mask
    require(0 < mask.rate <= 1, f"mask.rate is a share above 0 and at most 1, not {mask.rate}.")
    shares_fit = mask.mask >= 0 and mask.random >= 0 and mask.mask + mask.random <= 1
    require(shares_fit, f"mask.mask ({mask.mask}) and mask.random ({mask.random}) are shares that sum to at most 1.")
    for name, words in {
        "data.illegal": ("reject", "x"),
        "data.gaps": ("reject", "strip"),
        "data.duplicates": ("drop", "keep"),
        "run.precision": ("auto", "fp32", "bf16"),
        "spike.action": ("none", "skip", "rollback"),
    }.items():
        value = recipe[name]
        require(value in words, f"{name} is one of {', '.join(words)}, not {value!r}.")
    preset, hub = recipe.model.preset, recipe.hub
    require(
        preset != "auto" or recipe.init.from_ is not None,
        "model.preset auto takes the size of published weights: name them with --init.from.",
    )
    for name in ("hub.push", "hub.dataset"):
        value = recipe[name]
        require(
            value is None or _REPOSITORY.fullmatch(value) is not None,
            f"{name} is a repository on the Hub such as user/my-plm, not {value!r}.",
        )
    require(hub.every is None or hub.push is not None, "hub.every needs a repository to push to: --hub.push user/NAME.")
    for tracker in recipe.run.trackers:
        known = ("tensorboard", "wandb", "trackio")
        require(tracker in known, f"run.trackers knows {', '.join(known)} and none, not {tracker!r}.")
    for name, (low, high) in _RANGES.items():
        value = recipe[name]
        require(value is None or low <= value <= high, f"{name} must lie between {low:g} and {high:g}, not {value}.")
    if recipe.schedule.budget is not None:
        parse_duration(recipe.schedule.budget)
