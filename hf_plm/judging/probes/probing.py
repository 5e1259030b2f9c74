"""`hf-plm probe` from end to end: a model and a task in; a table, findings, predictions and a kept predictor out."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.files import write_whole
from hf_plm.inference.embedder import Embedder
from hf_plm.judging.findings import home, read_findings, write_findings
from hf_plm.judging.intervals import Interval
from hf_plm.judging.probes.features import embedded
from hf_plm.judging.probes.measures import LABELS, NAMES, decided, headline
from hf_plm.judging.probes.predictors import load_fitted
from hf_plm.judging.probes.probe import (
    PRIOR,
    Options,
    Predicted,
    Prepared,
    advantage,
    baselines,
    final,
    hashes_of,
    measured,
    predictions,
    prepare_task,
    wanted,
)
from hf_plm.judging.probes.task import Task
from hf_plm.judging.requirements import require_judge
from hf_plm.proteins.fasta import IllegalResidueError, clean_sequence, read_fasta


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
            print(f"{task.name} has no labelled residue {' or '.join(letters)}: that group is left out.", flush=True)
        elif task.classes and len(np.unique(some.labels_R)) < 2:
            print(
                f"{task.name}: all {len(some):,} residues {letters} have one label: that group is left out.", flush=True
            )
        else:
            found.append(some.proteins(np.unique(some.proteins_R)))
    if not found:
        raise UserError(f"{task.path} has no residues {sites} to tell apart.")
    return found


def run(model: Model, task: Task, options: Options, out: Path | None) -> dict[str, Any]:
    """Probes a model, prints the table, keeps what `out` and the run's folder are for. Returns the findings."""
    require_judge()
    prepared = prepare_task(task, options)
    names = wanted(options, prepared)
    tell(prepared)
    told = len(prepared.notes)
    encoder = model.open()
    X_RD = embedded(encoder.encoder, prepared.task, options.features)
    found = predictions(prepared, X_RD, names, "predictors")
    best = max(found.values(), key=lambda one: one.validation)
    beside = baselines(prepared, best.name, options.features)
    tell_notes(prepared, told)
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
        print(f"\n{_title(prepared, test)}\n{text_table(prepared.task.kind, table, {best.name: ' *'})}")
        gained = advantage(prepared, test, best.scores_RC, beside[letters_name])
        plain["tests"][test]["above_letters"] = gained.plain()
        print(verdict(best.name, letters_name, LABELS[headline(task.kind)], gained))
    if len(found) > 1:
        print("* is preferred by validation inside the train side.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        kept, learnt = final(prepared, X_RD, best, options.max_rows)
        kept.save(out)
        plain["kept"] = {"predictor": best.name, "learnt_from": learnt, "width": int(X_RD.shape[1])}
        write_predictions(out / "predictions.csv", prepared, found, beside, best.name)
        write_leaks(out / "left_out.tsv", prepared)
    facts = [dict(encoder.encoder.facts)]
    for path in (out / "findings.json" if out else None, home(model.name, "probe", prepared.task.name)):
        if path is not None:
            write_findings(path, "probe", facts, plain)
            print(f"Kept in {path.parent if path.name == 'findings.json' else path}.")
    return plain


def tell(prepared: Prepared) -> None:
    """The task and its split, before the work begins."""
    task = prepared.task
    residues = f", {len(task):,} residues" if task.level == "residue" else ""
    print(f"{task.name}: {len(task.ids):,} proteins{residues} with labels, {task.kind}{_shares(task)}.")
    first = prepared.plan.rounds[0]
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in first.tests.items())
    print(f"Split: {prepared.plan.how}; {'the first: ' if len(prepared.rounds) > 1 else ''}", end="")
    print(f"{len(first.train):,} proteins to learn from, {counts}.", flush=True)
    tell_notes(prepared)


def tell_notes(prepared: Prepared, told: int = 0) -> None:
    """Those that were not yet told."""
    for note in prepared.notes[told:]:
        print(f"Note: {note}", flush=True)


def _shares(task: Task) -> str:
    if not task.classes:
        return ""
    counts = np.bincount(task.labels_R, minlength=len(task.classes)) / len(task)
    order = np.argsort(-counts)[:4]
    more = f", {len(counts) - 4} more" if len(counts) > 4 else ""
    return " (" + ", ".join(f"{task.classes[index]} {counts[index]:.1%}" for index in order) + more + ")"


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


def _title(prepared: Prepared, test: str) -> str:
    rows = prepared.tests[test]
    proteins = len(np.unique(prepared.task.proteins_R[rows]))
    residues = f", {len(rows):,} residues" if prepared.task.level == "residue" else ""
    return f"{test}: {proteins:,} proteins{residues}"


def text_table(kind: str, table: dict[str, dict[str, Interval]], marks: dict[str, str]) -> str:
    """One line for each predictor; the first measure with its interval of 95%, the others as they are."""
    of = NAMES[kind]
    wide = max(len(name) + len(marks.get(name, "")) for name in table) + 2
    heads = [f"{LABELS[of[0]]} (95%)".rjust(24), *(LABELS[one].rjust(max(len(LABELS[one]), 7)) for one in of[1:])]
    lines = [" " * wide + "  ".join(heads)]
    for name, measures in table.items():
        cells = [str(measures[of[0]]).rjust(24)]
        cells += [f"{measures[one].value:.3f}".rjust(max(len(LABELS[one]), 7)) for one in of[1:]]
        lines.append((name + marks.get(name, "")).ljust(wide) + "  ".join(cells))
    return "\n".join(lines)


def verdict(name: str, baseline: str, of: str, gained: Interval) -> str:
    """In words, whether the model is above the letters."""
    how = f"{of} {gained.value:+.3f} (95%: {gained.low:+.3f} to {gained.high:+.3f})"
    if gained.low > 0:
        return f"The embeddings ({name}) are above the {baseline} baseline: {how}."
    if gained.high < 0:
        return f"The embeddings ({name}) are BELOW the {baseline} baseline: {how}."
    return f"The embeddings ({name}) are not shown to be above the {baseline} baseline: {how}."


def write_predictions(
    path: Path, prepared: Prepared, found: dict[str, Predicted], beside: dict[str, np.ndarray], best: str
) -> None:
    """A line for each test row: truth, and what each predictor says; of more classes all probabilities of the best."""
    task = prepared.task
    scores = {**{name: one.scores_RC for name, one in found.items()}, **beside}
    head = ["id", *(["position", "residue"] if task.level == "residue" else []), "test", "truth", *scores]
    if task.kind == "multiclass":
        head += [f"p_{name}" for name in task.classes]
    said = {name: _said(task.kind, task.classes, scores_RC) for name, scores_RC in scores.items()}

    def lines() -> Iterable[list[str]]:
        for test, rows in prepared.tests.items():
            for row in rows.tolist():
                protein, position = task.proteins_R[row], task.positions_R[row]
                place = [str(position + 1), task.sequences[protein][position]] if task.level == "residue" else []
                cells = [task.ids[protein], *place, test, task.numbers_written(row)]
                cells += [said[name][row] for name in scores]
                if task.kind == "multiclass":
                    cells += [f"{value:.4g}" for value in scores[best][row]]
                yield cells

    write_csv(path, head, lines())


def _said(kind: str, classes: Sequence[str], scores_RC: np.ndarray) -> list[str]:
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


def apply(model: Model, folder: Path, data: Path, out: Path, illegal: str = "reject") -> int:
    """Predicts for the proteins of a FASTA file with what `run` kept in `folder`; returns the number of rows.

    Says of how many proteins the predictor has learnt.
    """
    require_judge()
    below = sorted(path.parent.name for path in folder.glob("*/predictor.json"))
    if below and not (folder / "predictor.json").exists():
        raise UserError(f"{folder} holds predictors in folders of its own; give one of {', '.join(below)} in it.")
    plain = read_findings(folder / "findings.json")
    fitted = load_fitted(folder)
    try:
        then, features, of = plain["models"][0], plain["features"], plain["task"]
        then = {key: str(then[key]) for key in ("model", "revision")}
        of = {key: of[key] for key in ("name", "level", "kind", "classes", "letters")}
    except (LookupError, TypeError):
        raise UserError(f"{folder} holds no predictor of hf-plm probe --out: its findings lack something.") from None
    encoder = model.open()
    facts = encoder.encoder.facts
    if facts["revision"] != then["revision"]:
        raise UserError(
            f"The predictor in {folder} has learnt from embeddings of {then['model']} (revision "
            f"{then['revision'][:16]}); {model.name} is another model ({facts['revision'][:16]})."
        )
    task = _new_task(data, of, illegal)
    seen_P = np.isin(hashes_of(task.sequences), fitted.arrays.get("seen", np.empty(0, dtype=np.uint64)))
    if seen_P.any():
        print(
            f"Note: the predictor has learnt from {seen_P.sum():,} of these {len(seen_P):,} proteins (column seen), so "
            "that what it says of them is no test of it."
        )
    scores_RC = fitted.predict(embedded(encoder.encoder, task, "site" if features == "site" else "residue"))
    said = _said(task.kind, task.classes, scores_RC)
    head = ["id", *(["position", "residue"] if task.level == "residue" else []), "seen"]
    if task.kind != "binary":
        head.append("prediction")
    head += [f"p_{name}" for name in (task.classes[1:] if task.kind == "binary" else task.classes)]

    def lines() -> Iterable[list[str]]:
        for row, (protein, place) in enumerate(zip(task.proteins_R, task.positions_R, strict=True)):
            where = [str(place + 1), task.sequences[protein][place]] if task.level == "residue" else []
            probabilities = [f"{value:.4g}" for value in scores_RC[row]] if task.kind == "multiclass" else []
            yield [task.ids[protein], *where, "yes" if seen_P[protein] else "no", said[row], *probabilities]

    write_csv(out, head, lines())
    return len(task)


def _new_task(data: Path, of: dict[str, Any], illegal: str) -> Task:
    """The rows of a FASTA file that a predictor is for: its proteins, or their residues of the letters it knows."""
    ids: list[str] = []
    sequences: list[str] = []
    proteins: list[int] = []
    positions: list[int] = []
    for record in read_fasta(data):
        try:
            sequence = clean_sequence(record.sequence, illegal)
        except IllegalResidueError as error:
            raise UserError(f"{data}, {record.id}: {error} --illegal x writes X for it.") from None
        if not sequence:
            raise UserError(f"{data}, {record.id}: the sequence is empty.")
        places = [0]
        if of["level"] == "residue":
            places = [place for place, letter in enumerate(sequence) if letter in of["letters"]]
        proteins += [len(ids)] * len(places)
        positions += places
        ids.append(record.id)
        sequences.append(sequence)
    return Task(
        of["name"],
        str(data),
        of["level"],
        of["kind"],
        tuple(of["classes"]),
        tuple(ids),
        tuple(sequences),
        tuple(range(len(ids))),
        None,
        None,
        np.array(proteins, dtype=np.int64),
        np.array(positions, dtype=np.int64),
        np.zeros(len(proteins)),
    )
