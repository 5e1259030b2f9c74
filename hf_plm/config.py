"""Every knob of a run, once: its name, default, unit, meaning and source.

A recipe is a YAML file of sections; a flag `--section.knob value` overrides it. It is parsed once, frozen, and never
changed afterwards: what depends on the machine (knobs left at `auto`) is resolved into a new recipe by `replace`.
Numbers marked ESM-2 are from Lin et al. 2023 (Science 379:1123), supplementary A.2.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what was expected, what came, where, and what to do."""


def knob(default: Any, meaning: str, may_change: bool = False) -> Any:
    """A field of a section. `may_change`: a run may be resumed with another value, since its numbers stay the same."""
    return field(default=default, metadata={"meaning": meaning, "may_change": may_change})


@dataclass(frozen=True)
class Model:
    preset: str = knob("8m", "size of the network: demo, 8m, 35m, 150m, 650m, 3b, 15b (ESM-2)")
    token_dropout: bool = knob(True, "zero the embedding of <mask> and rescale the rest, per sequence (ESM-2)")
    activation_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, about a third slower", may_change=True
    )


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = knob(
        (), "FASTA (.gz .zst .bz2 too), Parquet, a glob, a folder, a prepared corpus, or a dataset on the Hub"
    )
    validation: tuple[str, ...] = knob(
        (), "held-out sequences; left out, 1% of train (at least 20, at most 2,000 or half) is held out by a hash"
    )
    crop: int = knob(1024, "tokens of the longest window, <cls> and <eos> included (ESM-2)")
    sequence_column: str | None = knob(None, "column that holds the sequences, where its name cannot be guessed")
    illegal: str = knob("reject", "records with illegal letters: reject, or x to turn each such letter into X")
    gaps: str = knob("reject", "records with - or . in them: reject, or strip to unalign them")
    duplicates: str = knob("drop", "records with a sequence that came before: drop or keep")
    max_rejected: float = knob(0.1, "share of rejected records above which preparation stops")
    cache: str | None = knob(None, "where prepared corpora are kept (default: $HF_PLM_CACHE or ~/.cache/hf_plm)", True)
    workers: int | None = knob(None, "processes that read ahead; auto: 0 on a CPU, 4 per GPU", may_change=True)


@dataclass(frozen=True)
class Batch:
    tokens: int = knob(8192, "tokens of one micro-batch: what one forward pass of one process takes")
    micro_batches: int | None = knob(
        256, "micro-batches per step, over all processes (256 x 8,192 = ESM-2's 2 million); auto: fit to the budget"
    )


@dataclass(frozen=True)
class Mask:
    rate: float = knob(0.15, "share of residues that become targets (BERT; ESM-2)")
    mask: float = knob(0.8, "share of targets shown as <mask> (BERT; ESM-2)")
    random: float = knob(0.1, "share of targets shown as a random standard residue (BERT; ESM-2); the rest is kept")


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = knob(4e-4, "peak learning rate of AdamW (ESM-2; 1.6e-4 for 15B)")
    beta1: float = knob(0.9, "decay of the first moment (ESM-2)")
    beta2: float = knob(0.98, "decay of the second moment (ESM-2)")
    epsilon: float = knob(1e-8, "AdamW's epsilon (ESM-2)")
    weight_decay: float = knob(0.01, "decoupled decay; never on biases and layer norms (ESM-2; 0.1 for 15B)")
    clip: float = knob(1.0, "largest norm of the gradient; 0 switches clipping off (ours; ESM-2 names none)")


@dataclass(frozen=True)
class Schedule:
    steps: int = knob(500_000, "optimizer steps (ESM-2); ignored where a budget is given")
    budget: str | None = knob(None, "wall-clock length of the run instead of a number of steps, such as 8h or 30m")
    warmup: int | None = knob(None, "steps of linear warm-up; auto: 5% of the steps, at most 2,000 (ESM-2)")
    decay_share: float = knob(0.9, "share of the run over which the rate falls linearly (ESM-2)")
    final_ratio: float = knob(0.1, "final learning rate over the peak (ESM-2)")


@dataclass(frozen=True)
class Validation:
    every: int | None = knob(None, "steps between validations; auto: 20 of them in a run", may_change=True)
    sequences: int | None = knob(
        None, "held-out sequences used during the run; auto: 20 to 1,000, at most 5% of the work", may_change=True
    )
    final_sequences: int = knob(2000, "held-out sequences used at the end, a fixed choice by hash", may_change=True)


@dataclass(frozen=True)
class Checkpoint:
    every: int | None = knob(None, "steps between checkpoints; auto: 20 of them, at most 1,000 apart", may_change=True)
    keep: int = knob(2, "newest checkpoints kept", may_change=True)


@dataclass(frozen=True)
class Run:
    folder: str | None = knob(None, "where the run writes everything", may_change=True)
    seed: int = knob(0, "seed of weights, order, crops and corruption")
    precision: str = knob("auto", "fp32, bf16, or auto: what the launcher says, else bf16 on GPUs that have it")
    log_every: int = knob(10, "steps between lines of metrics", may_change=True)
    trackers: tuple[str, ...] = knob(("tensorboard",), "tensorboard, wandb, trackio; none to switch off", True)


@dataclass(frozen=True)
class Recipe:
    """All knobs of one run. Build one with `load_recipe`."""

    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    mask: Mask = Mask()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()

    @property
    def run_folder(self) -> Path:
        if self.run.folder is None:
            raise UserError("The run has no folder; say where it should write with --run.folder runs/NAME.")
        return Path(self.run.folder)

    @property
    def cache_folder(self) -> Path:
        return Path(self.data.cache or os.environ.get("HF_PLM_CACHE") or Path.home() / ".cache" / "hf_plm").expanduser()

    @property
    def budget_seconds(self) -> float | None:
        return None if self.schedule.budget is None else parse_duration(self.schedule.budget)

    def replace(self, **values: Any) -> "Recipe":
        """A copy with knobs set, `section__knob=value`; values must already have their types."""
        recipe = self
        for name, value in values.items():
            section, knob_name = name.split("__")
            changed = dataclasses.replace(getattr(recipe, section), **{knob_name: value})
            recipe = dataclasses.replace(recipe, **{section: changed})
        return recipe

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and knob; `auto` where a knob is not resolved."""
        plain = dataclasses.asdict(self)
        return {
            section: {name: _plain(self, section, name, value) for name, value in knobs.items()}
            for section, knobs in plain.items()
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _plain(recipe: Recipe, section: str, name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return "auto" if value is None and KNOBS[f"{section}.{name}"].may_be_auto else value


@dataclass(frozen=True)
class Knob:
    name: str
    type: Any
    default: Any
    meaning: str
    may_change: bool

    @property
    def may_be_auto(self) -> bool:
        """Whether `auto` leaves the choice to the machine."""
        return self.default == "auto" or (isinstance(self.type, types.UnionType) and int in typing.get_args(self.type))


def _all_knobs() -> dict[str, Knob]:
    knobs = {}
    for section in fields(Recipe):
        hints = typing.get_type_hints(section.type)
        for item in fields(section.type):  # type: ignore[arg-type]
            name = f"{section.name}.{item.name}"
            knobs[name] = Knob(
                name, hints[item.name], item.default, item.metadata["meaning"], item.metadata["may_change"]
            )
    return knobs


KNOBS = _all_knobs()
"""Every knob by its full name, `section.knob`."""


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `8h`, `2d` or a sum such as `1h30m`."""
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise UserError(f"A duration such as 30m, 8h or 1h30m was expected for schedule.budget, not {text!r}.")
    seconds = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    total = sum(float(amount) * seconds[unit] for amount, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", text))
    if total <= 0:
        raise UserError(f"schedule.budget must be longer than nothing, not {text!r}.")
    return total


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
    "validation.every",
    "validation.sequences",
    "validation.final_sequences",
    "run.log_every",
    "optimizer.learning_rate",
)


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
        section, knob_name = name.split(".")
        value = getattr(getattr(recipe, section), knob_name)
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
    }.items():
        section, knob_name = name.split(".")
        value = getattr(getattr(recipe, section), knob_name)
        require(value in words, f"{name} is one of {', '.join(words)}, not {value!r}.")
    for tracker in recipe.run.trackers:
        known = ("tensorboard", "wandb", "trackio")
        require(tracker in known, f"run.trackers knows {', '.join(known)} and none, not {tracker!r}.")
    for name, (low, high) in _RANGES.items():
        section, knob_name = name.split(".")
        value = getattr(getattr(recipe, section), knob_name)
        require(value is None or low <= value <= high, f"{name} must lie between {low:g} and {high:g}, not {value}.")
    if recipe.schedule.budget is not None:
        parse_duration(recipe.schedule.budget)
