"""A probe: how much of a task a small predictor reads off a model's frozen embeddings, beside what the letters give.

Each round fits on its train side and is tested once; settings are chosen inside the train side, in groups too. Beside
the model stand two baselines over the same rows: the shares of the labels, and the same predictor on the letters
(composition of a protein, a window of 15 residues). A probe that is not above the second has read nothing.

Dimensions: R rows, D features, C classes.
"""

import collections
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.data.heldout import hash_of
from hf_plm.inference.vectors import Encoder
from hf_plm.judging.intervals import Difference, Interval, bootstrap_intervals, paired_difference
from hf_plm.judging.probes.features import FEATURES, embedded, letters
from hf_plm.judging.probes.measures import NAMES, headline, measure, measures
from hf_plm.judging.probes.predictors import MOST_STEPS, PREDICTORS, STACK, Fitted, How, Rows, choose, fit
from hf_plm.judging.probes.splits import KMER_SHARE, Plan, near_pairs, plan
from hf_plm.judging.probes.task import Task, side
from hf_plm.progress import shown

MOST_TREE_CLASSES = 30
"""Boosting fits a tree a class and round; beyond so many classes it is only done when it is asked for by name."""
PRIOR = "label shares"


@dataclass(frozen=True)
class Options:
    """How a task is put to a model."""

    predictor: str = "all"  # linear, knn, trees, phosboost or all
    features: str = "residue"
    folds: int = 5
    clusters: Path | None = None
    leaks: str = "refuse"
    max_rows: int = 200_000  # to learn from; tests are whole
    max_proteins: int | None = None
    threads: int = 0  # 0: all
    resamples: int | None = None  # behind intervals and tests; none: by the number of rows
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise UserError(f"--features is one of {', '.join(FEATURES)}, not {self.features!r}.")
        if self.predictor not in (*PREDICTORS, STACK, "all"):
            raise UserError(f"--predictor is one of {', '.join(PREDICTORS)}, {STACK}, all, not {self.predictor!r}.")
        for flag, number, least in (
            ("max-rows", self.max_rows, 10),
            ("max-proteins", self.max_proteins, 10),
            ("resamples", self.resamples, 20),
        ):
            if number is not None and number < least:
                raise UserError(f"--{flag} is a number from {least}, not {number}.")


@dataclass(frozen=True)
class RowRound:
    """One fit and its tests, in rows."""

    fit: np.ndarray
    inner: list[tuple[np.ndarray, np.ndarray]]  # indices into `fit`
    tests: dict[str, np.ndarray]


@dataclass(frozen=True)
class Prepared:
    """A task with its folds: the same for all models."""

    task: Task  # only the rows that are used
    plan: Plan
    rounds: list[RowRound]
    notes: list[str]
    how: How
    resamples: int | None

    @property
    def groups_R(self) -> np.ndarray:
        return self.plan.groups_P[self.task.proteins_R]

    def ranked(self, scores_RC: np.ndarray) -> np.ndarray:
        """(R,) ranks within each round as shares, NaN where no test: fits of other rounds have offsets of their own,
        which say nothing of the order of their rows together."""
        from scipy.stats import rankdata

        found = np.full(len(scores_RC), np.nan)
        for one in self.rounds:
            for rows in one.tests.values():
                found[rows] = rankdata(scores_RC[rows, -1]) / (len(rows) + 1)
        return found

    @property
    def tests(self) -> dict[str, np.ndarray]:
        """The rows of each test set, over all rounds."""
        found: dict[str, list[np.ndarray]] = {}
        for one in self.rounds:
            for name, rows in one.tests.items():
                found.setdefault(name, []).append(rows)
        return {name: np.concatenate(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class Predicted:
    """What one predictor says of every test row, each said without having seen its group."""

    name: str
    scores_RC: np.ndarray  # NaN where no test
    settings: list[dict[str, Any]]  # of each round
    validation: float  # by the first measure, mean over rounds; NaN where there is none
    fitted: Fitted  # of the last round


def prepare_task(task: Task, options: Options) -> Prepared:
    """Draws, splits and looks for leaks. Raises `UserError` for what cannot be split, and for leaks."""
    notes = list(task.notes)
    if options.features == "site" and task.level == "protein":
        raise UserError(f"--features site is for labels of residues, and {task.path} has one label for each protein.")
    if options.max_proteins is not None and options.max_proteins < len(task.ids):
        whole = len(task.ids)
        task = _few(task, options.max_proteins, options.seed)
        notes.append(f"{len(task.ids):,} of {whole:,} proteins are drawn (--max-proteins).")
    split = plan(task, options.folds, options.clusters, options.leaks, options.seed)
    notes += split.notes
    if task.splits is not None and len(split.rounds) == 1 and (near := _relatives(task, split)):
        notes.append(near)
    rounds, sampled = _row_rounds(task, split, options)
    if sampled:
        notes.append(f"{sampled:,} rows are drawn to learn from (--max-rows); tests are whole.")
    used = np.zeros(len(task), dtype=bool)
    for one in rounds:
        for rows in (one.fit, *one.tests.values()):
            used[rows] = True
    number = np.cumsum(used) - 1
    rounds = [
        RowRound(number[one.fit], one.inner, {name: number[rows] for name, rows in one.tests.items()}) for one in rounds
    ]
    threads = options.threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else options.threads
    how = How(task.kind, max(len(task.classes), 1), threads or os.cpu_count() or 1, options.seed)
    return Prepared(task.rows(used), split, rounds, notes, how, options.resamples)


def _few(task: Task, count: int, seed: int) -> Task:
    """A draw of proteins, by the sizes of a split's sides, a quarter for the tests where these are smaller."""
    draw = np.random.default_rng(seed)
    sides = np.array([side(value) or value for value in task.splits] if task.splits else ["train"] * len(task.ids))
    names, sizes = np.unique(sides, return_counts=True)
    is_test = np.array([name not in ("train", "valid") and not name.startswith("fold ") for name in names])
    shares = sizes / sizes.sum()
    if is_test.any() and not is_test.all() and shares[is_test].sum() < 0.25:
        shares = np.where(is_test, 0.25 * shares / shares[is_test].sum(), 0.75 * shares / shares[~is_test].sum())
    chosen = [
        draw.permutation(np.flatnonzero(sides == name))[: max(1, round(count * share))]
        for name, share in zip(names, shares, strict=True)
    ]
    return task.proteins(np.sort(np.concatenate(chosen)))


def _relatives(task: Task, split: Plan) -> str:
    """An honest word on a given split: how many of the test have a near relative to learn from."""
    tested = np.concatenate(list(split.rounds[0].tests.values()))
    count = len(np.unique(near_pairs(task.sequences, tested, split.rounds[0].train)[0]))
    return (
        f"{count:,} of {len(tested):,} test proteins have a near relative on the train side: the one of the two with "
        f"fewer 5-mers shares {KMER_SHARE:.0%} of them."
        if count
        else ""
    )


def _row_rounds(task: Task, split: Plan, options: Options) -> tuple[list[RowRound], int]:
    """Rounds in rows, and how many rows the largest draw has where one was needed."""
    draw, sampled, rounds = np.random.default_rng(options.seed), 0, []
    for one in split.rounds:
        rows = np.flatnonzero(np.isin(task.proteins_R, one.train))
        if len(rows) > options.max_rows:
            rows = np.sort(draw.choice(rows, options.max_rows, replace=False))
            sampled = max(sampled, len(rows))
        of_rows = task.proteins_R[rows]
        inner = [
            (np.flatnonzero(np.isin(of_rows, train)), np.flatnonzero(np.isin(of_rows, valid)))
            for train, valid in one.inner
        ]
        inner = [pair for pair in inner if len(pair[0]) and len(pair[1])]
        if not inner:
            raise UserError(
                f"{task.path}: too few labelled rows are left to choose settings by; --max-rows keeps more."
            )
        tests = {name: np.flatnonzero(np.isin(task.proteins_R, proteins)) for name, proteins in one.tests.items()}
        tests = {name: found for name, found in tests.items() if len(found)}
        if not len(rows) or not tests:
            raise UserError(f"{task.path}: a side of the split has no labelled row.")
        rounds.append(RowRound(rows, inner, tests))
    return rounds, sampled


def wanted(options: Options, prepared: Prepared) -> list[str]:
    """The names of the predictors to fit; says which is left out."""
    if options.predictor == STACK and prepared.task.kind != "binary":
        raise UserError(f"--predictor {STACK} is for two labels, and {prepared.task.path} is {prepared.task.kind}.")
    if options.predictor != "all":
        return [options.predictor]
    if len(prepared.task.classes) > MOST_TREE_CLASSES:
        prepared.notes.append(
            f"Trees are left out for {len(prepared.task.classes):,} classes; --predictor trees fits them."
        )
        return [name for name in PREDICTORS if name != "trees"]
    return list(PREDICTORS)


def predictions(prepared: Prepared, X_RD: np.ndarray, names: Sequence[str], label: str) -> dict[str, Predicted]:
    """Each predictor through all rounds, settings chosen inside each."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    groups_R, classes = prepared.groups_R, prepared.how.num_classes
    done: dict[str, list[tuple[dict, float, Fitted]]] = {name: [] for name in names}
    scores = {name: np.full((len(prepared.task), classes), np.nan) for name in names}
    work = [(one, name) for one in prepared.rounds for name in names]
    with threadpool_limits(limits=prepared.how.threads):
        for one, name in shown(label, work, [1] * len(work)):
            rows = Rows(X_RD[one.fit], prepared.task.labels_R[one.fit], groups_R[one.fit])
            settings, value = choose(name, rows, one.inner, prepared.how)
            fitted = fit(name, rows, settings, prepared.how)
            done[name].append((settings, value, fitted))
            for test in one.tests.values():
                scores[name][test] = fitted.predict(X_RD[test])
    for name, fits in done.items():
        if num := sum(not fitted.is_converged for _, _, fitted in fits):
            note = f"{label}, {name}: {num} of {len(fits)} fits had not converged after {MOST_STEPS} steps."
            if note not in prepared.notes:
                prepared.notes.append(note)
    return {
        name: Predicted(
            name,
            scores[name],
            [settings for settings, _, _ in done[name]],
            float(np.mean([value for _, value, _ in done[name]])),
            done[name][-1][2],
        )
        for name in names
    }


def baselines(prepared: Prepared, predictor: str = "linear", features: str = "residue") -> dict[str, np.ndarray]:
    """(R, C) of the shares of the labels, and of the same predictor on the letters, or of a linear one where that is
    better by validation."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    found = np.full((len(prepared.task), prepared.how.num_classes), np.nan)
    labels_R = prepared.task.labels_R
    for one in prepared.rounds:
        for test in one.tests.values():
            blank, unseen = np.zeros((len(one.fit), 1)), np.zeros((len(test), 1))
            if prepared.task.kind == "regression":
                found[test, 0] = DummyRegressor().fit(blank, labels_R[one.fit]).predict(unseen)
            else:
                dummy = DummyClassifier(strategy="prior").fit(blank, labels_R[one.fit])
                found[test] = 0
                found[np.ix_(test, dummy.classes_)] = dummy.predict_proba(unseen)
    name = "composition" if prepared.task.level == "protein" else "one-hot window"
    name += " and composition" * (features == "site")
    names = dict.fromkeys([predictor] if predictor == STACK else [predictor, "linear"])
    fitted = predictions(prepared, letters(prepared.task, features), list(names), "baseline")
    best = max(fitted.values(), key=lambda one: one.validation)
    return {PRIOR: found, f"{name}, {best.name}": best.scores_RC}


def measured(prepared: Prepared, scores: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, Interval]]]:
    """Test set, predictor, measure: with intervals over groups."""
    kind, groups_R = prepared.task.kind, prepared.groups_R
    work = [(test, name, rows) for test, rows in prepared.tests.items() for name in scores]
    found: dict[str, dict[str, dict[str, Interval]]] = {test: {} for test in prepared.tests}
    for test, name, rows in shown("intervals", work, [len(rows) for _, _, rows in work]):
        of = measures(kind, prepared.task.labels_R[rows], scores[name][rows], prepared.ranked(scores[name])[rows])
        found[test][name] = dict(
            zip(NAMES[kind], bootstrap_intervals(groups_R[rows], of, prepared.resamples), strict=True)
        )
    return found


def advantage(prepared: Prepared, test: str, first_RC: np.ndarray, second_RC: np.ndarray) -> Difference:
    """How far the first is above the second by the kind's first measure, over the same draws of groups."""
    rows, kind = prepared.tests[test], prepared.task.kind
    labels_R = prepared.task.labels_R[rows]
    return paired_difference(
        prepared.groups_R[rows],
        measure(kind, labels_R, first_RC[rows], prepared.ranked(first_RC)[rows]),
        measure(kind, labels_R, second_RC[rows], prepared.ranked(second_RC)[rows]),
        prepared.resamples,
    )


def final(prepared: Prepared, X_RD: np.ndarray, chosen: Predicted, max_rows: int) -> tuple[Fitted, str]:
    """The predictor to keep and what it has learnt from: of one round as it was tested; of folds, from all rows with
    the settings that were chosen most often. Its array `seen` has the hashes of the sequences."""
    if len(prepared.rounds) == 1:
        return _with_seen(chosen.fitted, prepared, prepared.rounds[0].fit), "the train side, as tested"
    alike = [tuple(sorted((key, value) for key, value in one.items() if key != "rounds")) for one in chosen.settings]
    most = collections.Counter(alike).most_common(1)[0][0]
    settings = dict(most)
    if "rounds" in chosen.settings[0]:
        of_most = [one["rounds"] for one, same in zip(chosen.settings, alike, strict=True) if same == most]
        settings["rounds"] = int(np.median(of_most))
    rows = np.arange(len(prepared.task))
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(prepared.how.seed).choice(rows, max_rows, replace=False))
    known = Rows(X_RD[rows], prepared.task.labels_R[rows], prepared.groups_R[rows])
    fitted = fit(chosen.name, known, settings, prepared.how)
    return _with_seen(fitted, prepared, rows), "all rows, with the settings chosen in most folds"


def hashes_of(sequences: Sequence[str]) -> np.ndarray:
    """uint64, 8 bytes of BLAKE2b for each sequence."""
    return np.array([hash_of(sequence.encode()) for sequence in sequences], dtype=np.uint64)


def _with_seen(fitted: Fitted, prepared: Prepared, rows: np.ndarray) -> Fitted:
    task = prepared.task
    seen = hashes_of([task.sequences[protein] for protein in np.unique(task.proteins_R[rows])])
    return dataclasses.replace(fitted, arrays={**fitted.arrays, "seen": np.unique(seen)})


@dataclass(frozen=True)
class Quick:
    """What `quick_probe` needs again and again; the letters stay the same while a model learns."""

    prepared: Prepared
    baseline: float


def prepare_quick(task: Task, max_proteins: int = 300, seed: int = 0) -> Quick:
    """One round of a draw of proteins, for `quick_probe`. Raises `UserError` for what cannot be split."""
    options = Options("linear", max_rows=20_000, max_proteins=max_proteins, leaks="drop", threads=1, seed=seed)
    prepared = prepare_task(task, options)
    prepared = dataclasses.replace(prepared, rounds=prepared.rounds[:1])
    return Quick(prepared, _quick_value(prepared, letters(prepared.task)))


def quick_probe(encoder: Encoder, quick: Quick) -> dict[str, float]:
    """One number and its baseline, in seconds: a linear probe, for use during a run.

    Keys are `probe_TASK_MEASURE` and the same with `_baseline`; of several test sets the first counts.
    """
    task = quick.prepared.task
    name = f"probe_{task.name}_{headline(task.kind)}"
    return {name: _quick_value(quick.prepared, embedded(encoder, task)), f"{name}_baseline": quick.baseline}


def _quick_value(prepared: Prepared, X_RD: np.ndarray) -> float:
    rows = next(iter(prepared.tests.values()))
    scores_RC = predictions(prepared, X_RD, ["linear"], "probe")["linear"].scores_RC[rows]
    return measure(prepared.task.kind, prepared.task.labels_R[rows], scores_RC)(np.arange(len(rows)))
