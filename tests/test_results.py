"""A result holds the vectors that were written, in the order of the records, whoever reads it; half of one is never seen.

The ids are of the kind that files hold: with spaces, slashes, letters of other alphabets, twice, like another's name.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hf_plm.config import UserError
from hf_plm.inference import formats, results
from hf_plm.inference.formats import FORMATS, check_format, finish, format_of, read_result
from hf_plm.inference.results import Tensor, WorkingFile, portions, reserve

IDS = ["sp|P1|A_HUMAN", "größe 蛋白", "a/b", "a_b", "twice", "twice", "twice_2", ".", "", "NP_1.2", "x" * 70, "a/b"]
NAMES = ["sp|P1|A_HUMAN", "größe 蛋白", "a_b_2", "a_b", "twice", "twice_3", "twice_2", "_", "__2", "NP_1.2", "x" * 70]
NAMES += ["a_b_3"]
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 0, 40, 8]
SUFFIXES = [".safetensors", ".h5", ".parquet", ".npz"]
PORTION_BYTES = 400  # the longest record is a portion of its own, and others are several in one
METADATA = {"model": "demo", "note": 'ein "Wort"', **{f"key{number}": "" for number in range(12)}}


@dataclass(frozen=True)
class Case:
    rows: str
    dtype: str = "float32"
    pooled: tuple[str, ...] = ()


CASES = {
    "residues": Case("residues"),
    "residues-float16": Case("residues", "float16"),
    "residues-mean-max": Case("residues", "float32", ("mean", "max")),
    "proteins": Case("proteins"),
    "proteins-float16-cls": Case("proteins", "float16", ("cls",)),
    "sites": Case("sites"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
suffixes = pytest.mark.parametrize("suffix", SUFFIXES)


def ids_of(case):
    if case.rows != "sites":
        return IDS
    return [f"{id_}_{letter}{position}" for id_, letter, position in zip(IDS, "STYSTYSTYSTY", range(7, 19), strict=True)]


def arrays_of(case, ids=None, lengths=LENGTHS, width=5):
    """Every tensor of a working file, with numbers that tell where they belong."""
    ids = ids_of(case) if ids is None else ids
    generator = np.random.default_rng(0)
    num_rows = sum(lengths) if case.rows == "residues" else len(ids)
    text = [id_.encode() for id_ in ids]
    arrays = {"embeddings": generator.normal(size=(num_rows, width)).astype(case.dtype)}
    arrays |= {name: generator.normal(size=(len(ids), width)).astype(case.dtype) for name in case.pooled}
    arrays["ids"] = np.frombuffer(b"".join(text), dtype=np.uint8)
    arrays["id_offsets"] = np.cumsum([0, *map(len, text)])
    arrays["lengths"] = np.array(lengths)
    arrays["windows"] = np.arange(1, len(ids) + 1, dtype=np.int32)
    arrays["offsets"] = np.cumsum([0, *lengths]) if case.rows == "residues" else np.arange(len(ids) + 1)
    if case.rows == "sites":
        arrays["site_position"] = np.arange(7, 19)
        arrays["site_residue"] = np.frombuffer(b"STYSTYSTYSTY", dtype=np.uint8)
    return arrays


def create(path, case, arrays):
    tensors = {name: Tensor(array.dtype.name, array.shape) for name, array in arrays.items()}
    return WorkingFile.create(path, tensors, {"rows": case.rows, **METADATA})


def write_working(path, case, arrays=None):
    """A whole working file, and the records that are in it."""
    arrays = arrays_of(case) if arrays is None else arrays
    with create(path, case, arrays) as file:
        for name, array in arrays.items():
            file.write(name, 0, array)
        return records_of(case, arrays, file.read_ids(0, file.num_records))


def records_of(case, arrays, ids):
    offsets = arrays["offsets"]
    records = []
    for index, id_ in enumerate(ids):
        rows = slice(offsets[index], offsets[index + 1]) if case.rows == "residues" else index
        pooled = {name: arrays[name][index] for name in case.pooled}
        records.append((id_, {"embeddings": arrays["embeddings"][rows], **pooled}))
    return records


def differences(expected, found, dtype=None):
    """What is not the same, in words: nothing, where ids, order, shapes, types and every bit agree."""
    found = list(found)
    if [id_ for id_, _ in expected] != [id_ for id_, _ in found]:
        return ["ids"]
    faults = []
    for (id_, one), (_, other) in zip(expected, found, strict=True):
        if one.keys() != other.keys():
            faults.append(f"{id_}: {sorted(other)}")
        for name in one.keys() & other.keys():
            wanted = one[name].astype(dtype or one[name].dtype)
            if (wanted.shape, wanted.dtype) != (other[name].shape, other[name].dtype) or (wanted != other[name]).any():
                faults.append(f"{id_}: {name}")
    return faults


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(formats, "PORTION_BYTES", PORTION_BYTES)


def finished(tmp_path, suffix, case):
    expected = write_working(tmp_path / "working", case)
    counts = []
    finish(tmp_path / "working", tmp_path / f"out{suffix}", counts.append)
    assert sum(counts) == len(expected)
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]
    return expected, tmp_path / f"out{suffix}"


@cases
@suffixes
def test_a_result_is_read_as_it_was_written(tmp_path, small_portions, case, suffix):
    expected, out = finished(tmp_path, suffix, case)
    dtype = np.float32 if suffix == ".parquet" else None
    assert differences(expected, read_result(out), dtype) == []
    foreign = {".safetensors": read_tensors, ".npz": read_tensors, ".h5": read_h5py, ".parquet": read_pandas}[suffix]
    assert differences(expected, foreign(out, case), dtype) == []


@suffixes
def test_two_rows_that_change_places_are_seen(tmp_path, small_portions, suffix):
    case = CASES["residues"]
    write_working(tmp_path / "working", case)
    with WorkingFile.open(tmp_path / "working") as file:
        file.write("embeddings", 6, file.read("embeddings", 6, 8)[::-1])
    finish(tmp_path / "working", tmp_path / f"out{suffix}", len_of)
    expected = records_of(case, arrays_of(case), IDS)
    assert differences(expected, read_result(tmp_path / f"out{suffix}")) == ["a/b: embeddings"]


def len_of(num_records):
    return num_records


def read_tensors(path, case):
    """By safetensors' own reader, or by NumPy's."""
    if path.suffix == ".safetensors":
        arrays = load_file(path)
        text = arrays["ids"].tobytes()
        edges = arrays["id_offsets"]
        ids = [text[a:b].decode() for a, b in zip(edges[:-1], edges[1:], strict=True)]
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"rows": case.rows, **METADATA}
    else:
        with np.load(path) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        ids = arrays["ids"].tolist()
        assert json.loads(str(arrays["metadata"])) == {"rows": case.rows, **METADATA}
    for name in ("lengths", "windows", *(["site_position", "site_residue"] if case.rows == "sites" else [])):
        assert np.array_equal(arrays[name], arrays_of(case)[name])
    return records_of(case, arrays, ids)


def read_h5py(path, case):
    import h5py

    with h5py.File(path) as file:
        assert dict(file.attrs) == {"rows": case.rows, **METADATA}
        groups = {name: file[name] for name in case.pooled}
        groups["embeddings"] = file[case.rows] if case.pooled else file
        if case.rows != "sites":
            assert list(groups["embeddings"]) == NAMES
        for index, (name, data_set) in enumerate(groups["embeddings"].items()):
            assert (data_set.attrs["length"], data_set.attrs["windows"]) == (LENGTHS[index], index + 1)
            assert isinstance(data_set.attrs["original_id"], str)
            yield data_set.attrs["original_id"], {vector: group[name][:] for vector, group in groups.items()}


def read_pandas(path, case):
    import pandas
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    assert json.loads(file.schema_arrow.metadata[b"hf_plm"]) == {"rows": case.rows, **METADATA}
    assert file.num_row_groups > 1
    return records_of_table(case, pandas.read_parquet(path).to_dict("records"))


def records_of_table(case, rows):
    """Records from rows of a table, whose vectors may be arrays, lists, or lists of either."""
    for index, row in enumerate(rows):
        assert (row["length"], row["windows"]) == (LENGTHS[index], index + 1)
        if case.rows == "sites":
            assert (row["protein"], row["residue"], row["position"]) == (IDS[index], "STY"[index % 3], index + 7)
        shape = (-1, 5) if case.rows == "residues" else (5,)
        flat = [np.asarray(list(row["embedding"]), dtype=np.float32).reshape(shape)]
        pooled = {name: np.asarray(row[name], dtype=np.float32) for name in case.pooled}
        yield row["id"], {"embeddings": flat[0], **pooled}


@cases
def test_polars_and_duckdb_read_the_parquet(tmp_path, small_portions, case):
    import duckdb
    import polars

    expected, out = finished(tmp_path, ".parquet", case)
    assert differences(expected, records_of_table(case, polars.read_parquet(out).to_dicts()), np.float32) == []
    table = duckdb.sql(f"SELECT * FROM '{out}'")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]
    assert differences(expected, records_of_table(case, rows), np.float32) == []


def test_ids_that_would_make_a_wide_array_stay_utf8(tmp_path, small_portions, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_IDS_BYTES", 1000)
    expected, out = finished(tmp_path, ".npz", CASES["residues-mean-max"])
    assert differences(expected, read_result(out)) == []
    with np.load(out) as loaded:
        assert loaded["ids"].dtype == np.uint8
        assert len(loaded["id_offsets"]) == len(IDS) + 1


@given(st.lists(st.text("ab_2/.", max_size=4), max_size=30))
def test_every_data_set_has_a_name_of_its_own(ids):
    names = formats._Names(ids)
    given_names = [names.name(id_) for id_ in ids]
    assert len(set(given_names)) == len(ids)
    for id_, name in zip(ids, given_names, strict=True):
        assert "/" not in name
        assert name not in ("", ".")
        if "/" not in id_ and id_ not in ("", "."):
            assert given_names[ids.index(id_)] == id_, "the first record of an id is found under it"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 200), st.sampled_from(["residues", "sites"]))
def test_portions_are_all_records_in_order(tmp_path_factory, lengths, most_bytes, rows):
    path = tmp_path_factory.mktemp("portions") / "working"
    case = Case(rows)
    arrays = arrays_of(Case("residues"), ["x"] * len(lengths), lengths, 2)
    with create(path, case, arrays) as file:
        file.write("offsets", 0, arrays["offsets"])
        cut = list(portions(file, most_bytes))
    assert [place for portion in cut for place in range(portion.begin, portion.end)] == list(range(len(lengths)))
    counts = lengths if rows == "residues" else [1] * len(lengths)
    for portion, after in zip(cut, [*cut[1:], None], strict=True):
        num_bytes = 8 * sum(counts[portion.begin : portion.end])
        assert num_bytes <= most_bytes or portion.end == portion.begin + 1
        assert after is None or num_bytes + 8 * counts[after.begin] > most_bytes, "one more would have fitted"


@given(st.permutations(range(12)))
def test_rows_may_come_in_any_order(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    case = CASES["residues"]
    arrays = arrays_of(case)
    write_working(folder / "whole", case, arrays)
    with create(folder / "parts", case, arrays) as file:
        for name in arrays.keys() - {"embeddings"}:
            file.write(name, 0, arrays[name])
        for record in order:
            first, last = arrays["offsets"][record : record + 2]
            file.write("embeddings", first, arrays["embeddings"][first:last])
        file.sync()
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
