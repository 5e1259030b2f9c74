"""Pictures in one style: readable without colour vision, drawn without a display, written whole or not."""

import io
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_plm.files import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito (2008), told apart with any colour vision; lines differ in `STYLES` too."""
STYLES = ("-", "--", "-.", ":")
DIVERGING, SEQUENTIAL = "PuOr", "cividis"
"""Colour maps that are read the same without red or green."""
SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def figure(width: float = 7.0, height: float = 4.5, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its axes, row by row."""
    with rc_context(SETTINGS):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, [made.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]


def png(made: Figure, dots_per_inch: int = 150) -> bytes:
    """The picture, as the bytes of a PNG."""
    with rc_context(SETTINGS), io.BytesIO() as buffer:
        made.savefig(buffer, format="png", dpi=dots_per_inch)
        return buffer.getvalue()


def save(made: Figure, path: Path, dots_per_inch: int = 150) -> None:
    """Write a PNG; raises `UserError` where that cannot be."""
    write_whole(path, png(made, dots_per_inch))
