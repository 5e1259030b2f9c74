"""What a masked language model says of variants, from probabilities alone: higher is fitter, 0 is the wild type.

Four ways, in nats, all but the second from Meier et al. 2021 ("Language models enable zero-shot prediction of the
effects of mutations on protein function"):

- `masked`: each mutated position is masked, one at a time, in the wild type: log p(substitution) - log p(wild type),
  summed over the positions of a variant. A forward pass for each position that any variant mutates.
- `random-masks`: the same with as many other residues masked as in training, a random 15%, and the mean over DRAWS
  draws. With all of its relatives' residues in sight a small model recalls one of them; this asks what it makes of the
  family. Seven passes a draw, whatever the length (dropout in its place: Ravuri and Lawrence 2025, arXiv 2506.14793).
- `wild-type`: the same as `masked` from the wild type as it is: one forward pass.
- `pseudo-likelihood`: log p(residue | all others), summed over all residues of the mutated protein, less the same of
  the wild type. As many forward passes for each variant as it has residues. fair-esm's script means this by
  `pseudo-ppl`, but asks token i, which is residue i - 1, for residue i, and never asks for the last two
  (examples/variant-prediction/predict.py, `compute_pppl`; ProteinGym's copy too). Here each is asked for itself.

Of a protein longer than the model takes, each position is seen in the middle of a window: ProteinGym's "optimal" one
(proteingym/utils/scoring_utils.py, `get_optimal_window`). ProteinGym cuts 1,024 tokens out of the whole, so that its
inner windows have neither <cls> nor <eos>; here a window of 1,022 residues is encoded as a protein of that length.

Dimensions: N residues, P places, A letters (20), M mutations of all variants together.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from hf_plm.judging.scores.variants import Variant
from hf_plm.models.masked_lm import LETTER_INDEX, LETTERS, MaskedLM, Query

METHODS = ("masked", "random-masks", "wild-type", "pseudo-likelihood")
MASKED_SHARE = 0.15
"""Of the residues in each pass of `random-masks`: that of ESM-2's training."""
DRAWS = 8
"""Of `random-masks`; with twice as many, Spearman on four assays of one protein moved by 0.002 at most."""

Count = Callable[[int], object]
"""Told how many residues have gone through the model."""


def window_begin(place: int, length: int, limit: int) -> int:
    """The first residue of the window of `limit` residues, or of all, that has `place` in its middle if it can."""
    return max(0, min(place - limit // 2, length - limit))


def tile_begin(place: int, length: int, limit: int) -> int:
    """The same of windows half a window apart, so that there are few: `place` is in the middle half of its own."""
    half = limit // 2
    return max(0, min((place - limit // 4) // half * half, length - limit))


def score_variants(
    model: MaskedLM, residues: bytes, variants: Sequence[Variant], method: str, count: Count = lambda _: None
) -> np.ndarray:
    """fp64 (variants,): log-ratios of variants that `variants.check` has let pass."""
    assert method in METHODS
    if method == "pseudo-likelihood":
        return _pseudo_likelihoods(model, residues, variants, count)
    rows = [(index, *one) for index, variant in enumerate(variants) for one in variant]
    if not rows:
        return np.zeros(len(variants))
    owners_M, wild_types_M, places_M, letters_M = (np.array(column) for column in zip(*rows, strict=True))
    places_P, which_M = np.unique(places_M, return_inverse=True)
    log_probs_PA = marginals(model, residues, places_P, method, count)
    old_M, new_M = (
        LETTER_INDEX[np.frombuffer("".join(letters).encode(), dtype=np.uint8)] for letters in (wild_types_M, letters_M)
    )
    ratios_M = log_probs_PA[which_M, new_M] - log_probs_PA[which_M, old_M]
    return np.bincount(owners_M, ratios_M, minlength=len(variants))


def marginals(
    model: MaskedLM, residues: bytes, places_P: np.ndarray, method: str, count: Count = lambda _: None
) -> np.ndarray:
    """fp64 (P, A): log-probabilities at 0-based places, ascending; the mean over the draws of `random-masks`."""
    length, limit = len(residues), model.limit
    asked = list(_ask(places_P, method, length, limit))
    queries = (Query(residues[begin : begin + limit], masked, wanted) for begin, masked, wanted in asked)
    sums_PA = np.zeros((len(places_P), len(LETTERS)))
    for (begin, _, wanted), log_probs_WA in zip(asked, model.log_probs(queries), strict=True):
        sums_PA[np.searchsorted(places_P, begin + wanted)] += log_probs_WA
        count(min(length, limit))
    return sums_PA / (DRAWS if method == "random-masks" else 1)


def _ask(places_P: np.ndarray, method: str, length: int, limit: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """What to ask for `marginals`: where a window begins, and what is masked and wanted in it."""
    if method == "masked":
        for place in places_P.tolist():
            begin = window_begin(place, length, limit)
            yield begin, np.array([place - begin]), np.array([place - begin])
        return
    window = tile_begin if method == "random-masks" else window_begin
    for begin, places in groupby(places_P.tolist(), lambda place: window(place, length, limit)):
        wanted = np.array(list(places)) - begin
        if method == "wild-type":
            yield begin, np.array([], dtype=np.int64), wanted
            continue
        random = np.random.default_rng(0)
        for _ in range(DRAWS):
            for masked in np.array_split(random.permutation(min(length, limit)), round(1 / MASKED_SHARE)):
                if len(both := np.intersect1d(masked, wanted)):
                    yield begin, np.sort(masked), both


def num_residues(residues: bytes, variants: Sequence[Variant], method: str, limit: int) -> int:
    """How many residues `score_variants` sends through the model: what it costs."""
    length = min(len(residues), limit)
    if method == "pseudo-likelihood":
        pieces = {piece for variant in set(variants) for piece in _pieces(variant, len(residues), limit)}
        return (len(pieces) + len({begin for begin, _ in pieces})) * length * length
    places_P = np.array(sorted({one.place for variant in variants for one in variant}), dtype=np.int64)
    return sum(length for _ in _ask(places_P, method, len(residues), limit))


def num_split(residues: bytes, variants: Sequence[Variant], method: str, limit: int) -> int:
    """How many variants are seen in more than one window."""
    if method == "pseudo-likelihood":
        return sum(len(_pieces(variant, len(residues), limit)) > 1 for variant in variants)
    window = tile_begin if method == "random-masks" else window_begin
    return sum(len({window(one.place, len(residues), limit) for one in variant}) > 1 for variant in variants)


Piece = tuple[int, Variant]
"""Where a window begins, and the mutations shown in it."""


def _pieces(variant: Variant, length: int, limit: int) -> list[Piece]:
    """A variant in the window around the middle of its mutations; where they do not fit one, each in its own."""
    mutations = tuple(sorted((one for one in variant if one.letter != one.wild_type), key=lambda one: one.place))
    if not mutations:
        return []
    begin = window_begin((mutations[0].place + mutations[-1].place) // 2, length, limit)
    if mutations[0].place >= begin and mutations[-1].place < begin + limit:
        return [(begin, mutations)]
    return [(window_begin(one.place, length, limit), (one,)) for one in mutations]


def _pseudo_likelihoods(model: MaskedLM, residues: bytes, variants: Sequence[Variant], count: Count) -> np.ndarray:
    pieces_of = [_pieces(variant, len(residues), model.limit) for variant in variants]
    # In this order, so that a window's wild type comes once; equal variants are one.
    wanted: dict[Piece, float] = {(begin, ()): 0.0 for pieces in pieces_of for begin, _ in pieces}
    wanted |= {piece: 0.0 for pieces in pieces_of for piece in pieces}
    sequences = [_shown(residues, piece, model.limit) for piece in wanted]
    # Residues that are none of the 20 have no probability; they are the same in both.
    columns = [LETTER_INDEX[np.frombuffer(sequence, dtype=np.uint8)] for sequence in sequences]

    def queries() -> Iterator[Query]:
        for sequence, columns_N in zip(sequences, columns, strict=True):
            for place in np.flatnonzero(columns_N >= 0)[:, None]:
                yield Query(sequence, place, place)

    answers = model.log_probs(queries())
    for piece, columns_N in zip(wanted, columns, strict=True):
        for column in columns_N[columns_N >= 0]:
            wanted[piece] += float(next(answers)[0, column])
            count(len(columns_N))
    return np.array([sum(wanted[piece] - wanted[piece[0], ()] for piece in pieces) for pieces in pieces_of])


def _shown(residues: bytes, piece: Piece, limit: int) -> bytes:
    begin, mutations = piece
    shown = bytearray(residues[begin : begin + limit])
    for one in mutations:
        shown[one.place - begin] = ord(one.letter)
    return bytes(shown)
