"""Predictors against the libraries' own, after saving and reading, and settings chosen on what was not fitted."""

import contextlib
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from hf_plm.config import UserError
from hf_plm.judging.probes import predictors
from hf_plm.judging.probes.predictors import PREDICTORS, STACK, How, Rows, choose, fit, load_fitted, quiet

CLASSES = {"binary": 2, "multiclass": 3, "regression": 1}


def drawn(kind, count=300, seed=0):
    draw = np.random.default_rng(seed)
    X = draw.normal(2, 3, (count, 8)).astype(np.float32)
    signal = X[:, 0] - X[:, 1] + draw.normal(size=count)
    y = signal if kind == "regression" else np.digitize(signal, [0] if kind == "binary" else [-2, 2])
    return Rows(X, y, np.arange(count) // 3)


def settings_of(name, kind):
    return {"linear": {"strength": 0.1}, "knn": {"k": 5}}.get(name, {"leaves": 7, "rounds": 20})


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", [*PREDICTORS, STACK])
def test_a_saved_predictor_predicts_the_same(name, kind, tmp_path):
    if name == STACK and kind != "binary":
        return
    how = How(kind, CLASSES[kind], 1)
    rows, new = drawn(kind), drawn(kind, 50, 1)
    fitted = fit(name, rows, settings_of(name, kind), how)
    fitted.save(tmp_path)
    said = fitted.predict(new.X_RD)
    assert said.shape == (50, CLASSES[kind])
    assert np.array_equal(load_fitted(tmp_path).predict(new.X_RD), said)
    assert np.array_equal(fit(name, rows, settings_of(name, kind), how).predict(new.X_RD), said)
    if kind != "regression":
        assert said.sum(1) == pytest.approx(1)
        assert (said.argmax(1) == new.y_R).mean() > 0.5
    shuffled = fit(name, Rows(rows.X_RD, rows.y_R[::-1], rows.groups_R), settings_of(name, kind), how)
    assert not np.allclose(shuffled.predict(new.X_RD), said, atol=0.01)


def test_linear_and_neighbours_are_scikit_learns():
    for kind in CLASSES:
        rows, new = drawn(kind), drawn(kind, 50, 1)
        scaler = StandardScaler().fit(rows.X_RD)
        X, X_new = scaler.transform(rows.X_RD), scaler.transform(new.X_RD)
        said = fit("linear", rows, {"strength": 0.1}, How(kind, CLASSES[kind], 1)).predict(new.X_RD)
        if kind == "regression":
            assert said[:, 0] == pytest.approx(Ridge(alpha=0.1).fit(X, rows.y_R).predict(X_new), abs=1e-4)
            continue
        model = LogisticRegression(C=0.1, max_iter=500, tol=1e-3).fit(X, rows.y_R)
        assert said == pytest.approx(model.predict_proba(X_new), abs=1e-4)
        near = KNeighborsClassifier(5, metric="cosine").fit(X, rows.y_R)
        said = fit("knn", rows, {"k": 5}, How(kind, CLASSES[kind], 1)).predict(new.X_RD)
        assert said == pytest.approx(near.predict_proba(X_new))


def test_a_class_that_is_not_there_is_never_said():
    rows = drawn("multiclass")
    some = rows.at(np.flatnonzero(rows.y_R != 1))
    for name in ("linear", "knn", "trees"):
        said = fit(name, some, settings_of(name, "multiclass"), How("multiclass", 3, 1)).predict(rows.X_RD)
        assert said[:, 1].max() < 0.01
    with pytest.raises(UserError, match="one label only"):
        fit("linear", rows.at(np.flatnonzero(rows.y_R == 1)), {"strength": 1}, How("multiclass", 3, 1))


def test_many_classes_are_no_warning():
    rows = Rows(drawn("binary", 40).X_RD, np.arange(40) % 30, np.arange(40))

    def said(how):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with how:
                fit("linear", rows, {"strength": 0.1}, How("multiclass", 30, 1))
        return [str(one.message) for one in found]

    assert any("unique classes" in one for one in said(contextlib.nullcontext()))
    assert said(quiet()) == []


@pytest.mark.parametrize("name", PREDICTORS)
def test_settings_are_chosen_by_validation(name):
    rows = drawn("binary")
    train, valid = np.arange(200), np.arange(200, 300)
    settings, value = choose(name, rows, [(train, valid), (valid, train)], How("binary", 2, 1))
    assert 0.7 < value <= 1
    # Neighbours of noise in many more dimensions: more of them are better.
    if name == "knn":
        assert settings["k"] > 1
    nothing = Rows(rows.X_RD, np.random.default_rng(0).permutation(rows.y_R), rows.groups_R)
    assert choose(name, nothing, [(train, valid), (valid, train)], How("binary", 2, 1))[1] < 0.65


def test_few_groups_and_few_of_a_label():
    rows = drawn("binary", 40)
    few = Rows(rows.X_RD, rows.y_R, np.arange(40) % 3)
    how = How("binary", 2, 1)
    assert fit(STACK, few, settings_of(STACK, "binary"), how).predict(rows.X_RD).shape == (40, 2)
    for broken in (Rows(rows.X_RD, rows.y_R, np.zeros(40)), Rows(rows.X_RD, 0 * rows.y_R, rows.groups_R)):
        with pytest.raises(UserError, match="needs two groups of proteins, and two rows of each label"):
            fit(STACK, broken, settings_of(STACK, "binary"), how)
    parts = [(np.arange(30), np.arange(30, 40))]
    assert np.isnan(choose(STACK, rows, parts, how)[1])  # its trees are validated, and it is not


def test_a_fit_that_has_no_end_says_so(monkeypatch):
    rows = drawn("binary")
    how = How("binary", 2, 1)
    assert fit("linear", rows, {"strength": 0.1}, how).is_converged
    monkeypatch.setattr(predictors, "MOST_STEPS", 2)
    assert not fit("linear", rows, {"strength": 0.1}, how).is_converged


def test_no_predictor(tmp_path):
    with pytest.raises(UserError, match="holds no predictor"):
        load_fitted(tmp_path)
    np.savez(tmp_path / "predictor.npz", coef=np.array([object()], dtype=object))
    for plain in ("{}", "null"):
        (tmp_path / "predictor.json").write_text(plain)
        with pytest.raises(UserError, match="holds no predictor"):
            load_fitted(tmp_path)
    (tmp_path / "predictor.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="holds no predictor"):
        load_fitted(tmp_path)
