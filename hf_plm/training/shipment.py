"""What a push sends: the files of a run, a Hub folder or a corpus, verified, and nothing else."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_plm.config import UserError
from hf_plm.data.manifest import MANIFEST_NAME, is_corpus, read_manifest
from hf_plm.models.card import NO_LICENCE, model_card
from hf_plm.models.hub import (
    CARD,
    check_for_others,
    check_hub_folder,
    is_hub_folder,
    save_hub_folder,
    sha256,
)
from hf_plm.training import run_folder
from hf_plm.training.export import read_run

_LICENCE_FILES = r"(README|LICEN[SC]E|NOTICE|COPYING|CITATION|AUTHORS)[\w.-]*|[\w.-]+\.(md|png|jpg|jpeg|svg)"
_MODEL_FILES = re.compile(
    rf"{_LICENCE_FILES}|\.gitattributes|config\.json|generation_config\.json|[\w.-]+\.safetensors(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|vocab\.txt"
)
_LOOKS_LIKE_A_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_LOCK, _MADE = ".push.lock", ".push-made"


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; without `revision` the branch is main."""

    folder: Path
    repository: str
    revision: str | None = None
    is_public: bool = False

    @property
    def branch(self) -> str:
        return self.revision or "main"


@dataclass
class Shipment:
    """What a push sends: `files` by their names in the repository, on disk or in memory."""

    kind: str  # model or dataset
    files: dict[str, Path | bytes]
    title: str
    _hashes: dict[str, str] = field(default_factory=dict)

    def size(self, name: str) -> int:
        content = self.files[name]
        return content.stat().st_size if isinstance(content, Path) else len(content)

    def is_at(self, name: str, entry: Any) -> bool:
        """Whether an entry of the Hub's listing is this file: by sha256 in LFS, elsewhere by git's name of it."""
        content, lfs = self.files[name], getattr(entry, "lfs", None)
        if entry is None:
            return False
        if lfs is None:
            data = content.read_bytes() if isinstance(content, Path) else content
            return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if name not in self._hashes:
            is_file = isinstance(content, Path)
            self._hashes[name] = sha256(content) if is_file else hashlib.sha256(content).hexdigest()  # type: ignore[arg-type]
        return lfs.sha256 == self._hashes[name]


def with_branch(request: Request) -> Request:
    """The request with its branch as it is called on the Hub: of a checkpoint step-N, however N was written."""
    branch = request.branch
    if run_folder.is_run(request.folder) and (step := re.fullmatch(r"step[-_ ]?0*(\d+)", branch)):
        return replace(request, revision=f"step-{step.group(1)}")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", branch) or branch.startswith("refs/") or ".." in branch:
        raise UserError(f"--revision names a branch, such as step-10000, not {branch!r}.")
    return request


@contextmanager
def packed(request: Request) -> Iterator[Shipment]:
    """The verified shipment of a folder. What has to be made for it is gone afterwards."""
    folder = request.folder.expanduser()
    with ExitStack() as held:
        if run_folder.is_run(folder):
            yield _pack_run(folder, request, held)
        elif is_corpus(folder):
            yield _pack_corpus(folder)
        elif is_hub_folder(folder):
            yield _pack_model(folder, request, f"Push {folder.resolve().name}")
        else:
            hint = f" (hf-plm prepare {folder} --out FOLDER makes a corpus)" if folder.is_file() else ""
            raise UserError(f"{folder} is neither a run, a Hub folder nor a prepared corpus{hint}; nothing was sent.")


def _pack_run(folder: Path, request: Request, held: ExitStack) -> Shipment:
    """The finished model, or where the revision is called step-N, the checkpoint of that step."""
    summary = run_folder.finished(folder)
    match = re.fullmatch(r"step-(\d+)", request.branch)
    step = int(match.group(1)) if match else None
    if summary is not None and step in (None, summary["steps"]):
        return _pack_model(folder / run_folder.HUB, request, f"{summary['steps']:,} steps")
    if step is None:
        raise UserError(
            f"The run in {folder} is not finished; push one of its checkpoints with --revision step-N, or finish it."
        )
    made = held.enter_context(_workplace(folder))
    model, facts = read_run(folder, step)
    finished_card = folder / run_folder.HUB / CARD
    if facts.recipe.hub.license is None and finished_card.is_file():  # set there by hand
        licence = licence_in(finished_card.read_text(encoding="utf-8"))
        facts = replace(facts, recipe=facts.recipe.replace(hub__license=licence))
    save_hub_folder(model, made / "hub", model_card(facts))
    del model
    return _pack_model(made / "hub", request, f"Step {step:,}")


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder inside the run's for what is made of a checkpoint; what a killed push left there goes first."""
    with run_folder.locked(folder / _LOCK, f"is pushing a checkpoint of {folder} already"):
        made = folder / _MADE
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed push left in a run folder."""
    if (folder / _MADE).is_dir():
        with suppress(UserError), _workplace(folder):
            pass


def _pack_model(folder: Path, request: Request, title: str) -> Shipment:
    check_hub_folder(folder)
    check_for_others(folder)
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and path.name != ".gitattributes":
            continue
        if not path.is_file() or not _MODEL_FILES.fullmatch(path.name):
            raise UserError(
                f"{path} has no place in a repository of a model (weights in safetensors, configuration, tokenizer, "
                "card, licence, pictures); move it away."
            )
        _check_private(path)
        files[path.name] = path
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("auto_map", "_name_or_path"):
        if config.get(key):
            raise UserError(f"{folder / 'config.json'} has {key!r}, which points outside of the folder; take it out.")
    text = (folder / CARD).read_text(encoding="utf-8")
    files[CARD] = _as_published(text, request).encode()
    return Shipment("model", files, title)


def _pack_corpus(folder: Path) -> Shipment:
    """All files of a corpus, the shards as its manifest has them."""
    manifest = read_manifest(folder)
    shards = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    for name, shard in shards.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != shard.bytes or sha256(path) != shard.sha256:
            raise UserError(f"{path} is not the file that {MANIFEST_NAME} names; prepare the corpus again.")
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if name not in {*shards, CARD, MANIFEST_NAME, "rejected.tsv"} and not re.fullmatch(_LICENCE_FILES, name):
            raise UserError(f"{path} is no part of the corpus; move it away, or it would be published.")
        if name not in shards:
            _check_private(path)
        files[name] = path
    return Shipment("dataset", files, f"{manifest.name}: {manifest.counts.kept:,} sequences")


def _check_private(path: Path) -> None:
    if path.suffix in (".md", ".json", ".txt", ".tsv", ".cff", "") and _LOOKS_LIKE_A_TOKEN.search(path.read_bytes()):
        raise UserError(f"{path} holds what looks like a token of the Hub (hf_...); nothing was sent.")


def _as_published(card: str, request: Request) -> str:
    """The card with repository and revision in the place of the name that it was written under."""
    if licence_in(card):
        card = card.replace(f"\n{NO_LICENCE}\n", "")
    loaded = re.search(r'from_pretrained\("([^"]+)"', card)
    if loaded is None:
        return card
    old, new = re.escape(loaded.group(1)), request.repository
    card = re.sub(rf'(?m)(^# |pipeline\("fill-mask", "){old}(?=$|")', rf"\g<1>{new}", card)
    quoted = f'"{new}"' + (f', revision="{request.revision}"' if request.revision else "")
    card = re.sub(rf'from_pretrained\("{old}"', f"from_pretrained({quoted}", card)
    named = new + (f"@{request.revision}" if request.revision else "")
    card = re.sub(rf"--init\.from {old}(?= )", f"--init.from {named}", card)
    short = re.escape(loaded.group(1).split("/")[-1])
    return re.sub(rf"(?m)^(model-index:\n- name: ){short}$", rf"\g<1>{new.split('/')[-1]}", card)


def licence_in(card: str) -> str | None:
    """The licence that the front matter names, or None; `unknown` is none."""
    found = re.match(r"---\n(?:(?!---).*\n)*?license: *[\"']?([\w.-]+)[\"']? *\n", card)
    return None if found is None or found.group(1) == "unknown" else found.group(1)
