"""The file of an embedding run: which kind it is, how the working file becomes it, and how it is read again.

safetensors is the working file itself, renamed. The others are converted from it portion by portion, so the memory
taken is that of a portion or of the longest protein, and for a while the disk holds both. Under its own name the result
is always whole. One core takes 900 MB/s to HDF5, 500 to NumPy and 280 to Parquet; to HDF5 at most 3,500 records/s.

- HDF5: a data set for each record, as ProtT5 and bio_embeddings write it: (N, D) or (D), with the id as it was in the
  attribute `original_id` (ProtTrans, Embedding/prott5_embedder.py; bio_embeddings, embed/pipeline.py).
- Parquet: a row for each record, always in float32. DuckDB cannot read float16 in the encoding that makes floats small
  (BYTE_STREAM_SPLIT; it and Zstandard take 15% off float32), and what was float16 takes no more room in this one.
- NumPy: the tensors as they are, but `ids` as an array of strings.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.files import sync_folder
from hf_plm.inference.results import POOLED, RECORDS_AT_ONCE, Portion, WorkingFile, check_space, portions, reserve

FORMATS = {".safetensors": "safetensors", ".h5": "hdf5", ".hdf5": "hdf5", ".parquet": "parquet", ".npz": "npz"}
"""The kind of file by its suffix."""
PORTION_BYTES = 16_000_000
"""Of vectors at once; a row group of Parquet. Its writer takes five times that, most of it for levels of nesting."""
DATA_SET_BYTES = 600
"""What HDF5 takes for a data set with its name and attributes, beside the vectors and the id: 420 were found."""
LARGEST_IDS_BYTES = 1_000_000_000
"""NumPy pads all strings of an array to the longest, at 4 bytes a letter. Above this they stay UTF-8 with offsets."""

Record = tuple[str, dict[str, np.ndarray]]


def format_of(out: Path) -> str:
    """The kind of file that a path asks for. Raises `UserError` where its suffix is none of FORMATS."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out} ends in none of {', '.join(FORMATS)}; its suffix says what kind of file it becomes.")
    return FORMATS[out.suffix.lower()]


def check_format(kind: str) -> None:
    """Raises `UserError` where the package for this kind of file is missing: told before the work, not after."""
    assert kind in FORMATS.values(), kind
    if kind == "hdf5":
        try:
            import h5py  # type: ignore[import-untyped,import-not-found]  # noqa: F401
        except ImportError:
            raise UserError('HDF5 needs h5py, which is not installed: pip install "hf_plm[hdf5]".') from None


def finish(working: Path, out: Path, on_records: Callable[[int], object]) -> None:
    """Makes the whole working file the result `out`, replacing what is there; then the working file is gone.

    Both are in one folder, or at least on one file system. `on_records` is told each number of records that were added.
    A process that dies here leaves the working file, and `out` as it was or whole; of safetensors, one of the two.
    Raises `UserError` where `out` has another suffix or a package is missing, and `OSError` where the disk is full.
    """
    kind = format_of(out)
    check_format(kind)
    if kind == "safetensors":
        with WorkingFile.open(working) as file:
            file.sync()
            num_records = file.num_records
        os.replace(working, out)
        sync_folder(out.parent)
        on_records(num_records)
        return
    write = {"hdf5": _write_hdf5, "parquet": _write_parquet, "npz": _write_npz}[kind]
    temporary = out.with_name(f".{out.name}.writing")
    try:
        with WorkingFile.open(working, read_only=True) as file:
            check_space(out.parent, file.num_bytes)
            write(file, temporary, on_records)
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(out.parent)
    working.unlink()


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a result says of itself. Raises `UserError` where it is not one of ours, or a package is missing."""
    path = Path(path)
    kind = format_of(path)
    check_format(kind)
    try:
        if kind == "safetensors":
            with WorkingFile.open(path, read_only=True) as file:
                return file.metadata
        if kind == "hdf5":
            import h5py

            with h5py.File(path) as opened:
                return {name: str(value) for name, value in opened.attrs.items()}
        if kind == "parquet":
            import pyarrow.parquet

            return dict(json.loads(pyarrow.parquet.read_schema(path).metadata[b"hf_plm"]))
        with np.load(path) as arrays:
            return dict(json.loads(str(arrays["metadata"])))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        raise UserError(f"{path} is no result of hf-plm embed.") from None


def read_result(path: str | Path) -> Iterator[Record]:
    """Id and vectors of each record, in their order, whatever kind of file it is.

    `embeddings` is (N, D) of a result per residue and else (D); `mean`, `max` and `cls` are (D), where they are there.
    Raises `UserError` where the file is not one of ours, or a package is missing.
    """
    path = Path(path)
    kind = format_of(path)
    check_format(kind)
    read = {"hdf5": _read_hdf5, "parquet": _read_parquet, "npz": _read_npz, "safetensors": _read_safetensors}[kind]
    try:
        yield from read(path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a file of embeddings: {' '.join(str(error).split())}.") from error


def _read_safetensors(path: Path) -> Iterator[Record]:
    with WorkingFile.open(path, read_only=True) as file:
        for portion in portions(file, PORTION_BYTES):
            for id_, vectors in portion.records(file):
                # Copies, so that one record that is kept does not keep its portion.
                yield id_, {name: array.copy() for name, array in vectors.items()}


# HDF5


class _Names:
    """A name for each record's data set, from the ids alone and in their order.

    A record whose id can be a name has that name, the first of those that share it. The rest have `/` replaced by `_`
    and, where the name is taken or is another's id, `_2`, `_3` and so on: the ids a, a, a_2 give a, a_3, a_2.
    """

    def __init__(self, ids: Iterable[str]):
        self._waiting = {id_ for id_ in ids if self._cleaned(id_) == id_}
        self._last_number: dict[str, int] = {}  # of all names given

    @staticmethod
    def _cleaned(id_: str) -> str:
        name = id_.replace("/", "_").replace("\0", "_")
        return "_" if name in ("", ".") else name  # . is the group itself

    def name(self, id_: str) -> str:
        """The name of the next record."""
        name = self._cleaned(id_)
        if name == id_ and name in self._waiting:
            self._waiting.remove(name)
        elif name in self._waiting or name in self._last_number:
            number = self._last_number.get(name, 1) + 1
            while (numbered := f"{name}_{number}") in self._waiting or numbered in self._last_number:
                number += 1
            self._last_number[name] = number
            name = numbered
        self._last_number.setdefault(name, 1)
        return name


def _write_hdf5(file: WorkingFile, path: Path, on_records: Callable[[int], object]) -> None:
    import h5py

    names = _Names(file.ids())
    most_bytes = file.num_bytes + len(file.vectors) * (
        DATA_SET_BYTES * file.num_records + 3 * file.tensors["ids"].num_bytes
    )
    with h5py.File(path, "w", track_order=True) as result:
        reserve(path, most_bytes)  # on a full disk HDF5 prints for each data set, and then crashes the process
        result.attrs.update(file.metadata)
        groups = {"embeddings": result}
        if len(file.vectors) > 1:
            labels = {"embeddings": file.metadata["rows"]}
            groups = {name: result.create_group(labels.get(name, name), track_order=True) for name in file.vectors}
        for portion in portions(file, PORTION_BYTES):
            lengths = file.read("lengths", portion.begin, portion.end)
            windows = file.read("windows", portion.begin, portion.end)
            for index, (id_, vectors) in enumerate(portion.records(file)):
                name = names.name(id_)
                for vector, array in vectors.items():
                    data_set = groups[vector].create_dataset(name, data=array)
                    data_set.attrs["original_id"] = id_
                    data_set.attrs["length"] = lengths[index]
                    data_set.attrs["windows"] = windows[index]
            on_records(portion.end - portion.begin)
    os.truncate(path, os.path.getsize(path))  # gives back what was reserved and not taken


def _read_hdf5(path: Path) -> Iterator[Record]:
    import h5py

    with h5py.File(path, "r") as result:
        rows = result.attrs["rows"]
        pooled = [name for name in POOLED if isinstance(result.get(name), h5py.Group)]
        groups = {"embeddings": result[rows] if pooled else result, **{name: result[name] for name in pooled}}
        for name, data_set in groups["embeddings"].items():
            yield data_set.attrs["original_id"], {vector: group[name][()] for vector, group in groups.items()}


# Parquet


def _write_parquet(file: WorkingFile, path: Path, on_records: Callable[[int], object]) -> None:
    import pyarrow
    import pyarrow.parquet

    fields = [("id", pyarrow.string()), ("length", pyarrow.int64()), ("windows", pyarrow.int32())]
    plain = [name for name, _ in fields]
    repeated = []
    if file.metadata["rows"] == "sites":
        repeated = ["protein", "residue"]
        fields[1:1] = [("protein", pyarrow.string()), ("residue", pyarrow.string()), ("position", pyarrow.int64())]
    leaves = []
    for name in file.vectors:
        type_ = pyarrow.list_(pyarrow.float32(), file.tensors[name].shape[1])
        is_list = name == "embeddings" and file.is_per_residue
        fields.append((_column(name), pyarrow.list_(type_) if is_list else type_))
        leaves.append(_column(name) + ".list.element" * (1 + is_list))
    schema = pyarrow.schema(fields, metadata={b"hf_plm": json.dumps(file.metadata).encode()})
    with pyarrow.parquet.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=repeated or False,
        use_byte_stream_split=leaves,
        write_statistics=plain,
    ) as writer:
        # In float32, which rows of float16 become.
        share = file.tensors["embeddings"].little_endian.itemsize / 4
        for portion in portions(file, int(PORTION_BYTES * share)):
            table = pyarrow.table(_columns(file, portion), schema=schema)
            writer.write_table(table, row_group_size=portion.end - portion.begin)
            on_records(portion.end - portion.begin)


def _column(name: str) -> str:
    return "embedding" if name == "embeddings" else name


def _columns(file: WorkingFile, portion: Portion) -> dict[str, Any]:
    """The columns of a row group, by name."""
    import pyarrow

    ids = file.read_ids(portion.begin, portion.end)
    columns: dict[str, Any] = {"id": ids}
    columns["length"] = file.read("lengths", portion.begin, portion.end)
    columns["windows"] = file.read("windows", portion.begin, portion.end)
    if file.metadata["rows"] == "sites":
        residues = file.read("site_residue", portion.begin, portion.end).tobytes().decode("ascii")
        positions = file.read("site_position", portion.begin, portion.end).tolist()
        columns["residue"], columns["position"] = list(residues), positions
        suffixes = [f"_{residue}{position}" for residue, position in zip(residues, positions, strict=True)]
        assert all(id_.endswith(suffix) for id_, suffix in zip(ids, suffixes, strict=True)), "a site's id is another"
        columns["protein"] = [id_.removesuffix(suffix) for id_, suffix in zip(ids, suffixes, strict=True)]
    for name in file.vectors:
        rows = portion.rows(file, name).astype(np.float32, copy=False)
        vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
        if name == "embeddings" and file.is_per_residue:
            offsets = (portion.offsets - portion.offsets[0]).astype(np.int32)
            vectors = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), vectors)
        columns[_column(name)] = vectors
    return columns


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as result:
        vectors = [name for name in ("embeddings", *POOLED) if _column(name) in result.schema_arrow.names]
        for group in range(result.num_row_groups):
            table = result.read_row_group(group, columns=["id", *map(_column, vectors)])
            rows, offsets = {}, None
            for name in vectors:
                array = table[_column(name)].combine_chunks()
                if pyarrow.types.is_list(array.type):
                    offsets = array.offsets.to_numpy() - array.offsets[0].as_py()
                    array = array.flatten()
                rows[name] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
            for index, id_ in enumerate(table["id"].to_pylist()):
                where = index if offsets is None else slice(offsets[index], offsets[index + 1])
                record = {name: array[where if name == "embeddings" else index] for name, array in rows.items()}
                yield id_, {name: array.copy() for name, array in record.items()}


# NumPy


def _write_npz(file: WorkingFile, path: Path, on_records: Callable[[int], object]) -> None:
    """Members of known shape are streamed, which `np.savez` cannot."""
    longest = max(1, max(map(len, file.ids())))
    has_strings = 4 * longest * file.num_records <= LARGEST_IDS_BYTES
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in file.tensors.items():
            if has_strings and name in ("ids", "id_offsets"):
                continue
            with _new_member(archive, name, tensor.little_endian, tensor.shape) as member:
                if name == "embeddings":
                    for portion in portions(file, PORTION_BYTES):
                        member.write(portion.rows(file, name).data)
                        on_records(portion.end - portion.begin)
                    continue
                step = max(1, PORTION_BYTES // tensor.row_bytes)
                for begin in range(0, tensor.shape[0], step):
                    member.write(file.read(name, begin, min(begin + step, tensor.shape[0])).data)
        if has_strings:
            type_ = np.dtype(f"<U{longest}")
            with _new_member(archive, "ids", type_, (file.num_records,)) as member:
                step = min(RECORDS_AT_ONCE, max(1, PORTION_BYTES // type_.itemsize))
                for begin in range(0, file.num_records, step):
                    end = min(begin + step, file.num_records)
                    member.write(np.array(file.read_ids(begin, end), dtype=type_).data)
        text = np.array(json.dumps(file.metadata, ensure_ascii=False))
        with _new_member(archive, "metadata", text.dtype, ()) as member:
            member.write(text.tobytes())


def _new_member(archive: zipfile.ZipFile, name: str, type_: np.dtype, shape: tuple[int, ...]) -> IO[bytes]:
    member = archive.open(f"{name}.npy", "w", force_zip64=True)
    header = {"descr": np.lib.format.dtype_to_descr(type_), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member


class _Member:
    """An array of an .npz, read from its beginning on."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self._stream = archive.open(f"{name}.npy")
        np.lib.format.read_magic(self._stream)
        shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._stream)
        self._width = shape[1]

    def rows(self, num_rows: int) -> np.ndarray:
        """The next rows, (num_rows, D)."""
        data = bytearray(self._stream.read(num_rows * self._width * self._dtype.itemsize))
        return np.frombuffer(data, dtype=self._dtype).reshape(num_rows, self._width)


def _read_npz(path: Path) -> Iterator[Record]:
    with np.load(path) as small, zipfile.ZipFile(path) as archive:
        is_per_residue = json.loads(small["metadata"].item())["rows"] == "residues"
        ids = small["ids"].tolist()
        if "id_offsets" in small:
            text = bytes(ids)
            ids = [text[begin:end].decode() for begin, end in pairwise(small["id_offsets"].tolist())]
        counts = np.diff(small["offsets"]).tolist() if is_per_residue else [1] * len(ids)
        members = {name: _Member(archive, name) for name in ("embeddings", *POOLED) if name in small}
        for id_, num_rows in zip(ids, counts, strict=True):
            record = {name: member.rows(1)[0] for name, member in members.items() if name != "embeddings"}
            rows = members["embeddings"].rows(num_rows)
            yield id_, {"embeddings": rows if is_per_residue else rows[0], **record}
