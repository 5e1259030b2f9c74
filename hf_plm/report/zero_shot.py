"""What a model can do without any training for it, as sections of a report: variants and contacts.

Each number stands beside what knows no model: BLOSUM62 for variants, chance and nearness along the chain for contacts.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.judging import plots
from hf_plm.judging.scores.scan import heat_map
from hf_plm.report.charts import QUIET, Axis, Series, rows_chart, span, xy_chart
from hf_plm.report.findings import Finding, dict_of, intervals, list_of, said, short
from hf_plm.report.page import (
    MISSING,
    Html,
    details,
    element,
    estimate,
    figure,
    first,
    grid,
    image,
    join,
    missing,
    number,
    paragraph,
    scrolling,
    table,
)

NUM_MAPS = 4
"""Heat maps of substitutions, and maps of contacts, that are drawn; the others are named."""
LARGEST_PICTURE_BYTES = 1_000_000
AGREEMENT = (("spearman", "Spearman"), ("auc", "AUC"), ("mcc", "MCC"), ("ndcg", "NDCG"), ("recall", "Recall"))
RANGES = (("long", "24 and more"), ("medium", "12 to 23"), ("short", "6 to 11"))


def model_of(finding: Finding) -> str:
    return ", ".join(short(one.get("model")) for one in finding.rows("models")) or "unknown"


def variants(findings: Sequence[Finding], model: str) -> Html:
    """Agreement with deep mutational scans, scored tables, and heat maps of every substitution."""
    benchmarks = [one for one in findings if one.kind == "dms"]
    tables = [one for one in findings if one.kind == "score"]
    scans = [one for one in findings if one.kind == "scan"]
    if not (benchmarks or tables or scans):
        return missing(
            "No variants were scored.", f"hf-plm score {model} --dms FOLDER", f"hf-plm score {model} --scan P.fasta"
        )
    parts = [_benchmarks(benchmarks)] if benchmarks else []
    if tables:
        parts.append(_tables(tables))
    parts += [_scan(one) for one in scans[:NUM_MAPS]]
    if len(scans) > NUM_MAPS:
        names = ", ".join(said(one.plain, "protein") for one in scans[NUM_MAPS:])
        parts.append(paragraph(f"Scanned too, and not drawn here: {names}."))
    return join(parts)


def _benchmarks(findings: Sequence[Finding]) -> Html:
    """Averages of each benchmark, beside BLOSUM62, and a point for each assay."""
    rows, drawn = [], []
    for finding in findings:
        averages = dict_of(finding.plain, "averages")
        name = f"{model_of(finding)}, {said(finding.plain, 'method')}"
        cells = [_average(dict_of(averages, key)) for key, _ in AGREEMENT]
        rows.append((name, said(finding.plain, "dms"), f"{len(finding.rows('assays')):,}", *cells))
        baseline = [_average(dict_of(averages, f"blosum62_{key}")) for key, _ in AGREEMENT]
        rows.append(("BLOSUM62", said(finding.plain, "dms"), f"{len(finding.rows('assays')):,}", *baseline))
        drawn.append((name, finding.rows("assays")))
    head = ["Scores", "Benchmark", "Assays", *(label for _, label in AGREEMENT)]
    caption = "Agreement with deep mutational scans: means over assays of a protein, proteins, and kinds of selection"
    lost = [(model_of(one), name) for one in findings for name in list_of(one.plain, "missing")]
    parts = [*(_against_blosum62(one) for one in findings), table(caption, head, dict.fromkeys(rows))]
    if lost:
        parts.append(
            paragraph(f"{len(lost)} assay(s) had no file and are in no mean: {', '.join(name for _, name in lost)}.")
        )
    return join([*parts, grid(_assays(drawn), _selections(findings)), _assay_table(drawn)])


def _against_blosum62(finding: Finding) -> Html:
    """In words; of the assays, which are not independent, a count instead of an interval."""
    averages = dict_of(finding.plain, "averages")
    own, other = (first(dict_of(averages, key).get("mean")) for key in ("spearman", "blosum62_spearman"))
    pairs = [(first(row.get("spearman")), first(row.get("blosum62_spearman"))) for row in finding.rows("assays")]
    head = "Above BLOSUM62" if own > other else "Not above BLOSUM62"
    text = f" Mean Spearman of {model_of(finding)} {number(own)}, of BLOSUM62 {number(other)}; it is higher in "
    return paragraph(element("b", f"{head}."), f"{text}{sum(one > two for one, two in pairs)} of {len(pairs)} assays.")


def _average(found: dict[str, Any]) -> str:
    error = number(found.get("standard_error"))
    return number(found.get("mean")) + ("" if error == MISSING else f" ± {error}")


def _assays(drawn: Sequence[tuple[str, list[dict[str, Any]]]]) -> Html:
    series = [
        Series(
            name,
            [first(row.get("blosum62_spearman")) for row in rows],
            [first(row.get("spearman")) for row in rows],
            style=style,
            kind="points",
        )
        for style, (name, rows) in enumerate(drawn)
    ]
    low, high = span([value for one in series for value in (*one.x, *one.y)], zero=True)
    diagonal = Series("equal", [low, high], [low, high], style=QUIET)
    return figure(
        join(
            [element("b", "A point for each assay."), " Above the line the model agrees better with the measurements."]
        ),
        xy_chart(
            [diagonal, *series],
            Axis("Spearman of BLOSUM62", low, high),
            Axis("Spearman of the model", low, high),
            "Spearman by assay, of the model and of BLOSUM62; the numbers are below.",
            height=400,
        ),
    )


def _selections(findings: Sequence[Finding]) -> Html:
    """Spearman by kind of selection."""
    by_model = [(model_of(one), dict_of(dict_of(one.plain, "averages"), "spearman")) for one in findings]
    names = list(dict.fromkeys(name for _, found in by_model for name in dict_of(found, "by_selection")))
    if not names:
        return Html("")
    first_one = dict_of(dict_of(findings[0].plain, "averages"), "blosum62_spearman")
    series = [_by_name("BLOSUM62", names, dict_of(first_one, "by_selection"), QUIET)]
    series += [
        _by_name(name, names, dict_of(found, "by_selection"), style) for style, (name, found) in enumerate(by_model)
    ]
    low, high = span([value for one in series for value in one.y], zero=True)
    chart = rows_chart(
        names, series, Axis("Spearman", low, high), "Spearman by kind of selection.", zero=True, left=132
    )
    return figure(join([element("b", "By what was selected for."), " Means over the proteins of each kind."]), chart)


def _by_name(label: str, names: Sequence[str], found: dict[str, Any], style: int) -> Series:
    return Series(label, range(len(names)), [first(found.get(name)) for name in names], style=style, kind="points")


def _assay_table(drawn: Sequence[tuple[str, list[dict[str, Any]]]]) -> Html:
    rows = [
        (
            said(row, "assay"),
            name,
            number(row.get("variants"), ",.0f"),
            *(number(row.get(key)) for key, _ in AGREEMENT),
            number(row.get("blosum62_spearman")),
        )
        for name, assays in drawn
        for row in sorted(assays, key=lambda row: -np.nan_to_num(first(row.get("spearman")), nan=-2))
    ]
    head = ["Assay", "Scores", "Variants", *(label for _, label in AGREEMENT), "Spearman of BLOSUM62"]
    return details("Every assay", table("Assays, by the Spearman of their scores", head, rows))


def _tables(findings: Sequence[Finding]) -> Html:
    rows = []
    for finding in findings:
        plain = finding.plain
        named = (f"{said(plain, 'protein')}, {said(plain, 'table')}", number(plain.get("variants"), ",.0f"))
        for name, key in ((f"{model_of(finding)}, {said(plain, 'method')}", "metrics"), ("BLOSUM62", "blosum62")):
            found = dict_of(plain, key)
            if found or key == "metrics":
                rows.append((named[0], name, named[1], *(number(found.get(one)) for one, _ in AGREEMENT)))
    head = ["Protein, table", "Scores", "Variants", *(label for _, label in AGREEMENT)]
    return table("Tables of variants; agreement where they were measured", head, rows)


def _scan(finding: Finding) -> Html:
    """The heat map of a scan, drawn as `hf-plm score --scan` draws it."""
    residues, name = said(finding.plain, "residues"), said(finding.plain, "protein")
    try:
        scores_NA = np.array(list_of(finding.plain, "scores_NA"), dtype=float)  # null becomes NaN
    except (TypeError, ValueError):  # rows of unlike length, or of something else
        scores_NA = np.empty(0)
    if scores_NA.shape != (len(residues), 20) or not np.isfinite(scores_NA).any():
        return paragraph(f"The scan of {name} is not as this version writes it, and is not drawn.")
    title = f"{name}, {said(finding.plain, 'method')} marginals of {model_of(finding)}"
    picture = plots.png(heat_map(title, residues.encode(), scores_NA), 100)
    alt = f"Heat map of every substitution of {name}, {len(residues)} residues, scored by {model_of(finding)}."
    caption = " Every substitution. Orange: less likely than the wild type; purple: likelier; dots: the wild type."
    return figure(join([element("b", f"{name}."), caption]), scrolling(alt, image(picture, alt)), kind="wide")


def contacts(findings: Sequence[Finding], model: str) -> Html:
    """Precision of predicted contacts by range, beside two predictors that know no protein, and a map."""
    shown = [one for one in findings if one.kind == "contacts"]
    if not shown:
        return missing("No contacts were predicted.", f"hf-plm contacts {model} --fit STRUCTURES")
    parts = []
    for finding in shown:
        means = dict_of(finding.plain, "means")
        found = dict_of(means, "all")
        rows = [
            (
                f"{name}, {apart} apart",
                *(_mean(dict_of(found, f"{name} {cut}")) for cut in ("P@L", "P@L/2", "P@L/5")),
                number(dict_of(found, f"{name} chance").get("mean")),
                number(dict_of(found, f"{name} nearest P@L").get("mean")),
            )
            for name, apart in RANGES
        ]
        proteins = dict_of(found, "long P@L").get("num_proteins")
        caption = (
            f"{model_of(finding)} on {said(finding.plain, 'structures', 'structures')}: precision, means over proteins"
        )
        head = ["Range, residues", "P@L", "P@L/2", "P@L/5", "By chance", "Nearest along the chain"]
        parts.append(element("h3", f"{model_of(finding)} on {said(finding.plain, 'structures', 'structures')}"))
        verdict = said(finding.plain, "verdict", "")
        counted = f" {number(proteins, ',.0f')} proteins have long-range contacts to find." if proteins else ""
        parts.append(paragraph(f"{verdict}{counted}".strip()))
        parts.append(table(caption, head, rows))
        figures = [_precisions(finding, found), _picture(finding)]
        parts.append(grid(*(one for one in figures if one)))
    return join(parts)


def _mean(found: dict[str, Any]) -> str:
    return estimate([found.get("mean"), found.get("low"), found.get("high")])


def _precisions(finding: Finding, found: dict[str, Any]) -> Html:
    names = [name for name, _ in RANGES]
    model = [dict_of(found, f"{name} P@L") for name in names]
    series = [
        Series(
            "by chance",
            range(3),
            [first(dict_of(found, f"{name} chance").get("mean")) for name in names],
            style=QUIET,
            kind="points",
        ),
        Series(
            "nearest along the chain",
            range(3),
            [first(dict_of(found, f"{name} nearest P@L").get("mean")) for name in names],
            style=1,
            kind="points",
        ),
        intervals(model_of(finding), [[one.get("mean"), one.get("low"), one.get("high")] for one in model], 0),
    ]
    values = [value for one in series for value in (*one.y, *one.high)]
    if not any(math.isfinite(value) for value in values):
        return Html("")
    high = span(values, zero=True)[1]
    chart = rows_chart(names, series, Axis("precision of the first L", 0, min(high, 1)), "P@L by range.", left=70)
    return figure(join([element("b", "P@L by range."), " Share of true contacts among the L predicted first."]), chart)


def _picture(finding: Finding) -> Html:
    """The map that `hf-plm contacts` has put beside its findings."""
    example = dict_of(finding.plain, "example")
    if not example.get("picture"):
        return Html("")
    name = said(example, "id")
    path = finding.path.parent / Path(str(example["picture"])).name
    try:
        picture = path.read_bytes()
    except OSError:
        picture = b""
    if not picture.startswith(b"\x89PNG") or len(picture) > LARGEST_PICTURE_BYTES:
        why = f"is larger than {LARGEST_PICTURE_BYTES / 1e6:g} MB" if picture[:4] == b"\x89PNG" else "is no PNG there"
        return paragraph(f"The contact map of {name} is not shown: {path.name} {why}.")
    alt = f"Contact map of {name}: predicted probability above the diagonal, contacts of the structure below it."
    caption = " In the middle of all proteins by its P@L: predicted above the diagonal, the structure below."
    return figure(join([element("b", f"{name}."), caption]), image(picture, alt))
