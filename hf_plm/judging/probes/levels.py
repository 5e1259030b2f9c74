"""Whether a column has one label for each protein or one for each residue.

`label` is the first and `labels` the second. Any other column is told by whether its cells are as long as the
sequences. Where that may be chance, or is missed by a letter, nothing is guessed: a row is named, and --level settles
it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_plm.config import UserError
from hf_plm.judging.probes.labels import is_missing, number

LEVELS = ("protein", "residue")
OF_PROTEINS, OF_RESIDUES = "label", "labels"
FEW_LENGTHS = 3
"""Names of classes may be as long as peptides of so many lengths (8 residues, `positive`), and of no more."""
LONG = 20
MOST_LETTERS = 12
"""Labels of residues are written with few letters (0 and 1, eight of DSSP); names of more than 20 use more."""


class Row(NamedTuple):
    """One protein of a table, and the cell of its label."""

    line: int
    id: str
    sequence: str
    cell: str


def level_of(path: Path, column: str, rows: Sequence[Row]) -> tuple[str, str]:
    """One of `LEVELS`, and a note where it was told by the names of classes.

    Raises `UserError` for labels that are as long as their sequences in a column `label`, and for such that look like
    labels of residues and are too few or too many.
    """
    if column.lower() == OF_RESIDUES:
        return "residue", ""
    known = [row for row in rows if len(row.sequence) > 1 and not is_missing(row.cell) and not _is_decimal(row.cell)]
    fits = [row for row in known if of_residues(row.cell, row.sequence) is not None]
    if 2 * len(fits) >= len(known) > 0:
        if _are_names(fits):
            note = f"The labels are as long as the sequences, and are taken for {len({row.cell for row in fits})} names"
            return "protein", f"{note}; --level residue takes them for labels of residues."
        if column.lower() == OF_PROTEINS:
            line, _, sequence, cell = fits[0]
            raise UserError(
                f"{path}, line {line}: the label {_short(cell)} is as long as its sequence ({len(sequence):,} "
                "residues); give --level residue if each letter is a label, --level protein if all are one."
            )
        return "residue", ""
    long = [row for row in known if _is_long(row)]
    if 2 * len(long) >= len(known) > 0 and _letters(long) <= MOST_LETTERS:
        raise UserError(mismatch(path, column, long[0]))
    return "protein", ""


def of_residues(cell: str, sequence: str) -> list[str] | None:
    """One label for each residue: characters, or a list separated by `;`, `,` or white space; None for neither."""
    if len(cell) == len(sequence):
        return list(cell)
    for separator in (";", ",", None):
        labels = cell.split(separator)
        if len(labels) == len(sequence) and len(sequence) > 1:
            return [label.strip() for label in labels]
    return None


def mismatch(path: Path, column: str, row: Row) -> str:
    """What is wrong with a row whose labels are not as many as its residues."""
    return (
        f"{path}, line {row.line}: {row.id} has {len(row.sequence):,} residues, and its column {column!r} "
        f"{_count(row.cell):,} labels ({_short(row.cell)}); give one for each residue, or --level protein if it is one "
        "label of the protein."
    )


def _are_names(rows: Sequence[Row]) -> bool:
    """Few words that many proteins share, as long as these by chance."""
    words = {row.cell for row in rows}
    lengths = {len(row.sequence) for row in rows}
    are_words = all(len(word) in lengths and any(map(str.isalpha, word)) for word in words)
    return are_words and 2 * len(words) < len(rows) and len(lengths) <= FEW_LENGTHS


def _is_decimal(cell: str) -> bool:
    return not cell.isdigit() and number(cell) is not None


def _is_long(row: Row) -> bool:
    return _count(row.cell) > LONG and 2 * _count(row.cell) > len(row.sequence)


def _count(cell: str) -> int:
    """How many labels a cell would hold."""
    parts = _parts(cell)
    return parts if parts > 1 else len(cell)


def _parts(cell: str) -> int:
    return max(len(cell.split(separator)) for separator in (";", ",", None))


def _letters(rows: Sequence[Row]) -> int:
    """How many different characters the labels of residues would have, lists aside."""
    return len(set("".join(row.cell for row in rows if _parts(row.cell) == 1)))


def _short(cell: str) -> str:
    return repr(cell) if len(cell) <= LONG else f"{cell[:LONG]!r}..."
