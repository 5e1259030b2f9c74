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
from hf_plm.report.benchmarks import AGREEMENT, BASELINE, benchmarks, scorer
from hf_plm.report.charts import QUIET, Axis, Series, rows_chart, span
from hf_plm.report.findings import Finding, dict_of, intervals, list_of, model_of, said
from hf_plm.report.page import (
    Html,
    counted,
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
RANGES = (("long", "24 and more"), ("medium", "12 to 23"), ("short", "6 to 11"))


def variants(findings: Sequence[Finding], model: str) -> Html:
    """Agreement with deep mutational scans, scored tables, and heat maps of every substitution."""
    scanned = [one for one in findings if one.kind == "dms"]
    tables = [one for one in findings if one.kind == "score"]
    scans = [one for one in findings if one.kind == "scan"]
    if not (scanned or tables or scans):
        return missing(
            "No variants were scored.", f"hf-plm score {model} --dms FOLDER", f"hf-plm score {model} --scan P.fasta"
        )
    parts = [benchmarks(scanned)] if scanned else []
    if tables:
        parts.append(_tables(tables))
    parts += [_scan(one) for one in scans[:NUM_MAPS]]
    if len(scans) > NUM_MAPS:
        names = ", ".join(said(one.plain, "protein") for one in scans[NUM_MAPS:])
        parts.append(paragraph(f"Scanned too, and not drawn here: {names}."))
    return join(parts)


def _tables(findings: Sequence[Finding]) -> Html:
    """Of each table who scored it, and BLOSUM62 once."""
    named: dict[tuple[str, str], list[Finding]] = {}
    for one in findings:
        of = (f"{said(one.plain, 'protein')}, {said(one.plain, 'table')}", number(one.plain.get("variants"), ",.0f"))
        named.setdefault(of, []).append(one)
    rows = []
    for (name, num_variants), members in named.items():
        for key in ("metrics", "blosum62"):
            for one in members:
                found = dict_of(one.plain, key)
                if found or key == "metrics":
                    who = BASELINE if key == "blosum62" else scorer(one)
                    rows.append((name, who, num_variants, *(number(found.get(metric)) for metric, _ in AGREEMENT)))
    head = ["Protein, table", "Scores", "Variants", *(label for _, label in AGREEMENT)]
    return table("Tables of variants; agreement where they were measured", head, dict.fromkeys(rows))


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
        have = "has" if proteins == 1 else "have"
        of_them = f" {counted(proteins, 'protein')} {have} long-range contacts to find." if proteins else ""
        parts.append(paragraph(f"{verdict}{of_them}".strip()))
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
