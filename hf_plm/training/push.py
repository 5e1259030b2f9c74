"""`hf-plm push`: a run, a Hub folder or a corpus to the Hugging Face Hub, in one commit that is whole or absent.

What is sent is verified before, and compared by checksum with what the Hub has afterwards. Large files go ahead of the
commit and are found there when it is tried again, so a push that failed late goes on where it was.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_plm.config import Hub, Recipe, UserError
from hf_plm.data.manifest import is_corpus, read_manifest
from hf_plm.models.card import model_card
from hf_plm.models.hub import CARD, check_card, check_hub_folder, is_hub_folder, save_hub_folder
from hf_plm.remote import attempt, judge, scrub
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import checkpoint_name, write_json
from hf_plm.training.export import read_run

LOG, RECORD = "push.log", "pushed.json"
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".py")
"""Files that others could only open by running what is in them, or that are code."""
_OURS = re.compile(r"(model.*\.safetensors(\.index\.json)?|curves\.png|data/.*\.parquet)")
"""What an earlier push may have left and a later one replaces; files that people added stay."""


@dataclass(frozen=True)
class Shipment:
    """What a push sends: `files` by their names in the repository, on disk or in memory."""

    kind: str  # model or dataset
    files: dict[str, Path | bytes]
    title: str

    @property
    def num_bytes(self) -> int:
        return sum(_size(content) for content in self.files.values())


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    folder: Path
    repository: str
    revision: str | None = None
    is_public: bool = False


def push(request: Request, say: Callable[[str], None] = print) -> str:
    """Verify and send; returns the address of the commit. Raises `UserError` where the folder or the Hub forbids it."""
    with packed(request) as shipment:
        return send(shipment, request, say)


def listing(request: Request) -> str:
    """What `push` would send, after the same verification; nothing is asked of the Hub."""
    with packed(request) as shipment:
        where = f"{shipment.kind} {request.repository}" + (f", branch {request.revision}" if request.revision else "")
        visibility = "public" if request.is_public else "private"
        rows = [f"  {_size(content):>15,}  {name}" for name, content in shipment.files.items()]
        heading = f"Would send {len(rows)} files, {shipment.num_bytes:,} bytes, to the {where} ({visibility} if new):"
        return "\n".join([heading, "", *rows])


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
            yield _pack_model(folder, request.repository, f"Push {folder.resolve().name}")
        else:
            raise UserError(f"{folder} is neither a run, a Hub folder nor a prepared corpus; nothing was sent.")


def _pack_run(folder: Path, request: Request, held: ExitStack) -> Shipment:
    """The finished model, or where the revision is called step-N, the checkpoint of that step."""
    summary = run_folder.finished(folder)
    match = re.fullmatch(r"step-(\d+)", request.revision or "")
    step = int(match.group(1)) if match else None
    if summary is not None and step in (None, summary["steps"]):
        return _pack_model(folder / run_folder.HUB, request.repository, f"{summary['steps']:,} steps")
    if step is None:
        raise UserError(
            f"The run in {folder} is not finished; push one of its checkpoints with --revision step-N, or finish it."
        )
    model, facts = read_run(folder, step)
    made = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".push-", dir=folder)))
    save_hub_folder(model, made / "hub", model_card(facts))
    return _pack_model(made / "hub", request.repository, f"Step {step:,}")


def _pack_model(folder: Path, repository: str, title: str) -> Shipment:
    check_hub_folder(folder)
    check_card(folder)
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix in _UNSAFE or not path.is_file() or path.is_symlink():
            raise UserError(
                f"{path} does not belong into a Hub folder (files only, safetensors, no code); move it away."
            )
        files[path.name] = path
    text = (folder / CARD).read_text(encoding="utf-8")
    files[CARD] = _renamed(text, repository).encode()
    return Shipment("model", files, title)


def _renamed(card: str, repository: str) -> str:
    """The card with the repository in the place of the name that it was written under."""
    title = re.search(r"^# (\S+)$", card, re.MULTILINE)
    if title is None:
        return card
    old = re.escape(title.group(1))
    return re.sub(rf'(?m)(^# |from_pretrained\("|--init\.from ){old}(?=$|"| )', rf"\g<1>{repository}", card)


def _pack_corpus(folder: Path) -> Shipment:
    """All files of a corpus, the shards as its manifest has them."""
    manifest = read_manifest(folder)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes or _sha256(path) != shard.sha256:
                raise UserError(f"{path} is not the file that corpus.json names; prepare the corpus again.")
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    wanted = {shard.file for split in manifest.splits.values() for shard in split.shards}
    wanted |= {CARD, "corpus.json", "rejected.tsv"}
    if strange := sorted(files.keys() - wanted):
        raise UserError(f"{folder / strange[0]} is no part of the corpus; move it away, or it would be published.")
    return Shipment("dataset", files, f"{manifest.name}: {manifest.counts.kept:,} sequences")


def check_right_to_push(knobs: Hub, say: Callable[[str], None]) -> None:
    """Make the repository before the run begins: hours later is late to hear that the token may not.

    Raises `UserError` where it may not; a Hub that cannot be reached now is said, and may be there by then.
    """
    what = f"the model {knobs.push}"
    _require_token(what)
    try:
        HfApi().create_repo(str(knobs.push), private=not knobs.public, exist_ok=True)
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
    """One commit with all files, on a repository that is made if need be; every step may be tried again."""
    what = f"the {shipment.kind} {request.repository}"
    _require_token(what)
    api = HfApi()
    # Made once: they know what of them the Hub has already.
    additions = [CommitOperationAdd(name, _content(content)) for name, content in shipment.files.items()]

    def work() -> str:
        try:
            return _commit(api, shipment, additions, request, say)
        except (ConnectionError, HfHubHTTPError) as error:
            if "xet" not in str(error).lower() or constants.HF_HUB_DISABLE_XET:
                raise
            # The client takes no other way by itself, and tells this fault by its words only.
            say("Sending through Xet, the Hub's store for large files, failed; going on without it.")
            constants.HF_HUB_DISABLE_XET = True
            return _commit(api, shipment, additions, request, say)

    return attempt(what, work, say)


def _commit(
    api: HfApi,
    shipment: Shipment,
    additions: list[CommitOperationAdd],
    request: Request,
    say: Callable[[str], None],
) -> str:
    repository, kind, branch = request.repository, shipment.kind, request.revision or "main"
    api.create_repo(repository, repo_type=kind, private=not request.is_public, exist_ok=True)
    if request.revision:
        api.create_branch(repository, branch=branch, repo_type=kind, exist_ok=True)
    there = api.repo_info(repository, repo_type=kind, revision=branch)
    if request.is_public and there.private:
        say(f"{repository} is there already and private, and stays so; its settings on the Hub change that.")
    names = api.list_repo_files(repository, repo_type=kind, revision=there.sha)
    stale = [name for name in names if _OURS.fullmatch(name) and name not in shipment.files]
    commit = api.create_commit(
        repository,
        [*additions, *(CommitOperationDelete(name) for name in stale)],
        commit_message=shipment.title,
        repo_type=kind,
        revision=branch,
        parent_commit=there.sha,
    )
    _compare(api, shipment, request, commit.oid)
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repository}/tree/{branch}"


def _content(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


def _compare(api: HfApi, shipment: Shipment, request: Request, commit: str) -> None:
    """Raises `UserError` unless the Hub has, in that commit, what was sent."""
    names = list(shipment.files)
    found: dict[str, Any] = {}
    for begin in range(0, len(names), 500):
        paths = names[begin : begin + 500]
        for entry in api.get_paths_info(request.repository, paths, revision=commit, repo_type=shipment.kind):
            found[entry.path] = entry
    for name, content in shipment.files.items():
        known = found.get(name)
        lfs, blob = getattr(known, "lfs", None), getattr(known, "blob_id", None)
        is_same = lfs.sha256 == _sha256(content) if lfs else blob == _git_blob(content)
        if known is None or not is_same:
            raise UserError(f"{name} is not on the Hub as it was sent to {request.repository}; push again.")


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob(content: Path | bytes) -> str:
    """Git's name of a file, which the Hub gives for those that are not in LFS."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class BackgroundPushes:
    """Pushes checkpoints of a run while it trains, each by `hf-plm push` in a process of the lowest priority.

    Nothing of it can stop or slow the run. A push that fails is said, and tried again along with the next one. The
    checkpoints of `held` are not to be removed. Used by the main process alone.
    """

    MOST_WAITING = 3

    def __init__(self, knobs: Hub, folder: Path, step: int, say: Callable[[str], None]) -> None:
        assert knobs.push is not None
        self.knobs, self.folder, self.say = knobs, folder, say
        self.last_offered = step
        self._waiting: list[int] = []
        self._failed: list[int] = []
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None

    @property
    def held(self) -> set[str]:
        """Names of checkpoints that a push has yet to read."""
        running = [self._running[0]] if self._running else []
        return {checkpoint_name(step) for step in [*self._waiting, *self._failed, *running]}

    def offer(self, step: int) -> None:
        """A checkpoint of `step` is whole: the first one at or after each multiple of hub.every is pushed."""
        every = self.knobs.every
        if every is not None and step // every > self.last_offered // every:
            self._waiting = (self._failed + self._waiting + [step])[-self.MOST_WAITING :]
            self._failed = []
        self.last_offered = step
        self.poll()

    def poll(self) -> None:
        """Say how the push under way ended, if it has, and begin the next one."""
        if self._running is not None:
            step, process = self._running
            if process.poll() is None:
                return
            self._running = None
            if process.returncode:
                self._failed.append(step)
                self.say(f"Step {step:,} was not pushed: {self._last_words()} The next push tries it again.")
            else:
                self.say(f"Pushed step {step:,} to {self.knobs.push}, branch step-{step}.")
        if self._waiting:
            step = self._waiting.pop(0)
            self._running = step, self._start(step)

    def drain(self) -> None:
        """Wait for what is under way, and try what waits or failed once more."""
        self._waiting, self._failed = self._failed + self._waiting, []
        self.poll()
        while self._running is not None:
            self.say(f"Waiting for the push of step {self._running[0]:,} ...")
            self._running[1].wait()
            self.poll()

    def stop(self) -> None:
        """End what is under way; its commit is whole or absent."""
        if self._running is not None:
            self._running[1].terminate()
            self._running[1].wait()
            self._running = None

    def _start(self, step: int) -> subprocess.Popen[bytes]:
        assert self.knobs.push is not None
        words = ["push", str(self.folder), self.knobs.push, "--revision", f"step-{step}"]
        command = [sys.executable, "-m", "hf_plm.cli", *words, *(["--public"] if self.knobs.public else [])]
        # A process of its own, not a member of the launch that this one belongs to.
        mine = re.compile(r"(RANK|LOCAL_|GROUP_|ROLE_|WORLD_SIZE|MASTER_|TORCHELASTIC|ACCELERATE_|FSDP_|PMI|OMPI)")
        variables = {name: value for name, value in os.environ.items() if not mine.match(name)}
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with open(self.folder / LOG, "ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=variables, start_new_session=True
            )
        with contextlib.suppress(psutil.Error):
            psutil.Process(process.pid).nice(19 if os.name == "posix" else 64)  # 64: Windows' idle class
        return process

    def _last_words(self) -> str:
        lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return scrub(lines[-1].removeprefix("hf-plm: ")) if lines else "it said nothing."


def push_finished(recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Push the finished model of a run where its recipe asks for it, unless it was pushed there already.

    Raises `UserError` with the command that does it later; the run is finished all the same.
    """
    repository, folder = recipe.hub.push, recipe.run_folder
    if repository is None or _is_pushed(folder, repository):
        return
    try:
        address = push(Request(folder, repository, is_public=recipe.hub.public), say)
    except UserError as error:
        raise UserError(
            f"The run is finished and its model is in {folder / run_folder.HUB}, but it was not pushed: {error} "
            f"Later: hf-plm push {folder} {repository}{' --public' * recipe.hub.public}"
        ) from None
    write_json(folder / RECORD, {"repository": repository, "address": address})
    say(f"Pushed the model: {address}")


def _is_pushed(folder: Path, repository: str) -> bool:
    path = folder / RECORD
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("repository") == repository
