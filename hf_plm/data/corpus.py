"""A prepared corpus, open for random access: the residues of any set of sequences as one array.

Storage is `datasets`: Parquet becomes a memory-mapped Arrow file in its cache, once, so that 20 GB of sequences cost no
memory and all processes of a machine share the same pages. A batch is gathered from Arrow's buffers with one copy, at
300 million residues per second and more for 64 sequences and up; Arrow's own `take` reaches 6 million here, because it
first joins the hundred or more chunks of the column.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from hf_plm.config import UserError
from hf_plm.data.manifest import Manifest, read_manifest


class Corpus:
    """One split of a prepared corpus. Made by `open_corpus`; pickles as the folder's name, so workers reopen it.

    lengths: int32 (N,), residues of each sequence. fingerprint: hex, equal only where the data files are equal.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest, table: pyarrow.Table):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.name = manifest.name
        self.lengths: np.ndarray = table.column("length").to_numpy().astype(np.int32, copy=False)
        self._sequences = _TextColumn(table.column("sequence"))
        self._ids = _TextColumn(table.column("id"))
        checksums = " ".join(shard.sha256 for shard in manifest.splits[split].shards)
        self.fingerprint = hashlib.sha256(checksums.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        num_residues = int(self.lengths.sum(dtype=np.int64))
        return f"Corpus({self.name}, {self.split}: {len(self):,} sequences, {num_residues:,} residues)"

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open_corpus, (str(self.folder), self.split)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residues uint8 (R,), offsets int64 (B+1,)) of the B sequences at `indices`: ASCII letters end to end,
        sequence b at `residues[offsets[b]:offsets[b + 1]]`, read-only. IndexError outside 0 to N - 1."""
        pieces = self._sequences.pieces(indices)
        residues_R = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return residues_R, offsets

    def ids(self, indices: np.ndarray) -> list[str]:
        """The ids of the B sequences at `indices`."""
        return [str(piece, "utf-8") for piece in self._ids.pieces(indices)]


class _TextColumn:
    """A column of strings as views of Arrow's own memory, chunk by chunk; no byte is copied until it is read."""

    def __init__(self, column: pyarrow.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in chunks])
        self._starts: list[int] = [0, *self._ends.tolist()]
        self._chunks: list[tuple[memoryview, memoryview]] = []
        for chunk in chunks:
            _, offsets, text = chunk.buffers()
            width = 8 if pyarrow.types.is_large_string(chunk.type) else 4
            view = memoryview(offsets)[chunk.offset * width : (chunk.offset + len(chunk) + 1) * width]
            self._chunks.append((view.cast("B").cast("q" if width == 8 else "i"), memoryview(text or b"")))

    def pieces(self, indices: np.ndarray) -> list[memoryview]:
        """The bytes of the strings at `indices`, uncopied."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._starts[-1]:
            raise IndexError(
                f"expected indices from 0 to {self._starts[-1] - 1}, got {indices.min()} to {indices.max()}"
            )
        pieces = []
        numbers = np.searchsorted(self._ends, indices, side="right").tolist()
        for number, index in zip(numbers, indices.tolist(), strict=True):
            offsets, text = self._chunks[number]
            place = index - self._starts[number]
            pieces.append(text[offsets[place] : offsets[place + 1]])
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
    return Corpus(folder, split, manifest, _arrow_table(files, split))


def _arrow_table(files: list[str], split: str) -> pyarrow.Table:
    import datasets
    from datasets.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    # The first opening of a corpus would otherwise show three progress bars of datasets' own.
    verbosity, had_no_bars = get_verbosity(), datasets.are_progress_bars_disabled()
    set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except OSError as error:
        raise UserError(
            f"The cache of the datasets library cannot be written ({error}); "
            "set HF_HOME to a folder with room that can be written."
        ) from None
    finally:
        set_verbosity(verbosity)
        if not had_no_bars:
            datasets.enable_progress_bars()
    return dataset.data.table
