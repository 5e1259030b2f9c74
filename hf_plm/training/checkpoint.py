"""All that continues a run, in one folder that is visible only when whole.

Weights and moments are fp32 safetensors under the stock model's parameter names, the rest is JSON: no pickle, and
nothing that depends on how many processes wrote it. A checkpoint is written under a temporary name, synced and renamed;
its files are hashed, so that a truncated or flipped one is found at resume and the one before it is used.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_plm.config import UserError
from hf_plm.data.order import Cursor

FORMAT = 1
_PREFIX, _PARTIAL, _DAMAGED = "step-", ".partial-", "damaged-"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` updates are done, and the next one begins at `cursor`."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    seconds: float = 0.0


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()) if folder.is_dir() else []


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNNNN` and drop all but the newest `keep`. `facts` are recorded and compared at resume."""
    final = folder / checkpoint_name(progress.step)
    partial = folder / f"{_PARTIAL}{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: p.detach().float().contiguous().cpu() for name, p in model.named_parameters()}
        if strange := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"After step {progress.step - 1} the weights {strange[0]} are not finite: the run stopped, the last "
                "checkpoint is kept; a lower --optimizer.learning_rate in a new run often avoids it."
            )
        save_file(weights, partial / "model.safetensors")
        save_file(_moments(model, optimizer), partial / "optimizer.safetensors")
        hashes = {path.name: sync_and_hash(path) for path in sorted(partial.iterdir())}
        state = {"format": FORMAT, "progress": asdict(progress), "facts": facts, "sha256": hashes}
        write_json(partial / "state.json", state)
        if final.exists():  # the same step saved before; it is not trusted more than this one
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(folder)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {progress.step} could not be written to {folder}: {error}; "
            "the checkpoints before it are whole, so free space or fix the folder, and run the same command again."
        ) from error
    others = [path for path in list_checkpoints(folder) if path != final]
    for old in others[: max(0, len(others) - keep + 1)]:
        # Renamed first, so that a kill in the middle of the removal does not leave half a checkpoint under its name.
        doomed = old.rename(folder / f"{_PARTIAL}{old.name}")
        shutil.rmtree(doomed, ignore_errors=True)
    return final


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for key in (*_MOMENTS, "step"):
            if key in state:
                tensors[f"{name}/{key}"] = state[key].detach().float().contiguous().cpu()
    return tensors


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all as they were written; raises ValueError or OSError otherwise."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if state["format"] > FORMAT:
        raise UserError(
            f"{checkpoint} has checkpoint format {state['format']}, newer than this version's {FORMAT}; update hf_plm."
        )
    for name, written in state["sha256"].items():
        if _sha256(checkpoint / name) != written:
            raise ValueError(f"{name} is not as it was written")
    return state


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
        except (OSError, ValueError, KeyError) as error:
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


def restore(checkpoint: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights and moments back, in place, and say where the run stood."""
    weights = load_file(checkpoint / "model.safetensors")
    moments = load_file(checkpoint / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        strange = sorted(parameters.keys() ^ weights.keys())[0]
        raise UserError(f"{checkpoint} does not fit the model: parameter {strange} is in one of them only.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            own = {key: moments[f"{name}/{key}"] for key in (*_MOMENTS, "step") if f"{name}/{key}" in moments}
            if own:
                # Counters of fused AdamW live on the device; those of the plain one must stay on the CPU.
                is_fused = optimizer.defaults.get("fused")
                optimizer.state[parameter] = {
                    # A copy: what was loaded is a view of the file, which will be removed one day.
                    key: tensor.clone() if key == "step" and not is_fused else tensor.to(parameter.device, copy=True)
                    for key, tensor in own.items()
                }
    saved = state["progress"]
    return Progress(saved["step"], Cursor(**saved["cursor"]), saved["tokens"], saved["seconds"])


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
    return _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; Windows cannot, and does not need to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
