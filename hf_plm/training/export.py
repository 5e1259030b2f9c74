"""`hf-plm export`: a run, or published weights, as a Hub folder, a fair-esm file or an ONNX model.

What is exported is read back and compared before it gets its name, and what it is made of is verified first.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.data.manifest import MANIFEST_NAME, Manifest, manifest_of
from hf_plm.models.card import CURVES, Facts, card_name, model_card
from hf_plm.models.hub import CARD, check_hub_folder, is_hub_folder, save_hub_folder, without_checksums
from hf_plm.models.presets import build_model, esm_config, num_parameters, preset_of
from hf_plm.models.published import find_published, read_published
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import checkpoint_name, list_checkpoints, read_state, step_of

FORMATS = ("hub", "fair-esm", "onnx")
EXPORTS = "exports"


def export(source: str, kind: str = "hub", out: Path | None = None, step: int | None = None) -> list[Path]:
    """Write `source` (a run folder, Hub folder, repository or fair-esm `.pt`) as one of `FORMATS`; the files written.

    Of a run it is the finished model, or with `step` the checkpoint of that step. Raises `UserError` where there is
    none, where `source` is not whole, or where `out` is missing and `source` is no run.
    """
    if kind not in FORMATS:
        raise UserError(f"A format is one of {', '.join(FORMATS)}, not {kind!r}.")
    path = Path(source).expanduser()
    extras: dict[str, Path] = {}
    is_run = run_folder.is_run(path)
    if step is not None and not is_run:
        raise UserError(f"{source} is no run folder, so it has no checkpoint of step {step}.")
    if out is None and not is_run:
        raise UserError(f"Say where to write: hf-plm export {source} --format {kind} --out PATH.")
    if is_run and (step is not None or run_folder.finished(path) is None):
        model, facts = read_run(path, step)
        if step is None:
            print(f"The run in {source} is not finished; this is its newest checkpoint, of step {facts.steps:,}.")
        card, name = model_card(facts), f"{path.resolve().name}-step-{facts.steps}"
    else:
        folder = path / run_folder.HUB if is_run else find_published(source)
        if is_hub_folder(folder):
            check_hub_folder(folder)
        model = read_published(folder)
        card, extras = _card_of(source, folder, model)
        name = path.resolve().name
    out = out or path / EXPORTS / _default_name(kind, name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another place with --out, or move it away.")
    if kind == "onnx" and out.suffix == ".onnx":
        raise UserError(f"--out names a folder for ONNX, where model.onnx will lie, not {out}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "hub":
        return sorted(save_hub_folder(model, out, card, extras).iterdir())
    if kind == "onnx":
        from hf_plm.models.onnx import write_onnx

        return sorted(write_onnx(model, out).iterdir())
    from hf_plm.models.fair_esm import write_fair_esm

    return write_fair_esm(model, out)


def _default_name(kind: str, name: str) -> str:
    # fair-esm reads a file as ESM-2 by the beginning of its name.
    return {"hub": f"{name}-hub", "onnx": f"{name}-onnx", "fair-esm": f"esm2_{name}.pt"}[kind]


def read_run(folder: Path, step: int | None) -> tuple[EsmForMaskedLM, Facts]:
    """The model of a run's checkpoint (the newest where `step` is None), checked by its checksums, and its card."""
    recipe, origin = run_folder.read_config(folder)
    data = _read_data(folder, origin)
    checkpoint, state = _find_checkpoint(folder, step)
    model = build_model(esm_config(recipe.model.preset, token_dropout=recipe.model.token_dropout), seed=0)
    weights: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(checkpoint.glob("model-*.safetensors")):
            weights |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The checkpoint {checkpoint} cannot be read ({error}); the run may have gone on.") from None
    if not weights:
        raise UserError(f"The checkpoint {checkpoint} was removed in the meantime; the run has newer ones.")
    wanted = dict(model.named_parameters())
    if strange := sorted(weights.keys() ^ wanted.keys()):
        raise UserError(f"{checkpoint} does not fit the model: {strange[0]} is in one of them only.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(weights[name])
    progress = state["progress"]
    facts = Facts(
        name=card_name(recipe.replace(run__folder=str(folder))),
        recipe=recipe,
        num_parameters=num_parameters(model.config),
        steps=progress["step"],
        tokens=progress["tokens"],
        seconds=progress["seconds"],
        numbers=_numbers_at(folder / run_folder.METRICS, progress["step"]),
        machine=state["facts"],
        data=data,
        data_hash=origin.train,
        is_simulated=origin.is_simulated,
        is_finished=progress["step"] == (run_folder.read_summary(folder) or {}).get("steps"),
        datasets=origin.datasets,
        start=origin.start,
        start_sha256=origin.start_sha256,
    )
    return model, facts


def _read_data(folder: Path, origin: run_folder.Origin) -> Manifest:
    """What the corpus of a run said of itself: the run's copy, or for want of it the corpus's own."""
    copy = folder / run_folder.DATA
    path = copy if copy.is_file() else Path(origin.folder) / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"What the run in {folder} was trained on is not known any more: {copy} is missing.")
    return manifest_of(path)


def _card_of(source: str, folder: Path, model: EsmForMaskedLM) -> tuple[str, dict[str, Path]]:
    """The card of published weights, without its old checksums, and what it shows; of a fair-esm file, a short one."""
    if (folder / CARD).is_file():
        text = without_checksums((folder / CARD).read_text(encoding="utf-8"))
        return text, {CURVES: folder / CURVES} if (folder / CURVES).is_file() else {}
    front_matter = ModelCardData(
        library_name="transformers", pipeline_tag="fill-mask", tags=["biology", "protein", "esm"]
    )
    name = Path(source).name
    return (
        f"---\n{front_matter.to_yaml()}\n---\n\n# {name}\n\nConverted from `{name}` ({preset_of(model.config)}).\n",
        {},
    )


def _find_checkpoint(folder: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    checkpoints = folder / run_folder.CHECKPOINTS
    if step is None:
        for path in reversed(list_checkpoints(checkpoints)):
            try:
                return path, read_state(path)
            except (OSError, ValueError, KeyError, TypeError):  # the run itself says so when it goes on
                continue
        raise UserError(f"The run in {folder} has no whole checkpoint yet.")
    path = checkpoints / checkpoint_name(step)
    if not path.is_dir():
        there = ", ".join(str(step_of(one)) for one in list_checkpoints(checkpoints)) or "none"
        raise UserError(f"The run in {folder} has no checkpoint of step {step}; there are {there} (--checkpoint.keep).")
    try:
        return path, read_state(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The checkpoint {path} is damaged ({error}) and is not exported.") from None


def _numbers_at(metrics: Path, step: int) -> dict[str, Any]:
    """The validation of a step, or {} where there was none."""
    if not metrics.is_file():
        return {}
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = [line for line in lines if "validation_loss" in line and line["step"] == step]
    return found[-1] if found else {}
