"""What a probe sees of a row: a frozen embedding, or for a baseline the letters alone.

Vectors are kept of the rows that are used and of no others, in fp32: 100,000 sites of a model 1,024 wide are 0.4 GB.

Dimensions: P proteins, R rows, D numbers of a row, N residues, A = 20 letters.
"""

import numpy as np
import psutil

from hf_plm.inference.vectors import Encoder, embed_stream
from hf_plm.judging.probes.task import Task
from hf_plm.judging.probes.telling import say
from hf_plm.progress import shown
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

FEATURES = ("residue", "site")
"""Of a residue: its own vector, or beside it the mean of its protein, as PhosBoost has them (eporetsky/PhosBoost,
embed.py)."""
WINDOW = 7
"""Residues on either side of a one-hot window: 15 in all."""


def embedded(encoder: Encoder, task: Task, features: str = "residue", label: str = "embedding") -> np.ndarray:
    """fp32 (R, D): the mean over each protein, or the vectors of the residues; each sequence is embedded once."""
    assert features in FEATURES
    is_site = task.level == "residue" and features == "site"
    shape = (len(task), encoder.width * (2 if is_site else 1))
    if (num_bytes := 4 * shape[0] * shape[1]) > psutil.virtual_memory().total / 2:
        size = f"{num_bytes / 1e9:,.1f} GB, more than half of the memory"
        say(f"Note: the vectors of {len(task):,} rows take {size}; --max-proteins draws fewer.")
    found_RD = np.empty(shape, dtype=np.float32)
    rows_of: dict[str, list[int]] = {}
    for row, protein in enumerate(task.proteins_R.tolist()):
        rows_of.setdefault(task.sequences[protein], []).append(row)
    # Of like length one after the other: less waits for the longest of a batch.
    sequences = sorted(rows_of, key=len, reverse=True)
    pool = "mean" if task.level == "protein" else "none"
    vectors = embed_stream(encoder, [(one.encode() for one in sequences)], (pool,), "window", encoder.limit)
    for sequence, pooled in zip(sequences, shown(label, vectors, map(len, sequences)), strict=True):
        rows, vector = rows_of[sequence], pooled[pool]
        if task.level == "protein":
            found_RD[rows] = vector
        elif is_site:
            found_RD[rows] = np.concatenate(
                [vector[task.positions_R[rows]], np.broadcast_to(vector.mean(0), (len(rows), encoder.width))], axis=1
            )
        else:
            found_RD[rows] = vector[task.positions_R[rows]]
    return found_RD


def letters(task: Task, features: str = "residue") -> np.ndarray:
    """fp32 (R, A) composition of each protein, or (R, 15 * 21) letters around each residue, one-hot (20 and other);
    of `site` features the composition of the residue's protein beside them."""
    other = len(STANDARD_RESIDUES)
    column = np.full(256, other, dtype=np.int64)
    column[list(STANDARD_RESIDUES.encode())] = np.arange(other)
    coded = [column[np.frombuffer(sequence.encode(), dtype=np.uint8)] for sequence in task.sequences]
    shares_PA = np.array([np.bincount(one, minlength=other + 1)[:other] / len(one) for one in coded], dtype=np.float32)
    if task.level == "protein":
        return shares_PA[task.proteins_R]
    # All proteins end to end with a margin between them, so that one index finds each window.
    margin = np.full(WINDOW, other)
    joined = np.concatenate([margin, *(part for one in coded for part in (one, margin))])
    lengths = np.array([len(one) for one in coded])
    begins_P = WINDOW + np.cumsum(lengths + WINDOW) - (lengths + WINDOW)
    at_R = begins_P[task.proteins_R] + task.positions_R
    width = other + 1
    found = np.zeros((len(task), (2 * WINDOW + 1) * width), dtype=np.float32)
    for offset in range(-WINDOW, WINDOW + 1):
        found[np.arange(len(task)), (offset + WINDOW) * width + joined[at_R + offset]] = 1
    return np.hstack([found, shares_PA[task.proteins_R]]) if features == "site" else found
