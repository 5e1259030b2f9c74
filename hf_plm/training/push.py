"""`hf-plm push`: a run, a Hub folder or a corpus to the Hugging Face Hub, in one commit that is whole or absent.

What is sent is verified before, and compared by checksum with what the Hub has afterwards. Large files go ahead of the
commit and are found there when it is tried again, so a push that failed late goes on where it was.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from hf_plm.config import Hub, UserError
from hf_plm.data.manifest import MANIFEST_NAME
from hf_plm.models.card import NO_LICENCE
from hf_plm.models.hub import (
    CARD,
    checksums_in,
)
from hf_plm.remote import attempt, judge, scrub
from hf_plm.training.shipment import Request, Shipment, licence_in, packed, with_branch

_OUR_TITLE = re.compile(r"^([\d,]+ steps|Step [\d,]+|Push .*|.*: [\d,]+ sequences|initial commit)$")


def push(request: Request, say: Callable[[str], None] = print) -> str:
    """Verify and send; returns the address. Raises `UserError` where the folder or the Hub forbids it."""
    request = with_branch(request)
    with packed(request) as shipment:
        return send(shipment, request, say)


def listing(request: Request) -> str:
    """What `push` would send, after the same verification; nothing is asked of the Hub."""
    request = with_branch(request)
    with packed(request) as shipment:
        where = f"{shipment.kind} {request.repository}" + (f", branch {request.revision}" if request.revision else "")
        visibility = "public" if request.is_public else "private"
        rows = [f"  {shipment.size(name):>15,}  {name}" for name in shipment.files]
        num_bytes = sum(map(shipment.size, shipment.files))
        heading = f"Would send {len(rows)} files, {num_bytes:,} bytes, to the {where} ({visibility} if new):"
        return "\n".join([heading, "", *rows])


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
    licence = licence_in(card)
    if licence is None or licence_in(mine) is not None:
        return None
    line = f"license: {licence}\n"
    if "\nlicense: unknown\n" in mine:
        return mine.replace("license: unknown\n", line, 1)
    return mine.replace("---\n", f"---\n{line}", 1).replace(f"\n{NO_LICENCE}\n", "")
