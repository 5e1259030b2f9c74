"""A probe in words: the task and its split before the work, tables and verdicts after it."""

import math
import os
import sys
from typing import TYPE_CHECKING

import numpy as np

from hf_plm.judging.intervals import Interval
from hf_plm.judging.probes.measures import LABELS, NAMES

if TYPE_CHECKING:
    from hf_plm.judging.probes.preparation import Prepared
    from hf_plm.judging.probes.task import Task


def say(*lines: str) -> None:
    """Lines on stdout at once. Where nobody reads on, as after `| head -1`, the work goes on for what it keeps."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(count: int, thing: str) -> str:
    """`1 protein`, `1,200 proteins`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def tell(prepared: "Prepared") -> None:
    """The task and its split, before the work begins."""
    task = prepared.task
    residues = f", {counted(len(task), 'residue')}" if task.level == "residue" else ""
    first = prepared.plan.rounds[0]
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in first.tests.items())
    which = "the first: " if len(prepared.rounds) > 1 else ""
    say(
        f"{task.name}: {counted(len(task.ids), 'protein')}{residues} with labels, {task.kind}{_shares(task)}.",
        f"Split: {prepared.plan.how}; {which}{counted(len(first.train), 'protein')} to learn from, {counts}.",
        *noted(prepared),
    )


def noted(prepared: "Prepared", told: int = 0) -> list[str]:
    """The notes that were not yet told."""
    return [f"Note: {note}" for note in prepared.notes[told:]]


def _shares(task: "Task") -> str:
    if not task.classes:
        return ""
    counts = np.bincount(task.labels_R, minlength=len(task.classes)) / len(task)
    order = np.argsort(-counts)[:4]
    more = f", {len(counts) - 4} more" if len(counts) > 4 else ""
    return " (" + ", ".join(f"{task.classes[index]} {counts[index]:.1%}" for index in order) + more + ")"


def title(prepared: "Prepared", test: str) -> str:
    """A test set and how much it holds."""
    rows = prepared.tests[test]
    residues = f", {counted(len(rows), 'residue')}" if prepared.task.level == "residue" else ""
    return f"{test}: {counted(len(np.unique(prepared.task.proteins_R[rows])), 'protein')}{residues}"


def text_table(kind: str, table: dict[str, dict[str, Interval]], marks: dict[str, str]) -> str:
    """One line for each predictor; the first measure with its interval of 95%, the others as they are."""
    of = NAMES[kind]
    wide = max(len(name) + len(marks.get(name, "")) for name in table) + 2
    heads = [f"{LABELS[of[0]]} (95%)".rjust(24), *(LABELS[one].rjust(max(len(LABELS[one]), 7)) for one in of[1:])]
    lines = [" " * wide + "  ".join(heads)]
    for name, measures in table.items():
        cells = [spread(measures[of[0]], of_it="").rjust(24)]
        cells += [decimals(measures[one].value).rjust(max(len(LABELS[one]), 7)) for one in of[1:]]
        lines.append((name + marks.get(name, "")).ljust(wide) + "  ".join(cells))
    return "\n".join(lines)


def verdict(name: str, baseline: str, of: str, gained: Interval) -> str:
    """In words, whether the model is above the letters."""
    if math.isnan(gained.value):
        return f"The embeddings ({name}) cannot be held against the {baseline} baseline: such rows have no {of}."
    how = f"{of} {spread(gained, '+')}"
    if gained.low > 0:
        return f"The embeddings ({name}) are above the {baseline} baseline: {how}."
    if gained.high < 0:
        return f"The embeddings ({name}) are BELOW the {baseline} baseline: {how}."
    return f"The embeddings ({name}) are not shown to be above the {baseline} baseline: {how}."


def spread(value: Interval, sign: str = "", of_it: str = "95%: ", more: str = "") -> str:
    """A number and its interval, where it has one: of one group of proteins there is none."""
    if math.isnan(value.value):
        return "-"
    low, high = (decimals(bound, sign) for bound in (value.low, value.high))
    within = f"{of_it}{low} to {high}" if math.isfinite(value.low) else "no interval"
    return f"{decimals(value.value, sign)} ({within}{more})"


def decimals(value: float, sign: str = "") -> str:
    """Three of them, for what is large four digits, and `-` for what is not defined."""
    if math.isnan(value):
        return "-"
    return format(value, f"{sign}z.3f" if abs(value) < 1e6 else f"{sign}.4g")
