"""A probe: how much of a task a small predictor reads off a model's frozen embeddings, beside what the letters give.

Each round fits on its train side and is tested once; settings are chosen inside the train side, in groups too. Beside
the model stand two baselines over the same rows: the shares of the labels, and the same predictor on the letters
(composition of a protein, a window of 15 residues). A probe that is not above the second has read nothing.

Dimensions: R rows, D features, C classes.
"""

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.data.heldout import hash_of
from hf_plm.inference.vectors import Encoder
from hf_plm.judging.intervals import Difference, Interval, bootstrap_intervals, paired_difference
from hf_plm.judging.probes.features import embedded, letters
from hf_plm.judging.probes.measures import NAMES, headline, measure, measures
from hf_plm.judging.probes.predictors import MOST_STEPS, PREDICTORS, STACK, Fitted, Rows, choose, fit, quiet
from hf_plm.judging.probes.preparation import Options, Prepared, check_labels, prepare_task
from hf_plm.judging.probes.task import Task
from hf_plm.progress import shown

MOST_TREE_CLASSES = 30
"""Boosting fits a tree a class and round; beyond so many classes it is only done when it is asked for by name."""
PRIOR = "label shares"


@dataclass(frozen=True)
class Predicted:
    """What one predictor says of every test row, each said without having seen its group."""

    name: str
    scores_RC: np.ndarray  # NaN where no test
    settings: list[dict[str, Any]]  # of each round
    validation: float  # by the first measure, mean over rounds; NaN where there is none
    fitted: Fitted  # of the last round


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


@quiet()
def prepare_quick(task: Task, max_proteins: int = 300, seed: int = 0) -> Quick:
    """One round of a draw of proteins, for `quick_probe`. Raises `UserError` for what cannot be split."""
    options = Options("linear", max_rows=20_000, max_proteins=max_proteins, leaks="drop", threads=1, seed=seed)
    prepared = prepare_task(task, options)
    prepared = dataclasses.replace(prepared, rounds=prepared.rounds[:1])
    check_labels(prepared)
    return Quick(prepared, _quick_value(prepared, letters(prepared.task)))


@quiet()
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
