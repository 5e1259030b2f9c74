"""How far scores of variants agree with what was measured, as ProteinGym reports it, and BLOSUM62 to compare with.

The metrics are those of ProteinGym's proteingym/performance_DMS_benchmarks.py, from SciPy and scikit-learn: Spearman;
AUC and MCC against fit and unfit variants, scores cut at their median for MCC; NDCG of the best tenth by score with
measurements from 0 to 1 as gains; recall of the best tenth. Tied scores share their NDCG, which ProteinGym leaves to
chance. Averages go by protein, then by type of selection, so that neither a protein with many assays nor the commonest
type counts more than the others; ProteinGym rounds each assay to 3 digits before, which is left out here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_plm.judging.intervals import Difference, Interval, bootstrap_interval, paired_difference
from hf_plm.judging.requirements import require_judge
from hf_plm.judging.scores.variants import Variant
from hf_plm.models.masked_lm import LETTER_INDEX, LETTERS

METRICS = ("spearman", "auc", "mcc", "ndcg", "recall")
BEST = 10
"""Percent of the variants that NDCG and recall are about."""


def metrics(scores_V: np.ndarray, measured_V: np.ndarray, is_fit_V: np.ndarray | None = None) -> dict[str, float]:
    """Each of `METRICS`; NaN where it is not defined (all scores, measurements or classes alike).

    Without `is_fit_V` a variant is fit when its measurement is above the median. Raises `UserError` without the extra
    `judge`.
    """
    require_judge("scipy", "sklearn")
    from scipy.stats import spearmanr
    from sklearn.metrics import matthews_corrcoef, ndcg_score, recall_score, roc_auc_score

    nan = float("nan")
    found = dict.fromkeys(METRICS, nan)
    if len(scores_V) < 2 or not np.ptp(measured_V) or not np.ptp(scores_V):
        return found
    if is_fit_V is None:
        is_fit_V = measured_V > np.median(measured_V)
    found["spearman"] = float(spearmanr(measured_V, scores_V)[0])
    if 0 < is_fit_V.sum() < len(is_fit_V):
        found["auc"] = float(roc_auc_score(is_fit_V, scores_V))
        found["mcc"] = float(matthews_corrcoef(is_fit_V, scores_V >= np.median(scores_V)))
    gains_V = (measured_V - measured_V.min()) / np.ptp(measured_V)
    found["ndcg"] = float(ndcg_score(gains_V[None], scores_V[None], k=max(1, len(scores_V) * BEST // 100)))
    is_best_V, is_chosen_V = (values_V > np.percentile(values_V, 100 - BEST) for values_V in (measured_V, scores_V))
    if is_best_V.any():
        found["recall"] = float(recall_score(is_best_V, is_chosen_V))
    return found


def agreement_intervals(
    scores_V: np.ndarray, baseline_V: np.ndarray, measured_V: np.ndarray, groups_V: np.ndarray
) -> tuple[Interval, Difference]:
    """The Spearman of scores, and how far it is above the baseline's, with intervals by bootstrap over groups.

    Groups are variants of one position (or the same positions): they are not independent of each other. NaN where one
    is not defined. Raises `UserError` without the extra `judge`.
    """
    require_judge("scipy", "sklearn")
    from scipy.stats import spearmanr

    def spearman(values_V: np.ndarray) -> Callable[[np.ndarray], float]:
        def of(rows: np.ndarray) -> float:
            pair = values_V[rows], measured_V[rows]
            return float(spearmanr(*pair)[0]) if all(len(one) and np.ptp(one) for one in pair) else float("nan")

        return of

    own = bootstrap_interval(groups_V, spearman(scores_V))
    return own, paired_difference(groups_V, spearman(scores_V), spearman(baseline_V))


@functools.cache
def _blosum62() -> np.ndarray:
    from Bio.Align import substitution_matrices

    matrix = substitution_matrices.load("BLOSUM62")
    return np.array([[matrix[one, other] for other in LETTERS] for one in LETTERS])


def blosum62(variants: Sequence[Variant]) -> np.ndarray:
    """fp64 (variants,): what BLOSUM62 (Biopython's) says of each, summed over its substitutions."""
    matrix_AA = _blosum62()
    return np.array(
        [sum(matrix_AA[LETTER_INDEX[ord(old)], LETTER_INDEX[ord(new)]] for old, _, new in one) for one in variants]
    )


def averages(rows: Sequence[dict[str, Any]], metric: str, num_resamples: int = 10_000) -> dict[str, Any]:
    """The mean over assays of a protein within a type, then over proteins, then over types.

    Each row has `uniprot`, `selection` and the metric; rows where it is NaN are left out. `standard_error` is that of
    the mean, by a bootstrap over the proteins of each type, as ProteinGym has it for the difference to its best model;
    NaN where no type has two proteins.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if np.isfinite(row[metric]):
            values.setdefault(row["selection"], {}).setdefault(row["uniprot"], []).append(row[metric])
    by_type = {
        name: np.array([np.mean(assays) for assays in proteins.values()]) for name, proteins in sorted(values.items())
    }
    if not by_type:
        return {"mean": float("nan"), "standard_error": float("nan"), "by_selection": {}}
    draw = np.random.default_rng(0)
    means_S = np.mean(
        [draw.choice(one, size=(num_resamples, len(one))).mean(axis=1) for one in by_type.values()], axis=0
    )
    has_spread = any(len(one) > 1 for one in by_type.values())
    return {
        "mean": float(np.mean([one.mean() for one in by_type.values()])),
        "standard_error": float(means_S.std(ddof=1)) if has_spread else float("nan"),
        "by_selection": {name: float(one.mean()) for name, one in by_type.items()},
    }
