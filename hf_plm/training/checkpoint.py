"""All that continues a run, in one folder that is visible only when whole.

Weights and moments are whole fp32 tensors under the stock model's parameter names, whatever engine held them, so that a
run goes on under any other engine and number of processes. Each process writes a share of the tensors, about as many
bytes each, in safetensors; the rest is JSON: no pickle (torch's distributed checkpoints have one). What is to be saved
is copied at once and written in a thread while training goes on; a checkpoint takes its name when all have written, and
its files are hashed, so that a truncated or flipped one is found at resume and the one before it is used.
"""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_plm.config import UserError
from hf_plm.data.order import Cursor
from hf_plm.files import sync_folder
from hf_plm.models.hub import sha256
from hf_plm.training.engine import MOMENTS, put, read, set_up
from hf_plm.training.spikes import Trend

FORMAT = 2
_PREFIX, _PARTIAL, _DAMAGED = "step-", ".partial-", "damaged-"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` steps are done, `skipped` of them without an update; the next begins at `cursor`."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    trend: Trend = field(default_factory=Trend)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Progress":
        return Progress(**{**values, "cursor": Cursor(**values["cursor"]), "trend": Trend(**values["trend"])})


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()) if folder.is_dir() else []


class Saver:
    """Writes checkpoints in `folder`, this process its share of each. `facts` are recorded, and compared at resume.

    `begin` is called by all processes together and returns when the tensors are copied; `wait` returns when this
    process's share is on disk; then, on one process, `commit` makes the checkpoint visible.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], keep: int, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.facts, self.keep = folder, facts, keep
        self.rank, self.world_size = rank, world_size
        self.held: set[str] = set()  # names of checkpoints that somebody reads, which stay as long
        self._progress: Progress | None = None
        self._thread: Thread | None = None
        self._error: Exception | None = None

    @property
    def is_pending(self) -> bool:
        return self._progress is not None

    @property
    def is_ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(self, progress: Progress, model: nn.Module, optimizer: Any) -> None:
        """Copy this process's share of the tensors and start to write it."""
        assert not self.is_pending
        weights, moments = {}, {}
        owners = _owners(model, self.world_size)
        for name, parameter in model.named_parameters():
            is_mine = owners[name] == self.rank
            weight = read(parameter, optimizer)
            if is_mine:
                weights[name] = weight.to("cpu", copy=True).contiguous()
            for moment in MOMENTS if parameter.requires_grad else ():
                value = read(parameter, optimizer, moment)
                if is_mine:
                    moments[f"{name}/{moment}"] = value.to("cpu", copy=True).contiguous()
        self._progress, self._error = progress, None
        self._thread = Thread(target=self._write, args=(progress, weights, moments), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, progress: Progress, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        partial = self._partial(progress)
        try:
            if strange := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
                raise UserError(
                    f"After step {progress.step - 1} the weights {strange[0]} are not finite: the run stopped, the "
                    "last checkpoint is kept; a lower --optimizer.learning_rate in a new run often avoids it."
                )
            partial.mkdir(parents=True, exist_ok=True)
            share = f"{self.rank + 1:05d}-of-{self.world_size:05d}"
            hashes = {}
            for kind, tensors in (("model", weights), ("optimizer", moments)):
                path = partial / f"{kind}-{share}.safetensors"
                save_file(tensors, path)
                hashes[path.name] = sync_and_hash(path)
            write_json(partial / f"share-{share}.json", hashes)
        except UserError as error:
            self._error = error
        except (OSError, SafetensorError) as error:
            self._error = self._failed(progress, error)
        except BaseException as error:  # told by `wait`; in a thread it would be printed and forgotten
            self._error = RuntimeError(f"writing the checkpoint of step {progress.step} failed: {error!r}")

    def _partial(self, progress: Progress) -> Path:
        return self.folder / f"{_PARTIAL}{checkpoint_name(progress.step)}"

    def _failed(self, progress: Progress, error: Exception) -> UserError:
        return UserError(
            f"The checkpoint of step {progress.step} could not be written to {self.folder}: {error}; "
            "the checkpoints before it are whole, so free space or fix the folder, and run the same command again."
        )

    def wait(self) -> None:
        """Until this process's share is on disk; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def commit(self) -> Path:
        """Give the checkpoint its name, once all shares are on disk, and drop all but the newest `keep`."""
        assert self._progress is not None
        partial = self._partial(self._progress)
        final = self.folder / checkpoint_name(self._progress.step)
        try:
            hashes: dict[str, str] = {}
            for number in range(1, self.world_size + 1):
                path = partial / f"share-{number:05d}-of-{self.world_size:05d}.json"
                hashes |= json.loads(path.read_text())
                path.unlink()
            state = {"format": FORMAT, "progress": asdict(self._progress), "facts": self.facts, "sha256": hashes}
            write_json(partial / "state.json", {**state, "checksum": checksum(state)})
            if final.exists():  # the same step saved before; it is not trusted more than this one
                shutil.rmtree(final)
            partial.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            raise self._failed(self._progress, error) from error
        others = [path for path in list_checkpoints(self.folder) if path != final and path.name not in self.held]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
            doomed = old.rename(self.folder / f"{_PARTIAL}{old.name}")
            shutil.rmtree(doomed, ignore_errors=True)
        return final

    def forget(self) -> None:
        """Be ready to begin again: what was begun is visible, or given up by all processes and removed."""
        if self._progress is not None and self.rank == 0:
            shutil.rmtree(self._partial(self._progress), ignore_errors=True)
        self._progress = self._thread = self._error = None


def _owners(model: nn.Module, world_size: int) -> dict[str, int]:
    """Which process writes each parameter: about the same number of elements each."""
    loads = [0] * world_size
    owners = {}
    for name, parameter in model.named_parameters():
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += getattr(parameter, "ds_numel", parameter.numel())
    return owners


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all as they were written; raises ValueError or OSError otherwise."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if "checksum" in state and state.pop("checksum") != checksum(state):
        raise ValueError("state.json is not as it was written")
    if state["format"] != FORMAT:
        other = (
            "a newer version: update hf_plm" if state["format"] > FORMAT else "an older version: go on with that one"
        )
        raise UserError(f"{checkpoint} has checkpoint format {state['format']}, not {FORMAT}; it is of {other}.")
    for name, written in state["sha256"].items():
        if sha256(checkpoint / name) != written:
            raise ValueError(f"{name} is not as it was written")
    return state


def checksum(state: dict[str, Any]) -> str:
    """Of what state.json says, but for its checksum."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state, and a sentence for each newer one, which is put aside.

    None where there is no checkpoint at all. Raises `UserError` where there are some and none is whole: starting from
    nothing would throw away what may still be brought back.
    """
    damaged = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            state = read_state(checkpoint)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append((checkpoint, error))
            continue
        complaints = []
        for path, fault in damaged:
            aside = path.rename(folder / f"{_DAMAGED}{path.name}")
            complaints.append(f"The checkpoint {path} is damaged ({fault}); it is now called {aside.name}.")
        return checkpoint, state, complaints
    if damaged:
        path, fault = damaged[0]
        raise UserError(
            f"No checkpoint in {folder} is whole ({path.name}: {fault}), so the run cannot go on; "
            "bring one back from a copy, or give a new --run.folder."
        )
    return None, {}, []


def restore(checkpoint: Path, state: dict[str, Any], model: nn.Module, optimizer: Any) -> Progress:
    """Put weights and moments back, in place, and say where the run stood; all processes together."""
    progress = Progress.from_json(state["progress"])
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    wanted = parameters.keys() | {f"{name}/{moment}" for name in trained for moment in MOMENTS}
    with ExitStack() as held:
        files = [held.enter_context(safe_open(checkpoint / name, "pt")) for name in sorted(state["sha256"])]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
        if strange := sorted(where.keys() ^ wanted):
            raise UserError(f"{checkpoint} does not fit the model: {strange[0]} is in one of them only.")
        set_up(list(trained.values()), optimizer, progress.step - progress.skipped)
        for name, parameter in parameters.items():
            put(parameter, optimizer, where[name].get_tensor(name))
            for moment in MOMENTS if name in trained else ():
                put(parameter, optimizer, where[f"{name}/{moment}"].get_tensor(f"{name}/{moment}"), moment)
    return progress


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one motion."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one motion: either the old content is there or the new one."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    sync_and_hash(partial)
    partial.replace(path)


def sync_and_hash(path: Path) -> str:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return sha256(path)
