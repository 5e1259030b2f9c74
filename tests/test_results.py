"""A result holds the vectors that were written, in the order of the records, whoever reads it, and is never half there.

The ids are of the kind that files hold: with spaces, slashes, letters of other alphabets, twice, like another's name.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hf_plm.config import UserError
from hf_plm.inference import formats
from hf_plm.inference.formats import FORMATS, check_format, finish, format_of, read_result
from hf_plm.inference.results import Tensor, WorkingFile, portions, reserve

IDS = ["sp|P1|A_HUMAN", "größe 蛋白", "a/b", "a_b", "twice", "twice", "twice_2", ".", "", "NP_1.2", "x" * 70, "a/b"]
NAMES = ["sp|P1|A_HUMAN", "größe 蛋白", "a_b_2", "a_b", "twice", "twice_3", "twice_2", "_", "__2", "NP_1.2", "x" * 70]
NAMES += ["a_b_3"]
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 0, 40, 8]
SUFFIXES = [".safetensors", ".h5", ".parquet", ".npz"]
PORTION_BYTES = 100  # several records, or less than one
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
    return [
        f"{id_}_{letter}{position}" for id_, letter, position in zip(IDS, "STYSTYSTYSTY", range(7, 19), strict=True)
    ]


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
        ids = [text[begin:end].decode() for begin, end in pairwise(arrays["id_offsets"])]
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
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        columns = list(map(group.column, range(group.num_columns)))
        vectors = [column for column in columns if "BYTE_STREAM_SPLIT" in column.encodings]
        assert len(vectors) == 1 + len(case.pooled)
        num_bytes = 4 * (
            sum(column.num_values for column in vectors) - group.num_rows
        )  # a record without rows counts 1
        assert num_bytes <= PORTION_BYTES or group.num_rows == 1
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


def test_a_large_npz_has_large_members_and_its_ids_in_utf8(tmp_path, small_portions, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_IDS_BYTES", 1000)
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", 100)  # instead of 2 GB, which a streamed member must say beforehand
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


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 25), st.sampled_from(["residues", "sites"]))
def test_portions_are_all_records_in_order(tmp_path_factory, lengths, num_rows, rows):
    path, most_bytes = tmp_path_factory.mktemp("portions") / "working", 8 * num_rows
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


WRITER = """
import sys
import numpy as np
from hf_plm.inference.results import WorkingFile

path, rank = sys.argv[1], int(sys.argv[2])
with WorkingFile.open(path) as file:
    for first in range(rank * 7, 7000, 14):
        file.write("embeddings", first, np.full((7, 5), first, dtype=np.float32))
    file.sync()
"""


def test_two_processes_fill_one_file(tmp_path):
    case = Case("proteins")
    create(tmp_path / "working", case, arrays_of(case, ["x"] * 7000, [1] * 7000)).close()
    command = [sys.executable, "-c", WRITER, tmp_path / "working"]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    with WorkingFile.open(tmp_path / "working", read_only=True) as file:
        rows = file.read("embeddings", 0, 7000)
    assert np.array_equal(rows, np.repeat(np.arange(7000) // 7 * 7, 5).reshape(7000, 5))


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path):
    for pooled in ((), ("mean", "cls")):
        write_working(tmp_path / "working", Case("sites", "float16", pooled))
        raw = (tmp_path / "working").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert size % 8 == 0
        header = json.loads(raw[8 : 8 + size])
        assert header.pop("__metadata__") == {"rows": "sites", **METADATA}
        for entry in header.values():
            assert entry["data_offsets"][0] % (int(entry["dtype"][1:]) // 8) == 0


def test_what_float16_cannot_hold_is_refused(tmp_path):
    case = Case("proteins", "float16", ("mean",))
    with create(tmp_path / "working", case, arrays_of(case)) as file:
        file.write("mean", 0, np.full((1, 5), 65504, dtype=np.float32))
        file.write("mean", 1, np.array([[np.inf, -np.inf, np.nan, 1e-9, 0.1]], dtype=np.float32))
        assert np.array_equal(
            file.read("mean", 0, 2),
            np.array([[65504] * 5, [np.inf, -np.inf, np.nan, 0, 0.1]], np.float16),
            equal_nan=True,
        )
        with pytest.raises(UserError, match=r"-?7e\+04 in mean is beyond float16.*--dtype float32\.$"):
            file.write("mean", 0, np.array([[0, 1, -70000, 3, 4]], dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "first_row", "array"),
    [
        ("embeddings", 0, np.zeros((1, 5), np.float64)),
        ("embeddings", 0, np.zeros((1, 5), np.float16)),
        ("embeddings", 0, np.zeros((1, 4), np.float32)),
        ("embeddings", 0, np.zeros(5, np.float32)),
        ("embeddings", 11, np.zeros((2, 5), np.float32)),
        ("embeddings", -1, np.zeros((1, 5), np.float32)),
        ("lengths", 0, np.zeros(1, np.int32)),
    ],
)
def test_rows_of_another_kind_are_not_written(tmp_path, name, first_row, array):
    write_working(tmp_path / "working", Case("proteins"))
    before = (tmp_path / "working").read_bytes()
    with WorkingFile.open(tmp_path / "working") as file, pytest.raises(AssertionError):
        file.write(name, first_row, array)
    assert (tmp_path / "working").read_bytes() == before


def test_other_files_are_refused_in_a_sentence(tmp_path):
    write_working(tmp_path / "cut.safetensors", Case("proteins"))
    os.truncate(tmp_path / "cut.safetensors", 700)
    save_file({"weight": np.zeros(3)}, tmp_path / "weights.safetensors")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("text.safetensors", "text.npz", "text.h5", "text.parquet", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b">P1\nMKT" * 100)
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "none.h5", tmp_path / "none.safetensors"]:
        with pytest.raises(UserError, match=r"\.$"):
            next(read_result(path))


def test_the_suffix_says_what_kind_of_file_it_is():
    assert {suffix: format_of(Path(f"a.b{suffix.upper()}")) for suffix in FORMATS} == FORMATS
    with pytest.raises(UserError, match=r"out\.csv ends in none of \.safetensors, \.h5, \.hdf5, \.parquet, \.npz;"):
        format_of(Path("out.csv"))


def test_a_missing_h5py_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for kind in ("safetensors", "parquet", "npz"):
        check_format(kind)
    for refused in (lambda: check_format("hdf5"), lambda: finish(tmp_path / "working", tmp_path / "out.h5", len_of)):
        with pytest.raises(UserError, match=r'pip install "hf_plm\[hdf5\]"\.$'):
            refused()


def test_results_need_neither_torch_nor_transformers(tmp_path):
    write_working(tmp_path / "working", Case("proteins"))
    missing = ["torch", "transformers", "pyarrow", "h5py"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from hf_plm.inference.formats import finish\n"
    code += "from pathlib import Path; finish(Path('working'), Path('out.npz'), str)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out.npz").is_file()


def test_a_disk_that_is_too_small_is_met_at_the_start(tmp_path, monkeypatch):
    num_rows = 2 * shutil.disk_usage(tmp_path).total // 20
    with pytest.raises(OSError, match="bytes are needed") as error:
        WorkingFile.create(tmp_path / "working", {"embeddings": Tensor("float32", (num_rows, 5))}, {})
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    # HDF5 cannot stop in the middle: what it takes beside the vectors is asked for as well.
    write_working(tmp_path / "working", Case("proteins"))
    monkeypatch.setattr(formats, "DATA_SET_BYTES", shutil.disk_usage(tmp_path).total)
    with pytest.raises(OSError, match="bytes are needed"):
        finish(tmp_path / "working", tmp_path / "out.h5", len_of)
    assert [path.name for path in tmp_path.iterdir()] == ["working"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_space_is_taken_and_what_is_left_of_it_given_back(tmp_path):
    (tmp_path / "probe").touch()
    tool = shutil.which("fallocate")
    if tool is None or subprocess.run([tool, "--keep-size", "--length", "4096", tmp_path / "probe"]).returncode:
        pytest.skip("this file system cannot")
    reserve(tmp_path / "probe", 10_000_000)
    assert (tmp_path / "probe").stat().st_size == 0
    assert (tmp_path / "probe").stat().st_blocks * 512 >= 10_000_000
    case = Case("proteins")
    create(tmp_path / "working", case, arrays_of(case, ["x"] * 2000, [1] * 2000, 500)).close()
    assert (tmp_path / "working").stat().st_blocks * 512 >= (tmp_path / "working").stat().st_size >= 4_000_000
    finish(tmp_path / "working", tmp_path / "out.h5", len_of)
    found = (tmp_path / "out.h5").stat()
    assert found.st_size <= found.st_blocks * 512 < found.st_size + 100_000


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import h5py, pandas, pyarrow.parquet
from hf_plm.inference import formats

formats.PORTION_BYTES = 400
folder, suffix = Path(sys.argv[1]), sys.argv[2]
num_steps = 0
while True:
    attempt = folder / str(num_steps)
    attempt.mkdir()
    shutil.copy(folder / "working", attempt)
    (attempt / f"out{suffix}").write_bytes(b"what was there")
    child = os.fork()
    if child == 0:
        steps = iter(range(num_steps))

        def step(event, arguments):
            # Files that are opened, renamed and removed, and each portion.
            if event in ("records", "os.rename", "os.remove", "os.truncate") or (
                event == "open" and str(attempt) in str(arguments[0])
            ):
                if next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        formats.finish(attempt / "working", attempt / f"out{suffix}", lambda _: step("records", None))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    num_steps += 1
print(num_steps)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@suffixes
def test_a_kill_leaves_a_whole_file_or_none(tmp_path, small_portions, suffix):
    expected = write_working(tmp_path / "working", CASES["residues"])
    whole = (tmp_path / "working").read_bytes()
    command = [sys.executable, "-c", KILLED, tmp_path, suffix]
    num_steps = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert num_steps >= (3 if suffix == ".safetensors" else 7)
    dtype = np.float32 if suffix == ".parquet" else None
    states = set()
    for number in range(num_steps):
        working, out = tmp_path / str(number) / "working", tmp_path / str(number) / f"out{suffix}"
        replaced = out.read_bytes() != b"what was there"
        states.add((working.exists(), replaced))
        if replaced:
            assert differences(expected, read_result(out), dtype) == [], "under its name it is whole"
        if working.exists():
            assert working.read_bytes() == whole
            finish(working, out, len_of)
        assert differences(expected, read_result(out), dtype) == []
        assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert states == {(True, False), (False, True) if suffix == ".safetensors" else (True, True)}


CONVERTED = """
import re, sys
from pathlib import Path
import h5py, pandas, pyarrow.parquet
from hf_plm.inference.formats import finish
from hf_plm.inference.results import WorkingFile

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

before = peak()
if sys.argv[2] == "whole":
    with WorkingFile.open(Path(sys.argv[1])) as file:
        rows = file.read("embeddings", 0, file.tensors["embeddings"].shape[0])
else:
    finish(Path(sys.argv[1]), Path(sys.argv[2]), str)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB of vectors."""
    case, lengths = Case("residues", "float32", ("mean",)), [200] * 500
    arrays = arrays_of(case, [f"P{number}" for number in range(500)], lengths, 1)
    row = np.random.default_rng(0).normal(size=500).astype(np.float32)
    arrays["embeddings"] = np.broadcast_to(row, (100_000, 500))
    path = tmp_path_factory.mktemp("large") / "working"
    write_working(path, case, arrays)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("suffix", ["whole", ".h5", ".parquet", ".npz"])
def test_memory_does_not_grow_with_the_file(tmp_path, large, suffix):
    os.link(large, tmp_path / "working")
    out = suffix if suffix == "whole" else tmp_path / f"out{suffix}"
    command = [sys.executable, "-c", CONVERTED, tmp_path / "working", out]
    megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert megabytes > 190 if suffix == "whole" else megabytes < 150
