"""The proteins to embed, cleaned and on disk: the one pass over the sources that comes before the first vector.

It knows every id and length, so that a result's size is known beforehand, and a run that goes on need not read the
sources again. In memory are 16 bytes for each protein; residues and ids are read by position.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hf_plm.config import UserError
from hf_plm.data.heldout import SeenHashes
from hf_plm.data.intake import DNA_LETTERS, note_of_dna
from hf_plm.data.sources import Source, read_records
from hf_plm.proteins.fasta import IllegalResidueError, clean

RESIDUES, IDS, BOUNDS, COUNTS = "residues.bin", "ids.bin", "bounds.npz", "worklist.json"
REJECTED = "rejected.tsv"


@dataclass(frozen=True)
class Cleaning:
    """How records are cleaned; the words and defaults are those of `hf-plm prepare`."""

    illegal: str = "reject"
    gaps: str = "reject"
    max_rejected: float = 0.1
    sequence_column: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("illegal", self.illegal, ("reject", "x")),
            ("gaps", self.gaps, ("reject", "strip")),
        ):
            if value not in allowed:
                raise UserError(f"--{name} is {' or '.join(allowed)}, not {value!r}.")
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"--max-rejected is a share from 0 to 1, not {self.max_rejected!r}.")


@dataclass(frozen=True)
class Counts:
    """What was read and what of it is there."""

    read: int
    kept: int
    rejected: int
    j_to_x: int
    illegal_to_x: int
    gaps_stripped: int
    repeated_ids: int
    notes: tuple[str, ...]


class Worklist:
    """Cleaned proteins by number, from 0, in the order of the sources."""

    def __init__(self, folder: Path):
        self.folder = folder
        plain = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        self.counts = Counts(**{**plain, "notes": tuple(plain["notes"])})
        with np.load(folder / BOUNDS) as bounds:
            self.bounds: np.ndarray = bounds["residues"]  # int64 (P+1,)
            self.id_bounds: np.ndarray = bounds["ids"]
        self._residues, self._ids = (open(folder / name, "rb") for name in (RESIDUES, IDS))  # noqa: SIM115

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def close(self) -> None:
        self._residues.close()
        self._ids.close()

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    def residues(self, begin: int, end: int) -> list[bytes]:
        """The proteins from `begin` up to `end`."""
        return _slices(self._residues, self.bounds[begin : end + 1])

    def ids(self, begin: int, end: int) -> list[str]:
        return [
            raw.decode("utf-8", errors="surrogateescape") for raw in _slices(self._ids, self.id_bounds[begin : end + 1])
        ]

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """All ids and residues."""
        for begin in range(0, len(self), 10_000):
            end = min(begin + 10_000, len(self))
            yield from zip(self.ids(begin, end), self.residues(begin, end), strict=True)


def _slices(file: BinaryIO, bounds: np.ndarray) -> list[bytes]:
    first, last = int(bounds[0]), int(bounds[-1])
    file.seek(first)
    data = file.read(last - first)
    if len(data) != last - first:
        raise UserError(f"{file.name} was cut after it was written; remove its folder and begin again.")
    cuts = (bounds - first).tolist()
    return [data[begin:end] for begin, end in pairwise(cuts)]


def write_worklist(
    sources: Iterable[Source], folder: Path, cleaning: Cleaning, on_bytes: Callable[[int], object]
) -> Worklist:
    """Reads the sources into `folder`; rejected records are listed in its `rejected.tsv`.

    Raises `UserError` where nothing is left, or more than `max_rejected` is rejected.
    """
    bounds, id_bounds, notes = array("q", [0]), array("q", [0]), []
    num_read = num_rejected = num_j = num_illegal = num_gaps = 0
    first_rejected = ""
    seen, hashes, num_new_ids = SeenHashes(), array("q"), 0
    with (
        open(folder / RESIDUES, "wb") as residues_file,
        open(folder / IDS, "wb") as ids_file,
        open(folder / REJECTED, "w", encoding="utf-8", errors="replace", newline="\n") as rejected,
    ):
        rejected.write("source\trecord\tid\tposition\treason\n")
        for source in sources:
            own_notes: list[str] = []
            num_bases = num_letters = 0
            for number, raw in enumerate(read_records(source, cleaning.sequence_column, own_notes, on_bytes), start=1):
                num_read += 1
                position: int | str = ""
                try:
                    cleaned = clean(raw.sequence, cleaning.illegal, cleaning.gaps)
                    reason = "" if cleaned.residues else "no residues"
                except IllegalResidueError as error:
                    position, reason = error.position, f"illegal character {error.character!r}"
                if reason:
                    num_rejected += 1
                    rejected.write(f"{source.name}\t{number}\t{raw.id}\t{position}\t{reason}\n")
                    at = f", position {position}" if position else ""
                    first_rejected = first_rejected or f"{source.name}, record {number} ({raw.id}){at}: {reason}"
                    continue
                num_j += cleaned.num_j
                num_illegal += cleaned.num_illegal
                num_gaps += cleaned.num_gaps
                num_letters += len(cleaned.residues)
                num_bases += len(cleaned.residues) - len(cleaned.residues.translate(None, DNA_LETTERS))
                residues_file.write(cleaned.residues)
                bounds.append(bounds[-1] + len(cleaned.residues))
                hashes.append(hash(raw.id))
                if len(hashes) == 4096:
                    num_new_ids += int(seen.add(np.array(hashes).view(np.uint64)).sum())
                    hashes = array("q")
                id_bounds.append(id_bounds[-1] + ids_file.write(raw.id.encode("utf-8", errors="replace")))
            if note := note_of_dna(num_letters, num_bases):
                own_notes.append(note)
            notes += [f"{source.name}: {note}" for note in ([source.note] if source.note else []) + own_notes]
    num_new_ids += int(seen.add(np.array(hashes).view(np.uint64)).sum()) if hashes else 0
    num_repeated = len(bounds) - 1 - num_new_ids
    counts = Counts(num_read, len(bounds) - 1, num_rejected, num_j, num_illegal, num_gaps, num_repeated, tuple(notes))
    _check(counts, cleaning, first_rejected)
    np.savez(folder / BOUNDS, residues=np.array(bounds), ids=np.array(id_bounds))
    (folder / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return Worklist(folder)


def _check(counts: Counts, cleaning: Cleaning, first_rejected: str) -> None:
    if counts.rejected > cleaning.max_rejected * counts.read:
        raise UserError(
            f"{counts.rejected:,} of {counts.read:,} records are rejected for illegal characters or no residues, more "
            f"than {100 * cleaning.max_rejected:g}%, the first: {first_rejected}; --illegal x writes X for such "
            "characters, --gaps strip takes gaps out, --max-rejected raises the limit."
        )
    if not counts.kept:
        raise UserError(f"There is no protein to embed: of {counts.read:,} records none is left.")
