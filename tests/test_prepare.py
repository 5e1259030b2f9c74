"""From records to a corpus folder: what is kept, held out, refused and written."""

import json
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfApi
from support.hub_server import HubServer

from hf_plm.config import UserError
from hf_plm.data import heldout, shards
from hf_plm.data import prepare as module
from hf_plm.data.heldout import hash_of
from hf_plm.data.manifest import Manifest, read_manifest, report
from hf_plm.data.prepare import ensure_prepared, prepare
from hf_plm.data.sources import find_sources
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES


def proteins(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array(list(STANDARD_RESIDUES))
    return ["".join(letters[rng.integers(0, 20, rng.integers(30, 120))]) for _ in range(number)]


def write_fasta(path: Path, sequences: list[str]) -> Path:
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)), encoding="utf-8")
    return path


def split_of(folder: Path, split: str) -> list[str]:
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return [sequence for file in files for sequence in pyarrow.parquet.read_table(file)["sequence"].to_pylist()]


def rejected(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "rejected.tsv").read_text(encoding="utf-8").splitlines()[1:]]


def test_the_folder_is_complete_and_says_what_it_holds(tmp_path: Path) -> None:
    sequences = proteins(3000)
    manifest = prepare(write_fasta(tmp_path / "a.fasta", sequences), tmp_path / "mine")
    folder = tmp_path / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "corpus.json", "data", "rejected.tsv"]
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    table = pyarrow.parquet.read_table(folder / manifest.splits["train"].shards[0].file)
    assert table.column_names == ["id", "sequence", "length"]
    assert table["length"].to_pylist() == [len(sequence) for sequence in table["sequence"].to_pylist()]
    train, validation = split_of(folder, "train"), split_of(folder, "validation")
    assert len(validation) == 30
    assert sorted(train + validation) == sorted(sequences)
    assert read_manifest(folder) == manifest == Manifest(**vars(manifest))
    split = manifest.splits["train"]
    assert (split.sequences, split.residues) == (2970, sum(map(len, train)))
    assert sum(split.residue_frequencies.values()) == pytest.approx(1)
    lengths = sorted(map(len, train))
    assert (split.length_quantiles["0"], split.length_quantiles["1"]) == (lengths[0], lengths[-1])
    assert split.length_quantiles["0.5"] == lengths[(len(lengths) - 1) // 2]
    text = report(manifest)
    assert max(map(len, text.splitlines())) <= 80
    assert "mine: 3,000 records read, 3,000 kept" in text
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for expected in ("license: unknown", "1K<n<10K", "path: data/validation-*", "so relatives of it may be in train"):
        assert expected in card
    assert str(tmp_path) not in card + (folder / "corpus.json").read_text(encoding="utf-8")


def test_held_out_are_the_smallest_hashes_whatever_the_order(tmp_path: Path) -> None:
    sequences = proteins(2500)
    expected = sorted(sequences, key=lambda sequence: hash_of(sequence.encode()))[:25]
    shuffled = list(np.random.default_rng(1).permutation(sequences))
    for name, given_order in (("a", sequences), ("b", shuffled)):
        prepare(write_fasta(tmp_path / f"{name}.fasta", given_order), tmp_path / name)
        assert split_of(tmp_path / name, "validation") == expected
        assert set(split_of(tmp_path / name, "train")).isdisjoint(expected)
    assert expected != sequences[:25], "the twin: the first ones would depend on the order"


def test_the_same_file_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "a.fasta", proteins(200))
    for parent in ("x", "y"):
        prepare(source, tmp_path / parent / "mine")
    files = [path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_whole_clusters_are_held_out(tmp_path: Path) -> None:
    sequences = proteins(1200)
    clusters = [f"c{number // 7}" for number in range(1200)]
    table = pyarrow.table({"Entry": [f"p{i}" for i in range(1200)], "Sequence": sequences, "cluster": clusters})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    manifest = prepare(tmp_path / "a.parquet", tmp_path / "out")
    cluster_of = dict(zip(sequences, clusters, strict=True))
    held_out = {cluster_of[sequence] for sequence in split_of(tmp_path / "out", "validation")}
    train = {cluster_of[sequence] for sequence in split_of(tmp_path / "out", "train")}
    assert manifest.split_kind == "cluster"
    assert held_out.isdisjoint(train)
    assert 20 <= manifest.splits["validation"].sequences <= 40
    prepare(write_fasta(tmp_path / "a.fasta", sequences), tmp_path / "twin")
    by_sequence = {cluster_of[sequence] for sequence in split_of(tmp_path / "twin", "validation")}
    assert not by_sequence.isdisjoint(cluster_of[sequence] for sequence in split_of(tmp_path / "twin", "train"))


def test_duplicates_are_dropped_listed_and_never_straddle(tmp_path: Path) -> None:
    sequences = proteins(100)
    doubled = [*sequences, *(sequence.lower() for sequence in sequences[:30])]
    source = write_fasta(tmp_path / "a.fasta", doubled)
    dropped = prepare(source, tmp_path / "drop")
    assert (dropped.counts.read, dropped.counts.kept, dropped.counts.duplicates) == (130, 100, 30)
    assert rejected(tmp_path / "drop")[0] == ["a.fasta", "101", "p100", "", "same sequence before"]
    assert len(rejected(tmp_path / "drop")) == 30
    kept = prepare(source, tmp_path / "keep", duplicates="keep")
    assert (kept.counts.kept, kept.counts.duplicates) == (130, 30)
    train, validation = split_of(tmp_path / "keep", "train"), split_of(tmp_path / "keep", "validation")
    assert sorted(train + validation) == sorted(sequence.upper() for sequence in doubled)
    assert set(train).isdisjoint(validation)


def test_given_validation_and_test_leave_train(tmp_path: Path) -> None:
    sequences = proteins(60)
    train = write_fasta(tmp_path / "train.fasta", sequences)
    validation = write_fasta(tmp_path / "valid.fasta", sequences[:10] + proteins(5, seed=1))
    test = write_fasta(tmp_path / "test.fasta", sequences[5:12])
    manifest = prepare(train, tmp_path / "out", validation=validation, test=test)
    assert manifest.split_kind == "given"
    assert {name: split.sequences for name, split in manifest.splits.items()} == {
        "train": 48,
        "validation": 10,
        "test": 7,
    }
    assert manifest.counts.in_other_split == 12 + 5
    splits = [set(split_of(tmp_path / "out", name)) for name in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)), "no sequence is in two splits"
    with pytest.raises(UserError, match=r"No sequence is left for train: of 60 read from train\.fasta, all are empty"):
        prepare(train, tmp_path / "all", validation=train)


def test_rejected_records_are_listed_and_the_rest_goes_on(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "a.fasta", [*proteins(40), "MK V?L", "", "MK*V"])
    counts = prepare(source, tmp_path / "out").counts
    assert (counts.read, counts.kept, counts.empty, counts.illegal) == (43, 40, 1, {"*": 1, "?": 1})
    assert rejected(tmp_path / "out") == [
        ["a.fasta", "41", "p40", "4", "illegal character '?'"],
        ["a.fasta", "42", "p41", "", "no residues"],
        ["a.fasta", "43", "p42", "3", "illegal character '*'"],
    ]
    text = report(read_manifest(tmp_path / "out"))
    assert "1  illegal character '?'" in text


def test_too_many_rejected_is_one_sentence_and_leaves_the_list_only(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "a.fasta", [*proteins(40), *["MK?"] * 5])
    with pytest.raises(UserError) as raised:
        prepare(source, tmp_path / "out")
    assert str(raised.value) == (
        "5 of 45 records are rejected for illegal characters or no residues, more than 10%, the first: a.fasta, "
        "record 41 (p40), position 3: '?'; --data.illegal x writes X for such characters, --data.max_rejected raises "
        "the limit. "
        f"All are listed in {tmp_path / 'out.rejected.tsv'}."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fasta", "out.rejected.tsv"]
    assert prepare(source, tmp_path / "more", max_rejected=0.2).counts.kept == 40
    mapped = prepare(source, tmp_path / "x", illegal="x")
    assert (mapped.counts.kept, mapped.counts.illegal_to_x) == (41, 5)
    assert "5 illegal characters were written as X" in mapped.warnings


def test_dna_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    dna = ["".join(rng.choice(list("ACGT"), 200)) for _ in range(20)]
    warning = "warning: dna.fasta: almost only A C G T (100% of the letters, U and N included), so it looks like DNA"
    prepare(write_fasta(tmp_path / "dna.fasta", dna), tmp_path / "out")
    assert warning in capsys.readouterr().err
    prepare(write_fasta(tmp_path / "dna.fasta", dna + proteins(20)), tmp_path / "out")
    assert warning not in capsys.readouterr().err


def test_an_exception_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_fasta(tmp_path / "a.fasta", proteins(50))
    prepare(source, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def stop(manifest: Manifest) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "dataset_card", stop)
    for out in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / out, duplicates="keep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fasta", "out"]
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_only_a_corpus_is_replaced(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "a.fasta", proteins(50))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(
        UserError, match="thesis exists and is not a prepared corpus; give another folder, or remove it"
    ):
        prepare(source, tmp_path / "thesis")
    (tmp_path / "out").mkdir()
    prepare(source, tmp_path / "out")
    other = write_fasta(tmp_path / "b.fasta", proteins(60))
    with pytest.raises(UserError, match=r"out is a corpus of other sources \(a\.fasta\); give another folder"):
        prepare(other, tmp_path / "out")
    assert read_manifest(tmp_path / "out").counts.kept == 50
    other.unlink()
    assert prepare(write_fasta(source, proteins(70)), tmp_path / "out").counts.kept == 70
    assert read_manifest(tmp_path / "out").counts.kept == 70
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fasta", "out", "thesis"]


def test_ensure_prepared_prepares_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_fasta(tmp_path / "my proteins.fasta", proteins(50))
    first = ensure_prepared([str(source)], tmp_path / "cache")
    assert first.parent == tmp_path / "cache"
    assert first.name.startswith("my_proteins-")
    capsys.readouterr()
    assert ensure_prepared(source, tmp_path / "cache") == first
    assert capsys.readouterr().out == f"Data: {first}, prepared before from the same files\n"
    assert ensure_prepared(first, tmp_path / "cache") == first, "a prepared corpus is used as it is"
    assert ensure_prepared(source, tmp_path / "cache", duplicates="keep") != first, "other options, other corpus"
    write_fasta(source, proteins(51))
    assert ensure_prepared(source, tmp_path / "cache") != first, "a changed file, another corpus"


def _ensure(source: Path, cache: Path, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    ensure_prepared(source, cache)


def test_two_processes_that_prepare_at_once_share_one_corpus(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "a.fasta", proteins(500))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_ensure, args=(source, tmp_path / "cache", barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert read_manifest(folder).counts.kept == 500


def test_sources_of_all_kinds_give_the_same_corpus(tmp_path: Path) -> None:
    sequences = proteins(80)
    columns = {"ID": [f"p{number}" for number in range(80)], "Protein_Sequence": sequences}
    (tmp_path / "fasta").mkdir()
    write_fasta(tmp_path / "fasta" / "a.faa", sequences[:50])
    write_fasta(tmp_path / "fasta" / "b.fa", sequences[50:])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    expected = None
    for number, source in enumerate(("fasta", "fasta/*.f*", "a.parquet", "saved")):
        out = tmp_path / f"out{number}"
        prepare(str(tmp_path / source), out)
        splits = (split_of(out, "train"), split_of(out, "validation"))
        expected = expected or splits
        assert splits == expected
        assert len(splits[1]) == 20


def test_own_splits_of_a_data_set_are_used_unless_others_are_given(tmp_path: Path) -> None:
    parts = {"train": proteins(40), "valid": proteins(8, seed=1), "extra": proteins(3, seed=2)}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"seq": part}) for name, part in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    manifest = prepare(tmp_path / "saved", tmp_path / "out")
    assert manifest.split_kind == "given"
    assert split_of(tmp_path / "out", "validation") == parts["valid"]
    assert any("splits of other names left out: extra" in warning for warning in manifest.warnings)
    prepare(tmp_path / "out", tmp_path / "again")  # a corpus is a folder of Parquet files with splits
    assert split_of(tmp_path / "again", "validation") == parts["valid"]
    other = write_fasta(tmp_path / "other.fasta", proteins(5, seed=3))
    assert prepare(tmp_path / "out", tmp_path / "new", validation=other).splits["validation"].sequences == 5


def test_sources_that_are_wrong(tmp_path: Path) -> None:
    def sentence(source: object, **options: str) -> str:
        with pytest.raises(UserError) as raised:
            prepare(source, tmp_path / "out", **options)  # type: ignore[arg-type]
        return str(raised.value).replace(str(tmp_path), "HERE")

    pyarrow.parquet.write_table(pyarrow.table({"a": ["M"], "n": [1]}), tmp_path / "odd.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "odd.parquet").read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    assert sentence([]).startswith("There is no training data; ")
    assert sentence(tmp_path / "x.fasta") == "There is no file or folder HERE/x.fasta."
    assert sentence("data/x.fasta.gz") == "There is no file or folder data/x.fasta.gz."
    assert sentence(str(tmp_path / "*.fa")) == "No file matches HERE/*.fa."
    assert sentence(tmp_path / "empty").startswith(
        "The folder HERE/empty holds no FASTA file (.fasta .fa .faa .fas, also"
    )
    assert sentence(tmp_path / "odd.parquet") == (
        "odd.parquet has no column whose name says that it holds sequences; give one of a, n by --data.sequence_column."
    )
    assert (
        sentence(tmp_path / "odd.parquet", sequence_column="b")
        == "odd.parquet has no column 'b': its columns are a, n."
    )
    assert sentence(tmp_path / "odd.parquet", sequence_column="n") == (
        "odd.parquet, row 1: column 'n' should hold text, not int; name another by --data.sequence_column."
    )
    assert sentence(tmp_path / "cut.parquet").startswith("HERE/cut.parquet is not a whole Parquet file")
    assert sentence(tmp_path / "odd.parquet", illegal="drop") == "data.illegal is reject or x, not 'drop'."
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_the_hub_does_not_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, revision: str | None) -> list[str]:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(UserError, match=r"^user/name is no file or folder here, and .* \(no route to the Hub\)\.$"):
        find_sources("user/name", "train")


def test_shards_are_named_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "MOST", 100)
    monkeypatch.setattr(shards, "ROW_GROUP_RESIDUES", 5000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    monkeypatch.setattr("hf_plm.data.intake.BATCH_RECORDS", 50)
    sequences = proteins(2000)
    manifest = prepare(write_fasta(tmp_path / "a.fasta", sequences), tmp_path / "out")
    split = manifest.splits["train"]
    assert len(split.shards) > 3
    assert all(shard.bytes < 40_000 for shard in split.shards)
    assert split.shards[1].file == f"data/train-00001-of-{len(split.shards):05d}.parquet"
    assert sum(shard.sequences for shard in split.shards) == split.sequences == 1980
    assert sorted(split_of(tmp_path / "out", "train") + split_of(tmp_path / "out", "validation")) == sorted(sequences)


def test_a_manifest_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    prepare(write_fasta(tmp_path / "a.fasta", proteins(50)), tmp_path / "out")
    path = tmp_path / "out" / "corpus.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**raw, "format_version": 99}), encoding="utf-8")
    with pytest.raises(
        UserError, match="is a corpus of format 99, this hf_plm reads up to 1: prepare it again or update"
    ):
        read_manifest(tmp_path / "out")


def test_a_hub_data_set_is_streamed_at_its_revision(hub: HubServer, tmp_path: Path) -> None:
    sequences = proteins(50)
    stored = datasets.Dataset.from_dict({"seq": sequences, "n": [0] * 50})
    stored.push_to_hub("tester/plain", private=True)
    api = HfApi()
    api.create_tag("tester/plain", tag="v1", repo_type="dataset")
    datasets.Dataset.from_dict({"seq": ["MKV"], "n": [0]}).push_to_hub("tester/plain")
    manifest = prepare("tester/plain@v1", tmp_path / "out")
    assert (manifest.sources[0].format, manifest.sources[0].name, manifest.counts.kept) == (
        "hub",
        "tester/plain@v1",
        50,
    )
    assert sorted(split_of(tmp_path / "out", "train") + split_of(tmp_path / "out", "validation")) == sorted(sequences)
