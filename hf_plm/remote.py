"""The Hub over a bad network: what is worth another try is tried again, and what went wrong is told in one sentence.

The calls themselves are `huggingface_hub`'s. No sentence shows a token: not ours, and not one that a server sends back.
"""

import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from hf_plm.config import UserError

ATTEMPTS = 6
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each later wait is twice as long, about half a minute in all."""
LONGEST_WAIT = 300.0
"""Seconds: where a server asks for more patience than that, the person decides."""

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Fault:
    """What went wrong, in words; whether it may pass by itself, and after how many seconds, where a server said so."""

    sentence: str
    is_temporary: bool = False
    wait: float | None = None


def attempt(
    what: str, work: Callable[[], Returned], say: Callable[[str], None] = print, attempts: int = ATTEMPTS
) -> Returned:
    """The result of `work`, begun again after faults that may pass; `what` names the repository in sentences.

    Raises `UserError` where the fault is of another kind, or the attempts are used up.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()  # of its own retries; what comes of them is told here
    wait = FIRST_WAIT
    for number in range(1, attempts + 1):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            fault = judge(error, what)
            if fault is None:
                raise
            pause = wait * random.uniform(0.8, 1.2) if fault.wait is None else fault.wait
            if not fault.is_temporary or number == attempts or pause > LONGEST_WAIT:
                tries = f" (tried {number} times)" if number > 1 else ""
                raise UserError(f"{fault.sentence}{tries}") from None  # the cause may quote what was sent
            say(f"{fault.sentence} Trying again{f' in {pause:.0f} s' if pause >= 0.5 else ''}.")
            time.sleep(pause)
            wait *= 2
    raise AssertionError


def judge(error: Exception, what: str) -> Fault | None:
    """What an error of the client or of the connection means for the person; None for one that is a bug."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # So the client wraps a failed upload.
        return judge(error.__cause__, what)
    if _is_offline(error):
        return Fault(
            f"{_capital(what)} was not reached, because HF_HUB_OFFLINE is set; unset it, or name a folder on this disk."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return Fault(f"{_capital(what)} is no name of a repository: {scrub(error)}")
    if isinstance(error, GatedRepoError):
        return Fault(
            f"{_capital(what)} is gated: ask for access on its page on the Hub, with the account of your token."
        )
    if isinstance(error, RevisionNotFoundError):
        return Fault(f"{_capital(what)} has no such revision; its page on the Hub lists branches and tags.")
    if isinstance(error, RepositoryNotFoundError):
        return Fault(
            f"The Hub has not got {what}, or it is private and not for this token; check the name, or log in with "
            "`hf auth login` (or HF_TOKEN)."
        )
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        given = "does not accept the token it was given" if get_token() else "wants a token and there is none"
        return Fault(f"The Hub {given} for {what}; log in with `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return Fault(f"{_capital(what)} lacks a file that is needed: {scrub(error)}")
    if isinstance(error, HfHubHTTPError):
        return _judge_status(error, status, what)
    if isinstance(error, LocalEntryNotFoundError) or _is_of_the_connection(error):
        cause = error.__cause__ or error
        is_temporary = type(cause).__name__ not in ("UnsupportedProtocol", "InvalidURL")
        return Fault(f"The connection to the Hub failed for {what} ({type(cause).__name__}).", is_temporary)
    if isinstance(error, UnicodeEncodeError):
        return Fault("The token has characters that no token has; log in again with `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, ValueError) and re.search("metadata|licen[sc]e", str(error), re.IGNORECASE):
        return Fault(f"The Hub does not take the card of {what}: {scrub(error)[:300]}")
    if isinstance(error, OSError) and error.errno is not None:
        return Fault(f"{_capital(what)}: {error.strerror} ({error.filename}); the client keeps its files in HF_HOME.")
    return None


def _capital(what: str) -> str:
    return what[:1].upper() + what[1:]


def _is_offline(error: BaseException | None) -> bool:
    """Whether offline mode is at the bottom of it; the client wraps that in errors of other kinds."""
    for _ in range(10):
        if error is None or isinstance(error, OfflineModeIsEnabled):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, OfflineModeIsEnabled)


def _judge_status(error: HfHubHTTPError, status: int | None, what: str) -> Fault:
    if status == 403:
        return Fault(f"The token may not do that with {what}: it needs the right to write to it. {_server_says(error)}")
    if status == 409:
        return Fault(f"The Hub is busy with {what} (HTTP 409). {_server_says(error)}".strip(), is_temporary=True)
    if status == 412:
        return Fault(f"Somebody else wrote to {what} in between.", is_temporary=True, wait=0.0)
    if status == 429:
        return Fault(f"The Hub has had too many requests ({what}).", is_temporary=True, wait=_retry_after(error))
    if status is None or status >= 500 or status == 408:
        sentence = f"The Hub failed on {what} (HTTP {status}). {_server_says(error)}".strip()
        return Fault(sentence, is_temporary=True, wait=_retry_after(error))
    return Fault(f"The Hub refused {what} (HTTP {status}). {_server_says(error)}".strip())


def _server_says(error: HfHubHTTPError) -> str:
    message = scrub(error.server_message or "").strip()
    return f"It says: {message[:200].rstrip('.! ')}." if message else ""


def _retry_after(error: HfHubHTTPError) -> float | None:
    """Seconds of the Retry-After header, or of the Hub's RateLimit header (`t=...`); None where neither is a number."""
    headers = getattr(error.response, "headers", {})
    found = re.search(r"^\s*(\d+)|(?:^|;)\s*t=(\d+)", headers.get("retry-after") or headers.get("ratelimit") or "")
    return float(next(filter(None, found.groups()))) if found else None


def _is_of_the_connection(error: Exception) -> bool:
    # The client's transport is httpx, httpx2 or hf_xet, by its version; none of them is a dependency of ours.
    is_transport = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")
    return is_transport or isinstance(error, ConnectionError | TimeoutError)


def scrub(text: Any) -> str:
    """Text in one line, without anything that is or looks like a token."""
    clean = " ".join(str(text).split())
    if token := get_token():
        clean = clean.replace(token, "***")
    return re.sub(r"\bhf_\w{6,}|(?i:bearer)\s+\S+", "***", clean)


def split_revision(name: str) -> tuple[str, str | None]:
    """`user/model@revision` in its two parts."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_repository(name: str) -> bool:
    """Whether a name is of the form `user/name` or `user/name@revision`; nothing is asked of the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name) is not None


def download(name: str, kind: str, patterns: list[str], say: Callable[[str], None] = print) -> Path:
    """The folder, in the client's cache, of the files of a repository (kind: model or dataset) that match `patterns`.

    Where the Hub cannot be reached and the files are there from an earlier time, these are taken.
    """
    repository, revision = split_revision(name)

    def work() -> str:
        # Of a model the top folder alone: others keep whole checkpoints in folders.
        nested = ["*/*"] if kind == "model" else None
        return snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=nested
        )

    return Path(attempt(f"the {kind} {name}", work, say))


def has_file(name: str, kind: str, file: str) -> bool:
    """Whether a repository has a file; it is then in the client's cache. Tried twice: the name may be a mistake."""
    repository, revision = split_revision(name)

    def work() -> bool:
        try:
            return os.path.exists(hf_hub_download(repository, file, repo_type=kind, revision=revision))
        except EntryNotFoundError as error:
            # Offline, what the client never saw is not there; `datasets` may have it in a cache of its own.
            if isinstance(error, LocalEntryNotFoundError) and not _is_offline(error):
                raise
            return False

    return attempt(f"the {kind} {name}", work, attempts=2)
