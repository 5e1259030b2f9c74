"""What a probe is measured by, for each kind of task: functions of scikit-learn and SciPy, from truth and prediction.

Dimensions: R rows, C classes (1 for regression: the predicted value).
"""

from collections.abc import Callable

import numpy as np

NAMES = {
    "binary": ("auprc", "auroc", "mcc", "f1", "precision", "recall", "balanced_accuracy"),
    "multiclass": ("mcc", "accuracy", "balanced_accuracy", "f1_macro"),
    "regression": ("spearman", "r2", "mae"),
}
"""The first of each kind is the one that settings are chosen by. F1, precision and recall count the positive class at
a probability of 0.5, as PhosBoost's predict.py does (eporetsky/PhosBoost)."""
LABELS = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "mcc": "MCC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "spearman": "Spearman",
    "r2": "R2",
    "mae": "mean absolute error",
}


def headline(kind: str) -> str:
    """The measure that a kind of task is first told by."""
    return NAMES[kind][0]


def decided(kind: str, scores_RC: np.ndarray) -> np.ndarray:
    """What is predicted: int64 (R,) classes, of two the second from 0.5 on; float64 (R,) values for regression."""
    if kind == "regression":
        return scores_RC[:, 0].astype(np.float64)
    if kind == "binary":
        return (scores_RC[:, 1] >= 0.5).astype(np.int64)
    return scores_RC.argmax(axis=1)


def measure(
    kind: str, labels_R: np.ndarray, scores_RC: np.ndarray, ranked_R: np.ndarray | None = None
) -> Callable[[np.ndarray], float]:
    """The first measure of the kind, of whichever rows it is asked for; NaN where it is not defined for these.

    `ranked_R` stands for the scores where only their order counts.
    """
    decided_R, ranked_R = decided(kind, scores_RC), scores_RC[:, -1] if ranked_R is None else ranked_R
    return lambda rows: _first(kind, labels_R[rows], decided_R[rows], ranked_R[rows])


def measures(
    kind: str, labels_R: np.ndarray, scores_RC: np.ndarray, ranked_R: np.ndarray | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """All measures of the kind, float64 in the order of `NAMES`, in as few calls as can be: resamples ask often."""
    decided_R, ranked_R = decided(kind, scores_RC), scores_RC[:, -1] if ranked_R is None else ranked_R
    further = {"binary": _further_binary, "multiclass": _further_multiclass, "regression": _further_regression}[kind]

    def of(rows: np.ndarray) -> np.ndarray:
        truth, guess, ranked = labels_R[rows], decided_R[rows], ranked_R[rows]
        return np.array([_first(kind, truth, guess, ranked), *further(truth, guess, ranked)])

    return of


def _first(kind: str, truth: np.ndarray, guess: np.ndarray, ranked: np.ndarray) -> float:
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score

    if kind == "binary":
        return float(average_precision_score(truth, ranked)) if truth.any() else float("nan")
    if kind == "multiclass":
        return _mcc(truth, guess)
    if len(truth) < 3 or np.ptp(truth) == 0 or np.ptp(ranked) == 0:
        return float("nan")
    return float(spearmanr(truth, ranked).statistic)


def _mcc(truth: np.ndarray, guess: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if truth.min() == truth.max() == guess.min() == guess.max():
        return 0.0  # what scikit-learn says of a resample with one label, after a warning
    return float(matthews_corrcoef(truth, guess))


def _further_binary(truth: np.ndarray, guess: np.ndarray, ranked: np.ndarray) -> list[float]:
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    auroc = float("nan") if truth.min() == truth.max() else roc_auc_score(truth, ranked)
    precision, recall, f1, support = precision_recall_fscore_support(truth, guess, labels=[0, 1], zero_division=0)
    # Balanced accuracy is the mean recall; balanced_accuracy_score warns of a class that a resample does not have.
    balanced = recall[support > 0].mean()
    return [auroc, _mcc(truth, guess), f1[1], precision[1], recall[1], balanced]


def _further_multiclass(truth: np.ndarray, guess: np.ndarray, ranked: np.ndarray) -> list[float]:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    _, recall, f1, support = precision_recall_fscore_support(truth, guess, zero_division=0)
    return [accuracy_score(truth, guess), recall[support > 0].mean(), f1.mean()]


def _further_regression(truth: np.ndarray, guess: np.ndarray, ranked: np.ndarray) -> list[float]:
    from sklearn.metrics import mean_absolute_error, r2_score

    r2 = float("nan") if len(truth) < 2 or np.ptp(truth) == 0 else r2_score(truth, guess)
    return [r2, mean_absolute_error(truth, guess)]
