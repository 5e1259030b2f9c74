"""`hf-plm push`: a run, a Hub folder or a corpus to the Hugging Face Hub, in one commit that is whole or absent.

What is sent is verified before, and compared by checksum with what the Hub has afterwards. Large files go ahead of the
commit and are found there when it is tried again, so a push that failed late goes on where it was.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from hf_plm.config import Hub, UserError
from hf_plm.data.manifest import MANIFEST_NAME, is_corpus, read_manifest
from hf_plm.models.card import NO_LICENCE, model_card
from hf_plm.models.hub import (
    CARD,
    check_for_others,
    check_hub_folder,
    checksums_in,
    is_hub_folder,
    save_hub_folder,
    sha256,
)
from hf_plm.remote import attempt, judge, scrub
from hf_plm.training import run_folder
from hf_plm.training.export import read_run

_LICENCE_FILES = r"(README|LICEN[SC]E|NOTICE|COPYING|CITATION|AUTHORS)[\w.-]*|[\w.-]+\.(md|png|jpg|jpeg|svg)"
_MODEL_FILES = re.compile(
    rf"{_LICENCE_FILES}|\.gitattributes|config\.json|generation_config\.json|[\w.-]+\.safetensors(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|vocab\.txt"
)
_LOOKS_LIKE_A_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_OUR_TITLE = re.compile(r"^([\d,]+ steps|Step [\d,]+|Push .*|.*: [\d,]+ sequences|initial commit)$")
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


def push(request: Request, say: Callable[[str], None] = print) -> str:
    """Verify and send; returns the address. Raises `UserError` where the folder or the Hub forbids it."""
    request = _with_branch(request)
    with packed(request) as shipment:
        return send(shipment, request, say)


def listing(request: Request) -> str:
    """What `push` would send, after the same verification; nothing is asked of the Hub."""
    request = _with_branch(request)
    with packed(request) as shipment:
        where = f"{shipment.kind} {request.repository}" + (f", branch {request.revision}" if request.revision else "")
        visibility = "public" if request.is_public else "private"
        rows = [f"  {shipment.size(name):>15,}  {name}" for name in shipment.files]
        num_bytes = sum(map(shipment.size, shipment.files))
        heading = f"Would send {len(rows)} files, {num_bytes:,} bytes, to the {where} ({visibility} if new):"
        return "\n".join([heading, "", *rows])


def _with_branch(request: Request) -> Request:
    """The request with its branch as it is called on the Hub: of a checkpoint step-N, however N was written."""
    branch = request.branch
    if run_folder.is_run(request.folder) and (step := re.fullmatch(r"step[-_ ]?0*(\d+)", branch)):
        return replace(request, revision=f"step-{step.group(1)}")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", branch) or branch.startswith("refs/") or ".." in branch:
        raise UserError(f"--revision names a branch, such as step-10000, not {branch!r}.")
    return request


# What is sent


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
        licence = _licence_in(finished_card.read_text(encoding="utf-8"))
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
    if _licence_in(card):
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


def _licence_in(card: str) -> str | None:
    """The licence that the front matter names, or None; `unknown` is none."""
    found = re.match(r"---\n(?:(?!---).*\n)*?license: *[\"']?([\w.-]+)[\"']? *\n", card)
    return None if found is None or found.group(1) == "unknown" else found.group(1)


# How it is sent


def check_right_to_push(knobs: Hub, say: Callable[[str], None]) -> None:
    """Make the repository before the run begins: hours later is late to hear that the token may not.

    Raises `UserError` where it may not, or where the Hub does not know the licence; a Hub that cannot be reached now is
    said, and may be there by then.
    """
    assert knobs.push is not None
    what, api = f"the model {knobs.push}", HfApi()
    _require_token(what)
    try:
        if knobs.license:
            ModelCard(f"---\nlicense: {json.dumps(knobs.license)}\n---\n").validate(repo_type="model")
        api.create_repo(knobs.push, private=not knobs.public, exist_ok=True)
        api.auth_check(knobs.push, write=True)
    except Exception as error:
        fault = judge(error, what)
        if fault is None:
            raise
        if not fault.is_temporary:
            raise UserError(fault.sentence) from None
        say(f"{fault.sentence} The run goes on, and pushes later.")


def _require_token(what: str) -> None:
    if not get_token():
        raise UserError(f"There is no token to push {what} with; log in with `hf auth login`, or set HF_TOKEN.")


def send(shipment: Shipment, request: Request, say: Callable[[str], None] = print) -> str:
    """One commit with all files, on a repository that is made if need be; returns the address."""
    what, api = f"the {shipment.kind} {request.repository}", HfApi()
    _require_token(what)

    def work() -> str:
        try:
            return _commit(api, shipment, request, say)
        except (ConnectionError, HfHubHTTPError, RuntimeError) as error:
            is_of_xet = re.search(r"xet|data processing error", str(error), re.IGNORECASE)
            if not is_of_xet or constants.HF_HUB_DISABLE_XET:
                raise
            # The client takes no other way by itself, and tells this fault by its words only.
            say("Sending through Xet, the Hub's store for large files, failed; going on without it.")
            constants.HF_HUB_DISABLE_XET = True
            return _commit(api, shipment, request, say)

    commit = attempt(what, work, say)
    if missing := attempt(what, lambda: _differing(api, shipment, request, commit), say):
        raise UserError(f"{missing[0]} is not on the Hub as it was sent to {request.repository}; push again.")
    place = "datasets/" if shipment.kind == "dataset" else ""
    return f"{api.endpoint}/{place}{request.repository}/tree/{request.branch}"


def _commit(api: HfApi, shipment: Shipment, request: Request, say: Callable[[str], None]) -> str:
    """The commit that has the files: a new one on top of the branch, or its head where that has them all."""
    repository, kind, branch = request.repository, shipment.kind, request.branch
    api.create_repo(repository, repo_type=kind, private=not request.is_public, exist_ok=True)
    there = api.repo_info(repository, repo_type=kind)
    if request.is_public and there.private:
        say(f"{repository} is there already and private, and stays so; its settings on the Hub change that.")
    head = _head(api, repository, kind, branch)
    stale: list[str] = []
    if head is not None:
        stale = _prepare_to_replace(api, shipment, request, head, say)
        if not stale and not _differing(api, shipment, request, head):
            say(f"{repository} has all of it already.")
            return head
    is_new_branch = head is None
    if head is None:
        # Large files first, so that the branch is there no longer than a moment without its files.
        api.preupload_lfs_files(repository, _additions(shipment), repo_type=kind, revision="main")
        # From the empty beginning, not from main: until the commit is there, it must not pass for another model.
        head = api.list_repo_commits(repository, repo_type=kind)[-1].commit_id
        api.create_branch(repository, branch=branch, repo_type=kind, revision=head, exist_ok=True)
    try:
        commit = api.create_commit(
            repository,
            [*_additions(shipment), *(CommitOperationDelete(name) for name in stale)],
            commit_message=shipment.title,
            repo_type=kind,
            revision=branch,
            parent_commit=head,
        )
    except Exception:
        if is_new_branch:
            with suppress(Exception):
                api.delete_branch(repository, branch=branch, repo_type=kind)
        raise
    return commit.oid


def _additions(shipment: Shipment) -> list[CommitOperationAdd]:
    """Made anew for each call: they remember what the repository held when they were last looked at."""
    return [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in shipment.files.items()
    ]


def _head(api: HfApi, repository: str, kind: str, branch: str) -> str | None:
    try:
        return api.repo_info(repository, repo_type=kind, revision=branch).sha
    except RevisionNotFoundError:
        return None


def _differing(api: HfApi, shipment: Shipment, request: Request, commit: str) -> list[str]:
    """Names of files that a commit does not have as they are sent."""
    names = list(shipment.files)
    found: dict[str, Any] = {}
    for begin in range(0, len(names), 500):
        part = names[begin : begin + 500]
        for entry in api.get_paths_info(request.repository, part, revision=commit, repo_type=shipment.kind):
            found[entry.path] = entry
    return [name for name in names if not shipment.is_at(name, found.get(name))]


def _prepare_to_replace(
    api: HfApi, shipment: Shipment, request: Request, head: str, say: Callable[[str], None]
) -> list[str]:
    """Files of an earlier push that this one no longer has; and the licence that was set on the Hub is kept."""
    listed = set(api.list_repo_files(request.repository, repo_type=shipment.kind, revision=head))

    def text_of(name: str) -> str:
        if name not in listed:
            return ""
        path = api.hf_hub_download(request.repository, name, repo_type=shipment.kind, revision=head)
        return Path(path).read_text(encoding="utf-8", errors="replace")

    card = text_of(CARD)
    ours = shipment.files[CARD]
    mine = ours.read_bytes() if isinstance(ours, Path) else ours
    if (licensed := _with_licence_of(card, mine.decode())) is not None:
        shipment.files[CARD] = licensed.encode()
    if card:
        (entry,) = api.get_paths_info(request.repository, [CARD], revision=head, repo_type=shipment.kind, expand=True)
        title = getattr(getattr(entry, "last_commit", None), "title", "")
        if title and not _OUR_TITLE.search(title):
            say(f"The card on the Hub was changed there ({scrub(title)}); yours replaces it, and its history keeps it.")
    earlier = set(checksums_in(card)) if shipment.kind == "model" else _shards_in(text_of(MANIFEST_NAME))
    stale = sorted((earlier & listed) - shipment.files.keys())
    if stale:
        more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
        say(f"Removing what an earlier push left: {', '.join(stale[:3])}{more}.")
    return stale


def _shards_in(manifest: str) -> set[str]:
    try:
        splits = json.loads(manifest)["splits"].values()
        return {shard["file"] for split in splits for shard in split["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def _with_licence_of(card: str, mine: str) -> str | None:
    """My card with the licence that the one on the Hub names, where mine names none; None where nothing changes."""
    licence = _licence_in(card)
    if licence is None or _licence_in(mine) is not None:
        return None
    line = f"license: {licence}\n"
    if "\nlicense: unknown\n" in mine:
        return mine.replace("license: unknown\n", line, 1)
    return mine.replace("---\n", f"---\n{line}", 1).replace(f"\n{NO_LICENCE}\n", "")
