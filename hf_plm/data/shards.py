"""The Parquet files of one split, written as a stream of rows, and the statistics of what went into them."""

import os
from collections import Counter
from hashlib import file_digest
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from hf_plm.data.heldout import Row
from hf_plm.data.manifest import Shard, Split

SHARD_BYTES = 500_000_000  # what the Hub's own `push_to_hub` writes at most (datasets, config.MAX_SHARD_SIZE)
ROW_GROUP_RESIDUES = 16_000_000
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def checksum(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


class SplitWriter:
    """Writes `data/<split>-XXXXX-of-XXXXX.parquet` under a folder; holds one row group in memory."""

    def __init__(self, folder: Path, split: str, has_cluster: bool):
        self.folder, self.split = folder, split
        fields = [("id", pyarrow.string()), ("sequence", pyarrow.string()), ("length", pyarrow.int32())]
        self._schema = pyarrow.schema(fields + ([("cluster", pyarrow.string())] if has_cluster else []))
        self._rows: list[Row] = []
        self._num_waiting_residues = 0
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._files: list[Path] = []
        self._sequences_per_file: list[int] = []
        self._lengths: Counter[int] = Counter()
        self._letters_256 = np.zeros(256, dtype=np.int64)
        self.num_sequences = 0

    def write(self, rows: list[Row]) -> None:
        """Append rows, in their order."""
        self._rows.extend(rows)
        self.num_sequences += len(rows)
        self._num_waiting_residues += sum(len(row.residues) for row in rows)
        if self._num_waiting_residues >= ROW_GROUP_RESIDUES:
            self._write_row_group()

    def _write_row_group(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._files.append(self.folder / "data" / f"{self.split}-{len(self._files):05d}.parquet")
            self._sequences_per_file.append(0)
            self._writer = pyarrow.parquet.ParquetWriter(self._files[-1], self._schema, compression="zstd")
        lengths = [len(row.residues) for row in self._rows]
        columns = {
            "id": pyarrow.array([row.id for row in self._rows], pyarrow.string()),
            "sequence": pyarrow.array([row.residues for row in self._rows], pyarrow.binary()).cast(pyarrow.string()),
            "length": pyarrow.array(lengths, pyarrow.int32()),
            "cluster": pyarrow.array([row.cluster for row in self._rows], pyarrow.string()),
        }
        table = pyarrow.table({name: columns[name] for name in self._schema.names}, schema=self._schema)
        self._writer.write_table(table, row_group_size=len(self._rows))
        self._sequences_per_file[-1] += len(self._rows)
        self._lengths.update(lengths)
        residues_R = np.frombuffer(b"".join(row.residues for row in self._rows), dtype=np.uint8)
        self._letters_256 += np.bincount(residues_R, minlength=256)
        self._rows, self._num_waiting_residues = [], 0
        if os.path.getsize(self._files[-1]) >= SHARD_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def abort(self) -> None:
        """Let go of the open file, so that the folder can be removed on every system."""
        self._close_file()

    def close(self) -> Split:
        """Write what waits, give the files their final names, and return their summary. Needs at least one row."""
        self._write_row_group()
        self._close_file()
        shards = []
        for index, path in enumerate(self._files):
            final = path.with_name(f"{self.split}-{index:05d}-of-{len(self._files):05d}.parquet")
            path.rename(final)
            shards.append(
                Shard(f"data/{final.name}", self._sequences_per_file[index], final.stat().st_size, checksum(final))
            )
        letters = {chr(byte): int(self._letters_256[byte]) for byte in np.flatnonzero(self._letters_256)}
        return Split(
            sequences=self.num_sequences,
            residues=int(self._letters_256.sum()),
            length_quantiles=_quantiles(self._lengths),
            residue_counts=letters,
            shards=tuple(shards),
        )


def _quantiles(lengths: Counter[int]) -> dict[str, int]:
    """The lengths at QUANTILES: each is the length of a real sequence, the lower of two at a border."""
    values = np.array(sorted(lengths), dtype=np.int64)
    cumulative = np.cumsum([lengths[int(value)] for value in values])
    places = [int(quantile * (cumulative[-1] - 1)) for quantile in QUANTILES]
    return {
        f"{quantile:g}": int(values[np.searchsorted(cumulative, place, side="right")])
        for quantile, place in zip(QUANTILES, places, strict=True)
    }
