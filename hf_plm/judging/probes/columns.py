"""Which column of a table is which, told from their names or as the user says.

Raises `UserError` where a column that is needed, or was named, is not there.
"""

from dataclasses import dataclass
from pathlib import Path

from hf_plm.config import UserError
from hf_plm.inference.sites import POSITION_COLUMNS, PROTEIN_COLUMNS, RESIDUE_COLUMNS

SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence", "aa_seq", "residues")
LABEL_COLUMNS = ("label", "labels", "target", "y", "value", "values", "location", "localization", "is_site")
SPLIT_COLUMNS = ("split", "set", "partition", "fold")
CLUSTER_COLUMNS = ("cluster", "cluster_id", "clusters")


@dataclass(frozen=True)
class Columns:
    """Which columns to read where their names do not say it."""

    label: str | None = None
    split: str | None = None
    cluster: str | None = None


class Found:
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
