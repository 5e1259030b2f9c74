"""What the folder of a run says of it, finished or not, as sections of a report: summary, recipe, data, machine.

Nothing here opens a model, and nothing that is not there stops it: a run that is still going has a report of what it
has written so far.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_plm.config import KNOBS, Recipe
from hf_plm.data.manifest import MANIFEST_NAME, SPLIT_KINDS, Manifest, manifest_of
from hf_plm.models.presets import esm_config, num_parameters
from hf_plm.progress import duration
from hf_plm.report.charts import Axis, Series, rows_chart, span
from hf_plm.report.page import (
    Html,
    bounds,
    counted,
    details,
    element,
    escape,
    estimate,
    facts,
    figure,
    first,
    grid,
    join,
    missing,
    notice,
    number,
    paragraph,
    table,
)
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import list_checkpoints

MARGINS = (
    ("all targets", "margin_context_free", "validation_loss", "context_free_loss"),
    ("masked targets", "margin_unigram_masked", "validation_loss_masked", "unigram_entropy"),
)


@dataclass(frozen=True)
class Run:
    """A run's folder, read. Lines that could not be read in the metrics are counted in `num_torn`."""

    name: str
    folder: Path
    recipe: Recipe
    origin: run_folder.Origin
    manifest: Manifest | None
    summary: dict[str, Any]  # of a run that goes on: what is known by now
    is_finished: bool
    machine: dict[str, Any]
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    tasks: list[dict[str, Any]]  # what `--evaluate.every` measured
    num_torn: int


def read_run(folder: Path) -> Run:
    """Raises `UserError` where config.yaml is not that of a run, or data.json is damaged."""
    recipe, origin = run_folder.read_config(folder)
    data = next(
        (path for path in (folder / run_folder.DATA, Path(origin.folder) / MANIFEST_NAME) if path.is_file()), None
    )
    lines, num_torn = _read_metrics(folder / run_folder.METRICS)
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation_loss" in line]
    summary = run_folder.finished(folder)
    state: dict[str, Any] = {}
    for checkpoint in list_checkpoints(folder / run_folder.CHECKPOINTS):
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # one that goes away while it is read
            continue
    known = {
        "steps": training[-1]["step"] if training else 0,
        "tokens": training[-1]["tokens"] if training else 0,
        "seconds": training[-1].get("seconds") if training else None,
        "parameters": num_parameters(esm_config(recipe.model.preset, token_dropout=recipe.model.token_dropout)),
        **(
            {key: value for key, value in validation[-1].items() if key not in ("step", "tokens")} if validation else {}
        ),
    }
    return Run(
        name=folder.resolve().name,
        folder=folder,
        recipe=recipe,
        origin=origin,
        manifest=manifest_of(data) if data else None,
        summary={**known, **(summary or {})},
        is_finished=summary is not None,
        machine=summary or state.get("facts", {}),
        training=training,
        validation=validation,
        tasks=[line for line in lines if not {"loss", "validation_loss"} & line.keys()],
        num_torn=num_torn,
    )


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and how many were not whole: the last one of a run that goes on may not be."""
    lines, num_torn = [], 0
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            num_torn += 1
            continue
        if isinstance(line, dict) and {"step", "tokens"} <= line.keys():
            lines.append(line)
    return lines, num_torn


def verdict(numbers: dict[str, Any]) -> bool | None:
    """Whether both margins are above zero with their intervals; None where they were not measured."""
    lows = [bounds(numbers.get(margin))[0] for _, margin, _, _ in MARGINS]
    return None if any(math.isnan(low) for low in lows) else min(lows) > 0


def summary(run: Run) -> Html:
    """What it is, how much it saw, whether it learnt."""
    parts = []
    if not run.is_finished:
        state = f"after step {run.summary['steps']:,}" if run.training else "before its first line of metrics"
        parts.append(notice(f"This run is not finished: what follows is how it stood {state}. ", _export_hint(run)))
    if run.origin.is_simulated:
        parts.append(notice("Its proteins are simulated, not natural: this model is a demonstration."))
    parts.append(paragraph(_what_it_is(run), kind="lead"))
    parts.append(paragraph(_whether_it_learnt(run), kind="lead"))
    parts.append(_cards(run))
    margins = _margins(run)
    return join([*parts, margins])


def _export_hint(run: Run) -> Html:
    command = element("code", f"hf-plm export {run.folder} --out FOLDER")
    return join([command, " writes its newest checkpoint as a model, which has a report of its own."])


def _what_it_is(run: Run) -> str:
    numbers, recipe = run.summary, run.recipe
    start = f"the weights of {run.origin.start}" if run.origin.start else "random weights"
    corpus = f"{run.manifest.name}" if run.manifest else "its corpus"
    seen = ""
    if run.manifest and "train" in run.manifest.splits:
        split = run.manifest.splits["train"]
        # <cls> and <eos> are tokens too; what crops leave out counts as not seen.
        share = numbers["tokens"] / (split.residues + 2 * split.sequences)
        seen = f": {share:.1%} of what that holds" if share < 1 else f": {share:,.1f} times what that holds"
    spent = f" in {duration(numbers['seconds'])}" if numbers.get("seconds") else ""
    return (
        f"{run.name} is a protein language model of {numbers['parameters']:,} parameters: ESM-2's architecture in size "
        f"{recipe.model.preset}, pretrained from {start} for {counted(numbers['steps'], 'step')}{spent}. It saw "
        f"{numbers['tokens']:,} tokens of {corpus}{seen}."
    )


def _whether_it_learnt(run: Run) -> Html:
    numbers = run.summary
    loss, baseline = numbers.get("validation_loss"), numbers.get("context_free_loss")
    learnt = verdict(numbers)
    if learnt is None:
        if loss is None or baseline is None:
            return Html("Whether it has learnt is not measured yet: there was no validation.")
        side = "under" if loss < baseline else "above"
        return escape(
            f"At its last validation the loss was {number(abs(loss - baseline))} nats per target {side} that of the "
            f"best guess without any context ({number(loss)} and {number(baseline)}); intervals come at the end."
        )
    held_out = counted(numbers.get("validation_sequences", 0), "held-out protein")
    all_targets, masked = (_side(numbers[margin]) for _, margin, _, _ in MARGINS)
    head = "It has learnt from context." if learnt else "It has not been shown to learn from context."
    end = (
        "in brackets 95% intervals"
        if learnt
        else "learning means under both, with the whole 95% intervals (in brackets)"
    )
    text = (
        f" On {held_out} its loss is {all_targets[0]} that of the best guess without context by {all_targets[1]} nats "
        f"per target, and on masked residues {masked[0]} that of letter frequencies by {masked[1]}; {end}."
    )
    return join([element("b", head), text])


def _side(margin: Any) -> tuple[str, str]:
    """Under or above, and by how much with its interval: the amount is never below zero."""
    value, (low, high) = first(margin), bounds(margin)
    return ("under", estimate(margin)) if value >= 0 else ("above", estimate([-value, -high, -low]))


def _cards(run: Run) -> Html:
    numbers = run.summary
    entropy = numbers.get("unigram_entropy")
    guess = f"letter frequencies: {number(math.exp(entropy), '.1f')}" if isinstance(entropy, float) else ""
    masked = numbers.get("validation_loss_masked")
    perplexity = math.exp(masked) if isinstance(masked, float) else None
    cards = (
        ("Perplexity, masked residues", number(perplexity, ".2f"), guess),
        ("Recovery, all targets", number(numbers.get("validation_recovery"), ".1%"), "held out"),
        ("Parameters", f"{numbers['parameters'] / 1e6:,.3g} M", f"size {run.recipe.model.preset}"),
        ("Tokens seen", f"{numbers['tokens'] / 1e6:,.3g} M", counted(numbers["steps"], "step")),
    )
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value, element("small", note)))
            for name, value, note in cards
        ),
        class_="cards",
    )


def _margins(run: Run) -> Html:
    values = [run.summary.get(margin) for _, margin, _, _ in MARGINS]
    ends = [bounds(value) for value in values]
    names = [name for name, _, _, _ in MARGINS]
    rows = [
        (name, number(run.summary.get(loss), ".4f"), number(run.summary.get(base), ".4f"), estimate(value, "+.3f"))
        for (name, _, loss, base), value in zip(MARGINS, values, strict=True)
    ]
    head = ["Held out", "Loss", "Without context", "Margin"]
    shown = table("Nats per target; a margin above zero is better; 95% intervals over proteins", head, rows)
    if verdict(run.summary) is None:
        return shown
    low, high = span([0.0, *(end for pair in ends for end in pair)], zero=True)
    series = Series("", range(2), [first(one) for one in values], [low for low, _ in ends], [high for _, high in ends])
    chart = rows_chart(
        names,
        [series],
        Axis("nats per target under what needs no context", low, high),
        "Margins over the baselines: " + "; ".join(f"{row[0]} {row[3]}" for row in rows),
        zero=True,
        left=104,
    )
    return grid(shown, figure(join([element("b", "Learning"), " means right of zero, interval and all."]), chart))


def recipe(runs: Sequence[Run]) -> Html:
    """The knobs that are not as they come, and the whole recipe to open; of two runs, where they differ."""
    parts = []
    if len(runs) > 1:
        differ = [name for name in KNOBS if len({_knob(run, name) for run in runs}) > 1 and name not in _PLACES]
        rows = [(element("code", name), *(_knob(run, name) for run in runs)) for name in differ]
        parts.append(table("Knobs that differ", ["Knob", *(run.name for run in runs)], rows))
    else:
        changed = [name for name, knob in KNOBS.items() if runs[0].recipe[name] != knob.default and name not in _PLACES]
        rows = [(element("code", name), _knob(runs[0], name), _cell(KNOBS[name].meaning)) for name in changed]
        parts.append(table("Knobs that are not at their defaults", ["Knob", "Value", "Meaning"], rows))
    for run in runs:
        whole = element("pre", element("code", _whole(run)), tabindex="0")
        parts.append(details(f"The whole recipe of {run.name}", whole))
    return join(parts)


_PLACES = ("run.folder", "data.cache")


def _whole(run: Run) -> str:
    """The recipe as YAML; of paths the last part, so that the page can be passed on."""
    plain = run.recipe.to_dict()
    for name in _PLACES:
        section, knob = name.split(".")
        del plain[section][knob]
    for name in ("train", "validation"):
        plain["data"][name] = [Path(one).name for one in plain["data"][name]]
    plain["init"]["from"] = run.origin.start
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _cell(text: str) -> Html:
    return element("span", text, class_="meaning")


def _knob(run: Run, name: str) -> str:
    value = run.recipe[name]
    if value is None:
        return "auto" if KNOBS[name].may_be_auto else "none"
    if isinstance(value, tuple):
        return ", ".join(Path(one).name or one for one in map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def data(runs: Sequence[Run]) -> Html:
    """What the corpus said of itself."""
    parts = []
    seen: set[str] = set()
    for run in runs:
        if run.origin.train in seen:
            parts.append(paragraph(f"{run.name} was trained on the same sequences."))
            continue
        seen.add(run.origin.train)
        if len(runs) > 1:
            parts.append(element("h3", run.name))
        parts.append(_corpus(run))
    return join(parts)


def _corpus(run: Run) -> Html:
    manifest = run.manifest
    if manifest is None:
        return missing("The run has no data.json, and its corpus is not where it was.")
    splits = [
        (
            name,
            f"{split.sequences:,}",
            f"{split.residues:,}",
            *(f"{split.length_quantiles[key]:,}" if key in split.length_quantiles else "" for key in ("0", "0.5", "1")),
        )
        for name, split in manifest.splits.items()
    ]
    counts = manifest.counts
    pairs: list[tuple[object, object]] = [
        ("Corpus", manifest.name),
        ("Sources", ", ".join(dict.fromkeys(source.name for source in manifest.sources)) or "unknown"),
        ("Records", f"{counts.read:,} read, {counts.kept:,} kept, {counts.rejected:,} rejected"),
        ("Held out", SPLIT_KINDS.get(manifest.split_kind, manifest.split_kind).replace("`", "")),
        ("Hash", element("code", run.origin.train)),
        *(("Warning", warning) for warning in manifest.warnings),
    ]
    head = ["Split", "Sequences", "Residues", "Shortest", "Median", "Longest"]
    return join([facts(pairs), table("Splits, lengths in residues", head, splits)])


def machine(runs: Sequence[Run]) -> Html:
    """Hardware and versions."""
    rows = []
    for label, text in (
        ("Hardware", lambda run: f"{run.machine.get('processes', '?')} \u00d7 {run.machine.get('device', 'unknown')}"),
        ("Threads", lambda run: run.machine.get("threads", "unknown")),
        ("Engine", lambda run: run.machine.get("engine", "unknown")),
        ("Precision", lambda run: run.machine.get("precision", "unknown")),
        ("Layers", lambda run: run.machine.get("layers", "unknown")),
        *((name, lambda run, name=name: run.machine.get(name, "unknown")) for name in _VERSIONS),
    ):
        rows.append((label, *(str(text(run)) for run in runs)))
    if len(runs) == 1:
        return facts((row[0], row[1]) for row in rows)
    return table("Where it ran", ["", *(run.name for run in runs)], rows)


_VERSIONS = ("hf_plm", "python", "torch", "transformers", "accelerate", "numpy")
