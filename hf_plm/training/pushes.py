"""Pushes that a run makes: of checkpoints while it trains, of the model when it is finished.

Nothing of it can stop or slow the training. What is not pushed yet is written down in the run folder, and taken up by
the next push, by the next start of the same command, or by hand.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from hf_plm.config import Hub, Recipe, UserError
from hf_plm.remote import scrub
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import checkpoint_name, write_json
from hf_plm.training.push import push
from hf_plm.training.shipment import Request, sweep

LOG, RECORD = "push.log", "pushed.json"
MOST_PENDING = 3
"""Checkpoints kept for a Hub that cannot be reached; older ones are given up, and said."""


class BackgroundPushes:
    """Pushes checkpoints of a run while it trains, each by `hf-plm push` in a process of the lowest priority.

    `pending` are the steps that are not pushed yet, the one under way included; their checkpoints (`held`) are not to
    be removed. A push that fails is said, and tried again along with the next one. Used by the main process alone.
    """

    def __init__(self, knobs: Hub, folder: Path, step: int, say: Callable[[str], None]) -> None:
        assert knobs.push is not None
        self.knobs, self.folder, self.say = knobs, folder, say
        self.last_offered = step
        self.pending: list[int] = []
        self._waiting: list[int] = []
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None
        sweep(folder)
        for earlier in _read_record(folder, knobs.push).get("pending", []):
            if (folder / run_folder.CHECKPOINTS / checkpoint_name(earlier)).is_dir():
                self.pending.append(earlier)
            elif earlier <= step:
                say(f"Step {earlier:,} was never pushed, and its checkpoint is gone.")
        self._waiting = list(self.pending)

    @property
    def held(self) -> set[str]:
        """Names of checkpoints that a push has yet to read."""
        return {checkpoint_name(step) for step in self.pending}

    def offer(self, step: int) -> None:
        """A checkpoint of `step` is whole: the first one at or after each multiple of hub.every is pushed."""
        every = self.knobs.every
        if every is not None and step // every > self.last_offered // every:
            self.pending = [*(one for one in self.pending if one != step), step]
            while len(self.pending) > MOST_PENDING:
                running = self._running[0] if self._running else None
                given_up = next(one for one in self.pending if one != running)
                self.pending.remove(given_up)
                self.say(f"Step {given_up:,} is not pushed any more: {MOST_PENDING} later ones wait for the Hub.")
            self._waiting = [one for one in self.pending if self._running is None or one != self._running[0]]
            self._write()
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
                self._say_failed(step, self._last_words())
            else:
                self.say(f"Pushed step {step:,} to {self.knobs.push}, branch step-{step}.")
                self.pending.remove(step)
                self._write()
        if self._waiting:
            step = self._waiting.pop(0)
            try:
                self._running = step, self._start(step)
            except OSError as error:
                self._say_failed(step, f"{error.strerror} ({error.filename}).")

    def close(self) -> None:
        """End what is under way; its commit is whole or absent, and it stays pending."""
        if self._running is not None:
            self._running[1].terminate()
            self._running[1].wait()
            self._running = None
        self._write()

    def _say_failed(self, step: int, reason: str) -> None:
        self.say(f"Step {step:,} was not pushed: {reason} The next push tries it again.")

    def _write(self) -> None:
        assert self.knobs.push is not None
        _write_record(self.folder, self.knobs.push, pending=self.pending)

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
        with suppress(psutil.Error):
            psutil.Process(process.pid).nice(19 if os.name == "posix" else 64)  # 64: Windows' idle class
        return process

    def _last_words(self) -> str:
        try:
            with open(self.folder / LOG, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
        except OSError as error:
            return f"{error.strerror} ({error.filename})."
        return scrub(lines[-1].removeprefix("hf-plm: ")) if lines else "it said nothing."


def push_finished(recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """Push what is pending of a finished run, and its model, where the recipe asks for it and it was not done before.

    Raises `UserError` with what was not pushed and why; the run is finished all the same.
    """
    repository, folder = recipe.hub.push, recipe.run_folder
    if repository is None:
        return
    record = _read_record(folder, repository)
    failures = []
    if record.get("address") is None:
        try:
            address = push(Request(folder, repository, is_public=recipe.hub.public), say)
            _write_record(folder, repository, address=address)
            say(f"Pushed the model: {address}")
        except UserError as error:
            failures.append(f"its model was not pushed ({str(error).rstrip('.')})")
    pending = list(record.get("pending", []))
    for step in list(pending) if not failures else []:  # what the model met, they would meet again
        try:
            push(Request(folder, repository, f"step-{step}", recipe.hub.public), say)
            say(f"Pushed step {step:,} to {repository}, branch step-{step}.")
            pending.remove(step)
            _write_record(folder, repository, pending=pending)
        except UserError as error:
            failures.append(f"step {step:,} was not pushed ({str(error).rstrip('.')})")
    if failures:
        waiting = f", and step {', '.join(map(str, pending))} waits" if pending else ""
        public = " --public" if recipe.hub.public else ""
        raise UserError(
            f"The run is finished and its model is in {folder / run_folder.HUB}, but {', and '.join(failures)}"
            f"{waiting}; run the same command again, or hf-plm push {folder} {repository}{public}."
        )


def _read_record(folder: Path, repository: str) -> dict[str, Any]:
    """What was pushed to a repository, or waits for it."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if record.get("repository") == repository else {}


def _write_record(folder: Path, repository: str, **changes: Any) -> None:
    with suppress(OSError):  # a full disk is told by what needs it; a push may be made twice
        write_json(folder / RECORD, {**_read_record(folder, repository), "repository": repository, **changes})
