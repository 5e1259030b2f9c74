"""Two models on one task: the same rows, folds, predictor and draws for both, so that only the embeddings differ.

Closest to a reader of PhosBoost (Poretsky et al. 2023, Plant Direct 7:e554) is `--sites STY --predictor phosboost`:
S and T together and Y apart, a residue's vector beside its protein's mean, their stack of boosters, recall and
precision at 0.5. One thing differs on purpose. Its repository draws 60/20/20% of single sites (split.py), so that sites
of one protein, with the same mean, are learnt from and tested; here whole proteins, or clusters, are on one side, in
the same shares, and numbers come out lower.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.judging.findings import home
from hf_plm.judging.intervals import Interval, permutation_p_value
from hf_plm.judging.probes.features import embedded
from hf_plm.judging.probes.measures import LABELS, decided, headline, measure
from hf_plm.judging.probes.predictors import quiet
from hf_plm.judging.probes.preparation import Options, Prepared, check_labels, kept_as, prepare_task
from hf_plm.judging.probes.probe import PRIOR, advantage, baselines, measured, predictions, wanted
from hf_plm.judging.probes.probing import Model, described, keep, plain_result, sizes, write_csv, write_leaks
from hf_plm.judging.probes.task import Task
from hf_plm.judging.probes.telling import counted, noted, say, spread, tell, text_table, title
from hf_plm.judging.requirements import require_judge

MOST_POINTS = 2000
"""Of a curve in a picture."""


@quiet()
def compare(first: Model, second: Model, task: Task, options: Options, out: Path | None) -> dict[str, Any]:
    """Probes both models, keeps findings, predictions and a picture, prints the table and the tests. Returns the
    findings."""
    require_judge()
    prepared = prepare_task(task, options)
    names = wanted(options, prepared)
    check_labels(prepared)
    tell(prepared)
    told = len(prepared.notes)
    labels = short_names(first.name, second.name)
    found, facts = {}, []
    for model, label in zip((first, second), labels, strict=True):
        encoder = model.open()
        facts.append(dict(encoder.encoder.facts))
        X_RD = embedded(encoder.encoder, prepared.task, options.features, label)
        found[label] = predictions(prepared, X_RD, names, label)
        del encoder, X_RD
    # By both models' validation, so that neither picks the predictor that suits it.
    best = max(names, key=lambda name: sum(found[label][name].validation for label in labels))
    beside = baselines(prepared, best, options.features)
    lines = noted(prepared, told)
    letters = next(name for name in beside if name != PRIOR)
    scores = {f"{label} {name}": found[label][name].scores_RC for name in names for label in labels}
    tables = measured(prepared, {**scores, **beside})
    plain: dict[str, Any] = {
        **described(prepared, options),
        "labels": list(labels),
        "predictor": best,
        "settings": {label: {name: found[label][name].settings for name in names} for label in labels},
        "tests": {},
        "results": [],
    }
    for test, table in tables.items():
        lines += ["", title(prepared, test), text_table(task.kind, table, {})]
        differences = {}
        for name in names:
            pair = [found[label][name].scores_RC for label in labels]
            differences[name] = paired(prepared, test, pair[0], pair[1])
            lines.append(sentence(labels, name, task.kind, differences[name]))
        plain["tests"][test] = {**sizes(prepared, test), "differences": differences}
        for name in names:
            for label in labels:
                row = plain_result(test, name, table[f"{label} {name}"])
                plain["results"].append({**row, "model": label})
        plain["results"] += [plain_result(test, name, table[name], True) for name in beside]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        _write_rows(out / "predictions.csv", prepared, {**scores, **beside})
        write_leaks(out / "left_out.tsv", prepared)
    name = f"{kept_as(task, prepared, options)}-{'-'.join(labels)}"
    homes = [home(model.name, "comparison", name) for model in (first, second)]
    kept = keep(out, homes, "comparison", facts, plain)
    drawn = {**{label: found[label][best].scores_RC for label in labels}, letters: beside[letters]}
    for test in tables if out is not None else ():
        assert out is not None
        lines += draw(prepared, test, drawn, best, out / f"{_file(test)}.png")
    say(*lines, *kept)
    return plain


def short_names(first: str, second: str) -> tuple[str, str]:
    """The last parts of two names, as many as tell them apart; A and B of one model twice."""
    parts = [name.rstrip("/").split("/") for name in (first, second)]
    for depth in range(1, max(map(len, parts)) + 1):
        one, other = ("/".join(part[-depth:]) for part in parts)
        if one != other:
            return one, other
    return f"{parts[0][-1]} (A)", f"{parts[1][-1]} (B)"


def paired(prepared: Prepared, test: str, first_RC: np.ndarray, second_RC: np.ndarray) -> dict[str, float]:
    """The difference of the first measure, its interval over draws of groups, and the p-value of exchanging the two
    models' predictions protein by protein (group by group). Ranks stand for scores where only order counts, since two
    models need not mean the same by 0.3."""
    rows, kind = prepared.tests[test], prepared.task.kind
    labels_R, groups_R = prepared.task.labels_R[rows], prepared.groups_R[rows]
    one, other = first_RC[rows], second_RC[rows]
    if kind != "multiclass":
        ranks = [prepared.ranked(scores_RC)[rows, None] for scores_RC in (first_RC, second_RC)]
        one, other = (np.repeat(ranks_R, first_RC.shape[1], axis=1) for ranks_R in ranks)
    everywhere = np.arange(len(rows))

    def difference(exchanged_R: np.ndarray) -> float:
        mixed = np.where(exchanged_R[:, None], other, one), np.where(exchanged_R[:, None], one, other)
        values = [measure(kind, labels_R, scores)(everywhere) for scores in mixed]
        return values[0] - values[1]

    return {
        **advantage(prepared, test, first_RC, second_RC).plain(),
        "permutation_p_value": permutation_p_value(groups_R, difference, prepared.resamples),
    }


def sentence(labels: tuple[str, str], predictor: str, kind: str, found: dict[str, float]) -> str:
    """The difference, in words."""
    of, p_value = LABELS[headline(kind)], found["permutation_p_value"]
    how = f"such rows have no {of}"
    if not np.isnan(found["value"]):
        more = "" if np.isnan(p_value) else f"; permutation p = {p_value:.3g}"
        how = f"{of} {spread(Interval(found['value'], found['low'], found['high']), '+', more=more)}"
    if not (found["low"] > 0 or found["high"] < 0):
        return f"{predictor}: no difference shown between {labels[0]} and {labels[1]}: {how}."
    better, worse = labels if found["value"] > 0 else labels[::-1]
    return f"{predictor}: {better} is above {worse}; {labels[0]} - {labels[1]}: {how}."


def draw(prepared: Prepared, test: str, scores: dict[str, np.ndarray], predictor: str, path: Path) -> list[str]:
    """ROC and precision-recall curves of two classes; true against predicted values; recall of each of more classes.

    Of a test set with one label or value there is nothing to draw, and that is what is returned."""
    from hf_plm.judging.plots import figure, save

    rows, kind = prepared.tests[test], prepared.task.kind
    truth = prepared.task.labels_R[rows]
    if kind != "multiclass" and np.ptp(truth) == 0:
        return [f"All rows of {test} have one label: its picture is left out."]
    here = {name: scores_RC[rows] for name, scores_RC in scores.items()}
    if kind == "binary":
        made, axes = figure(10, 4.6, 1, 2)
        _curves(axes, truth, here)
    elif kind == "regression":
        made, axes = figure(4 * len(here), 4.2, 1, len(here))
        _scatter(axes, truth, here)
    else:
        made, axes = figure(8, 1.6 + 0.34 * min(len(prepared.task.classes), 25), 1, 1)
        _by_class(axes[0], truth, here, prepared.task.classes)
    of = counted(len(np.unique(prepared.task.proteins_R[rows])), "protein")
    if prepared.task.level == "residue":
        of = f"{counted(len(rows), 'residue')} of {of}"
    made.suptitle(f"{prepared.task.name}, {test}: {of}, predictor {predictor}", fontsize=11)
    save(made, path)
    return []


def _curves(axes: list[Any], truth: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    from hf_plm.judging.plots import COLOURS, STYLES

    top = 0.0
    for index, (name, scores_RC) in enumerate(scores.items()):
        said = scores_RC[:, 1]
        line = {"color": COLOURS[index], "linestyle": STYLES[index % len(STYLES)], "linewidth": 1.8}
        false, true, _ = roc_curve(truth, said)
        axes[0].plot(*_thinned(false, true), label=f"{name}: {roc_auc_score(truth, said):.3f}", **line)
        precision, recall, _ = precision_recall_curve(truth, said)
        axes[1].plot(*_thinned(recall, precision), label=f"{name}: {average_precision_score(truth, said):.3f}", **line)
        top = max(top, float(precision[recall >= 0.05].max()))
    axes[0].plot([0, 1], [0, 1], color="0.6", linewidth=1, label="chance: 0.500", zorder=0)
    share = truth.mean()
    axes[1].axhline(share, color="0.6", linewidth=1, label=f"share of positives: {share:.3f}", zorder=0)
    axes[0].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC (area)", xlim=(0, 1), ylim=(0, 1))
    # The first few of a ranking make spikes up to 1 that say little; the rest would be squeezed flat by them.
    high = min(1.0, 1.25 * top)
    axes[1].set(xlabel="recall", ylabel="precision", title="Precision-recall (average precision)")
    axes[1].set(xlim=(0, 1), ylim=(0, high))
    axes[0].legend(loc="lower right", fontsize=8)
    axes[1].legend(loc="upper right", fontsize=8)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
    return x[kept], y[kept]


def _scatter(axes: list[Any], truth: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    from hf_plm.judging.plots import COLOURS

    some = np.random.default_rng(0).permutation(len(truth))[:MOST_POINTS]
    low, high = float(truth.min()), float(truth.max())
    for index, (axis, (name, scores_RC)) in enumerate(zip(axes, scores.items(), strict=True)):
        value = measure("regression", truth, scores_RC)(np.arange(len(truth)))
        axis.scatter(truth[some], scores_RC[some, 0], s=6, alpha=0.35, color=COLOURS[index], linewidths=0)
        axis.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel="true", ylabel="predicted" if index == 0 else "", title=f"{name}\nSpearman {value:.3f}")
        axis.set(xlim=(low, high), ylim=(low, high))


def _by_class(axis: Any, truth: np.ndarray, scores: dict[str, np.ndarray], classes: tuple[str, ...]) -> None:
    from sklearn.metrics import recall_score

    from hf_plm.judging.plots import COLOURS

    present, counts = np.unique(truth, return_counts=True)
    shown = present[np.argsort(-counts, kind="stable")][:25]
    places = np.arange(len(shown))
    for index, (name, scores_RC) in enumerate(scores.items()):
        recalls = recall_score(truth, decided("multiclass", scores_RC), labels=shown, average=None, zero_division=0)
        axis.scatter(
            recalls, places + (index - 1) * 0.18, color=COLOURS[index], marker="osD^v"[index % 5], s=30, label=name
        )
    axis.set_yticks(places, [f"{classes[index]} ({np.sum(truth == index):,})" for index in shown])
    axis.invert_yaxis()
    axis.set(xlim=(-0.02, 1.02), xlabel="recall", title="Recall by class" + (", the 25 largest" * (len(present) > 25)))
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _file(test: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in test)


def _write_rows(path: Path, prepared: Prepared, scores: dict[str, np.ndarray]) -> None:
    task = prepared.task
    place = ["position", "residue"] if task.level == "residue" else []

    def said(scores_RC: np.ndarray, row: int) -> str:
        if task.kind == "multiclass":
            return task.classes[int(scores_RC[row].argmax())]
        return f"{scores_RC[row, -1]:.6g}"

    def lines() -> Any:
        for test, rows in prepared.tests.items():
            for row in rows.tolist():
                protein, position = task.proteins_R[row], task.positions_R[row]
                where = [str(position + 1), task.sequences[protein][position]] if place else []
                values = [said(scores_RC, row) for scores_RC in scores.values()]
                yield [task.ids[protein], *where, test, task.numbers_written(row), *values]

    write_csv(path, ["id", *place, "test", "truth", *scores], lines())
