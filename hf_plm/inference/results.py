"""The vectors of an embedding run, in a safetensors file whose rows are filled in any order by any number of processes.

All ids and lengths are known before the first vector, so the header is written first and every row has its place in
the file: nothing is gathered, kept in memory or put together at the end. `formats` turns the whole file into a result.

The tensors, for P records and R rows of width D:
- `embeddings` (R, D) float32 or float16: what `metadata["rows"]` says. `residues`: one row per residue, all proteins
  end to end; `proteins`: one per protein; `sites`: one per site, its residue's vector and then its protein's mean.
- `offsets` (P + 1) int64: record i has the rows offsets[i] to offsets[i + 1]; only residues need them.
- `ids` uint8 and `id_offsets` (P + 1) int64: the ids end to end in UTF-8, and where each begins.
- `lengths` (P) int64: residues of the protein; `windows` (P) int32: overlapping windows it was embedded in, or 1.
- `mean`, `max`, `cls` (P, D), where they were asked for beside the rows.
- `site_position` (P) int64 and `site_residue` (P) uint8 of sites, whose ids are `{protein}_{residue}{position}`.
"""

import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from hf_plm.config import UserError

POOLED = ("mean", "max", "cls")
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
"""NumPy's name of a type, and that of safetensors."""
LARGEST_HEADER = 100_000_000  # bytes; safetensors opens none above (MAX_HEADER_SIZE in its tensor.rs)
ONE_CALL = 2**30  # bytes; one call of the system moves less than 2 GB
RECORDS_AT_ONCE = 65_536
KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of Linux


@dataclass(frozen=True)
class Tensor:
    """Type and shape of a tensor, which are known before its values."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def little_endian(self) -> np.dtype:
        """The type as it lies in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        return self.little_endian.itemsize * prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


class WorkingFile:
    """A safetensors file, read and written by rows. Each process opens it for itself and writes rows of its own."""

    def __init__(self, path: Path, file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str], first: int):
        self.path, self.tensors, self.metadata = path, tensors, metadata
        self._file = file
        self._places: dict[str, int] = {}
        for name, tensor in tensors.items():
            self._places[name] = first
            first += tensor.num_bytes
        self.num_bytes = first

    @classmethod
    def create(cls, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "WorkingFile":
        """Writes the header and takes the space of all rows, which are zeros. Replaces a file that was there.

        The file gets its name when it has its header and size. Raises `OSError` (ENOSPC) where the disk is too small.
        """
        # Large items first: then each tensor begins at a multiple of its item size, as readers that map the file want.
        names = sorted(tensors, key=lambda name: -tensors[name].little_endian.itemsize)
        ordered = {name: tensors[name] for name in names}
        header = _header(ordered, metadata)
        temporary = path.with_name(f".{path.name}.creating")
        file = open(temporary, "w+b", buffering=0)  # noqa: SIM115
        try:
            working = cls(path, file, ordered, dict(metadata), len(header))
            file.truncate(working.num_bytes)
            reserve(temporary, working.num_bytes)
            _write(file, np.frombuffer(header, dtype=np.uint8), 0)
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return working

    @classmethod
    def open(cls, path: Path, read_only: bool = False, is_shared: bool = False) -> "WorkingFile":
        """A file that is there, or a finished result; `is_shared` where other processes write to it at the same time.

        Raises `UserError` where it is another kind of file, or cut.
        """
        # Without O_DSYNC, an NFS client may write a whole page back where some of its bytes are another machine's.
        flags = os.O_DSYNC if is_shared and hasattr(os, "O_DSYNC") else 0
        file = open(path, "rb" if read_only else "r+b", 0, opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115
        try:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size) if size <= LARGEST_HEADER else b"")
            metadata = header.pop("__metadata__", {})
            names = sorted(header, key=lambda name: header[name]["data_offsets"])
            types = {theirs: ours for ours, theirs in DTYPES.items()}
            tensors = {name: Tensor(types[header[name]["dtype"]], tuple(header[name]["shape"])) for name in names}
            if not {"embeddings", "ids", "id_offsets"} <= tensors.keys() or "rows" not in metadata:
                raise KeyError("rows")
        except (ValueError, KeyError, TypeError, AttributeError):
            file.close()
            raise UserError(f"{path} is not a safetensors file of embeddings.") from None
        working = cls(path, file, tensors, metadata, 8 + size)
        there = os.fstat(file.fileno()).st_size
        if there != working.num_bytes:
            file.close()
            raise UserError(
                f"{path} has {there:,} bytes, and its header promises {working.num_bytes:,}; make it again."
            )
        return working

    def write(self, name: str, first_row: int, array: np.ndarray) -> None:
        """Puts rows in their place. float32 is rounded to float16 where the tensor is.

        Raises `UserError` where a number is too large for float16.
        """
        tensor = self.tensors[name]
        rounds = tensor.dtype == "float16" and array.dtype == np.float32
        assert array.dtype == tensor.little_endian or rounds, f"{name}: {array.dtype}"
        assert array.shape[1:] == tensor.shape[1:], f"{name}: {array.shape}"
        assert 0 <= first_row <= first_row + len(array) <= tensor.shape[0], f"{name}: {first_row} + {len(array)}"
        if rounds:
            array = _rounded(name, array)
        rows = np.ascontiguousarray(array, dtype=tensor.little_endian)
        _write(self._file, rows.reshape(-1).view(np.uint8), self._places[name] + first_row * tensor.row_bytes)

    def read(self, name: str, begin: int, end: int) -> np.ndarray:
        """The rows from `begin` to `end`, which is not among them."""
        tensor = self.tensors[name]
        assert 0 <= begin <= end <= tensor.shape[0], f"{name}: {begin} to {end}"
        rows = np.empty((end - begin, *tensor.shape[1:]), dtype=tensor.little_endian)
        _read(self._file, rows.reshape(-1).view(np.uint8), self._places[name] + begin * tensor.row_bytes)
        return rows

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        getattr(os, "fdatasync", os.fsync)(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "WorkingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_records(self) -> int:
        return self.tensors["id_offsets"].shape[0] - 1

    @property
    def vectors(self) -> list[str]:
        """Names of the tensors with vectors: `embeddings`, and the pooled ones beside it."""
        return ["embeddings", *(name for name in POOLED if name in self.tensors)]

    @property
    def is_per_residue(self) -> bool:
        """Whether a record has a row for each residue, and not one row."""
        return self.metadata["rows"] == "residues"

    def read_ids(self, begin: int, end: int) -> list[str]:
        """The ids of the records from `begin` to `end`."""
        offsets = self.read("id_offsets", begin, end + 1).tolist()
        text = self.read("ids", offsets[0], offsets[-1]).tobytes()
        return [text[a - offsets[0] : b - offsets[0]].decode() for a, b in pairwise(offsets)]

    def ids(self) -> Iterator[str]:
        """All ids in their order."""
        for begin in range(0, self.num_records, RECORDS_AT_ONCE):
            yield from self.read_ids(begin, min(begin + RECORDS_AT_ONCE, self.num_records))


@dataclass(frozen=True)
class Portion:
    """The records from `begin` to `end`; `offsets[i]` to `offsets[i + 1]` are the rows of the i-th of them."""

    begin: int
    end: int
    offsets: np.ndarray

    def rows(self, file: WorkingFile, name: str) -> np.ndarray:
        """Their rows of one tensor of vectors."""
        if name == "embeddings":
            return file.read(name, int(self.offsets[0]), int(self.offsets[-1]))
        return file.read(name, self.begin, self.end)

    def records(self, file: WorkingFile) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Id and vectors of each: (rows, D) of `embeddings` where a record has many, else (D)."""
        arrays = {name: self.rows(file, name) for name in file.vectors}
        places = (self.offsets - self.offsets[0]).tolist()
        for index, id_ in enumerate(file.read_ids(self.begin, self.end)):
            vectors = {name: array[index] for name, array in arrays.items() if name != "embeddings"}
            rows = slice(places[index], places[index + 1]) if file.is_per_residue else index
            yield id_, {"embeddings": arrays["embeddings"][rows], **vectors}


def portions(file: WorkingFile, most_bytes: int) -> Iterator[Portion]:
    """Cuts the records into runs whose vectors take at most `most_bytes`, or that are a single record."""
    row_bytes = file.tensors["embeddings"].row_bytes
    pooled_bytes = sum(file.tensors[name].row_bytes for name in file.vectors[1:])
    begin = 0
    while begin < file.num_records:
        end = min(begin + RECORDS_AT_ONCE, file.num_records)
        offsets = file.read("offsets", begin, end + 1) if file.is_per_residue else np.arange(begin, end + 1)
        num_bytes = (offsets[1:] - offsets[0]) * row_bytes + np.arange(1, len(offsets)) * pooled_bytes
        num_records = max(1, int(np.searchsorted(num_bytes, most_bytes, side="right")))
        yield Portion(begin, begin + num_records, offsets[: num_records + 1])
        begin += num_records


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises `OSError` (ENOSPC) where a file of that size cannot fit."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < num_bytes:  # some network file systems say nothing: 0 of 0
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes are needed and {disk.free:,} are free", str(folder))


def reserve(path: Path, num_bytes: int) -> None:
    """Takes the space for a file that is there, so that a full disk is met now and not after hours; its size stays.

    Raises `OSError`: ENOSPC, or EDQUOT where the user may have no more. A file system that cannot reserve is only asked
    how much is free. Not by `os.posix_fallocate`: for those, such as NFS before 4.2, glibc writes into every block.
    """
    # Asked first, because a reservation that fails may have filled the disk for a moment, for everyone.
    check_space(path.parent, num_bytes)
    if sys.platform != "linux":
        return
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with open(path, "r+b") as file:
        while fallocate(file.fileno(), KEEP_SIZE, 0, num_bytes) != 0:
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), str(path))


def _header(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for name, tensor in tensors.items():
        offsets = [place, place + tensor.num_bytes]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= LARGEST_HEADER
    return len(text).to_bytes(8, "little") + text


def _rounded(name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    lost = np.isinf(half) & np.isfinite(array)
    if lost.any():
        largest = np.abs(array[lost]).max()
        raise UserError(f"{largest:.4g} in {name} is beyond float16, which ends at 65,504; take --dtype float32.")
    return half


def _write(file: BinaryIO, data: np.ndarray, place: int) -> None:
    while len(data):
        if hasattr(os, "pwrite"):
            done = os.pwrite(file.fileno(), data[:ONE_CALL].data, place)
        else:  # Windows
            file.seek(place)
            done = file.write(data[:ONE_CALL].data)
        data, place = data[done:], place + done


def _read(file: BinaryIO, data: np.ndarray, place: int) -> None:
    while len(data):
        if hasattr(os, "preadv"):
            done = os.preadv(file.fileno(), [data[:ONE_CALL].data], place)
        else:  # Windows
            file.seek(place)
            done = file.readinto(data[:ONE_CALL].data)  # type: ignore[attr-defined]
        assert done, "the file was cut while it was open"
        data, place = data[done:], place + done
