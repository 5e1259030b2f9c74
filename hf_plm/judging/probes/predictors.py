"""Small predictors on frozen features: linear, nearest neighbours, boosted trees, and PhosBoost's stack of two.

Each is fitted by scikit-learn or LightGBM and kept as plain arrays and LightGBM's own text, so that a saved one is read
again without running what a stranger wrote (no pickles). Settings are chosen on proteins that neither the fit nor the
test has seen; of a linear one the strength of L2, of neighbours their number, of trees leaves and rounds.

Dimensions: R rows, D features, C classes (1 for regression).
"""

import contextlib
import json
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.judging.probes.measures import measure

PREDICTORS = ("linear", "knn", "trees")
STACK = "phosboost"
MOST_STEPS = 500  # of logistic regression
INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of logistic regression, on standardised features
RIDGES = (1e5, 1e4, 1e3, 1e2, 1e1, 1.0)  # alpha of ridge regression
NEIGHBOURS = (1, 5, 15, 50)
KNN_ROWS = 20_000
"""At most so many rows are kept to be neighbours, a fixed draw; memory and time are in proportion."""
LEAVES = (7, 31)
MOST_ROUNDS, PATIENCE, LEARNING_RATE = 400, 30, 0.1
ABSENT = -1e9
"""The intercept of a class that the rows to learn from do not have."""


@dataclass(frozen=True)
class Rows:
    """Features, labels and groups of some rows."""

    X_RD: np.ndarray  # float32
    y_R: np.ndarray
    groups_R: np.ndarray

    def __len__(self) -> int:
        return len(self.y_R)

    def at(self, chosen: np.ndarray) -> "Rows":
        return Rows(self.X_RD[chosen], self.y_R[chosen], self.groups_R[chosen])


@dataclass(frozen=True)
class How:
    """What holds for all fits of a task."""

    kind: str
    num_classes: int  # 1 for regression
    threads: int
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A predictor: plain arrays, and the text of LightGBM's models."""

    name: str
    kind: str
    num_classes: int
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    is_converged: bool = True  # not kept

    def predict(self, X_RD: np.ndarray) -> np.ndarray:
        """float64 (R, C): probabilities of the classes, or the value."""
        if self.name == "linear":
            return _linear_predict(self, X_RD)
        if self.name == "knn":
            return _votes(self.arrays["labels"], _near(self.arrays, X_RD, self.settings["k"]), self.num_classes)
        parts = [_trees_predict(text, X_RD, self.kind) for text in self.texts]
        if self.name == STACK:
            both = np.stack([part[:, 1] for part in parts], axis=1)
            return _softmax(np.stack([np.zeros(len(both)), both @ self.arrays["coef"] + self.arrays["intercept"]], 1))
        return parts[0]

    def save(self, folder: Path) -> None:
        """`predictor.npz`, `predictor.json` and, of trees, `trees_N.txt`; the JSON last."""
        plain = {"name": self.name, "kind": self.kind, "num_classes": self.num_classes, "settings": self.settings}
        np.savez(folder / "predictor.npz", **self.arrays)  # type: ignore[arg-type]
        for number, text in enumerate(self.texts):
            (folder / f"trees_{number}.txt").write_text(text, encoding="utf-8")
        (folder / "predictor.json").write_text(json.dumps({**plain, "num_trees_files": len(self.texts)}, indent=1))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without scikit-learn's word, at each of hundreds of fits, that so many classes may be a quantity."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        yield


def load_fitted(folder: Path) -> Fitted:
    """Raises `UserError` where `folder` holds no predictor."""
    try:
        plain = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
        with np.load(folder / "predictor.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        count = plain.pop("num_trees_files")
        texts = tuple((folder / f"trees_{number}.txt").read_text(encoding="utf-8") for number in range(count))
        return Fitted(**plain, arrays=arrays, texts=texts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder} holds no predictor of hf-plm probe --out ({error}).") from None


def choose(name: str, rows: Rows, inner: list[tuple[np.ndarray, np.ndarray]], how: How) -> tuple[dict, float]:
    """The settings that are best on the validation sides, by the kind's first measure, and how good they are there:
    NaN for the stack, whose settings are those of its trees."""
    measured: list[list[tuple[dict, float]]] = []
    for train, valid in inner:
        fit, check = rows.at(train), rows.at(valid)
        measured.append(
            [
                (settings, measure(how.kind, check.y_R, scores_RC)(np.arange(len(check))))
                for settings, scores_RC in _tried(name, fit, check, how)
            ]
        )
    means = []
    for options in zip(*measured, strict=True):
        values = [value for _, value in options if not np.isnan(value)]
        means.append(float(np.mean(values)) if values else -np.inf)
    best = int(np.argmax(means))
    settings = dict(measured[0][best][0])
    if "rounds" in settings:
        settings["rounds"] = int(np.median([options[best][0]["rounds"] for options in measured]))
    return settings, float("nan") if name == STACK else means[best]


def fit(name: str, rows: Rows, settings: dict[str, Any], how: How) -> Fitted:
    """A predictor with these settings, of these rows."""
    if name == "linear":
        for one in _linear_path(rows, how, [settings["strength"]]):
            return one
    if name == "knn":
        return Fitted("knn", how.kind, how.num_classes, settings, _memory(rows, how))
    if name == "trees":
        return Fitted("trees", how.kind, how.num_classes, settings, {}, (_trees(rows, settings, how),))
    assert name == STACK
    return _stack(rows, settings, how)


def _tried(name: str, fit_on: Rows, check: Rows, how: How) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Settings and what they predict for `check`."""
    if name == "linear":
        grid = RIDGES if how.kind == "regression" else INVERSE_STRENGTHS
        for fitted in _linear_path(fit_on, how, grid):
            yield fitted.settings, fitted.predict(check.X_RD)
    elif name == "knn":
        arrays = _memory(fit_on, how)
        near = _near(arrays, check.X_RD, max(NEIGHBOURS))
        for k in NEIGHBOURS:
            yield {"k": k}, _votes(arrays["labels"], near[:, :k], how.num_classes)
    else:
        for leaves in LEAVES:
            text, rounds = _boosted(fit_on, {"leaves": leaves, "rounds": MOST_ROUNDS}, how, check)
            yield {"leaves": leaves, "rounds": rounds}, _trees_predict(text, check.X_RD, how.kind)


def _linear_path(rows: Rows, how: How, grid: Any) -> Iterator[Fitted]:
    """Logistic or ridge regression for each strength, each begun where the last ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(rows.X_RD)
    X_RD = scaler.transform(rows.X_RD)
    base = {"mean": scaler.mean_.astype(np.float32), "scale": scaler.scale_.astype(np.float32)}
    if how.kind == "regression":
        X_RD = X_RD.astype(np.float64)  # one-hot letters add up to one, which fp32 takes for a singular matrix
        for alpha in grid:
            ridge = Ridge(alpha=alpha).fit(X_RD, rows.y_R)
            arrays = {**base, "coef": ridge.coef_[None].astype(np.float64), "intercept": np.array([ridge.intercept_])}
            yield Fitted("linear", how.kind, 1, {"strength": alpha}, arrays)
        return
    present = np.unique(rows.y_R)
    if len(present) < 2:
        raise UserError("A part of the task to learn from has one label only; it needs proteins of two.")
    model = LogisticRegression(warm_start=True, max_iter=MOST_STEPS, tol=1e-3)
    for strength in grid:
        with warnings.catch_warnings():
            # Half a thousand steps without an end is no strength to be chosen, and validation says so.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=strength).fit(X_RD, rows.y_R)
        coef = np.zeros((how.num_classes, X_RD.shape[1]))
        intercept = np.full(how.num_classes, ABSENT)
        if len(present) == 2:
            intercept[present[0]] = 0.0
            coef[present[1]], intercept[present[1]] = model.coef_[0], model.intercept_[0]
        else:
            coef[present], intercept[present] = model.coef_, model.intercept_
        arrays = {**base, "coef": coef, "intercept": intercept}
        is_converged = bool(model.n_iter_.max() < MOST_STEPS)
        yield Fitted("linear", how.kind, how.num_classes, {"strength": strength}, arrays, (), is_converged)


def _linear_predict(fitted: Fitted, X_RD: np.ndarray) -> np.ndarray:
    at = fitted.arrays
    # The scale goes into the coefficients, so that no standardised copy of all rows is made.
    coef = at["coef"] / at["scale"]
    scores = X_RD @ coef.T.astype(np.float32) + (at["intercept"] - coef @ at["mean"])
    return scores if fitted.kind == "regression" else _softmax(scores)


def _softmax(scores_RC: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(scores_RC, axis=1)


def _memory(rows: Rows, how: How) -> dict[str, np.ndarray]:
    """What neighbours are looked for in: standardised rows of length one."""
    from sklearn.preprocessing import StandardScaler

    if len(rows) > KNN_ROWS:
        rows = rows.at(np.sort(np.random.default_rng(how.seed).choice(len(rows), KNN_ROWS, replace=False)))
    scaler = StandardScaler().fit(rows.X_RD)
    arrays = {"mean": scaler.mean_.astype(np.float32), "scale": scaler.scale_.astype(np.float32), "labels": rows.y_R}
    return {**arrays, "vectors": _on_sphere(arrays, rows.X_RD)}


def _on_sphere(arrays: dict[str, np.ndarray], X_RD: np.ndarray) -> np.ndarray:
    from sklearn.preprocessing import normalize

    return normalize((X_RD - arrays["mean"]) / arrays["scale"]).astype(np.float32)


def _near(arrays: dict[str, np.ndarray], X_RD: np.ndarray, k: int) -> np.ndarray:
    """int64 (R, k): the nearest by cosine, nearest first."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(algorithm="brute").fit(arrays["vectors"])
    k = min(k, len(arrays["labels"]))
    chunks = [
        search.kneighbors(_on_sphere(arrays, X_RD[begin : begin + 20_000]), k, return_distance=False)
        for begin in range(0, len(X_RD), 20_000)
    ]
    return np.concatenate(chunks) if chunks else np.empty((0, k), dtype=np.int64)


def _votes(labels: np.ndarray, near_Rk: np.ndarray, num_classes: int) -> np.ndarray:
    if num_classes == 1:
        return labels[near_Rk].mean(axis=1, keepdims=True)
    votes = np.zeros((len(near_Rk), num_classes))
    for column in range(near_Rk.shape[1]):
        votes[np.arange(len(near_Rk)), labels[near_Rk[:, column]]] += 1
    return votes / near_Rk.shape[1]


def _trees(rows: Rows, settings: dict[str, Any], how: How, weight: str = "equal") -> str:
    return _boosted(rows, settings, how, None, weight)[0]


def _boosted(
    rows: Rows, settings: dict[str, Any], how: How, check: Rows | None, weight: str = "equal"
) -> tuple[str, int]:
    """LightGBM's model as text, and its rounds: as many as asked for, or as help on `check`."""
    import lightgbm

    objective = {"binary": "binary", "multiclass": "multiclass", "regression": "regression"}[how.kind]
    parameters = {
        "objective": objective,
        "num_leaves": settings["leaves"],
        "learning_rate": LEARNING_RATE,
        "feature_fraction": 0.3,  # embeddings are redundant: as good, and three times as fast
        "max_bin": 63,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": how.threads,
        "seed": how.seed,
        "verbosity": -1,
        "is_unbalance": weight == "balanced",
    }
    if how.kind == "multiclass":
        parameters["num_class"] = how.num_classes
    data = lightgbm.Dataset(rows.X_RD, rows.y_R, free_raw_data=True, params={"max_bin": 63, "verbosity": -1})
    watched, stops = [], []
    if check is not None:
        watched = [data.create_valid(check.X_RD, check.y_R)]
        stops = [lightgbm.early_stopping(PATIENCE, verbose=False)]
    booster = lightgbm.train(parameters, data, settings["rounds"], valid_sets=watched, callbacks=stops)
    rounds = booster.best_iteration if check is not None else settings["rounds"]
    return booster.model_to_string(num_iteration=rounds or -1), max(rounds, 1)


def _trees_predict(text: str, X_RD: np.ndarray, kind: str) -> np.ndarray:
    import lightgbm

    found = np.asarray(lightgbm.Booster(model_str=text).predict(X_RD))
    if kind == "binary":
        return np.stack([1 - found, found], axis=1)
    return found.reshape(len(X_RD), -1)


def _stack(rows: Rows, settings: dict[str, Any], how: How) -> Fitted:
    """PhosBoost's classifier: boosted trees of equal and of balanced weights, joined by a balanced logistic regression
    on what each says of five folds that it has not seen (Poretsky et al. 2023; eporetsky/PhosBoost, train.py).

    Its trees are CatBoost's, tuned in 100 steps by F1, and its folds of single sites; here they are LightGBM's, and
    whole groups of proteins stay together.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    weights = ("balanced", "equal")
    num_folds = min(5, len(np.unique(rows.groups_R)), np.bincount(rows.y_R, minlength=2).min())
    if num_folds < 2:
        raise UserError(f"--predictor {STACK} needs two groups of proteins, and two rows of each label, to learn from.")
    seen_R2 = np.zeros((len(rows), 2))
    folds = StratifiedGroupKFold(int(num_folds), shuffle=True, random_state=how.seed)
    for train, held in folds.split(rows.X_RD, rows.y_R, rows.groups_R):
        for column, weight in enumerate(weights):
            text = _trees(rows.at(train), settings, how, weight)
            seen_R2[held, column] = _trees_predict(text, rows.X_RD[held], how.kind)[:, 1]
    joined = LogisticRegression(class_weight="balanced", max_iter=1000).fit(seen_R2, rows.y_R)
    texts = tuple(_trees(rows, settings, how, weight) for weight in weights)
    arrays = {"coef": joined.coef_[0], "intercept": joined.intercept_}
    return Fitted(STACK, how.kind, how.num_classes, settings, arrays, texts)
