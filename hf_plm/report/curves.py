"""The curves of one run, or of two, as charts of a report."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_plm.report.charts import QUIET, Axis, Series, span, xy_chart
from hf_plm.report.page import Html, counted, element, figure, grid, join, missing, paragraph
from hf_plm.report.run import Run
from hf_plm.training.judging import SHOWN, probed

NUM_POINTS, NUM_WINDOWS = 400, 40
"""Points of a curve at most, and how many of its running means are independent."""


def curves(runs: Sequence[Run]) -> Html:
    """Loss beside what needs no context, learning rate, gradient norm and speed, over the tokens seen."""
    runs = [run for run in runs if run.training]
    if not runs:
        return missing("There are no metrics: the run has not written its first line, or metrics.jsonl was taken away.")
    most = max(line["tokens"] for run in runs for line in (*run.training, *run.validation, *run.tasks))
    unit, name = (1e6, "million tokens") if most > 1e6 else (1e3, "thousand tokens")
    x = Axis(name, 0.0, most / unit)
    losses = [
        _loss_chart(runs, x, unit, "validation_loss", "context_free_loss", "Loss of all targets"),
        _loss_chart(runs, x, unit, "validation_loss_masked", "unigram_entropy", "Loss of masked targets"),
    ]
    others = [
        _plain_chart(runs, x, unit, "learning_rate", "Learning rate", ""),
        _plain_chart(runs, x, unit, "gradient_norm", "Gradient norm", " On a log scale.", is_log=True),
        _plain_chart(runs, x, unit, "tokens_per_second", "Throughput", " Tokens per second."),
    ]
    torn = sum(run.num_torn for run in runs)
    parts = [grid(*losses), grid(*others, kind="small")]
    if tasks := _task_charts(runs, x, unit):
        parts += [element("h3", "Tasks during the run, on a small sample"), grid(*tasks, kind="small")]
    if torn:
        are = "is" if torn == 1 else "are"
        parts.append(
            paragraph(f"{counted(torn, 'line')} of metrics.jsonl could not be read, and {are} not in the charts.")
        )
    return join(parts)


def _loss_chart(runs: Sequence[Run], x: Axis, unit: float, loss: str, baseline: str, title: str) -> Html:
    series, shown, bases, validated = [], [], [], []
    for style, run in enumerate(runs):
        label = f"{run.name}, " if len(runs) > 1 else ""
        if loss == "validation_loss":
            at, values = _thinned(run.training, "loss", unit)
            if len(runs) == 1:  # of two they would hide each other
                series.append(Series("", at, values, style=style, kind="faint"))
            smooth_at, smooth = _running_mean(at, values)
            series.append(Series(f"{label}training", smooth_at, smooth, style=style))
            shown += smooth[len(smooth) // 10 :]
        # The last validation is on more proteins, so it is no point of the same curve.
        lines = [line for line in run.validation if not line.get("final")] or run.validation
        values = [_float(line.get(loss)) for line in lines]
        at = [line["tokens"] / unit for line in lines]
        series.append(Series(f"{label}validation", at, values, style=style + len(runs), kind="marked"))
        validated += values
        base = _float(lines[-1].get(baseline)) if lines else math.nan
        if math.isfinite(base) and base not in bases:
            bases.append(base)
            name = baseline.replace("_", " ").replace("context free", "context-free")
            series.append(Series(f"{name} {base:.3f}", [0, x.high], [base, base], style=QUIET))
    low, high = span([*shown, *validated, *bases])
    if bases:  # the first losses of a training may be far above, and are drawn at the edge; no validation is
        high = max(min(high, max(bases) + 0.35), span([*validated, *bases])[1])
    alt = f"{title} over tokens seen, for {', '.join(run.name for run in runs)}."
    note = "Learning means under the dashed line."
    return figure(
        join([element("b", f"{title}."), " ", note]), xy_chart(series, x, Axis("nats per target", low, high), alt)
    )


def _task_charts(runs: Sequence[Run], x: Axis, unit: float) -> list[Html]:
    """A chart for each number that `--evaluate.every` follows, with what it has to beat."""
    found = dict.fromkeys(name for run in runs for line in run.tasks for name in line)
    shown = [(name, title[:1].upper() + title[1:], base, than) for name, title, base, than in SHOWN if name in found]
    probes = [name for name in found if f"{name}_baseline" in found]
    shown += [(name, probed(name), f"{name}_baseline", "without a model") for name in probes]
    charts = []
    for name, title, baseline, than in shown:
        series = []
        for style, run in enumerate(runs):
            lines = [line for line in run.tasks if name in line]
            at = [line["tokens"] / unit for line in lines]
            values = [_float(line[name]) for line in lines]
            series.append(Series(run.name if len(runs) > 1 else "the model", at, values, style=style, kind="marked"))
            if style == 0 and lines:
                values = [_float(line.get(baseline)) for line in lines]
                if len(set(values)) == 1:  # on the same sample it is; of one point there is no line otherwise
                    at, values = [0, x.high], values[:1] * 2
                series.append(Series(than, at, values, style=QUIET))
        low, high = span([value for one in series for value in one.y])
        chart = xy_chart(series, x, Axis("", low, high), f"{title} over tokens seen.", height=200, width=300)
        charts.append(figure(element("b", f"{title}."), chart))
    return charts


def _plain_chart(
    runs: Sequence[Run], x: Axis, unit: float, name: str, title: str, note: str, is_log: bool = False
) -> Html:
    series = []
    for style, run in enumerate(runs):
        at, values = _thinned(run.training, name, unit)
        series.append(Series(run.name if len(runs) > 1 else "", at, values, style=style))
    low, high = span([value for one in series for value in one.y], zero=not is_log, is_log=is_log)
    alt = f"{title} over tokens seen."
    chart = xy_chart(series, x, Axis("", low, high, is_log=is_log), alt, height=200, width=300)
    return figure(join([element("b", f"{title}."), note]), chart)


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _thinned(lines: Sequence[dict[str, Any]], name: str, unit: float) -> tuple[list[float], list[float]]:
    """Means of neighbouring lines, so that there are at most `NUM_POINTS`; a line that is no number leaves a gap."""
    size = -(-len(lines) // NUM_POINTS)
    groups = [lines[begin : begin + size] for begin in range(0, len(lines), size)]
    means = [np.array([_float(line.get(name)) for line in group]) for group in groups]
    values = [float(one[np.isfinite(one)].mean()) if np.isfinite(one).any() else math.nan for one in means]
    return [group[-1]["tokens"] / unit for group in groups], values


def _running_mean(at: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    width = max(1, len(values) // NUM_WINDOWS)
    kept = np.isfinite(values)
    finite, places = np.asarray(values)[kept], np.asarray(at)[kept]
    if len(finite) < width:
        return [], []
    return places[width - 1 :].tolist(), np.convolve(finite, np.ones(width) / width, mode="valid").tolist()
