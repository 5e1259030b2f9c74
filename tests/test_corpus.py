"""Random access to a prepared corpus."""

import multiprocessing
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from hf_plm.config import UserError
from hf_plm.data.corpus import Corpus, _batches, _TextColumn, open_corpus
from hf_plm.data.prepare import prepare
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    rng = np.random.default_rng(0)
    letters = np.array(list(STANDARD_RESIDUES))
    return ["".join(letters[rng.integers(0, 20, rng.integers(1, 60))]) for _ in range(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sequences: list[str]) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    text = "".join(f">p{number} é\n{sequence}\n" for number, sequence in enumerate(sequences))
    (root / "a.fasta").write_text(text, encoding="utf-8")
    prepare(root / "a.fasta", root / "mine", duplicates="keep")
    return root / "mine"


def _letters(corpus: Corpus, indices: np.ndarray) -> list[str]:
    residues_R, offsets = corpus.read(indices)
    assert residues_R.dtype == np.uint8
    assert offsets.dtype == np.int64
    return [residues_R[start:end].tobytes().decode() for start, end in pairwise(offsets)]


def test_reads_what_the_ids_say(folder: Path, sequences: list[str]) -> None:
    corpus = open_corpus(folder)
    rng = np.random.default_rng(1)
    indices = rng.integers(0, len(corpus), 500)
    read = _letters(corpus, indices)
    ids = corpus.ids(indices)
    assert read == [sequences[int(id_[1:])] for id_ in ids]
    assert [len(sequence) for sequence in read] == corpus.lengths[indices].tolist()
    assert read != _letters(corpus, indices[::-1]), "the twin: the order of the indices is the order of the sequences"
    assert corpus.lengths.dtype == np.int32


def test_reads_windows_alone(folder: Path, sequences: list[str]) -> None:
    corpus = open_corpus(folder)
    rng = np.random.default_rng(2)
    indices = rng.integers(0, len(corpus), 500)
    bounds = np.sort(rng.integers(0, corpus.lengths[indices] + 1, (2, 500)), axis=0)
    assert (bounds[0] == bounds[1]).any(), "windows of nothing, too"
    residues_R, offsets = corpus.read(indices, *bounds)
    whole = [sequences[int(id_[1:])] for id_ in corpus.ids(indices)]
    expected = [sequence[begin:end] for sequence, (begin, end) in zip(whole, bounds.T, strict=True)]
    assert [residues_R[begin:end].tobytes().decode() for begin, end in pairwise(offsets)] == expected
    assert len(residues_R) == int((bounds[1] - bounds[0]).sum())
    # A window that ends behind the sequence ends with it, and does not go on in the next one.
    assert len(corpus.read(indices, bounds[0], corpus.lengths[indices] + 7)[0]) == sum(
        len(sequence) - begin for sequence, begin in zip(whole, bounds[0], strict=True)
    )


def test_all_windows_are_asked_for_before_the_first_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that serves many reads at once is given them at once; one of nothing would mean the rest of the file."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be told what will be read")
    corpus, asked, done = open_corpus(folder), [], []

    def announce(descriptor: int, start: int, size: int, advice: int) -> None:
        asked.append((start, size, advice))
        done.append("asked for")

    monkeypatch.setattr("os.posix_fadvise", announce)

    class Watched:
        def __init__(self, file: pyarrow.NativeFile) -> None:
            self.file = file

        def read_at(self, size: int, start: int) -> bytes:
            if any(start == place and size == length for place, length, _ in asked):
                done.append("read")
            return self.file.read_at(size, start)

    chunks = corpus._sequences._chunks
    chunks[:] = [(Watched(file), *others) for file, *others in chunks]
    lengths = corpus.lengths[:4].tolist()
    begins, ends = np.array([0, 1, 0, 1]), np.array([lengths[0], 1, lengths[2], lengths[3]])
    corpus.read(np.arange(4), begins, ends)
    assert done == ["asked for"] * 3 + ["read"] * 3
    assert {advice for _, _, advice in asked} == {os.POSIX_FADV_WILLNEED}
    places = [(start - asked[0][0], size) for start, size, _ in asked]
    # Sequence 1 is not among them: nothing of it is read.
    assert places == [(0, lengths[0]), (sum(lengths[:2]), lengths[2]), (sum(lengths[:3]) + 1, lengths[3] - 1)]


def test_splits_are_all_there_and_apart(folder: Path, sequences: list[str]) -> None:
    train, validation = open_corpus(folder), open_corpus(folder, "validation")
    assert (train.name, validation.split) == ("mine", "validation")
    everything = [_letters(corpus, np.arange(len(corpus))) for corpus in (train, validation)]
    assert sorted(everything[0] + everything[1]) == sorted(sequences)
    assert train.fingerprint != validation.fingerprint


def test_no_indices_and_indices_outside(folder: Path) -> None:
    corpus = open_corpus(folder)
    residues_R, offsets = corpus.read(np.array([], dtype=np.int64))
    assert (len(residues_R), offsets.tolist()) == (0, [0])
    for outside in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus.read(np.array([0, outside]))


@pytest.mark.parametrize("text_type", [pyarrow.string(), pyarrow.large_string()])
def test_chunks_and_both_string_types(text_type: pyarrow.DataType, tmp_path: Path) -> None:
    words = ["", "MK", "é", "VLA", "", "W" * 300, "Y", ""]
    chunks = [words[:3], [], words[3:7], words[7:]]
    column = _TextColumn()
    for number in (0, 1):  # two files
        path = str(tmp_path / f"{number}.arrow")
        schema = pyarrow.schema([("other", pyarrow.int64()), ("text", text_type)])
        with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            for chunk in chunks[2 * number : 2 * number + 2]:
                arrays = [pyarrow.array(range(len(chunk)), pyarrow.int64()), pyarrow.array(chunk, text_type)]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        for batch, address in _batches(Path(path)):
            column.add(pyarrow.OSFile(path), address, batch.column("text"))
    indices = [7, 6, 0, 5, 3, 2, 2, 4, 1]
    assert [str(piece, "utf-8") for piece in column.pieces(np.array(indices))] == [words[index] for index in indices]


def test_a_row_group_is_one_chunk(folder: Path) -> None:
    """Opening costs time and memory by the chunk; datasets' own default makes three of these."""
    assert len(open_corpus(folder)._sequences._chunks) == 1


def _first_letters(corpus: Corpus, queue: "multiprocessing.Queue[list[str]]") -> None:
    queue.put(_letters(corpus, np.arange(5)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_worker_processes(folder: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    corpus = open_corpus(folder)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_first_letters, args=(corpus, queue))
    worker.start()
    assert queue.get(timeout=60) == _letters(corpus, np.arange(5))
    worker.join(60)


def test_pickles_as_a_name(folder: Path) -> None:
    corpus = open_corpus(folder)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert (again.fingerprint, len(again)) == (corpus.fingerprint, len(corpus))


def test_opening_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_corpus(folder, "validation")
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is not a prepared corpus: it has no corpus\.json \(`hf-plm prepare` makes one\)"
    ):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match="has no split 'test': it has train, validation"):
        open_corpus(folder, "test")
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    (copy / "corpus.json").write_bytes((folder / "corpus.json").read_bytes())
    shard = copy / "data" / "train-00000-of-00001.parquet"
    with pytest.raises(UserError, match=r"parquet is missing where corpus\.json says [\d,]+; prepare the corpus again"):
        open_corpus(copy)
    shard.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"parquet has 4 bytes where corpus\.json says"):
        open_corpus(copy)


def test_a_cache_file_cut_short_under_a_run_is_told(family_corpus: Path, tmp_path: Path) -> None:
    import shutil

    from hf_plm.data.corpus import _arrow_files

    folder = tmp_path / "corpus"
    shutil.copytree(family_corpus, folder)
    corpus = open_corpus(folder)
    (file,) = _arrow_files([str((folder / corpus.manifest.splits["train"].shards[0].file).resolve())], "train")
    everything = np.arange(len(corpus))
    whole = corpus.read(everything)[0]
    size = file.stat().st_size
    with open(file, "r+b") as cut:
        cut.truncate(size // 2)
    with pytest.raises(UserError, match=r"Sequence \d+ of the corpus cannot be read: .* cut short"):
        corpus.read(everything)
    assert len(whole)
