"""A kept predictor on new proteins: the residues or proteins of a FASTA file, in the words of its classes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.judging.findings import read_findings
from hf_plm.judging.probes.features import embedded
from hf_plm.judging.probes.predictors import load_fitted
from hf_plm.judging.probes.probe import hashes_of
from hf_plm.judging.probes.probing import Model, said, write_csv
from hf_plm.judging.probes.task import Task
from hf_plm.judging.probes.telling import say
from hf_plm.judging.requirements import require_judge
from hf_plm.proteins.fasta import IllegalResidueError, clean_sequence, read_fasta


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
    scores_RC = fitted.predict(embedded(encoder.encoder, task, "site" if features == "site" else "residue"))
    texts = said(task.kind, task.classes, scores_RC)
    head = ["id", *(["position", "residue"] if task.level == "residue" else []), "seen"]
    if task.kind != "binary":
        head.append("prediction")
    head += [f"p_{name}" for name in (task.classes[1:] if task.kind == "binary" else task.classes)]

    def lines() -> Iterable[list[str]]:
        for row, (protein, place) in enumerate(zip(task.proteins_R, task.positions_R, strict=True)):
            where = [str(place + 1), task.sequences[protein][place]] if task.level == "residue" else []
            probabilities = [f"{value:.4g}" for value in scores_RC[row]] if task.kind == "multiclass" else []
            yield [task.ids[protein], *where, "yes" if seen_P[protein] else "no", texts[row], *probabilities]

    write_csv(out, head, lines())
    if seen_P.any():
        say(
            f"Note: the predictor has learnt from {seen_P.sum():,} of these {len(seen_P):,} proteins (column seen), so "
            "that what it says of them is no test of it."
        )
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
