"""A prepared corpus, open for random access: the residues of any set of sequences as one array.

Storage is `datasets`: Parquet becomes Arrow files in its cache, once. Those are read at the places where the sequences
stand, and not mapped: all processes use the system's one cache of them, and the memory of each is the lengths, 4 bytes
a sequence. Mapped, 20 GB of sequences count as memory of every process that has seen them, and a read of 400 residues
brings 128 KB from the disk, or what else the system reads ahead. The sequences of a micro-batch come at 90 million
residues per second; Arrow's own `take` reaches 6 million, because it first joins all chunks of a column.
"""

import hashlib
import itertools
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc

from hf_plm.config import UserError
from hf_plm.data.manifest import Manifest, read_manifest

ROWS_OF_A_CHUNK = 1_000_000
"""More than a row group of Parquet has, so that a row group becomes one chunk of Arrow. With datasets' own 1,000 rows,
opening 65 million sequences took 10 seconds, a minute from a cold disk, and mapped 4 GB, page by page."""

_CAN_ANNOUNCE = hasattr(os, "posix_fadvise")
"""Whether the system can be told what will be read. Told of all windows of a micro-batch before the first is read, a
disk serves them together: 15 microseconds a sequence from a cold disk, where one after another takes 45."""


class Corpus:
    """One split of a prepared corpus. Made by `open_corpus`; pickles as the folder's name, so workers reopen it.

    lengths: int32 (N,), residues of each sequence. fingerprint: hex, equal only where the data files are equal.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest, files: list[Path]):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.name = manifest.name
        self.lengths = np.empty(manifest.splits[split].sequences, dtype=np.int32)
        self._sequences, self._ids = _TextColumn(), _TextColumn()
        end = 0
        for path in files:
            file = pyarrow.OSFile(str(path))
            for batch, address in _batches(path):
                begin, end = end, end + len(batch)
                self.lengths[begin:end] = _lengths(file, address, batch.column("length"))
                self._sequences.add(file, address, batch.column("sequence"))
                self._ids.add(file, address, batch.column("id"))
        assert end == len(self.lengths)
        checksums = " ".join(shard.sha256 for shard in manifest.splits[split].shards)
        self.fingerprint = hashlib.sha256(checksums.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        num_residues = int(self.lengths.sum(dtype=np.int64))
        return f"Corpus({self.name}, {self.split}: {len(self):,} sequences, {num_residues:,} residues)"

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open_corpus, (str(self.folder), self.split)

    def read(
        self, indices: np.ndarray, begins: np.ndarray | None = None, ends: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(residues uint8 (R,), offsets int64 (B+1,)) of the B sequences at `indices`: ASCII letters end to end,
        sequence b at `residues[offsets[b]:offsets[b + 1]]`, read-only. With `begins` and `ends`, (B,) each, those
        residues of each sequence alone. IndexError for an index outside 0 to N - 1."""
        pieces = self._sequences.pieces(indices, begins, ends)
        residues_R = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return residues_R, offsets

    def ids(self, indices: np.ndarray) -> list[str]:
        """The ids of the B sequences at `indices`."""
        return [str(piece, "utf-8") for piece in self._ids.pieces(indices)]


def _batches(path: Path) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """The record batches of an Arrow file, unread, and the address it is mapped at: what stands where."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    whole = pyarrow.py_buffer(mapped)
    for batch in pyarrow.ipc.open_stream(whole):
        yield batch, whole.address


def _lengths(file: pyarrow.NativeFile, address: int, chunk: pyarrow.Array) -> np.ndarray:
    """A chunk of int32 by one read, where the map would be read page by page."""
    assert chunk.type == pyarrow.int32()
    return np.frombuffer(file.read_at(4 * len(chunk), chunk.buffers()[1].address - address), np.int32)


class _TextColumn:
    """A column of strings as places in Arrow files, chunk by chunk."""

    def __init__(self) -> None:
        self._starts = [0]
        self._chunks: list[tuple[pyarrow.NativeFile, int, int, int, struct.Struct]] = []

    def add(self, file: pyarrow.NativeFile, address: int, chunk: pyarrow.Array) -> None:
        """The next chunk: strings in `file`, which is mapped at `address`."""
        _, offsets, text = chunk.buffers()
        pair = struct.Struct("<2q" if pyarrow.types.is_large_string(chunk.type) else "<2i")
        first_offset = offsets.address - address
        self._chunks.append((file, file.fileno(), first_offset, text.address - address if text else 0, pair))
        self._starts.append(self._starts[-1] + len(chunk))

    def pieces(
        self, indices: np.ndarray, begins: np.ndarray | None = None, ends: np.ndarray | None = None
    ) -> list[bytes]:
        """The bytes of the strings at `indices`, from `begins` to `ends` of each where these are given."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._starts[-1]:
            raise IndexError(
                f"expected indices from 0 to {self._starts[-1] - 1}, got {indices.min()} to {indices.max()}"
            )
        numbers = (np.searchsorted(self._starts, indices, side="right") - 1).tolist()
        first_bytes = itertools.repeat(0) if begins is None else begins.tolist()
        end_bytes = itertools.repeat(sys.maxsize) if ends is None else ends.tolist()
        spans = []
        for number, index, first, last in zip(numbers, indices.tolist(), first_bytes, end_bytes, strict=False):
            file, descriptor, first_offset, text, pair = self._chunks[number]
            place = index - self._starts[number]
            offsets = file.read_at(pair.size, first_offset + place * (pair.size // 2))
            begin, end = pair.unpack(offsets) if len(offsets) == pair.size else (0, -1)
            start, size = text + begin + first, min(begin + last, end) - begin - first
            spans.append((file, start, size))
            if _CAN_ANNOUNCE and size > 0:  # a size of 0 would mean the rest of the file
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)
        pieces = [file.read_at(size, start) if size >= 0 else b"" for file, start, size in spans]
        for index, piece, (_, _, size) in zip(indices, pieces, spans, strict=True):
            if len(piece) != size:
                raise UserError(
                    f"Sequence {index} of the corpus cannot be read: its file in the cache of the datasets library was "
                    "cut short since the run began; remove it (HF_DATASETS_CACHE, or ~/.cache/huggingface/datasets)."
                )
        return pieces


def open_corpus(folder: str | Path, split: str = "train") -> Corpus:
    """A split of a prepared corpus. UserError: no corpus there, no such split, a file missing or of another size."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise UserError(f"the corpus {folder} has no split {split!r}: it has {', '.join(manifest.splits)}.")
    files = []
    for shard in manifest.splits[split].shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            state = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is missing"
            raise UserError(f"{path} {state} where corpus.json says {shard.bytes:,}; prepare the corpus again.")
        files.append(str(path.resolve()))
    return Corpus(folder, split, manifest, _arrow_files(files, split))


def _arrow_files(files: list[str], split: str) -> list[Path]:
    """The Arrow files, in their order, that `datasets` has made of the Parquet files, or makes now."""
    import datasets
    from datasets.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    # The first opening of a corpus would otherwise show three progress bars of datasets' own.
    verbosity, had_no_bars = get_verbosity(), datasets.are_progress_bars_disabled()
    set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        # What `load_dataset` does, but for mapping the result.
        builder = datasets.load_dataset_builder("parquet", data_files={split: files}, writer_batch_size=ROWS_OF_A_CHUNK)
        builder.download_and_prepare()
    except OSError as error:
        raise UserError(
            f"The cache of the datasets library cannot be written ({error}); "
            "set HF_HOME to a folder with room that can be written."
        ) from None
    finally:
        set_verbosity(verbosity)
        if not had_no_bars:
            datasets.enable_progress_bars()
    return sorted(Path(builder.cache_dir).glob(f"{builder.dataset_name}-{split}*.arrow"))
