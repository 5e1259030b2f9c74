"""A task for a probe: proteins and what is to be told of each, or of some of its residues, read from a table.

Three forms are told apart by the columns: a row for each protein (`id, sequence, label`), a row for each protein with
one character or number for each residue (`id, sequence, labels`), and a row for each site (`protein, position, residue,
label`, with the sequences in a column or a FASTA file). A row that contradicts itself is refused by its line; a missing
label is counted and left out.

Dimensions: P proteins, R rows (proteins or residues that have a label).
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.inference.sites import POSITION_COLUMNS, PROTEIN_COLUMNS, RESIDUE_COLUMNS
from hf_plm.judging.probes.labels import KINDS, MISSING, understand
from hf_plm.judging.probes.table import read_table
from hf_plm.proteins.fasta import IllegalResidueError, clean_sequence, read_fasta

SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence", "aa_seq", "residues")
LABEL_COLUMNS = ("label", "labels", "target", "y", "value", "values", "location", "localization", "is_site")
SPLIT_COLUMNS = ("split", "set", "partition", "fold")
CLUSTER_COLUMNS = ("cluster", "cluster_id", "clusters")


@dataclass(frozen=True)
class Task:
    """Proteins and labels; `proteins_R` says whose each row is."""

    name: str
    path: str
    level: str  # protein or residue
    kind: str  # one of KINDS
    classes: tuple[str, ...]  # of a label; of two, the second is the positive one; none for regression
    ids: tuple[str, ...]  # (P,)
    sequences: tuple[str, ...]  # (P,), as `fasta.clean` leaves them
    lines: tuple[int, ...]  # (P,): where in the file
    splits: tuple[str, ...] | None  # (P,), as written
    clusters: tuple[str, ...] | None  # (P,), '' where unknown
    proteins_R: np.ndarray  # int64
    positions_R: np.ndarray  # int64, 0-based; 0 in a task of proteins
    labels_R: np.ndarray  # int64 class, or float64
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_R)

    def rows(self, keep_R: np.ndarray, name: str | None = None) -> "Task":
        """The same proteins with fewer rows."""
        return dataclasses.replace(
            self,
            name=name or self.name,
            proteins_R=self.proteins_R[keep_R],
            positions_R=self.positions_R[keep_R],
            labels_R=self.labels_R[keep_R],
        )

    def proteins(self, chosen: np.ndarray) -> "Task":
        """Fewer proteins, with their rows."""
        number = np.full(len(self.ids), -1)
        number[chosen] = np.arange(len(chosen))
        few = self.rows(number[self.proteins_R] >= 0)

        def picked(values: tuple) -> tuple:
            return tuple(values[index] for index in chosen)

        return dataclasses.replace(
            few,
            ids=picked(self.ids),
            sequences=picked(self.sequences),
            lines=picked(self.lines),
            splits=None if self.splits is None else picked(self.splits),
            clusters=None if self.clusters is None else picked(self.clusters),
            proteins_R=number[few.proteins_R],
        )

    def residues(self, letters: str) -> "Task":
        """The rows of some letters."""
        if self.level != "residue":
            raise UserError(f"--sites needs labels of residues, and {self.path} has one label for each protein.")
        here = [self.sequences[p][i] in letters for p, i in zip(self.proteins_R, self.positions_R, strict=True)]
        return self.rows(np.array(here, dtype=bool), f"{self.name}_{letters}")

    def numbers_written(self, row: int) -> str:
        """The label of a row, as text."""
        label = self.labels_R[row]
        return self.classes[int(label)] if self.classes else f"{label:g}"


@dataclass(frozen=True)
class Columns:
    """Which columns to read where their names do not say it."""

    label: str | None = None
    split: str | None = None
    cluster: str | None = None


def read_task(
    path: str | Path,
    columns: Columns = Columns(),
    kind: str | None = None,
    proteins: str | Path | None = None,
    sites: str | None = None,
    illegal: str = "reject",
) -> Task:
    """A task from CSV or TSV, gzip or not.

    `proteins` is a FASTA file for a table of sites that has no sequences; `sites` are letters whose residues are taken
    for negatives in a table that only lists positive sites. Raises `UserError` with the line of what does not fit.
    """
    path = Path(path)
    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind is one of {', '.join(KINDS)}, not {kind!r}.")
    head, rows = read_table(path)
    found = _Found(path, head, columns)
    if proteins is not None and found.sequence is not None:
        raise UserError(f"{path} has a column of sequences ({head[found.sequence]}); leave --proteins out.")
    by_site = found.position is not None
    raw = _by_site(found, rows, proteins, sites, illegal) if by_site else _by_protein(found, rows, illegal)
    level = "residue" if by_site or raw.per_residue else "protein"
    kind, classes, labels_R, kept_R = understand(path, raw.labels, kind)
    notes = []
    if not kept_R.all():
        notes.append(f"{int((~kept_R).sum()):,} of {len(kept_R):,} rows have no label and are left out.")
    if raw.without_label:
        notes.append(f"{raw.without_label:,} residues have no label and are left out.")
    splits: tuple[str, ...] | None = tuple(raw.splits) if found.split is not None else None
    if splits and columns.split is None and head[found.split or 0].lower() == "fold" and not all(map(side, splits)):
        splits = None  # SCOPe's folds, say
        notes.append("The column 'fold' holds no numbers, and is not taken for a split; --split fold would.")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0] + (f"_{columns.label}" if columns.label else "")
    task = Task(
        name,
        str(path),
        level,
        kind,
        classes,
        tuple(raw.ids),
        tuple(raw.sequences),
        tuple(raw.lines),
        splits,
        tuple(raw.clusters) if found.cluster is not None else None,
        np.array(raw.proteins, dtype=np.int64)[kept_R],
        np.array(raw.positions, dtype=np.int64)[kept_R],
        labels_R,
        tuple(notes),
    )
    return task.proteins(np.unique(task.proteins_R))


def side(value: str) -> str:
    """Of a split: `train`, `valid`, `fold N`, or for a test set its own name; '' where it is none of them."""
    name = value.strip().lower()
    if name.startswith("train"):
        return "train"
    if name in ("valid", "val", "validation", "dev", "eval"):
        return "valid"
    if number := re.fullmatch(r"(?:fold|cv|part)?[ _-]*(\d+)", name):
        return f"fold {int(number[1])}"
    return value if "test" in name or name in ("independent", "holdout", "held-out") else ""


class _Found:
    """Which column is which: indices, or None."""

    def __init__(self, path: Path, head: list[str], columns: Columns):
        self.path, self.head = path, head
        self._lower = [name.lower() for name in head]
        self.id = self._first(PROTEIN_COLUMNS)
        self.sequence = self._first(SEQUENCE_COLUMNS)
        self.position = self._first(POSITION_COLUMNS)
        self.residue = self._first(RESIDUE_COLUMNS)
        self.label = self._given(columns.label, "--label") if columns.label else self._first(LABEL_COLUMNS)
        # Of SCOPe's table, `fold` is a label: a split is only guessed where it is not what is asked for.
        self.split = self._first(SPLIT_COLUMNS)
        if columns.split is not None:
            self.split = None if columns.split == "none" else self._given(columns.split, "--split")
        self.cluster = self._given(columns.cluster, "--cluster") if columns.cluster else self._first(CLUSTER_COLUMNS)
        if self.split == self.label and not columns.split:
            self.split = None
        if self.sequence is None and self.position is None:
            raise UserError(
                f"{path} has no column {' or '.join(SEQUENCE_COLUMNS[:2])}; its columns: {', '.join(head)}."
            )

    def label_column(self) -> int:
        if self.label is not None:
            return self.label
        known = {self.id, self.sequence, self.position, self.residue, self.split, self.cluster}
        others = [name for index, name in enumerate(self.head) if index not in known]
        if len(others) == 1:
            return self.head.index(others[0])
        of = f" of {', '.join(others)}" if others else f"; its columns: {', '.join(self.head)}"
        raise UserError(f"{self.path} has no column named label; say which it is with --label{of}.")

    def _given(self, name: str, flag: str) -> int:
        if name not in self.head:
            raise UserError(f"{self.path} has no column {name!r} ({flag}); its columns: {', '.join(self.head)}.")
        return self.head.index(name)

    def _first(self, names: tuple[str, ...]) -> int | None:
        return next((self._lower.index(name) for name in names if name in self._lower), None)


class _Raw:
    """What is read, before labels are understood."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.sequences: list[str] = []
        self.lines: list[int] = []
        self.splits: list[str] = []
        self.clusters: list[str] = []
        self.proteins: list[int] = []
        self.positions: list[int] = []
        self.labels: list[tuple[int, str]] = []  # line, text
        self.per_residue = False
        self.without_label = 0

    def protein(self, found: _Found, line: int, cells: list[str], id_: str, sequence: str) -> int:
        self.ids.append(id_)
        self.sequences.append(sequence)
        self.lines.append(line)
        self.splits.append(cells[found.split] if found.split is not None else "")
        self.clusters.append(_cluster(found, cells))
        return len(self.ids) - 1

    def label(self, protein: int, position: int, line: int, text: str) -> None:
        self.proteins.append(protein)
        self.positions.append(position)
        self.labels.append((line, text))


def _cluster(found: _Found, cells: list[str]) -> str:
    name = cells[found.cluster] if found.cluster is not None else ""
    return "" if name.lower() in MISSING else name


def _by_protein(found: _Found, rows: Iterator[tuple[int, list[str]]], illegal: str) -> _Raw:
    raw = _Raw()
    column = found.label_column()
    kept = [(line, cells, _sequence(found, line, cells, illegal)) for line, cells in rows]
    if not kept:
        raise UserError(f"{found.path} has no rows below its head.")
    # By most rows, not by all: one that is too short is a mistake to be told, not a label of another kind.
    fits = [_per_residue(cells[column], sequence) is not None for _, cells, sequence in kept if len(sequence) > 1]
    raw.per_residue = 2 * sum(fits) >= len(fits) > 0
    for line, cells, sequence in kept:
        id_ = cells[found.id] if found.id is not None else f"line_{line}"
        protein = raw.protein(found, line, cells, id_, sequence)
        if not raw.per_residue:
            raw.label(protein, 0, line, cells[column])
            continue
        labels = _per_residue(cells[column], sequence)
        if labels is None:
            raise UserError(
                f"{found.path}, line {line}: {id_} has {len(sequence):,} residues, and its column "
                f"{found.head[column]!r} has not as many labels ({cells[column][:20]!r}...)."
            )
        for position, text in enumerate(labels):
            if text.lower() in MISSING:
                raw.without_label += 1
            else:
                raw.label(protein, position, line, text)
    return raw


def _per_residue(cell: str, sequence: str) -> list[str] | None:
    """One label for each residue: characters, or a list separated by `;`, `,` or white space; None for neither."""
    if len(cell) == len(sequence):
        return list(cell)
    for separator in (";", ",", None):
        labels = cell.split(separator)
        if len(labels) == len(sequence) and len(sequence) > 1:
            return [label.strip() for label in labels]
    return None


def _by_site(
    found: _Found, rows: Iterator[tuple[int, list[str]]], proteins: str | Path | None, sites: str | None, illegal: str
) -> _Raw:
    raw = _Raw()
    known = _fasta(Path(proteins), illegal) if proteins is not None else {}
    if found.sequence is None and proteins is None:
        raise UserError(f"{found.path} lists sites without their sequences; give them with --proteins FASTA.")
    if found.id is None:
        raise UserError(f"{found.path} lists sites and has no column {' or '.join(PROTEIN_COLUMNS[:2])}.")
    only_positives = found.label is None and sites is not None
    column = -1 if only_positives else found.label_column()
    numbers: dict[tuple[str, str], int] = {}
    seen: dict[tuple[int, int], int] = {}
    assert found.position is not None
    for line, cells in rows:
        id_ = cells[found.id]
        sequence = _sequence(found, line, cells, illegal) if found.sequence is not None else known.get(id_, "")
        where = f"{found.path}, line {line}"
        if not sequence:
            raise UserError(f"{where}: there is no protein {id_!r} in {proteins}.")
        # The same protein on two sides is two proteins here, which the search for leaks then finds.
        key = (id_, cells[found.split] if found.split is not None else "")
        if key not in numbers:
            numbers[key] = raw.protein(found, line, cells, id_, sequence)
        number = numbers[key]
        if raw.sequences[number] != sequence:
            raise UserError(f"{where}: {id_} has another sequence than in line {raw.lines[number]}.")
        if cluster := _cluster(found, cells):
            raw.clusters[number] = raw.clusters[number] or cluster
            if raw.clusters[number] != cluster:
                raise UserError(f"{where}: {id_} is in cluster {cluster}, and before in {raw.clusters[number]}.")
        place = _place(where, id_, sequence, cells[found.position], found, cells)
        if (number, place) in seen:
            raise UserError(f"{where}: {id_} has position {place + 1} twice, before in line {seen[number, place]}.")
        seen[number, place] = line
        raw.label(number, place, line, "1" if only_positives else cells[column])
    if not raw.ids:
        raise UserError(f"{found.path} lists no sites.")
    if only_positives:
        assert sites is not None
        for number, sequence in enumerate(raw.sequences):
            for place, letter in enumerate(sequence):
                if letter in sites and (number, place) not in seen:
                    raw.label(number, place, raw.lines[number], "0")
    return raw


def _place(where: str, id_: str, sequence: str, text: str, found: _Found, cells: list[str]) -> int:
    """The 0-based position of a site, checked against its protein."""
    text = text.removesuffix(".0")
    if not text.isdigit():
        raise UserError(f"{where}: a position is a number from 1, not {text!r}.")
    position = int(text)
    if not 1 <= position <= len(sequence):
        raise UserError(f"{where}: {id_} has {len(sequence):,} residues, and none at position {position} (from 1).")
    letter = cells[found.residue].upper() if found.residue is not None else ""
    if letter and letter != sequence[position - 1]:
        raise UserError(f"{where}: {id_} has {sequence[position - 1]} at position {position}, not {letter} (from 1).")
    return position - 1


def _sequence(found: _Found, line: int, cells: list[str], illegal: str) -> str:
    assert found.sequence is not None
    try:
        sequence = clean_sequence(cells[found.sequence], illegal)
    except IllegalResidueError as error:
        raise UserError(f"{found.path}, line {line}: {error} --illegal x writes X for it.") from None
    if not sequence:
        raise UserError(f"{found.path}, line {line}: the sequence is empty.")
    return sequence


def _fasta(path: Path, illegal: str) -> dict[str, str]:
    """Sequences by id, and by the accession of UniProt's `sp|P04637|P53_HUMAN`."""
    known: dict[str, str] = {}
    for record in read_fasta(path):
        try:
            sequence = clean_sequence(record.sequence, illegal)
        except IllegalResidueError as error:
            raise UserError(f"{path}, {record.id}: {error} --illegal x writes X for it.") from None
        parts = record.id.split("|")
        for name in {record.id, parts[1] if len(parts) >= 3 else record.id}:
            if known.setdefault(name, sequence) != sequence:
                raise UserError(f"{path} has two sequences with the id {name!r}.")
    return known
