"""Measures, against scikit-learn and SciPy called one by one."""

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn import metrics

from hf_plm.judging.probes.measures import NAMES, decided, headline, measure, measures

EVERY = np.arange(200)


def drawn(kind):
    draw = np.random.default_rng(0)
    if kind == "regression":
        labels = draw.normal(size=200)
        return labels, (labels + draw.normal(size=200))[:, None]
    labels = draw.integers(0, 2 if kind == "binary" else 4, 200)
    scores = draw.dirichlet(np.ones(labels.max() + 1), 200)
    scores[EVERY, labels] += 0.4
    return labels, scores / scores.sum(1, keepdims=True)


def called_directly(kind, truth, scores):
    guess = scores.argmax(1)
    if kind == "binary":
        said = scores[:, 1]
        return [
            metrics.average_precision_score(truth, said),
            metrics.roc_auc_score(truth, said),
            metrics.matthews_corrcoef(truth, guess),
            metrics.f1_score(truth, guess),
            metrics.precision_score(truth, guess),
            metrics.recall_score(truth, guess),
            metrics.balanced_accuracy_score(truth, guess),
        ]
    if kind == "multiclass":
        return [
            metrics.matthews_corrcoef(truth, guess),
            metrics.accuracy_score(truth, guess),
            metrics.balanced_accuracy_score(truth, guess),
            metrics.f1_score(truth, guess, average="macro"),
        ]
    said = scores[:, 0]
    return [spearmanr(truth, said)[0], metrics.r2_score(truth, said), metrics.mean_absolute_error(truth, said)]


@pytest.mark.parametrize("kind", NAMES)
def test_as_scikit_learn_says(kind):
    truth, scores = drawn(kind)
    found = measures(kind, truth, scores)(EVERY)
    assert found.tolist() == pytest.approx(called_directly(kind, truth, scores))
    assert measure(kind, truth, scores)(EVERY) == found[NAMES[kind].index(headline(kind))] == found[0]
    some = EVERY[:50].repeat(2)
    assert measures(kind, truth, scores)(some).tolist() == pytest.approx(
        called_directly(kind, truth[some], scores[some])
    )
    assert not np.allclose(measures(kind, truth[::-1], scores)(EVERY), found, atol=0.01)


@pytest.mark.parametrize("kind", NAMES)
def test_rows_of_one_label_warn_of_nothing(kind):
    truth, scores = drawn(kind)
    rows = EVERY[truth == truth[0]] if kind != "regression" else EVERY[:1].repeat(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(zip(NAMES[kind], measures(kind, truth, scores)(rows), strict=True))
    if kind == "binary":
        assert np.isnan(found["auroc"])
        same = np.eye(2)[np.zeros(200, dtype=int)]
        assert measures(kind, np.zeros(200, dtype=int), same)(rows)[2] == 0
    if kind == "regression":
        assert np.isnan(found["spearman"])


def test_a_half_is_positive():
    assert decided("binary", np.array([[0.5, 0.5], [0.51, 0.49]])).tolist() == [1, 0]
