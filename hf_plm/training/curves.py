"""curves.png: what a run did, in three panels that can be read without a legend table."""

import json
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito 2008: told apart without colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8c8c8c"


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and validation lines of metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "validation_loss" in line]


def draw_curves(metrics: Path, png: Path, title: str) -> None:
    """Loss against both baselines, learning rate and gradient norm, and speed, over the tokens seen."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, NullLocator

    training, validation = read_metrics(metrics)
    # The last validation is on more sequences, so it is no point of the same curve.
    validation = [line for line in validation if not line.get("final")] or validation
    if not training:
        return
    figure = Figure(figsize=(13.5, 4.2), layout=ConstrainedLayoutEngine(wspace=0.08), dpi=130)
    losses, rates, speeds = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    most = max(line["tokens"] for line in training)
    unit, unit_name = (1e6, "million tokens") if most > 1e6 else (1e3, "thousand tokens")
    tokens = np.array([line["tokens"] for line in training]) / unit

    def column(lines: list[dict[str, Any]], name: str) -> np.ndarray:
        return np.array([line[name] for line in lines], dtype=float)

    loss = column(training, "loss")
    losses.plot(tokens, loss, color=BLUE, alpha=0.25, linewidth=1)
    width = max(1, len(loss) // 40)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    point = "." if len(smooth) == 1 else ""
    losses.plot(tokens[width - 1 :], smooth, point, color=BLUE, label="training, all targets")
    if validation:
        at = column(validation, "tokens") / unit
        for name, colour, label in (
            ("validation_loss", ORANGE, "validation, all targets"),
            ("validation_loss_masked", GREEN, "validation, masked targets"),
        ):
            losses.plot(at, column(validation, name), color=colour, marker="o", markersize=3, label=label)
        last = validation[-1]
        baselines = []
        for name, colour, label in (
            ("context_free_loss", ORANGE, "context-free loss"),
            ("unigram_entropy", GREEN, "unigram entropy"),
        ):
            if last[name] is not None:  # as it is where no target is masked
                baselines.append(last[name])
                losses.axhline(last[name], color=colour, linestyle="--", linewidth=1, label=f"{label} {last[name]:.3f}")
        shown = np.concatenate([smooth, column(validation, "validation_loss"), baselines])
        low, high = np.nanmin(shown), min(np.nanmax(shown), max(baselines) + 0.4)
        losses.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    figure.suptitle(title, fontsize=11)
    losses.set(xlabel=unit_name, ylabel="nats per target")
    losses.legend(frameon=False, fontsize=8)

    rates.plot(tokens, column(training, "learning_rate"), color=BLUE)
    rates.set(xlabel=unit_name, ylabel="learning rate (line)")
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    norms = rates.twinx()
    norms.plot(tokens, column(training, "gradient_norm"), ".", color=GREY, markersize=2.5)
    norms.set(yscale="log", ylabel="gradient norm (dots)")
    norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norms.yaxis.set_minor_locator(NullLocator())
    norms.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    norms.spines["top"].set_visible(False)

    speeds.plot(tokens, column(training, "tokens_per_second"), color=BLUE)
    speeds.set(xlabel=unit_name, ylabel="tokens per second")
    speeds.set_ylim(bottom=0)
    for axes in (losses, rates, speeds):
        axes.spines["top"].set_visible(False)
        axes.grid(alpha=0.2)
    partial = png.with_name(f".partial-{png.name}")
    figure.savefig(partial, format="png")
    partial.replace(png)
