"""The folder of what is unfinished, `OUT.partial`: which proteins have their vectors, and who takes the others.

Proteins are taken in portions, ranges of neighbours that are cut by their lengths alone. A portion counts once its
rows are on the disk and a line says so; after a kill the others are cut as they were before, so that the same calls to
the model come and the same vectors.
"""

import os
from pathlib import Path
from typing import TextIO

import numpy as np

from hf_plm.inference.vectors import Encoder
from hf_plm.inference.worklist import BOUNDS, Worklist

REQUEST, ROWS, READY, DONE = "request.json", "vectors.safetensors", "ready", "done-{}.txt"
CALLS_PER_PORTION, LEAST_TOKENS = 16, 16_384
"""Of a portion."""
Range = tuple[int, int]
"""The first protein and the one after the last."""


def remaining_ranges(partial: Path) -> list[Range]:
    """Ranges of proteins that no process has written."""
    with np.load(partial / BOUNDS) as bounds:
        num_proteins = len(bounds["residues"]) - 1
    done: list[Range] = []
    for path in partial.glob(DONE.format("*")):
        lines = path.read_text(encoding="ascii").split("\n")[:-1]  # after the last line end comes one that was cut
        done += [(int(begin), int(end)) for begin, end in map(str.split, lines)]
    ranges, place = [], 0
    for begin, end in [*sorted(done), (num_proteins, num_proteins)]:
        if begin > place:
            ranges.append((place, begin))
        place = max(place, end)
    return ranges


def open_done(partial: Path, rank: int) -> TextIO:
    """The list of what a process has written, to add to; a last line that was cut is taken off."""
    path = partial / DONE.format(rank)
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))
    return open(path, "a", encoding="ascii", newline="\n")


def cut_portions(worklist: Worklist, encoder: Encoder, ranges: list[Range]) -> list[Range]:
    """Ranges of proteins, cut where a portion is full; what was cut before is cut there again."""
    most = max(CALLS_PER_PORTION * encoder.tokens_per_call, LEAST_TOKENS)
    tokens = worklist.bounds + encoder.spelling.num_special * np.arange(len(worklist) + 1)
    portions = []
    for begin, end in ranges:
        while begin < end:
            full = int(np.searchsorted(tokens, tokens[begin] + most, side="right")) - 1
            cut = min(max(full, begin + 1), end)
            portions.append((begin, cut))
            begin = cut
    return portions


def shares(portions: list[Range], partial: Path, num_ranks: int) -> list[list[Range]]:
    """The portions of each process: neighbours, and as many tokens for one as for another."""
    if num_ranks == 1:
        return [portions]
    with np.load(partial / BOUNDS) as loaded:
        bounds = loaded["residues"]
    sizes = np.array([bounds[end] - bounds[begin] + end - begin for begin, end in portions])
    middles = np.cumsum(sizes) - sizes / 2
    owners = np.minimum(middles * num_ranks / max(sizes.sum(), 1), num_ranks - 1).astype(int)
    return [[portion for portion, owner in zip(portions, owners, strict=True) if owner == r] for r in range(num_ranks)]
