"""The one pass over all sources: clean each record, drop what must go, list it, hold out, and write the rest.

In memory are 8 bytes for each sequence and each id, the candidates for validation, and one row group per split.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO

import numpy as np

from hf_plm.config import UserError
from hf_plm.data.heldout import HeldOut, Row, SeenHashes, hash_of
from hf_plm.data.manifest import FORMAT_VERSION, Counts, Manifest, SourceSummary
from hf_plm.data.shards import SplitWriter, checksum
from hf_plm.data.sources import RawRecord, Source, has_cluster, read_records
from hf_plm.proteins.fasta import IllegalResidueError, clean
from hf_plm.version import __version__

BATCH_RECORDS = 4096
BATCH_RESIDUES = 4_000_000
DNA_LETTERS, DNA_SHARE, DNA_FEWEST_LETTERS = b"ACGTUN", 0.95, 100
REPEATED_IDS_SHARE = 0.01


@dataclass(frozen=True)
class Options:
    """How records are cleaned and dropped; see `prepare`."""

    illegal: str
    gaps: str
    duplicates: str
    max_rejected: float
    sequence_column: str | None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("illegal", self.illegal, ("reject", "x")),
            ("gaps", self.gaps, ("reject", "strip")),
            ("duplicates", self.duplicates, ("drop", "keep")),
        ):
            if value not in allowed:
                raise UserError(f"data.{name} is {' or '.join(allowed)}, not {value!r}.")
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"data.max_rejected is a share from 0 to 1, not {self.max_rejected!r}.")


class TooManyRejectedError(UserError):
    """More records have illegal characters or no residues than `max_rejected` allows."""


@dataclass
class _Batch:
    """Cleaned records of one source on their way, and the counts of that source."""

    source: Source
    rows: list[Row] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    num_residues: int = 0
    num_read: int = 0
    num_kept: int = 0
    letters_256: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))


def note_of_dna(num_letters: int, num_bases: int) -> str:
    """What to say of letters of which so many are `DNA_LETTERS`; '' where there are too few, or it may be protein."""
    if num_letters < DNA_FEWEST_LETTERS or num_bases <= DNA_SHARE * num_letters:
        return ""
    return (
        f"almost only A C G T ({num_bases / num_letters:.0%} of the letters, U and N included), so it looks like DNA "
        "or RNA where protein is expected"
    )


class Intake:
    """What was read, kept and dropped, and where it went. A context manager: its files are closed whatever happens."""

    def __init__(self, folder: Path, options: Options, sources: list[Source], on_bytes: Callable[[int], object]):
        self.options, self._on_bytes = options, on_bytes
        self._has_cluster = any(has_cluster(source, options.sequence_column) for source in sources)
        self._holds_out = not any(source.split == "validation" for source in sources)
        self._writers = {name: SplitWriter(folder, name, self._has_cluster) for name in ("train", "validation", "test")}
        self._seen = {name: SeenHashes() for name in self._writers}
        self._seen_ids = SeenHashes()
        self._held_out = HeldOut()
        self._num: Counter[str] = Counter()  # by the names of the fields of Counts
        self._illegal: Counter[str] = Counter()
        self._first_rejected = ""
        self._summaries: list[SourceSummary] = []
        self._warnings: list[str] = []
        self._rejected: IO[str] = open(folder / "rejected.tsv", "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._rejected.write("source\trecord\tid\tposition\treason\n")

    def __enter__(self) -> "Intake":
        return self

    def __exit__(self, *exception: object) -> None:
        self._rejected.close()
        for writer in self._writers.values():
            writer.abort()

    def add(self, source: Source) -> None:
        """Read one source. Held-out sources must come before train, so that what they hold is kept out of it."""
        notes: list[str] = []
        batch = _Batch(source)
        records = read_records(source, self.options.sequence_column, notes, self._on_bytes)
        for number, raw in enumerate(records, start=1):
            batch.num_read = number
            self._clean_into(batch, number, raw)
            if len(batch.rows) >= BATCH_RECORDS or batch.num_residues >= BATCH_RESIDUES:
                self._flush(batch)
        self._flush(batch)
        for note in [source.note, *notes] if source.note else notes:
            self._warnings.append(f"{source.name}: {note}")
            self._list_rejected(source.name, 0, "", None, note)
        self._warn_of_dna(batch)
        files = source.files
        self._summaries.append(
            SourceSummary(
                name=source.name,
                split=source.split,
                format=source.format,
                bytes=sum(path.stat().st_size for path in files),
                sha256=checksum(files[0])
                if len(files) == 1
                else sha256("".join(map(checksum, files)).encode()).hexdigest(),
                read=batch.num_read,
                kept=batch.num_kept,
            )
        )

    def _clean_into(self, batch: _Batch, number: int, raw: RawRecord) -> None:
        where = f"{batch.source.name}, record {number} ({raw.id})"
        try:
            cleaned = clean(raw.sequence, self.options.illegal, self.options.gaps)
        except IllegalResidueError as error:
            self._illegal[error.character] += 1
            reason = f"illegal character {error.character!r}"
            self._list_rejected(batch.source.name, number, raw.id, error.position, reason)
            self._first_rejected = self._first_rejected or f"{where}, position {error.position}: {error.character!r}"
            return
        if not cleaned.residues:
            self._num["empty"] += 1
            self._list_rejected(batch.source.name, number, raw.id, None, "no residues")
            self._first_rejected = self._first_rejected or f"{where}: no residues"
            return
        self._num["j_to_x"] += cleaned.num_j
        self._num["illegal_to_x"] += cleaned.num_illegal
        self._num["gaps_stripped"] += cleaned.num_gaps
        batch.rows.append(Row(raw.id, cleaned.residues, raw.cluster))
        batch.numbers.append(number)
        batch.num_residues += len(cleaned.residues)

    def _flush(self, batch: _Batch) -> None:
        """Drop the duplicates of a batch, hold out, and pass the rest on."""
        split, rows = batch.source.split, batch.rows
        if not rows:
            return
        hashes_B = np.fromiter((hash_of(row.residues) for row in rows), dtype=np.uint64, count=len(rows))
        is_elsewhere_B = np.zeros(len(rows), dtype=bool)
        for other, seen in self._seen.items():
            if other != split:
                is_elsewhere_B |= seen.contains(hashes_B)
        is_new_B = self._seen[split].add(hashes_B)
        is_kept_B = ~is_elsewhere_B & (is_new_B | (self.options.duplicates == "keep"))
        for index in np.flatnonzero(~is_kept_B):
            reason = "same sequence in validation or test" if is_elsewhere_B[index] else "same sequence before"
            self._list_rejected(batch.source.name, batch.numbers[index], rows[index].id, None, reason)
        kept = [rows[index] for index in np.flatnonzero(is_kept_B)]
        self._num["in_other_split"] += int(is_elsewhere_B.sum())
        self._num["duplicates"] += int((~is_new_B & ~is_elsewhere_B).sum())
        self._num["kept"] += len(kept)
        batch.num_kept += len(kept)
        # Python's own string hash will do here: ids are compared within this process only.
        ids_B = np.fromiter((hash(row.id) for row in kept), dtype=np.int64, count=len(kept)).view(np.uint64)
        self._num["repeated_ids"] += len(kept) - int(self._seen_ids.add(ids_B).sum())
        residues_R = np.frombuffer(b"".join(row.residues for row in kept), dtype=np.uint8)
        batch.letters_256 += np.bincount(residues_R, minlength=256)
        if split == "train" and self._holds_out:
            kept = self._held_out.offer(self._group_keys(kept, hashes_B[is_kept_B]), kept)
        self._writers[split].write(kept)
        batch.rows, batch.numbers, batch.num_residues = [], [], 0

    def _group_keys(self, rows: list[Row], hashes_B: np.ndarray) -> list[int]:
        """What a row is held out by: the hash of its cluster, or of its sequence where it has none."""
        keys: list[int] = hashes_B.tolist()
        if not self._has_cluster:
            return keys
        self._num["unclustered"] += sum(row.cluster is None for row in rows)
        return [
            key if row.cluster is None else hash_of(b"cluster " + row.cluster.encode("utf-8", errors="replace"))
            for key, row in zip(keys, rows, strict=True)
        ]

    def _warn_of_dna(self, batch: _Batch) -> None:
        num_letters = int(batch.letters_256.sum())
        num_bases = int(batch.letters_256[list(DNA_LETTERS)].sum())
        if note := note_of_dna(num_letters, num_bases):
            self._warnings.append(f"{batch.source.name}: {note}")

    def _list_rejected(self, source: str, number: int, id_: str, position: int | None, reason: str) -> None:
        self._rejected.write(f"{source}\t{number}\t{id_}\t{position or ''}\t{reason}\n")

    def finish(self, name: str) -> Manifest:
        """Check the shares, divide what was kept aside, close the files, and sum up."""
        self._rejected.close()
        read = sum(summary.read for summary in self._summaries)
        num = {key: count for key, count in self._num.items() if key != "unclustered"}
        counts = Counts(**num, read=read, illegal=dict(sorted(self._illegal.items())))
        self._check(counts)
        if self._holds_out:
            held_out, train = self._held_out.finish(counts.kept - self._writers["test"].num_sequences)
            self._writers["train"].write(train)
            self._writers["validation"].write(held_out)
        self._warn(counts)
        return Manifest(
            name=name,
            format_version=FORMAT_VERSION,
            hf_plm_version=__version__,
            split_kind="given" if not self._holds_out else "cluster" if self._has_cluster else "random",
            options=asdict(self.options),
            counts=counts,
            splits={name: writer.close() for name, writer in self._writers.items() if writer.num_sequences},
            sources=tuple(self._summaries),
            warnings=tuple(self._warnings),
        )

    def _check(self, counts: Counts) -> None:
        if counts.read and counts.rejected > self.options.max_rejected * counts.read:
            gaps = ", --data.gaps strip takes gaps out" if set(self._illegal) & {"-", "."} else ""
            raise TooManyRejectedError(
                f"{counts.rejected:,} of {counts.read:,} records are rejected for illegal characters or no residues, "
                f"more than {100 * self.options.max_rejected:g}%, the first: {self._first_rejected}; --data.illegal x "
                f"writes X for such characters{gaps}, --data.max_rejected raises the limit."
            )
        for split in sorted({summary.split for summary in self._summaries}):
            summaries = [summary for summary in self._summaries if summary.split == split]
            if not any(summary.kept for summary in summaries):
                names = ", ".join(summary.name for summary in summaries[:3]) + (", ..." if summaries[3:] else "")
                raise UserError(
                    f"No sequence is left for {split}: of {sum(summary.read for summary in summaries):,} read from "
                    f"{names}, all are empty, have illegal characters or are in another split."
                )

    def _warn(self, counts: Counts) -> None:
        if counts.repeated_ids > REPEATED_IDS_SHARE * counts.kept:
            self._warnings.append(
                f"{counts.repeated_ids:,} of {counts.kept:,} records have an id that an earlier one has; they are kept"
            )
        if self.options.illegal == "x" and counts.illegal_to_x:
            self._warnings.append(f"{counts.illegal_to_x:,} illegal characters were written as X")
        if self._num["unclustered"]:
            self._warnings.append(
                f"{self._num['unclustered']:,} records have no cluster and were held out one by one, by their sequence"
            )
        if self._holds_out and not self._writers["validation"].num_sequences:
            self._warnings.append(
                "nothing could be held out for validation (too few sequences, or clusters too large): give some by "
                "--data.validation"
            )
