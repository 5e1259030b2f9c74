"""`hf-plm probe` from end to end: a model and a task in; a table, findings, predictions and a kept predictor out."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.files import check_writable, keep_inputs, write_whole
from hf_plm.inference.embedder import Embedder
from hf_plm.judging.findings import home, write_findings
from hf_plm.judging.intervals import Interval
from hf_plm.judging.probes.features import embedded
from hf_plm.judging.probes.measures import LABELS, decided, headline
from hf_plm.judging.probes.predictors import quiet
from hf_plm.judging.probes.preparation import Options, Prepared, check_labels, kept_as, prepare_task
from hf_plm.judging.probes.probe import (
    PRIOR,
    Predicted,
    advantage,
    baselines,
    final,
    measured,
    predictions,
    wanted,
)
from hf_plm.judging.probes.task import Task
from hf_plm.judging.probes.telling import noted, say, tell, text_table, title, verdict
from hf_plm.judging.requirements import require_judge

OUTPUTS = ("findings.json", "predictions.csv", "left_out.tsv", "predictor.json", "predictor.npz")
"""What `--out` holds, beside the trees of a predictor and the pictures of a comparison."""


@dataclass(frozen=True)
class Model:
    """Which model, and how it is run."""

    name: str
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def open(self) -> Embedder:
        return Embedder(self.name, precision=self.precision, device=self.device, threads=self.threads)


def letter_groups(sites: str | None) -> list[str]:
    """S and T together and Y apart, as PhosBoost has them; others as they are given."""
    if sites is None:
        return []
    apart = "Y" in sites and bool(set(sites) & set("ST"))
    return ["".join(letter for letter in sites if letter != "Y"), "Y"] if apart else [sites]


def site_groups(task: Task, sites: str | None) -> list[Task]:
    """The tasks that the `letter_groups` make.

    Says which group has no row. Raises `UserError` where none has.
    """
    if sites is None:
        return [task]
    found = []
    for letters in letter_groups(sites):
        some = task.residues(letters)
        if not len(some):
            say(f"{task.name} has no labelled residue {' or '.join(letters)}: that group is left out.")
        elif task.classes and len(np.unique(some.labels_R)) < 2:
            say(f"{task.name}: all {len(some):,} residues {letters} have one label: that group is left out.")
        else:
            found.append(some.proteins(np.unique(some.proteins_R)))
    if not found:
        raise UserError(f"{task.path} has no residues {sites} to tell apart.")
    return found


def check_out(out: Path, read: Iterable[Path | None]) -> None:
    """Before long work: raises `UserError` where `out` could not be written to, or what is read would be replaced."""
    keep_inputs(read, *(out / name for name in OUTPUTS), *out.glob("trees_*.txt"), *out.glob("*.png"))
    check_writable(out / "findings.json")


def check_predicted(path: Path, data: Path, folder: Path) -> None:
    """The same for predictions by a predictor that is kept in `folder`, of the proteins `data`."""
    keep_inputs([data, *(folder / name for name in OUTPUTS), *folder.glob("trees_*.txt"), *folder.glob("*.png")], path)


@quiet()
def run(model: Model, task: Task, options: Options, out: Path | None) -> dict[str, Any]:
    """Probes a model, keeps what `out` and the run's folder are for, prints the table. Returns the findings."""
    require_judge()
    prepared = prepare_task(task, options)
    names = wanted(options, prepared)
    check_labels(prepared)
    tell(prepared)
    told = len(prepared.notes)
    encoder = model.open()
    X_RD = embedded(encoder.encoder, prepared.task, options.features)
    found = predictions(prepared, X_RD, names, "predictors")
    best = max(found.values(), key=lambda one: one.validation)
    beside = baselines(prepared, best.name, options.features)
    lines = noted(prepared, told)
    scores = {**{name: one.scores_RC for name, one in found.items()}, **beside}
    tables = measured(prepared, scores)
    plain = {
        **described(prepared, options),
        "predictor": best.name,
        "predictors": {name: {"settings": one.settings, "validation": one.validation} for name, one in found.items()},
        "baselines": list(beside),
        "tests": {test: sizes(prepared, test) for test in tables},
        "results": [
            plain_result(test, name, measures, name in beside)
            for test, table in tables.items()
            for name, measures in table.items()
        ],
    }
    letters_name = next(name for name in beside if name != PRIOR)
    for test, table in tables.items():
        gained = advantage(prepared, test, best.scores_RC, beside[letters_name])
        plain["tests"][test]["above_letters"] = gained.plain()
        lines += ["", title(prepared, test), text_table(task.kind, table, {best.name: " *"})]
        lines.append(verdict(best.name, letters_name, LABELS[headline(task.kind)], gained))
    if len(found) > 1:
        lines.append("* is preferred by validation inside the train side.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        kept, learnt = final(prepared, X_RD, best, options.max_rows)
        kept.save(out)
        plain["kept"] = {"predictor": best.name, "learnt_from": learnt, "width": int(X_RD.shape[1])}
        write_predictions(out / "predictions.csv", prepared, found, beside, best.name)
        write_leaks(out / "left_out.tsv", prepared)
    at_home = home(model.name, "probe", kept_as(task, prepared, options))
    say(*lines, *keep(out, [at_home], "probe", [dict(encoder.encoder.facts)], plain))
    return plain


def keep(
    out: Path | None, homes: Iterable[Path | None], kind: str, facts: list[dict[str, str]], plain: dict[str, Any]
) -> list[str]:
    """Writes findings to a folder and to the runs that they are of; says where."""
    lines = []
    if out is not None:
        write_findings(out / "findings.json", kind, facts, plain)
        lines.append(f"Kept in {out.resolve()}.")
    for path in dict.fromkeys(one for one in homes if one is not None):
        write_findings(path, kind, facts, plain)
        lines.append(f"Kept in {path}.")
    return lines


def described(prepared: Prepared, options: Options) -> dict[str, Any]:
    """What every finding on a task begins with."""
    task = prepared.task
    letters = sorted({task.sequences[p][i] for p, i in zip(task.proteins_R, task.positions_R, strict=True)})
    return {
        "task": {
            "name": task.name,
            "file": Path(task.path).name,
            "level": task.level,
            "kind": task.kind,
            "classes": list(task.classes),
            "proteins": len(task.ids),
            "rows": len(task),
            "letters": "".join(letters) if task.level == "residue" else "",
        },
        "features": options.features if task.level == "residue" else "mean",
        "split": prepared.plan.how,
        "rounds": len(prepared.rounds),
        "groups": len(np.unique(prepared.groups_R)),
        "leaks_dropped": len({row for row, _, _, _ in prepared.plan.leaks}),
        "notes": prepared.notes,
        "headline": headline(task.kind),
        "seed": options.seed,
    }


def sizes(prepared: Prepared, test: str) -> dict[str, Any]:
    """How much a test set holds."""
    rows = prepared.tests[test]
    return {"rows": len(rows), "proteins": len(np.unique(prepared.task.proteins_R[rows]))}


def plain_result(test: str, name: str, measures: dict[str, Interval], is_baseline: bool = False) -> dict[str, Any]:
    """A row of the findings: one predictor on one test set."""
    plain = {one: interval.plain() for one, interval in measures.items()}
    return {"test": test, "predictor": name, "baseline": is_baseline, "measures": plain}


def write_predictions(
    path: Path, prepared: Prepared, found: dict[str, Predicted], beside: dict[str, np.ndarray], best: str
) -> None:
    """A line for each test row: truth, and what each predictor says; of more classes all probabilities of the best."""
    task = prepared.task
    scores = {**{name: one.scores_RC for name, one in found.items()}, **beside}
    head = ["id", *(["position", "residue"] if task.level == "residue" else []), "test", "truth", *scores]
    if task.kind == "multiclass":
        head += [f"p_{name}" for name in task.classes]
    texts = {name: said(task.kind, task.classes, scores_RC) for name, scores_RC in scores.items()}

    def lines() -> Iterable[list[str]]:
        for test, rows in prepared.tests.items():
            for row in rows.tolist():
                protein, position = task.proteins_R[row], task.positions_R[row]
                place = [str(position + 1), task.sequences[protein][position]] if task.level == "residue" else []
                cells = [task.ids[protein], *place, test, task.numbers_written(row)]
                cells += [texts[name][row] for name in scores]
                if task.kind == "multiclass":
                    cells += [f"{value:.4g}" for value in scores[best][row]]
                yield cells

    write_csv(path, head, lines())


def said(kind: str, classes: Sequence[str], scores_RC: np.ndarray) -> list[str]:
    """A class by its name; of two classes the probability of the second; a value."""
    if kind == "multiclass":
        return [classes[index] for index in decided(kind, np.nan_to_num(scores_RC))]
    return [f"{value:.6g}" for value in scores_RC[:, -1]]


def write_leaks(path: Path, prepared: Prepared) -> None:
    """Which proteins are left out of the train side, and why; no file where none is."""
    if not prepared.plan.leaks:
        path.unlink(missing_ok=True)
        return
    task = prepared.task
    write_csv(
        path,
        ["line", "id", "same", "test_line", "test_id", "round"],
        (
            [str(task.lines[row]), task.ids[row], what, str(task.lines[other]), task.ids[other], str(number)]
            for row, other, what, number in prepared.plan.leaks
        ),
        "\t",
    )


def write_csv(path: Path, head: list[str], lines: Iterable[list[str]], separator: str = ",") -> None:
    """Whole or not; raises `UserError` where it cannot be written."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    write_whole(path, buffer.getvalue().encode())
