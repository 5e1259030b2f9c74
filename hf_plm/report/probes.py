"""Probes and comparisons of two models as a section of a report, each beside what the letters alone give."""

import math
from collections.abc import Sequence
from typing import Any

from hf_plm.judging.probes.measures import LABELS
from hf_plm.report.charts import QUIET, Axis, rows_chart, span
from hf_plm.report.findings import Finding, dict_of, intervals, list_of, said, short
from hf_plm.report.page import (
    Html,
    counted,
    details,
    element,
    estimate,
    figure,
    first,
    grid,
    join,
    missing,
    number,
    paragraph,
    table,
)


def probes(findings: Sequence[Finding], model: str) -> Html:
    """Predictors trained on frozen embeddings: task by task, test set by test set."""
    shown = [one for one in findings if one.kind in ("probe", "comparison")]
    if not shown:
        return missing("No probe was trained.", f"hf-plm probe {model} --task TASK.tsv")
    return join(_task(one) for one in shown)


def _task(finding: Finding) -> Html:
    task = dict_of(finding.plain, "task")
    models = [short(one.get("model")) for one in finding.rows("models")]
    heading = f"{said(task, 'name', finding.path.stem)}: {' against '.join(models)}"
    unit = "protein" if task.get("level") == "protein" else "residue"
    notes = [str(note) for note in list_of(finding.plain, "notes")]
    about = paragraph(
        f"{counted(task.get('rows'), unit)} with labels, of {counted(task.get('proteins'), 'protein')} "
        f"({said(task, 'kind', 'unknown kind')}). Split: {said(finding.plain, 'split', 'unknown')}. ",
        " ".join(notes),
    )
    tests = list(dict.fromkeys(said(row, "test") for row in finding.rows("results")))
    return join([element("h3", heading), about, *(_test(finding, test, models) for test in tests)])


def _test(finding: Finding, test: str, models: Sequence[str]) -> Html:
    """A row for each predictor and baseline; a mark for each model."""
    rows = [row for row in finding.rows("results") if said(row, "test") == test]
    headline = said(finding.plain, "headline")
    measures = list(dict.fromkeys(key for row in rows for key in dict_of(row, "measures")))
    measures.sort(key=lambda one: one != headline)
    label = LABELS.get(headline, headline)
    plain = dict_of(dict_of(finding.plain, "tests"), test)
    sides = [str(one) for one in list_of(finding.plain, "labels") or models[:1]]
    cells = [
        (
            f"{said(row, 'predictor')}" + (f", {row['model']}" if row.get("model") else ""),
            *(_measure(row, one, is_first=one == headline) for one in measures),
        )
        for row in rows
    ]
    of = f"{test}: {counted(plain.get('rows'), 'row')} of {counted(plain.get('proteins'), 'protein')}"
    parts = [_chart(rows, sides, headline, label, of), join(_verdicts(finding, plain, sides, label))]
    shown = table(of, ["Predictor", *(LABELS.get(one, one) for one in measures)], cells)
    return join([grid(*(one for one in parts if one)), details(f"All measures, {test}", shown)])


def _measure(row: dict[str, Any], name: str, is_first: bool) -> str:
    value = _interval(dict_of(dict_of(row, "measures"), name))
    return estimate(value) if is_first else number(first(value))


def _interval(found: dict[str, Any]) -> list[Any]:
    return [found.get("value"), found.get("low"), found.get("high")]


def _chart(rows: Sequence[dict[str, Any]], sides: Sequence[str], headline: str, label: str, of: str) -> Html:
    names = list(dict.fromkeys(said(row, "predictor") for row in rows))
    baselines = {said(row, "predictor") for row in rows if row.get("baseline")}

    def values(side: str | None) -> list[Any]:
        found: dict[str, Any] = {}
        for row in rows:
            is_baseline = bool(row.get("baseline"))
            if is_baseline == (side is None) and (is_baseline or row.get("model", side) == side):
                found[said(row, "predictor")] = _interval(dict_of(dict_of(row, "measures"), headline))
        return [found.get(name) for name in names]

    series = [intervals(side, values(side), style) for style, side in enumerate(sides)]
    if baselines:
        series.append(intervals("without a model", values(None), QUIET))
    ends = [value for one in series for column in (one.y, one.low, one.high) for value in column]
    if not any(math.isfinite(value) for value in ends):
        return Html("")
    low, high = span(ends)
    axis = Axis(label, low, high)
    left = 20 + 7 * max(len(name) for name in names)
    return figure(
        join([element("b", f"{label}."), f" {of}; bars are 95% intervals."]),
        rows_chart(names, series, axis, f"{label} by predictor, {of}; the numbers are below.", left=left),
    )


def _verdicts(finding: Finding, plain: dict[str, Any], sides: Sequence[str], label: str) -> list[Html]:
    """In words: above the letters or not; the one model above the other or not."""
    sentences = []
    above = dict_of(plain, "above_letters")
    if above:
        amount = estimate(_interval(above), "+.3f")
        name = said(finding.plain, "predictor", "the predictor")
        letters = next((one for one in list_of(finding.plain, "baselines") if "shares" not in str(one)), "letters")
        head = (
            "Above what the letters give"
            if first(above.get("low")) > 0
            else "Below what the letters give"
            if first(above.get("high")) < 0
            else "Not shown to be above what the letters give"
        )
        sentences.append(paragraph(element("b", f"{head}."), f" {name} less {letters}: {label} {amount}."))
    for name, one in dict_of(plain, "differences").items():
        if len(sides) < 2 or not isinstance(one, dict):
            continue
        low, high = first(one.get("low")), first(one.get("high"))
        head = f"{sides[0]} is above" if low > 0 else f"{sides[1]} is above" if high < 0 else "No difference shown"
        p_value = number(one.get("permutation_p_value"), ".3g")
        text = f" {name}, {sides[0]} less {sides[1]}: {label} {estimate(_interval(one), '+.3f')}; p = {p_value}."
        sentences.append(paragraph(element("b", f"{head}."), text))
    return sentences
