"""What labels mean, from how they are written."""

from pathlib import Path

import numpy as np
import pytest

from hf_plm.config import UserError
from hf_plm.judging.probes.labels import understand


def understood(texts, kind=None):
    return understand(Path("t.tsv"), list(enumerate(texts, 2)), kind)


@pytest.mark.parametrize(
    ("texts", "kind", "classes"),
    [
        ("0 1 1 0", "binary", ("0", "1")),
        ("yes no no", "binary", ("no", "yes")),
        ("H E C", "multiclass", ("C", "E", "H")),
        ("10 9 1 2", "multiclass", ("1", "2", "9", "10")),
        ("1.5 2 3", "regression", ()),
        (" ".join(str(number) for number in range(11)), "regression", ()),
        ("0.1 0.9", "binary", ("0.1", "0.9")),
        ("0.0 1.0 2.0 1.0", "multiclass", ("0", "1", "2")),
        ("1.0 0.0", "binary", ("0", "1")),
    ],
)
def test_kinds(texts, kind, classes):
    found = understood(texts.split())
    assert found[:2] == (kind, classes)
    names = [text.removesuffix(".0") for text in texts.split()]
    values = [float(text) for text in names] if kind == "regression" else map(classes.index, names)
    assert found[2].tolist() == list(values)


def test_a_kind_may_be_forced_and_missing_labels_are_left_out():
    kind, classes, labels_R, kept_R = understood(["1", "", "3", "NaN", "2"], "regression")
    assert (kind, classes, labels_R.tolist()) == ("regression", (), [1, 3, 2])
    assert np.flatnonzero(kept_R).tolist() == [0, 2, 4]
    assert understood(["1", "2"], "regression")[0] == "regression"


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        ("1 2 x", "regression", "line 4: a number was expected for regression, not 'x'"),
        ("1 2 3", "binary", "has 3 labels"),
        ("a a", None, "the same label 'a' in all rows"),
        ("- ? na", None, "no label in any row"),
    ],
)
def test_what_cannot_be(texts, kind, message):
    with pytest.raises(UserError, match=message):
        understood(texts.split(), kind)
