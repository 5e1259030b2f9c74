"""Every substitution of a protein, scored: a table of 19 x N rows and a heat map of them.

Dimensions: N residues, A letters (20), in the order of `masked_lm.LETTERS`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_plm.config import UserError
from hf_plm.judging.scores.marginals import Count, marginals, num_residues
from hf_plm.judging.scores.variants import Substitution, read_proteins, write_table
from hf_plm.models.masked_lm import LETTER_INDEX, LETTERS, MaskedLM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("mutant", "position", "wild_type", "substitution", "score")
GROUPS = ("AVILM", "FWY", "STNQ", "CGP", "DE", "KRH")
"""Rows of the heat map by chemistry: aliphatic, aromatic, polar, special, acidic, basic."""


def read_scannable(path: Path) -> list[tuple[str, bytes]]:
    """`read_proteins`, and raises `UserError` for a record without one standard residue."""
    proteins = read_proteins(path)
    for number, (name, residues) in enumerate(proteins, start=1):
        if (LETTER_INDEX[np.frombuffer(residues, dtype=np.uint8)] < 0).all():
            raise UserError(f"{path}, record {number} ({name}) has no standard residue, so there is nothing to scan.")
    return proteins


def scan(model: MaskedLM, residues: bytes, method: str = "masked", count: Count = lambda _: None) -> np.ndarray:
    """fp64 (N, A): log p(letter) - log p(wild type) in nats, 0 at the wild type; NaN where that is none of the 20.

    One residue at least is standard, as `read_scannable` sees to.
    """
    columns_N = LETTER_INDEX[np.frombuffer(residues, dtype=np.uint8)]
    places_P = np.flatnonzero(columns_N >= 0)
    assert len(places_P)
    scores_NA = np.full((len(residues), len(LETTERS)), np.nan)
    log_probs_PA = marginals(model, residues, places_P, method, count)
    scores_NA[places_P] = log_probs_PA - np.take_along_axis(log_probs_PA, columns_N[places_P, None], axis=1)
    return scores_NA


def cost(residues: bytes, method: str, limit: int) -> int:
    """How many residues `scan` sends through a model."""
    variants = [(Substitution(chr(one), place, "A"),) for place, one in enumerate(residues) if LETTER_INDEX[one] >= 0]
    return num_residues(residues, variants, method, limit)


def write_scan(path: Path, residues: bytes, scores_NA: np.ndarray) -> None:
    """19 rows for each standard residue, positions from 1. Raises `UserError` where the file cannot be written."""
    rows = [
        (f"{old}{position}{new}", position, old, new, round(score, 6))
        for position, (old, scores_A) in enumerate(zip(residues.decode(), scores_NA.tolist(), strict=True), start=1)
        for new, score in zip(LETTERS, scores_A, strict=True)
        if new != old and np.isfinite(score)
    ]
    write_table(path, HEADER, rows)


def heat_map(title: str, residues: bytes, scores_NA: np.ndarray) -> "Figure":
    """Positions along x, wrapped; letters along y by chemistry; dots where the wild type is."""
    from hf_plm.judging import plots

    letters = "".join(GROUPS)
    order = [LETTERS.index(letter) for letter in letters]
    length = len(residues)
    width = min(length, 100 if length <= 1000 else 200)
    num_rows = -(-length // width)
    size = max(0.085 * width if num_rows > 1 else 0.085 * max(width, 55), 5) + 1.3
    made, axes = plots.figure(size, 1.9 * num_rows + 0.7, rows=num_rows)
    # One substitution that a model abhors should not leave the others pale.
    bound = float(np.nanpercentile(np.abs(scores_NA), 99)) or 1.0
    for number, ax in enumerate(axes):
        begin, end = number * width, min((number + 1) * width, length)
        image = ax.imshow(
            scores_NA[begin:end, order].T,
            cmap=plots.DIVERGING,
            vmin=-bound,
            vmax=bound,
            aspect="auto",
            interpolation="nearest",
            extent=(begin + 0.5, end + 0.5, len(letters) - 0.5, -0.5),
        )
        here_N = np.array([letters.find(letter) for letter in residues[begin:end].decode()])
        shown_N = np.flatnonzero(here_N >= 0)
        ax.scatter(begin + 1 + shown_N, here_N[shown_N], s=4, c="black", linewidths=0)
        ax.axvspan(begin + 0.5, end + 0.5, color="0.85", zorder=-1)  # seen where the wild type is none of the 20
        ax.spines["bottom"].set_bounds(begin + 0.5, end + 0.5)
        ax.set_xlim(begin + 0.5, begin + width + 0.5)
        ax.set_yticks(range(len(letters)), letters, fontsize=6, family="monospace")
        ax.tick_params(axis="y", length=0)
        ticks = [position for position in range(begin + 1, end + 1) if position == begin + 1 or not position % 10]
        ax.set_xticks(ticks, [str(position) for position in ticks], fontsize=7)
        for edge in np.cumsum([len(group) for group in GROUPS])[:-1]:
            ax.axhline(edge - 0.5, xmax=(end - begin) / width, color="black", linewidth=0.5)
    axes[0].set_title(title, loc="left")
    axes[-1].set_xlabel("position")
    made.colorbar(image, ax=axes, shrink=min(1.0, 2.0 / num_rows), aspect=15, label="log-ratio to the wild type")
    return made
