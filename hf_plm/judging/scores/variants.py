"""Variants as people have them, read from a table and held against the wild type before anything is computed.

A variant is one or several substitutions, `A42G` or `A42G:L50P`: the letter of the wild type, a position from 1, the
letter that stands there instead. HGVS (`p.Ala42Gly`) is read too. Nothing is skipped: a row that does not fit refuses
the table, names the line, and says which --offset would make all rows fit where there is one.
"""

import contextlib
import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from Bio.Data.IUPACData import protein_letters_3to1

from hf_plm.config import UserError
from hf_plm.data.intake import DNA_LETTERS, note_of_dna
from hf_plm.files import write_whole
from hf_plm.proteins.fasta import IllegalResidueError, clean, read_fasta
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

MUTANT_COLUMNS = ("mutant", "variant", "mutations", "mutation", "mutants", "variants", "hgvs", "hgvs_pro", "hgvsp")
SEQUENCE_COLUMN = "mutated_sequence"
"""ProteinGym's: read where none of the others is there."""
WILD_TYPE_NAMES = ("WT", "_WT", "WILD-TYPE", "WILDTYPE", "P.=", "=")


class Substitution(NamedTuple):
    """`place` counts from 0."""

    wild_type: str
    place: int
    letter: str


Variant = tuple[Substitution, ...]
"""In the order of the file; empty for the wild type."""


class FaultError(Exception):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Table:
    """The rows of a CSV or TSV file as they stand there, and the line that each begins or ends in."""

    path: Path
    delimiter: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def find(self, *names: str) -> int | None:
        """The column of the first of the names that is there, in any case; `UserError` where it is there twice."""
        columns = [name.strip().lower() for name in self.header]
        for name in names:
            if columns.count(name.lower()) > 1:
                raise UserError(f"{self.path} has several columns {name}; leave the one that is meant.")
            if name.lower() in columns:
                return columns.index(name.lower())
        return None

    def numbers(self, column: int, may_lack: bool = False) -> np.ndarray:
        """fp64 (rows,); NaN for an empty cell where one `may_lack`. Raises `UserError` for what is no finite number."""
        found = np.full(len(self.rows), np.nan)
        for index, row in enumerate(self.rows):
            text = row[column].strip()
            if may_lack and text.lower() in ("", "na", "nan"):
                continue
            with contextlib.suppress(ValueError):
                found[index] = float(text)
            if not np.isfinite(found[index]):
                has_comma = re.fullmatch(r"[-+]?\d*,\d+(e[-+]?\d+)?", text.lower())
                cure = "write a point for the decimal comma" if has_comma else "take the row out or fill it in"
                raise UserError(
                    f"{self.path}, line {self.lines[index]}: {self.header[column]} should be a number, not "
                    f"{row[column]!r}; {cure}."
                )
        return found


def read_table(path: Path) -> Table:
    """A CSV or TSV file with a line of column names, plain or gzip by content.

    Raises `UserError`: no such file, no text, no rows, or a row with another number of fields than the header.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
        head = re.split(r"[\r\n]", text, maxsplit=1)[0]
        delimiter = "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = next(reader, [])
        rows, lines = [], []
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, where the header has {len(header)}; a field "
                    "with the delimiter in it should stand in double quotes."
                )
            rows.append(row)
            lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is not text in UTF-8; a CSV or TSV table was expected.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path} is cut or damaged: its gzip stream breaks off.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not rows:
        raise UserError(f"{path} has no rows under a line of column names.")
    return Table(path, delimiter, header, rows, lines)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], delimiter: str = ",") -> None:
    """gzip where the name ends in .gz. Raises `UserError` where the file cannot be written."""
    with io.StringIO() as text:
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        data = text.getvalue().encode()
    write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_proteins(path: Path) -> list[tuple[str, bytes]]:
    """Ids and cleaned residues of a FASTA file. Raises `UserError`, for an illegal residue with record and position."""
    found = []
    for number, record in enumerate(read_fasta(path), start=1):
        try:
            residues = clean(record.sequence).residues
        except IllegalResidueError as error:
            raise UserError(f"{path}, record {number} ({record.id}): {error}") from None
        if not residues:
            raise UserError(f"{path}, record {number} ({record.id}) has no residues.")
        if note := note_of_dna(len(residues), len(residues) - len(residues.translate(None, DNA_LETTERS))):
            print(f"Warning: {path}, record {number} ({record.id}): {note}.", file=sys.stderr)
        found.append((record.id, residues))
    return found


def read_wild_type(path: Path) -> tuple[str, bytes]:
    """`read_proteins` of a file that holds one."""
    proteins = read_proteins(path)
    if len(proteins) > 1:
        names = ", ".join(name for name, _ in proteins[:3])
        raise UserError(f"{path} should hold one protein, the wild type, not {len(proteins):,} ({names} ...).")
    return proteins[0]


def find_variants(
    table: Table, residues: bytes, *, offset: int = 0, mutant_column: str | None = None
) -> tuple[list[str], list[Variant]]:
    """What the mutants of a table are called, and what they are.

    Position p of the table is position p - `offset` of the wild type `residues`. Raises `UserError` where a column is
    not there or any row does not fit.
    """
    names = (mutant_column,) if mutant_column else MUTANT_COLUMNS
    column = table.find(*names)
    is_sequence = column is None and not mutant_column
    if is_sequence:
        column = table.find(SEQUENCE_COLUMN)
    if column is None:
        named = f"a column {mutant_column!r}" if mutant_column else f"one of {', '.join(MUTANT_COLUMNS)}"
        raise UserError(
            f"{table.path} should have {named} among its columns, which are {', '.join(table.header)[:200]}; "
            "--mutant-column names another."
        )
    mutants = [row[column].strip() for row in table.rows]
    variants: list[Variant] = []
    faults = []
    written: list[Variant] = []  # before the offset, what could be read of it
    for mutant, line in zip(mutants, table.lines, strict=True):
        try:
            if is_sequence:
                variant = compare(mutant, residues)
            else:
                variant = parse(mutant)
                written.append(variant)
                variant = tuple(one._replace(place=one.place - offset) for one in variant)
            check(variant, residues, offset)
            variants.append(variant)
        except FaultError as fault:
            faults.append(f"line {line}: {f'{mutant[:60]}: ' if mutant else ''}{fault}")
    if faults:
        hint = _offset_hint(written, residues, offset) if len(written) == len(mutants) else ""
        raise UserError(
            f"{table.path}: {len(faults):,} of {len(mutants):,} rows do not fit the wild type, the first in "
            f"{faults[0]}.{hint}"
        )
    return mutants, variants


_PART = re.compile(r"([A-Z]{3}|[A-Z])(-?\d+)([A-Z]{3}|[A-Z*=])")
_INDEL = re.compile(r"\d(?:DEL|INS|DUP|FS|EXT|-)|_|^-")
_HGVS = re.compile(r"(?:[^\s:]+:)?P\.")
_LETTERS = {name.upper(): letter for name, letter in protein_letters_3to1.items()} | {"TER": "*"}


def parse(mutant: str) -> Variant:
    """The substitutions that a cell names, places as written less 1. Raises `FaultError`."""
    text = mutant.strip().upper()
    if not text:
        raise FaultError("the cell is empty; the wild type is written WT")
    if text in WILD_TYPE_NAMES:
        return ()
    text = _HGVS.sub("", text)
    found = []
    for part in re.split(r"\s*[:;,]\s*|\s+", text.translate(str.maketrans("", "", "()[]"))):
        if _INDEL.search(part):
            raise FaultError("insertions and deletions are not scored, only substitutions such as A42G")
        matched = _PART.fullmatch(part)
        if matched is None:
            raise FaultError("a substitution is written as A42G, several as A42G:L50P")
        first, position, last = matched.groups()
        wild_type, letter = (str(_LETTERS.get(one, one)) for one in (first, first if last == "=" else last))
        for one in (wild_type, letter):
            if len(one) > 1:
                raise FaultError(f"{one.title()} is no residue")
        found.append(Substitution(wild_type, int(position) - 1, letter))
    return tuple(found)


def compare(sequence: str, residues: bytes) -> Variant:
    """The substitutions by which a whole sequence differs from the wild type. Raises `FaultError`."""
    letters = sequence.upper()
    if len(letters) != len(residues):
        raise FaultError(
            f"it has {len(letters):,} residues and the wild type {len(residues):,}; insertions and deletions are not "
            "scored"
        )
    pairs = enumerate(zip(residues.decode(), letters, strict=True))
    return tuple(Substitution(old, place, new) for place, (old, new) in pairs if old != new)


def check(variant: Variant, residues: bytes, offset: int = 0) -> None:
    """Raises `FaultError` where a variant is none of the wild type's."""
    if len({one.place for one in variant}) < len(variant):
        raise FaultError("it names one position twice")
    for wild_type, place, letter in variant:
        here = f"position {place + 1}" + (f" ({place + 1 + offset} less the offset {offset})" if offset else "")
        if not 0 <= place < len(residues):
            raise FaultError(f"the wild type has {len(residues):,} residues, and none at {here}")
        if chr(residues[place]) != wild_type:
            raise FaultError(f"the wild type has {chr(residues[place])} at {here}")
        if wild_type not in STANDARD_RESIDUES:
            raise FaultError(f"{wild_type} at {here} is no standard residue, so nothing can be said against it")
        if letter not in STANDARD_RESIDUES:
            what = "a stop" if letter == "*" else "no standard residue"
            raise FaultError(f"{letter} is {what}; substitutions by {STANDARD_RESIDUES} are scored")


def _offset_hint(written: Sequence[Variant], residues: bytes, given: int) -> str:
    """Which constant offsets would make all rows fit, in words; '' where none would, too many, or the given one."""
    pairs = sorted({(one.place, ord(one.wild_type)) for variant in written for one in variant})
    if not pairs:
        return ""
    places_S, letters_S = (np.array(column) for column in zip(*pairs, strict=True))
    residues_N = np.frombuffer(residues, dtype=np.uint8)
    candidates = range(int(places_S[-1]) - len(residues_N) + 1, int(places_S[0]) + 1)
    fits = [offset for offset in candidates if (residues_N[places_S - offset] == letters_S).all()]
    if given in fits or not 1 <= len(fits) <= 3:
        return ""
    return f" With --offset {' or '.join(map(str, fits))} all positions would fit."
