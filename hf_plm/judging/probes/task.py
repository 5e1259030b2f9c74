"""A task for a probe: proteins and what is to be told of each, or of some of its residues, read from a table.

Three forms are told apart by the columns: a row for each protein (`id, sequence, label`), a row for each protein with
one character or number for each residue (`id, sequence, labels`), and a row for each site (`protein, position, residue,
label`, with the sequences in a column or a FASTA file). A row that contradicts itself is refused by its line; a missing
label is counted and left out.

Dimensions: P proteins, R rows (proteins or residues that have a label).
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.judging.probes.columns import Columns, Found
from hf_plm.judging.probes.forms import Raw, by_protein, by_site
from hf_plm.judging.probes.labels import KINDS, understand
from hf_plm.judging.probes.levels import LEVELS
from hf_plm.judging.probes.table import read_table


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


def read_task(
    path: str | Path,
    columns: Columns | None = None,
    kind: str | None = None,
    proteins: str | Path | None = None,
    sites: str | None = None,
    illegal: str = "reject",
    level: str | None = None,
) -> Task:
    """A task from CSV or TSV, gzip or not.

    `proteins` is a FASTA file for a table of sites that has no sequences; `sites` are letters whose residues are taken
    for negatives in a table that only lists positive sites. Raises `UserError` with the line of what does not fit.
    """
    path, columns = Path(path), columns or Columns()
    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind is one of {', '.join(KINDS)}, not {kind!r}.")
    if level is not None and level not in LEVELS:
        raise UserError(f"--level is one of {', '.join(LEVELS)}, not {level!r}.")
    head, lines = read_table(path)
    found = Found(path, head, columns)
    if proteins is not None and found.sequence is not None:
        raise UserError(f"{path} has a column of sequences ({head[found.sequence]}); leave --proteins out.")
    is_by_site = found.position is not None
    if is_by_site and level == "protein":
        raise UserError(f"{path} lists sites (its column {head[found.position or 0]!r}); leave --level protein out.")
    raw = by_site(found, lines, proteins, sites, illegal) if is_by_site else by_protein(found, lines, level, illegal)
    read_as, classes, labels_R, kept_R = understand(path, raw.labels, kind)
    splits, notes = _splits(found, raw, columns)
    if not kept_R.all():
        notes.append(f"{int((~kept_R).sum()):,} of {len(kept_R):,} rows have no label and are left out.")
    if raw.without_label:
        notes.append(f"{raw.without_label:,} residues have no label and are left out.")
    task = Task(
        _name(path, columns, kind, level),
        str(path),
        raw.level,
        read_as,
        classes,
        tuple(raw.ids),
        tuple(raw.sequences),
        tuple(raw.lines),
        splits,
        tuple(raw.clusters) if found.cluster is not None else None,
        np.array(raw.proteins, dtype=np.int64)[kept_R],
        np.array(raw.positions, dtype=np.int64)[kept_R],
        labels_R,
        (*raw.notes, *notes),
    )
    return task.proteins(np.unique(task.proteins_R))


def _splits(found: Found, raw: Raw, columns: Columns) -> tuple[tuple[str, ...] | None, list[str]]:
    """The sides as they are written, None where there are none, and a note where a column is not taken for them."""
    if found.split is None:
        return None, []
    if columns.split is None and found.head[found.split].lower() == "fold" and not all(map(side, raw.splits)):
        # SCOPe's folds, say
        return None, ["The column 'fold' holds no numbers, and is not taken for a split; --split fold would."]
    return tuple(raw.splits), []


def _name(path: Path, columns: Columns, kind: str | None, level: str | None) -> str:
    """Of the file, and how it is read where that was asked for, so that two readings have two names."""
    asked = {"split": columns.split, "cluster": columns.cluster, "kind": kind, "level": level}
    parts = [path.name.removesuffix(".gz").rsplit(".", 1)[0], *([columns.label] if columns.label else [])]
    return "_".join([*parts, *(f"{what}-{given}" for what, given in asked.items() if given)])


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
