"""Agreement with benchmarks of deep mutational scans, as a part of a report.

What was scored on the same variants of the same assays stands together, beside BLOSUM62 on these very variants; a
model by another method is another predictor. Two benchmarks may have one name, since it is that of a folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_plm.report.charts import QUIET, Axis, Series, rows_chart, span, xy_chart
from hf_plm.report.findings import Finding, dict_of, list_of, model_of, said
from hf_plm.report.page import (
    MISSING,
    Html,
    counted,
    details,
    element,
    figure,
    first,
    grid,
    join,
    number,
    paragraph,
    table,
)

AGREEMENT = (("spearman", "Spearman"), ("auc", "AUC"), ("mcc", "MCC"), ("ndcg", "NDCG"), ("recall", "Recall"))
BASELINE = "BLOSUM62"


@dataclass(frozen=True)
class Benchmark:
    """Findings on the same variants of the same assays. `label` is its own: its name and how many assays it has."""

    label: str
    findings: list[Finding]


def scorer(finding: Finding) -> str:
    """Who gave the scores: the model, and by which method."""
    return f"{model_of(finding)}, {said(finding.plain, 'method')}"


def benchmarks(findings: Sequence[Finding]) -> Html:
    """Averages of each benchmark, beside BLOSUM62, and a point for each assay."""
    every = _together(findings)
    names = list(dict.fromkeys(scorer(one) for one in findings))
    styles = {name: style + (style >= QUIET) for style, name in enumerate(names)}  # of one predictor alike everywhere
    sentences = [_against_blosum62(one, finding) for one in every for finding in one.findings]
    drawn = [_drawn(one, styles, is_titled=len(every) > 1) for one in every]
    return join([*sentences, _averages(every), _lost(findings), *drawn])


def _lost(findings: Sequence[Finding]) -> Html:
    names = list(dict.fromkeys(str(name) for one in findings for name in list_of(one.plain, "missing")))
    if not names:
        return Html("")
    had = f"{counted(len(names), 'assay')} had no file and {'is' if len(names) == 1 else 'are'} in no mean"
    return paragraph(f"{had}: {', '.join(names)}.")


def _together(findings: Sequence[Finding]) -> list[Benchmark]:
    """A benchmark is known by its name, its assays and how many variants each has."""
    groups: dict[Any, list[Finding]] = {}
    for finding in findings:
        assays = sorted((said(row, "assay"), said(row, "variants")) for row in finding.rows("assays"))
        groups.setdefault((said(finding.plain, "dms"), *assays), []).append(finding)
    found: list[Benchmark] = []
    for (name, *assays), members in groups.items():
        label = f"{name}, {counted(len(assays), 'assay')}"
        alike = sum(one.label.startswith(label) for one in found)
        found.append(Benchmark(f"{label} ({alike + 1})" if alike else label, members))
    return found


def _against_blosum62(benchmark: Benchmark, finding: Finding) -> Html:
    """In words; of the assays, which are not independent, a count instead of an interval."""
    averages = dict_of(finding.plain, "averages")
    own, other = (first(dict_of(averages, key).get("mean")) for key in ("spearman", "blosum62_spearman"))
    pairs = [(first(row.get("spearman")), first(row.get("blosum62_spearman"))) for row in finding.rows("assays")]
    head = "Above BLOSUM62" if own > other else "Not above BLOSUM62"
    text = (
        f" {model_of(finding)} ({said(finding.plain, 'method')}) on {benchmark.label}: mean Spearman {number(own)}, "
        f"that of BLOSUM62 {number(other)}; it is higher in {sum(one > two for one, two in pairs)} of {len(pairs)}."
    )
    return paragraph(element("b", f"{head}."), text)


def _averages(every: Sequence[Benchmark]) -> Html:
    rows = []
    for benchmark in every:
        for prefix in ("", "blosum62_"):
            for finding in benchmark.findings:
                found = dict_of(finding.plain, "averages")
                cells = [_average(dict_of(found, f"{prefix}{key}")) for key, _ in AGREEMENT]
                rows.append((benchmark.label, BASELINE if prefix else scorer(finding), *cells))
    head = ["Benchmark", "Scores", *(label for _, label in AGREEMENT)]
    caption = "Agreement with deep mutational scans: means over assays of a protein, proteins, and kinds of selection"
    return table(caption, head, dict.fromkeys(rows))  # BLOSUM62 once


def _average(found: dict[str, Any]) -> str:
    error = number(found.get("standard_error"))
    return number(found.get("mean")) + ("" if error == MISSING else f" ± {error}")


def _drawn(benchmark: Benchmark, styles: dict[str, int], is_titled: bool) -> Html:
    """The charts of one benchmark, with its own BLOSUM62, and its assays to open."""
    title = element("h3", benchmark.label) if is_titled else ""
    charts = grid(_assays(benchmark, styles), _selections(benchmark, styles))
    return join([title, charts, _assay_table(benchmark)])


def _assays(benchmark: Benchmark, styles: dict[str, int]) -> Html:
    series = [
        Series(
            scorer(finding),
            [first(row.get("blosum62_spearman")) for row in finding.rows("assays")],
            [first(row.get("spearman")) for row in finding.rows("assays")],
            style=styles[scorer(finding)],
            kind="points",
        )
        for finding in benchmark.findings
    ]
    low, high = span([value for one in series for value in (*one.x, *one.y)], zero=True)
    diagonal = Series("equal", [low, high], [low, high], style=QUIET)
    above = " Above the line the model agrees better with the measurements."
    return figure(
        join([element("b", "A point for each assay."), above]),
        xy_chart(
            [diagonal, *series],
            Axis("Spearman of BLOSUM62", low, high),
            Axis("Spearman of the model", low, high),
            f"Spearman by assay of {benchmark.label}, of the model and of BLOSUM62; the numbers are below.",
            height=400,
        ),
    )


def _selections(benchmark: Benchmark, styles: dict[str, int]) -> Html:
    """Spearman by kind of selection."""

    def by_selection(finding: Finding, key: str) -> dict[str, Any]:
        return dict_of(dict_of(dict_of(finding.plain, "averages"), key), "by_selection")

    names = list(dict.fromkeys(name for one in benchmark.findings for name in by_selection(one, "spearman")))
    if not names:
        return Html("")
    columns = [(BASELINE, by_selection(benchmark.findings[0], "blosum62_spearman"), QUIET)]
    columns += [(scorer(one), by_selection(one, "spearman"), styles[scorer(one)]) for one in benchmark.findings]
    series = [
        Series(label, range(len(names)), [first(found.get(name)) for name in names], style=style, kind="points")
        for label, found, style in columns
    ]
    low, high = span([value for one in series for value in one.y], zero=True)
    alt = f"Spearman by kind of selection, on {benchmark.label}."
    chart = rows_chart(names, series, Axis("Spearman", low, high), alt, zero=True, left=132)
    return figure(join([element("b", "By what was selected for."), " Means over the proteins of each kind."]), chart)


def _assay_table(benchmark: Benchmark) -> Html:
    rows = [
        (
            said(row, "assay"),
            scorer(finding),
            number(row.get("variants"), ",.0f"),
            *(number(row.get(key)) for key, _ in AGREEMENT),
            number(row.get("blosum62_spearman")),
        )
        for finding in benchmark.findings
        for row in sorted(finding.rows("assays"), key=lambda row: -np.nan_to_num(first(row.get("spearman")), nan=-2))
    ]
    head = ["Assay", "Scores", "Variants", *(label for _, label in AGREEMENT), "Spearman of BLOSUM62"]
    shown = table("Assays, by the Spearman of their scores", head, rows)
    return details(f"Every assay of {benchmark.label}", shown)
