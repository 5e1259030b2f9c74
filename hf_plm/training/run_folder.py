"""The folder of a run: whose it is, and what a run leaves in it."""

import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from hf_plm.config import KNOBS, Recipe, UserError
from hf_plm.data.corpus import Corpus
from hf_plm.data.simulate import is_simulated
from hf_plm.data.sources import is_hub_name
from hf_plm.lock import locked as hold
from hf_plm.remote import split_revision
from hf_plm.training.checkpoint import write_text

CONFIG, DATA, SUMMARY, METRICS, CHECKPOINTS, HUB, CURVES = (
    "config.yaml",
    "data.json",
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


@dataclass(frozen=True)
class Origin:
    """What a run was made of, written beside its recipe when it began: later, paths and names may mean something else.

    `folder` is the corpus, `train` and `validation` its fingerprints, `datasets` those of its sources that are on the
    Hub. `start` names published weights without a path, `start_sha256` is that of their files.
    """

    folder: str
    train: str
    validation: str
    is_simulated: bool = False
    datasets: tuple[str, ...] = ()
    start: str | None = None
    start_sha256: str | None = None


def is_run(folder: Path) -> bool:
    """Whether the folder is that of a run, finished or not."""
    return (folder / CONFIG).is_file()


def take(folder: Path) -> IO[str]:
    """Make the folder of a run and hold it for this process, as long as the returned file is open.

    Raises `UserError` at once where it cannot be written, belongs to something else, or another process runs in it:
    two runs in one folder would write into each other's files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    lock = locked(folder / ".lock", f"runs in {folder} already", ", or give another --run.folder")
    if not (folder / CONFIG).exists():
        foreign = [path.name for path in folder.iterdir() if not _MAY_BE_THERE.search(path.name)]
        if foreign:
            raise UserError(
                f"The run folder {folder} holds other files ({sorted(foreign)[0]}) and no {CONFIG}; "
                "give an empty or a new one with --run.folder."
            )
    return lock


def locked(path: Path, doing: str, otherwise: str = "") -> IO[str]:
    """A file in the run folder, held; see `hf_plm.lock`."""
    try:
        return hold(path, doing, otherwise)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The run folder {folder} cannot be written ({error.strerror}); give another one with --run.folder."
    )


def stored_recipe(recipe: Recipe, train: Corpus, held_out: Corpus) -> Recipe | None:
    """The resolved recipe of the run that is in the folder already, with what may change taken from `recipe`.

    None for a new run. Raises `UserError` where the folder holds a run of another recipe or on other sequences.
    """
    folder = recipe.run_folder
    if not (folder / CONFIG).exists():
        return None
    try:
        resolved, origin = read_config(folder)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; give another --run.folder.") from None
    fingerprints = {"data.train": origin.train, "data.validation": origin.validation}
    for name, split in (("data.train", train), ("data.validation", held_out)):
        if fingerprints[name] != split.fingerprint:
            raise UserError(
                f"The run in {folder} was started on other sequences than {name} names now; "
                "give the same data, or a new --run.folder."
            )
    return _merge(recipe, resolved, folder)


def read_config(folder: Path) -> tuple[Recipe, Origin]:
    """The resolved recipe of a run and what it was made of; raises `UserError` where config.yaml is none."""
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        known = stored.pop("corpus")
        origin = Origin(**{**known, "datasets": tuple(known.get("datasets", ()))})
        return from_stored(stored), origin
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIG} is not the recipe of a run ({reason}).") from None


def stored_precision(folder: Path) -> str:
    """The precision of the run that is in the folder already, or auto."""
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        return stored["run"]["precision"] if stored["run"]["precision"] in ("fp32", "bf16") else "auto"
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "auto"


def from_stored(stored: dict[str, dict[str, Any]]) -> Recipe:
    """The resolved recipe of config.yaml, without its corpus entry."""
    values = {}
    for section, knobs in stored.items():
        for name, value in knobs.items():
            if f"{section}.{name}" in KNOBS:
                item = KNOBS[f"{section}.{name}"]
                is_none = value == "auto" and item.default != "auto" and item.may_be_auto
                plain = None if is_none else tuple(value) if isinstance(value, list) else value
                values[f"{section}__{name}"] = plain
    return Recipe().replace(**values)


def _merge(asked: Recipe, stored: Recipe, folder: Path) -> Recipe:
    """The stored recipe with what may change taken from `asked`; anything else that differs is refused by name.

    A knob asked for as `auto` was resolved when the run began, and stays what it was.
    """
    for name, item in KNOBS.items():
        wanted, was = asked[name], stored[name]
        if wanted == was or name in _COMPARED_BY_CONTENT:
            continue
        if item.may_change:
            if wanted is not None:
                stored = stored.replace(**{name.replace(".", "__"): wanted})
        elif not _is_auto(asked, name, wanted):
            raise UserError(
                f"The run in {folder} has {name} = {_shown(was)}, but {_shown(wanted)} is asked for now; "
                "give the old value to go on with it, or a new --run.folder."
            )
    return stored


def _is_auto(asked: Recipe, name: str, wanted: Any) -> bool:
    """Whether the machine, not the user, chose this knob; tokens of a micro-batch go with their number, and a
    preset with the weights that the run began from.
    """
    if (name == "batch.tokens" and asked.batch.micro_batches is None) or (name == "model.preset" and wanted == "auto"):
        return True
    return KNOBS[name].may_be_auto and wanted in (None, "auto")


def _shown(value: Any) -> str:
    return "nothing" if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)


def origin_of(recipe: Recipe, train: Corpus, held_out: Corpus, start_sha256: str | None) -> Origin:
    """What a run that begins now is made of."""
    on_hub = tuple(split_revision(name)[0] for name in recipe.data.train if is_hub_name(name))
    named = (recipe.hub.dataset,) if recipe.hub.dataset else ()
    start = recipe.init.from_
    if start is not None and Path(start).expanduser().exists():
        start = re.split(r"[/\\]", start.rstrip("/\\"))[-1]
    return Origin(
        folder=str(train.folder.resolve()),
        train=train.fingerprint,
        validation=held_out.fingerprint,
        is_simulated=is_simulated(train),
        datasets=named + on_hub,
        start=start,
        start_sha256=start_sha256,
    )


def write_config(recipe: Recipe, origin: Origin) -> None:
    """config.yaml: the resolved recipe, and what it ran on."""
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(origin).items()}
    write_text(recipe.run_folder / CONFIG, recipe.to_yaml() + yaml.safe_dump({"corpus": known}, sort_keys=False))


def check_card_knobs(recipe: Recipe) -> None:
    """Raises `UserError` where a finished run is asked for another card: it is written once, and the author's then."""
    stored = read_config(recipe.run_folder)[0]
    for name in ("hub.license", "hub.dataset"):
        if recipe[name] not in (None, stored[name]):
            raise UserError(
                f"The run in {recipe.run_folder} is finished, and {name} went into its model card then; "
                f"edit {recipe.run_folder / HUB / 'README.md'} and push again, without --{name}."
            )


def write_data(folder: Path, train: Corpus) -> None:
    """data.json: what the corpus said of itself, which the model card repeats."""
    write_text(folder / DATA, train.manifest.to_json())


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a finished run, or None."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, its Hub folder included, or None."""
    return read_summary(folder) if (folder / HUB).is_dir() else None


def check_visible(folder: Path) -> None:
    """Raises `UserError` where this process does not see the folder that the main process writes."""
    if not (folder / CONFIG).exists():
        raise UserError(
            f"A process on {platform.node()} does not see the run folder {folder} that the main process writes; give a "
            "folder that all nodes share with --run.folder."
        )
