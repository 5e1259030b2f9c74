"""The forms that a table of labels has: a row for each protein, with one label or one for each residue, or a row for
each site.

A row that contradicts itself or another is refused, with both lines; one that repeats another is left out and counted.
"""

from collections.abc import Iterator
from pathlib import Path

from hf_plm.config import UserError
from hf_plm.inference.sites import PROTEIN_COLUMNS
from hf_plm.judging.probes.columns import Found
from hf_plm.judging.probes.labels import is_missing, number
from hf_plm.judging.probes.levels import Row, level_of, mismatch, of_residues
from hf_plm.proteins.fasta import IllegalResidueError, clean_sequence, read_fasta

Lines = Iterator[tuple[int, list[str]]]
"""The number and the cells of each."""


class Raw:
    """What is read, before labels are understood."""

    def __init__(self, level: str) -> None:
        self.level = level
        self.ids: list[str] = []
        self.sequences: list[str] = []
        self.lines: list[int] = []
        self.splits: list[str] = []
        self.clusters: list[str] = []
        self.proteins: list[int] = []
        self.positions: list[int] = []
        self.labels: list[tuple[int, str]] = []  # line, text
        self.without_label = 0  # residues
        self.notes: list[str] = []

    def protein(self, found: Found, line: int, cells: list[str], id_: str, sequence: str) -> int:
        self.ids.append(id_)
        self.sequences.append(sequence)
        self.lines.append(line)
        self.splits.append(_split(found, cells))
        self.clusters.append(_cluster(found, cells))
        return len(self.ids) - 1

    def label(self, protein: int, position: int, line: int, text: str) -> None:
        self.proteins.append(protein)
        self.positions.append(position)
        self.labels.append((line, text))

    def residues(self, protein: int, line: int, labels: list[str]) -> None:
        """Labels of all residues, of which those that are missing are counted."""
        for position, text in enumerate(labels):
            if is_missing(text):
                self.without_label += 1
            else:
                self.label(protein, position, line, text)


def _split(found: Found, cells: list[str]) -> str:
    return cells[found.split] if found.split is not None else ""


def _cluster(found: Found, cells: list[str]) -> str:
    name = cells[found.cluster] if found.cluster is not None else ""
    return "" if is_missing(name) else name


def by_protein(found: Found, lines: Lines, level: str | None, illegal: str) -> Raw:
    """A row for each protein. `level` is told by `level_of` where it is not given.

    Raises `UserError` for labels of residues that are too few or too many, and for proteins with two labels.
    """
    column = found.label_column()
    name = found.head[column]
    kept = []
    for line, cells in lines:
        id_ = (cells[found.id] if found.id is not None else "") or f"line_{line}"
        kept.append((Row(line, id_, _sequence(found, line, cells, illegal), cells[column]), cells))
    if not kept:
        raise UserError(f"{found.path} has no rows below its head.")
    told, note = (level, "") if level else level_of(found.path, name, [row for row, _ in kept])
    raw = Raw(told)
    unique = _without_repeats(found, kept, raw.level == "protein")
    if repeats := len(kept) - len(unique):
        raw.notes.append(f"{repeats:,} of {len(kept):,} rows repeat an earlier one and are left out.")
    raw.notes += [note] if note else []
    if shared := _shared_ids(found, unique):
        raw.notes.append(f"Ids that stand for several sequences: {shared:,}; these are proteins that stay together.")
    for row, cells in unique:
        protein = raw.protein(found, row.line, cells, row.id, row.sequence)
        if raw.level == "protein":
            raw.label(protein, 0, row.line, row.cell)
            continue
        blank = [""] * len(row.sequence) if is_missing(row.cell) else None
        labels = blank or of_residues(row.cell, row.sequence)
        if labels is None:
            raise UserError(mismatch(found.path, name, row))
        raw.residues(protein, row.line, labels)
    return raw


def _without_repeats(found: Found, rows: list[tuple[Row, list[str]]], are_numbers: bool) -> list[tuple[Row, list[str]]]:
    """Each protein once: an id and a sequence, or without ids a sequence.

    The same protein on two sides of a split is two proteins here, which the search for leaks then finds. Raises
    `UserError` for a protein with two labels or clusters; labels that `are_numbers` are compared as such.
    """
    kept = []
    first: dict[tuple[str, str, str], tuple[Row, str]] = {}
    for row, cells in rows:
        has_id = found.id is not None and cells[found.id]
        cluster = _cluster(found, cells)
        if is_missing(row.cell):
            kept.append((row, cells))
            continue
        key = (row.id if has_id else "", row.sequence, _split(found, cells))
        before, in_cluster = first.setdefault(key, (row, cluster))
        if before is row:
            kept.append((row, cells))
            continue
        where, who = f"{found.path}, line {row.line}", row.id if has_id else "the same sequence"
        if (_value(before.cell) != _value(row.cell)) if are_numbers else (before.cell != row.cell):
            raise UserError(
                f"{where}: {who} has the label {row.cell[:20]!r}, and in line {before.line} {before.cell[:20]!r}; "
                "leave one of the rows, or give each its own id."
            )
        if in_cluster != cluster:
            raise UserError(f"{where}: {who} is in cluster {cluster or 'none'}, and before in {in_cluster or 'none'}.")
    return kept


def _shared_ids(found: Found, rows: list[tuple[Row, list[str]]]) -> int:
    """How many ids have more than one sequence, as that of the parent of variants has."""
    if found.id is None:
        return 0
    sequences: dict[str, set[str]] = {}
    for row, _ in rows:
        sequences.setdefault(row.id, set()).add(row.sequence)
    return sum(len(one) > 1 for one in sequences.values())


def _value(cell: str) -> float | str:
    value = number(cell)
    return cell if value is None else value


def by_site(found: Found, lines: Lines, proteins: str | Path | None, sites: str | None, illegal: str) -> Raw:
    """A row for each site. Raises `UserError` for one that does not fit its protein or stands there twice."""
    raw = Raw("residue")
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
    for line, cells in lines:
        id_ = cells[found.id]
        sequence = _sequence(found, line, cells, illegal) if found.sequence is not None else known.get(id_, "")
        where = f"{found.path}, line {line}"
        if not sequence:
            raise UserError(f"{where}: there is no protein {id_!r} in {proteins}.")
        # The same protein on two sides is two proteins here, which the search for leaks then finds.
        key = (id_, _split(found, cells))
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


def _place(where: str, id_: str, sequence: str, text: str, found: Found, cells: list[str]) -> int:
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


def _sequence(found: Found, line: int, cells: list[str], illegal: str) -> str:
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
