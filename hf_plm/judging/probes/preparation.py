"""A task made ready for any model: what is drawn of it, its rounds in rows, and what these must hold.

Dimensions: R rows.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.judging.probes.features import FEATURES
from hf_plm.judging.probes.predictors import PREDICTORS, STACK, How
from hf_plm.judging.probes.splits import KMER_SHARE, NUM_INNER, Plan, near_pairs, plan
from hf_plm.judging.probes.task import Task, side


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

    def asked(self) -> list[str]:
        """What differs from the default and changes what is found, proteins aside, for the name of the findings."""
        usual = Options()
        words = [one for one in (self.predictor, self.features) if one not in (usual.predictor, usual.features)]
        given = {"clusters": self.clusters and self.clusters.stem}
        for name in ("folds", "leaks", "max_rows", "resamples", "seed"):
            given[name] = None if (value := getattr(self, name)) == getattr(usual, name) else str(value)
        return words + [f"{name}-{value}" for name, value in given.items() if value]


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


def check_labels(prepared: Prepared) -> None:
    """Raises `UserError` where a part to learn from has one label only, and says which it lacks."""
    task = prepared.task
    for one in prepared.rounds if task.classes else ():
        for part in (np.arange(len(one.fit)), *(train for train, _ in one.inner)):
            present = np.unique(task.labels_R[one.fit[part]])
            if len(present) < 2:
                raise UserError(_lacking(prepared, present))


def _lacking(prepared: Prepared, present: np.ndarray) -> str:
    task, rounds = prepared.task, len(prepared.rounds)
    rows = {label: np.flatnonzero(task.labels_R == label) for label in range(len(task.classes)) if label not in present}
    groups = {label: len(np.unique(prepared.groups_R[rows_r])) for label, rows_r in rows.items()}
    rare = min(groups, key=lambda label: groups[label])
    count = len(np.unique(task.proteins_R[rows[rare]]))
    more = "the given split should have more of them on its train side" if task.splits else "there should be more"
    if task.splits is None and rounds > 1:
        # So that each fold, and of the rest each part to choose settings by, is given one.
        enough = max(rounds, math.ceil(NUM_INNER * rounds / (rounds - 1)))
        more = f"for {rounds} folds {enough} unrelated ones are enough"
    return (
        f"{task.path}: the label {task.classes[rare]!r} stands in {count:,} protein{'s' * (count != 1)} "
        f"({groups[rare]:,} unrelated), and a part to learn from has none, where all would be "
        f"{task.classes[int(present[0])]!r}; to fit, to choose settings and to test each need one, and {more}."
    )


def kept_as(whole: Task, prepared: Prepared, options: Options) -> str:
    """The name of findings: the task's, and what was asked for, so that a quick look does not replace the whole."""
    count = len(prepared.task.ids)
    drawn = [f"{count}-proteins"] if count < len(whole.ids) else []
    return "-".join([whole.name, *drawn, *options.asked()])


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
