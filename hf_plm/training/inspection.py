"""What a step of a run held, from its number alone: for looking at a step whose loss was strange."""

import json
from pathlib import Path

import yaml
from tqdm import tqdm

from hf_plm.config import UserError
from hf_plm.data.corpus import Corpus, open_corpus
from hf_plm.data.manifest import is_corpus, read_manifest, report
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing, StepPlan, build_micro_batch, plan_steps
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import list_checkpoints


def inspect_folder(folder: Path, step: int | None) -> str:
    """A corpus: its report. A run: where it stands, or the windows of one step."""
    if is_corpus(folder):
        return report(read_manifest(folder))
    if not (folder / run_folder.CONFIG).exists():
        raise UserError(f"{folder} is neither a prepared corpus nor a run: it has no corpus.json and no config.yaml.")
    if step is None:
        return _stand(folder)
    if step < 0:
        raise UserError(f"--step counts from 0 and cannot be {step}.")
    return _describe(folder, step)


def _stand(folder: Path) -> str:
    checkpoints = ", ".join(path.name for path in list_checkpoints(folder / run_folder.CHECKPOINTS)) or "none"
    state = "finished" if (folder / run_folder.SUMMARY).exists() else "not finished"
    return (
        f"{folder}: {state}; checkpoints: {checkpoints}\n\n{(folder / run_folder.CONFIG).read_text(encoding='utf-8')}"
    )


def _nearest_cursor(folder: Path, step: int) -> tuple[int, Cursor]:
    """The latest step at or before `step` whose cursor the metrics hold.

    A line of n steps done is about step n - 1, and one of a return from a loss spike about the step that follows.
    """
    best, cursor = 0, Cursor()
    metrics = folder / run_folder.METRICS
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a run that was killed
            continue
        if "to_place" in line and best <= line["step"] <= step:
            best, cursor = line["step"], Cursor(line["to_epoch"], line["to_place"])
        if "place" in line and best < line["step"] - 1 <= step:
            best, cursor = line["step"] - 1, Cursor(line["epoch"], line["place"])
    return best, cursor


def plan_of_step(corpus: Corpus, packing: Packing, step: int, known: int, cursor: Cursor) -> StepPlan:
    """The plan of `step`, walking on from a step whose cursor is known: from lengths alone."""
    plans = plan_steps(corpus.lengths, packing, known, cursor)
    for _ in tqdm(range(known, step), desc="planning", disable=step - known < 1000, unit="step"):
        next(plans)
    return next(plans)


def _describe(folder: Path, step: int) -> str:
    stored = yaml.safe_load((folder / run_folder.CONFIG).read_text(encoding="utf-8"))
    known = stored.pop("corpus")
    recipe = run_folder.from_stored(stored)
    corpus = open_corpus(known["folder"])
    if corpus.fingerprint != known["train"]:
        raise UserError(f"The corpus of {folder} has changed since; what step {step} held cannot be shown.")
    known_step, cursor = _nearest_cursor(folder, step)
    last = recipe.schedule.steps - 1 if recipe.schedule.budget is None else known_step + 10 * recipe.run.log_every
    if step > last:
        raise UserError(f"The run in {folder} has no step {step}; the last that can be shown is {last}.")
    assert recipe.batch.micro_batches is not None
    packing = Packing(recipe.data.crop, recipe.batch.tokens, recipe.batch.micro_batches, recipe.run.seed)
    plan = plan_of_step(corpus, packing, step, known_step, cursor)
    lines = [
        f"Step {step} of {folder} begins at epoch {plan.cursor.epoch}, place {plan.cursor.place}: "
        f"{plan.num_tokens:,} tokens in {len(plan.micro_batches)} micro-batches."
    ]
    for number, windows in enumerate(plan.micro_batches):
        batch = build_micro_batch(corpus, plan, number, packing.seed, recipe.mask)
        lines.append(f"\nmicro-batch {number}: {len(batch.input_ids):,} tokens, {batch.num_targets:,} targets")
        lines.append(f"  {'id':<40}{'length':>8}  {'tokens shown':<16}{'targets':>8}")
        bounds = batch.cu_seqlens.tolist()
        for place, name in enumerate(corpus.ids(windows.indices)):
            targets = int((batch.labels[bounds[place] : bounds[place + 1]] >= 0).sum())
            start, length = int(windows.starts[place]), int(windows.num_tokens[place])
            shown = f"{start}-{start + length - 1}"
            residues = int(corpus.lengths[windows.indices[place]])
            lines.append(f"  {name[:38]:<40}{residues:>8,}  {shown:<16}{targets:>8,}")
    return "\n".join(lines)
