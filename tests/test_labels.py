"""What labels mean, from how they are written."""

from pathlib import Path

import numpy as np
import pytest

from hf_plm.config import UserError
from hf_plm.judging.probes.labels import is_missing, understand

NUMBERS = " ".join(f"{index}.37" for index in range(40))


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
        ("0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 x", "multiclass", ("0", "1", "x")),  # as often in strings of residues
        ("yes n/a no N/A #N/A <NA> N.A. NaN", "binary", ("no", "yes")),
    ],
)
def test_kinds(texts, kind, classes):
    found = understood(texts.split())
    assert found[:2] == (kind, classes)
    names = [text.removesuffix(".0") for text in texts.split() if not is_missing(text)]
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
        (f"{NUMBERS} <5", None, r"line 42: the label '<5' is no number, as 98% .* --kind multiclass"),
        (f"{NUMBERS} inf", None, "line 42: the label 'inf' is no number"),
        (f"{NUMBERS} #DIV/0!", "regression", "line 42: a number was expected for regression, not '#DIV/0!'"),
        (NUMBERS.replace(".", ","), None, "line 2: '0,37' has a decimal comma; write '0.37'"),
        (f"{NUMBERS} 1,5e-3", "regression", "line 42: '1,5e-3' has a decimal comma"),
        (f"1e308 {NUMBERS}", None, r"line 2: 1e308 is beyond 1e\+30"),
        (f"-2e30 {NUMBERS}", "regression", "line 2: -2e30 is beyond"),
        (" ".join(f"c{index % 30}" for index in range(50)), None, "30 different labels in 50 rows .* too many"),
    ],
)
def test_what_cannot_be(texts, kind, message):
    with pytest.raises(UserError, match=message):
        understood(texts.split(), kind)


def test_what_is_asked_for_is_done():
    """Odd labels are names where that is said, and many classes of many rows are classes."""
    for texts in (f"{NUMBERS} <5", f"{NUMBERS} 1e308", NUMBERS.replace(".", ",")):
        found = understood(texts.split(), "multiclass")
        assert (found[0], len(found[1])) == ("multiclass", len(texts.split()))
    assert len(understood([f"c{index % 30}" for index in range(60)])[1]) == 30
    assert understood(["#N/A", *NUMBERS.split(), "n/a"])[0] == "regression"
