"""Which residues get a row of their own: all of some letters, or those of a list.

Positions count from 1. A row's id is `{protein}_{residue}{position}`, as in `P04637_S15`.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.inference.worklist import Worklist
from hf_plm.proteins.vocabulary import RESIDUES

PROTEIN_COLUMNS = ("protein", "id", "name", "accession", "uniprot", "uniprot_id", "entry", "protein_id")
POSITION_COLUMNS = ("position", "site", "pos", "residue_position")
RESIDUE_COLUMNS = ("residue", "aa", "amino_acid", "letter")


@dataclass(frozen=True)
class Sites:
    """The sites of each protein, protein by protein, and which row of the result each is."""

    bounds: np.ndarray  # int64 (P+1,): protein i has the sites bounds[i] to bounds[i+1]
    positions: np.ndarray  # int32 (S,)
    letters: np.ndarray  # uint8 (S,)
    rows: np.ndarray | None = None  # int64 (S,); None where they stand in this order

    def __len__(self) -> int:
        return len(self.positions)

    def proteins(self) -> np.ndarray:
        """int64 (S,): the protein of each row."""
        return self.in_rows(np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds)))

    def in_rows(self, values_S: np.ndarray) -> np.ndarray:
        """Values by site, in the order of the rows."""
        if self.rows is None:
            return values_S
        ordered_S = np.empty_like(values_S)
        ordered_S[self.rows] = values_S
        return ordered_S

    def ids(self, worklist: Worklist) -> Iterator[str]:
        """The ids of the rows, in their order."""
        named = self._ids_by_protein(worklist)
        if self.rows is None:
            yield from named
            return
        names = np.empty(len(self), dtype=object)
        names[self.rows] = list(named)
        yield from names

    def _ids_by_protein(self, worklist: Worklist) -> Iterator[str]:
        for number, (id_, _) in enumerate(worklist):
            here = slice(self.bounds[number], self.bounds[number + 1])
            for position, letter in zip(self.positions[here].tolist(), self.letters[here].tolist(), strict=True):
                yield f"{id_}_{chr(letter)}{position}"


def site_letters(given: str) -> str:
    """The residues that letters such as `STY` or `S,T,Y` stand for; '' where it is something else."""
    letters = given.upper().replace(",", "").replace(" ", "")
    return "" if set(letters) - set(RESIDUES) else letters


def find_sites(given: str, worklist: Worklist, kept: np.ndarray) -> Sites:
    """The sites that letters, or a table with columns for protein and position, stand for.

    `kept` (P,) are the residues, from the first, that each protein has vectors for. Raises `UserError` where there is
    no site, and for rows of the table whose protein, position or residue is not that of the sequences.
    """
    if Path(given).expanduser().is_file():
        return _listed(Path(given).expanduser(), worklist, kept)
    letters = site_letters(given)
    table = np.zeros(256, dtype=bool)
    table[list(letters.encode())] = True
    counts, positions, found = [], [], []
    for number, (_, residues) in enumerate(worklist):
        letters_N = np.frombuffer(residues, dtype=np.uint8)[: kept[number]]
        places = np.flatnonzero(table[letters_N])
        counts.append(len(places))
        positions.append((places + 1).astype(np.int32))
        found.append(letters_N[places])
    if not sum(counts):
        raise UserError(f"None of the proteins has a residue {' or '.join(letters)}.")
    return Sites(np.cumsum([0, *counts]), np.concatenate(positions), np.concatenate(found))


def _listed(path: Path, worklist: Worklist, kept: np.ndarray) -> Sites:
    """The sites of a table, their rows in its order."""
    rows = list(_read_table(path))
    numbers: dict[str, int] = {}
    ambiguous: set[str] = set()
    for number, (id_, _) in enumerate(worklist):
        parts = id_.split("|")
        # A list may name the accession alone, of UniProt's `sp|P04637|P53_HUMAN`.
        for name in {id_, parts[1] if len(parts) >= 3 else id_}:
            if numbers.setdefault(name, number) != number:
                ambiguous.add(name)
    proteins_S = np.empty(len(rows), dtype=np.int64)
    positions_S, letters_S = np.empty(len(rows), dtype=np.int32), np.empty(len(rows), dtype=np.uint8)
    faults = []
    for index, (line, protein, position, residue) in enumerate(rows):
        number = numbers.get(protein, -1)
        residues = worklist.residues(number, number + 1)[0] if number >= 0 else b""
        if fault := _fault(protein, position, residue, residues, number < 0, protein in ambiguous, kept[number]):
            faults.append(f"line {line}: {fault}")
            continue
        proteins_S[index], positions_S[index], letters_S[index] = number, position, residues[position - 1]
    if faults:
        raise UserError(f"{path}: {len(faults):,} of {len(rows):,} rows do not fit, the first in {faults[0]}.")
    order = np.argsort(proteins_S, kind="stable")
    counts = np.bincount(proteins_S, minlength=len(worklist))
    return Sites(np.cumsum([0, *counts]), positions_S[order], letters_S[order], order)


def _fault(
    protein: str, position: int, residue: str, residues: bytes, is_missing: bool, is_ambiguous: bool, kept: int
) -> str:
    """What is wrong with a row, or ''."""
    if is_missing:
        return f"there is no protein {protein!r} among the sequences that are embedded"
    if is_ambiguous:
        return f"several sequences have the id {protein!r}, so the site's protein is not known"
    if not 1 <= position <= len(residues):
        return f"{protein} has {len(residues):,} residues, and none at position {position}"
    if position > kept:
        return f"--long crop keeps {kept:,} residues of {protein}, and position {position} is not among them"
    letter = chr(residues[position - 1])
    if residue and residue.upper() != letter:
        return f"{protein} has {letter} at position {position}, not {residue} (from 1)"
    return ""


def _read_table(path: Path) -> Iterator[tuple[int, str, int, str]]:
    """Line number, protein, position and residue (or '') of each row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in head else ",")
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            protein = next((columns[name] for name in PROTEIN_COLUMNS if name in columns), None)
            position = next((columns[name] for name in POSITION_COLUMNS if name in columns), None)
            residue = next((columns[name] for name in RESIDUE_COLUMNS if name in columns), None)
            if protein is None or position is None:
                raise UserError(
                    f"{path} should begin with a line of column names, one of {', '.join(PROTEIN_COLUMNS[:3])} and one "
                    f"of {', '.join(POSITION_COLUMNS[:3])} among them, not {head.strip()[:60]!r}."
                )
            count = 0
            for row in reader:
                count += 1
                text = (row[position] or "").strip().removesuffix(".0")
                if not text.isdigit():
                    raise UserError(f"{path}, line {reader.line_num}: a position is a number from 1, not {text!r}.")
                letter = (row[residue] or "").strip() if residue else ""
                yield reader.line_num, (row[protein] or "").strip(), int(text), letter
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; a table of sites was expected.") from None
    if not count:
        raise UserError(f"{path} lists no site.")
