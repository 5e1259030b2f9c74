"""The folder of a run: whose it is, and what a run leaves in it."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hf_plm.config import KNOBS, Recipe, UserError
from hf_plm.training.checkpoint import write_text

CONFIG, SUMMARY, METRICS, CHECKPOINTS, HUB, CURVES = (
    "config.yaml",
    "summary.json",
    "metrics.jsonl",
    "checkpoints",
    "hub",
    "curves.png",
)
# Hidden files, and what a shell or a scheduler writes beside a run before it begins.
_MAY_BE_THERE = re.compile(r"^\.|\.(log|out|err)$")
# What a corpus holds is compared by its fingerprint: a corpus that moved is the same corpus.
_COMPARED_BY_CONTENT = ("data.train", "data.validation")


def make(folder: Path) -> None:
    """Make the folder of a run, or say at once that it cannot be written or belongs to something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".partial-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be written ({error.strerror}); give another one with --run.folder."
        ) from None
    if not (folder / CONFIG).exists():
        foreign = [path.name for path in folder.iterdir() if not _MAY_BE_THERE.search(path.name)]
        if foreign:
            raise UserError(
                f"The run folder {folder} holds other files ({sorted(foreign)[0]}) and no {CONFIG}; "
                "give an empty or a new one with --run.folder."
            )


def stored_recipe(recipe: Recipe, corpus_fingerprint: str) -> Recipe | None:
    """The resolved recipe of the run that is in the folder already, with what may change taken from `recipe`.

    None for a new run. Raises `UserError` where the folder holds a run of another recipe or on other sequences.
    """
    folder = recipe.run_folder
    if not (folder / CONFIG).exists():
        return None
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        stored_fingerprint = stored.pop("corpus")["fingerprint"]
        resolved = from_stored(stored)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is not the recipe of a run ({error}); give another --run.folder.") from None
    if stored_fingerprint != corpus_fingerprint:
        raise UserError(
            f"The run in {folder} was started on other sequences than data.train names now; "
            "give the same data, or a new --run.folder."
        )
    return _merge(recipe, resolved, folder)


def from_stored(stored: dict[str, dict[str, Any]]) -> Recipe:
    """The resolved recipe of config.yaml, without its corpus entry."""
    values = {}
    for section, knobs in stored.items():
        for name, value in knobs.items():
            if f"{section}.{name}" in KNOBS:
                is_auto = value == "auto" and "None" in str(KNOBS[f"{section}.{name}"].type)
                plain = None if is_auto else tuple(value) if isinstance(value, list) else value
                values[f"{section}__{name}"] = plain
    return Recipe().replace(**values)


def _merge(asked: Recipe, stored: Recipe, folder: Path) -> Recipe:
    """The stored recipe with what may change taken from `asked`; anything else that differs is refused by name.

    A knob asked for as `auto` was resolved when the run began, and stays what it was.
    """
    for name, item in KNOBS.items():
        section, knob_name = name.split(".")
        wanted = getattr(getattr(asked, section), knob_name)
        was = getattr(getattr(stored, section), knob_name)
        if wanted == was or name in _COMPARED_BY_CONTENT:
            continue
        if item.may_change:
            if wanted is not None:
                stored = stored.replace(**{f"{section}__{knob_name}": wanted})
        elif not _is_auto(asked, name, wanted):
            raise UserError(
                f"The run in {folder} has {name} = {_shown(was)}, but {_shown(wanted)} is asked for now; "
                "give the old value to go on with it, or a new --run.folder."
            )
    return stored


def _is_auto(asked: Recipe, name: str, wanted: Any) -> bool:
    """Whether the machine, not the user, chose this knob; tokens of a micro-batch go with the number of them."""
    if name == "batch.tokens" and asked.batch.micro_batches is None:
        return True
    return wanted is None and "None" in str(KNOBS[name].type) and name not in ("schedule.budget",)


def _shown(value: Any) -> str:
    return "nothing" if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)


def write_config(recipe: Recipe, corpus_name: str, corpus_fingerprint: str) -> None:
    """config.yaml: the resolved recipe, and which corpus it ran on."""
    corpus = yaml.safe_dump({"corpus": {"name": corpus_name, "fingerprint": corpus_fingerprint}}, sort_keys=False)
    write_text(recipe.run_folder / CONFIG, recipe.to_yaml() + corpus)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a finished run, or None."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary
