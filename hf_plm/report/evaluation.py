"""The evaluation on held-out proteins as a section of a report: losses, perplexity, recovery; by residue, by length."""

import math
from collections.abc import Sequence
from typing import Any

from hf_plm.report.charts import QUIET, Axis, Series, rows_chart, span, xy_chart
from hf_plm.report.findings import Finding, dict_of, intervals, list_of, rows_of, said, short, source_name
from hf_plm.report.page import (
    Html,
    bounds,
    counted,
    details,
    element,
    estimate,
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


def evaluation(findings: Sequence[Finding], model: str, why_not: str = "") -> Html:
    """Losses, perplexity and recovery of each evaluation, by residue, length and depth of cluster."""
    every = _once([finding for finding in findings if finding.kind == "evaluation" and finding.rows("results")])
    shown = [one for one in every if not any(_says_more(other, one) for other in every)]
    if not shown:
        return missing(f"Not measured. {why_not}".strip(), f"hf-plm evaluate {model} --data HELD_OUT.fasta")
    parts = [notice(f"Not all of it could be measured. {why_not}")] if why_not else []
    return join([*parts, *(_one_evaluation(finding, is_titled=len(shown) > 1) for finding in shown)])


def _once(findings: Sequence[Finding]) -> list[Finding]:
    """Of evaluations of the same models on the same targets, which each run keeps for itself, one."""
    found: dict[Any, Finding] = {}
    for finding in findings:
        models = frozenset(str(one.get("revision") or one.get("model")) for one in finding.rows("models"))
        has_pseudo = any("pseudo" in row for row in finding.rows("results"))
        protocol = dict_of(finding.plain, "protocol").get("name")
        print_ = dict_of(finding.plain, "data").get("fingerprint")
        key = (print_, protocol, models, has_pseudo) if print_ and models else id(finding)
        found.setdefault(key, finding)
    return list(found.values())


def _says_more(one: Finding, other: Finding) -> bool:
    """Whether an evaluation has all models of the other and further ones, on the same proteins."""
    prints = [dict_of(finding.plain, "data").get("fingerprint") for finding in (one, other)]
    models, others = ({row.get("model") for row in finding.rows("results")} for finding in (one, other))
    return prints[0] == prints[1] and models > others


def against(findings: Sequence[Finding], revisions: Sequence[str | None]) -> Html:
    """One sentence for each paired difference between the two models of these revisions, whatever they were called."""
    sentences = []
    for finding in _once([one for one in findings if one.kind == "evaluation"]):
        revision_of = {one.get("model"): one.get("revision") for one in finding.rows("models")}
        for one in finding.rows("differences"):
            if {revision_of.get(one.get("a")), revision_of.get(one.get("b"))} != set(revisions):
                continue
            low, high = bounds(one.get("loss"))
            a, b = short(one.get("a")), short(one.get("b"))
            better, worse = (a, b) if high < 0 else (b, a)
            size = [abs(value) for value in (first(one.get("loss")), low, high)]
            amount = estimate([size[0], *sorted(size[1:])])
            proteins = counted(dict_of(finding.plain, "data").get("proteins"), "protein")
            if high < 0 or low > 0:
                text = f" predicts held-out residues better than {worse}: its loss is lower by {amount} nats per target"
                head = element("b", better)
            else:
                head, text = (
                    element("b", f"{a} and {b}"),
                    " cannot be told apart: the interval of the difference holds zero",
                )
            sentences.append(paragraph(head, f"{text}, on the same targets of {proteins}.", kind="lead"))
    return join(sentences)


def _one_evaluation(finding: Finding, is_titled: bool) -> Html:
    results, data = finding.rows("results"), dict_of(finding.plain, "data")
    protocol = dict_of(finding.plain, "protocol")
    sources = ", ".join(dict.fromkeys(map(source_name, list_of(data, "sources")))) or "held-out proteins"
    counts = [counted(data.get(f"{noun}s"), noun) for noun in ("protein", "target") if data.get(f"{noun}s")]
    parts: list[Html] = (
        [element("h3", ", ".join(short(result.get("model")) for result in results))] if is_titled else []
    )
    parts.append(
        paragraph(
            f"On {sources}: {', '.join(counts)}. Protocol {said(protocol, 'name', 'unknown')}; ",
            "in brackets 95% intervals.",
        )
    )
    overall = [(short(result.get("model")), dict_of(result, "overall")) for result in results]
    columns: tuple[tuple[str, str, str], ...] = (
        ("Loss", "loss", ".3f"),
        ("Perplexity", "perplexity", ".1f"),
        ("Recovery", "recovery", ".1%"),
        ("Margin, all targets", "margin_context_free", "+.3f"),
        ("Margin, masked targets", "margin_unigram_masked", "+.3f"),
    )
    rows = [(name, *(estimate(plain.get(key), form) for _, key, form in columns)) for name, plain in overall]
    without = next((plain for _, plain in overall if plain.get("context_free_loss") is not None), {})
    loss = first(without.get("context_free_loss"))
    if math.isfinite(loss):
        rows.append(("without context", number(loss), number(math.exp(loss), ".1f"), "", "", ""))
    pseudo = [(name, dict_of(result, "pseudo")) for (name, _), result in zip(overall, results, strict=True)]
    caption = "Nats per target, all targets; a margin above zero is better than without context"
    parts.append(table(caption, ["Model", *(title for title, _, _ in columns)], rows))
    if any(plain for _, plain in pseudo):
        parts.append(
            table(
                "Pseudo-perplexity: each residue masked alone",
                ["Model", "Pseudo-perplexity", "Proteins"],
                [
                    (name, estimate(one.get("pseudo_perplexity"), ".2f"), number(one.get("proteins"), ",.0f"))
                    for name, one in pseudo
                ],
            )
        )
    parts.append(_differences(finding))
    figures = [
        _by_residue(results),
        _by_recovery(results),
        _by_group(results, "by_length", "residues of the protein, from"),
    ]
    figures.append(_by_group(results, "by_cluster_size", "members of the protein's cluster, from"))
    parts += [grid(*(one for one in figures if one)), _numbers(results)]
    return join(parts)


def _differences(finding: Finding) -> Html:
    rows = []
    for one in finding.rows("differences"):
        low, high = bounds(one.get("loss"))
        a, b = short(one.get("a")), short(one.get("b"))
        clear = f"{a} is better" if high < 0 else f"{b} is better" if low > 0 else "no clear difference"
        share = number(one.get("share_of_proteins_better"), ".0%")
        rows.append((f"{a} less {b}", estimate(one.get("loss"), "+.4f"), share, clear))
    if not rows:
        return Html("")
    head = ["Models", "Loss, nats per target", "Proteins where the first is better", "In words"]
    return table("Differences, on the same targets", head, rows)


def _residues(results: Sequence[dict[str, Any]]) -> list[str]:
    """Those with targets, the best learnt by the first model at the top."""
    gains = {
        said(row, "residue"): first(row.get("context_free_loss")) - first(row.get("loss"))
        for row in rows_of(results[0], "by_residue")
    }
    return sorted((letter for letter, gain in gains.items() if math.isfinite(gain)), key=lambda one: -gains[one])


def _column(result: dict[str, Any], letters: Sequence[str], name: str) -> list[Any]:
    by_letter = {said(row, "residue"): row for row in rows_of(result, "by_residue")}
    return [by_letter.get(letter, {}).get(name) for letter in letters]


def _by_residue(results: Sequence[dict[str, Any]]) -> Html:
    letters = _residues(results)
    if not letters:
        return Html("")
    baseline = [first(value) for value in _column(results[0], letters, "context_free_loss")]
    series = [Series("best guess without context", range(len(letters)), baseline, style=QUIET, kind="points")]
    series += [
        intervals(short(result.get("model")), _column(result, letters, "loss"), style)
        for style, result in enumerate(results)
    ]
    low, high = span([value for one in series for values in (one.y, one.low, one.high) for value in values])
    who = counted(len(results), "model")
    alt = f"Loss by residue of {who} beside the best guess without context; the numbers are below."
    return figure(
        join(
            [element("b", "Loss by residue."), " Ordered by what context gains the first model, the most at the top."]
        ),
        rows_chart(letters, series, Axis("nats per target", low, high), alt, left=30),
    )


def _by_recovery(results: Sequence[dict[str, Any]]) -> Html:
    letters = _residues(results)
    series = [
        intervals(short(result.get("model")), _column(result, letters, "recovery"), style)
        for style, result in enumerate(results)
    ]
    if not letters or not any(math.isfinite(value) for one in series for value in one.y):
        return Html("")
    high = span([value for one in series for values in (one.y, one.high) for value in values], zero=True)[1]
    alt = f"Share of targets recovered, by residue, of {counted(len(results), 'model')}; the numbers are below."
    return figure(
        join([element("b", "Recovery by residue."), " Share of targets whose most likely residue is the true one."]),
        rows_chart(letters, series, Axis("share recovered", 0, min(high, 1.0)), alt, left=30),
    )


def _group_name(row: dict[str, Any]) -> str:
    begin, end = (number(row.get(name), ",.0f") for name in ("from", "to"))
    return f"{begin}+" if row.get("to") is None else begin if begin == end else f"{begin}\u2013{end}"


def _by_group(results: Sequence[dict[str, Any]], field: str, label: str) -> Html:
    groups = [row for row in rows_of(results[0], field) if isinstance(row.get("from"), int)]
    if len(groups) < 2:
        return Html("")
    names = [f"{row['from']:,}" for row in groups]
    baseline = [first(row.get("context_free_loss")) for row in groups]
    series = [Series("best guess without context", range(len(names)), baseline, style=QUIET, kind="marked")]
    for style, result in enumerate(results):
        by_begin = {row.get("from"): row for row in rows_of(result, field)}
        values = [by_begin.get(row["from"], {}).get("loss") for row in groups]
        aside = (style - (len(results) - 1) / 2) * 0.12
        places = [place + aside for place in range(len(names))]
        series.append(intervals(short(result.get("model")), values, style, places))
    low, high = span([value for one in series for values in (one.y, one.low, one.high) for value in values])
    x = Axis(label, -0.5, len(names) - 0.5, names=names)
    what = "length" if field == "by_length" else "depth of cluster"
    return figure(
        join([element("b", f"Loss by {what}."), " Bars are 95% intervals."]),
        xy_chart(series, x, Axis("nats per target", low, high), f"Loss by {what}; the numbers are below."),
    )


def _numbers(results: Sequence[dict[str, Any]]) -> Html:
    """The numbers of the charts, for who does not see them."""
    tables = []
    for field, title, name in (
        ("by_residue", "By residue", lambda row: said(row, "residue")),
        ("by_length", "By length", _group_name),
        ("by_cluster_size", "By depth of cluster", _group_name),
    ):
        rows = [
            (
                name(row),
                short(result.get("model")),
                number(row.get("num_targets"), ",.0f"),
                estimate(row.get("loss")),
                number(row.get("context_free_loss")),
                estimate(row.get("recovery"), ".1%"),
            )
            for result in results
            for row in rows_of(result, field)
        ]
        if rows:
            head = ["", "Model", "Targets", "Loss", "Without context", "Recovery"]
            tables.append(table(title, head, rows))
    return details("The numbers of these charts", *tables) if tables else Html("")
