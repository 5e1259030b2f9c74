"""The three forms of a task, the real tables, and rows that contradict themselves."""

import numpy as np
import pytest

from hf_plm.config import UserError
from hf_plm.judging.probes.task import Columns, read_task


def written(tmp_path, text, name="task.tsv"):
    path = tmp_path / name
    path.write_text(text.replace(" ", "\t"))
    return path


def test_a_label_for_each_protein(tmp_path):
    path = written(tmp_path, "id location split sequence\np1 Nucleus train MK\np2 Golgi test ga*\np3 - test VV\n")
    task = read_task(path)
    assert (task.level, task.kind, task.classes) == ("protein", "binary", ("Golgi", "Nucleus"))
    assert (task.ids, task.sequences, task.splits) == (("p1", "p2"), ("MK", "GA"), ("train", "test"))
    assert (task.labels_R.tolist(), task.lines) == ([1, 0], (2, 3))
    assert task.notes == ("1 of 3 rows have no label and are left out.",)


def test_a_label_for_each_residue(tmp_path):
    task = read_task(written(tmp_path, "id sequence labels\np1 MKS 0-1\np2 GA 10\n"))
    assert (task.level, task.kind) == ("residue", "binary")
    assert task.proteins_R.tolist() == [0, 0, 1, 1]
    assert task.positions_R.tolist() == [0, 2, 0, 1]
    assert task.labels_R.tolist() == [0, 1, 1, 0]
    only = task.residues("SG")
    assert (only.positions_R.tolist(), only.labels_R.tolist()) == ([2, 0], [1, 1])
    few = task.proteins(np.array([1]))
    assert (few.ids, few.proteins_R.tolist(), few.labels_R.tolist()) == (("p2",), [0, 0], [1, 0])


def test_a_number_for_each_residue(tmp_path):
    task = read_task(written(tmp_path, "id sequence values\np1 MKS ;-1.5;2e1\np2 GA 3;4\n"))
    assert (task.level, task.kind) == ("residue", "regression")
    assert task.labels_R.tolist() == [-1.5, 20, 3, 4]
    assert task.positions_R.tolist() == [1, 2, 0, 1]


def test_sites(tmp_path):
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">sp|P1|ONE first\nMSTY\n>two\nGGS\n")
    path = written(tmp_path, "protein position residue label\nP1 2 S 1\ntwo 3 s 0\nP1 4.0 Y 0\n")
    task = read_task(path, proteins=fasta)
    assert task.level == "residue"
    assert [(task.ids[p], i, y) for p, i, y in zip(task.proteins_R, task.positions_R, task.labels_R, strict=True)] == [
        ("P1", 1, 1),
        ("two", 2, 0),
        ("P1", 3, 0),
    ]
    # Of positives alone, the other residues of these proteins are the negatives.
    task = read_task(written(tmp_path, "protein site sequence\nP1 2 MSTY\n"), sites="ST")
    assert (task.positions_R.tolist(), task.labels_R.tolist()) == ([1, 2], [1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id label\np 1\n", "has no column sequence or seq"),
        ("id sequence a b\np MK 1 2\n", "say which it is with --label of a, b"),
        ("id sequence label\n", "no rows"),
        ("id sequence label\np M1K 1\n", "line 2: Residues .* not '1' at position 2. --illegal x"),
        ("id sequence label\np * 1\n", "line 2: the sequence is empty"),
        ("id sequence labels\np MKS 010\nq MKS 01\n", "line 3: q has 3 residues, and its column 'labels'"),
        ("id position label\np 1 1\n", "--proteins FASTA"),
        ("id position sequence label\np x MK 1\n", "line 2: a position is a number from 1, not 'x'"),
        ("id position sequence label\np 3 MK 1\n", "line 2: p has 2 residues, and none at position 3"),
        ("id position sequence aa label\np 1 MK K 1\n", "line 2: p has M at position 1, not K"),
        ("id position sequence label\np 1 MK 1\np 1 MK 0\n", "line 3: p has position 1 twice, before in line 2"),
        ("id position sequence label\np 1 MK 1\np 2 MV 0\n", "line 3: p has another sequence than in line 2"),
        ("id position sequence label cluster\np 1 MK 1 a\np 2 MK 0 b\n", "line 3: p is in cluster b, and before in a"),
    ],
)
def test_what_does_not_fit(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_task(written(tmp_path, text))


def test_columns_that_are_not_there(tmp_path):
    path = written(tmp_path, "id sequence label\np MK 1\nq MV 0\n")
    for columns in (Columns(label="tm"), Columns(split="x"), Columns(cluster="x")):
        with pytest.raises(UserError, match="has no column"):
            read_task(path, columns)
    with pytest.raises(UserError, match="--kind is one of"):
        read_task(path, kind="ordinal")
    with pytest.raises(UserError, match="labels of residues"):
        read_task(path).residues("S")


def test_clusters_that_are_not_known(tmp_path):
    text = "id position sequence label cluster\np 1 MK 1 NA\np 2 MK 0 a\nq 1 MV 0 -\nr 1 MA 0 NA\n"
    assert read_task(written(tmp_path, text)).clusters == ("a", "", "")


def test_sequences_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match="leave --proteins out"):
        read_task(written(tmp_path, "id position sequence label\np 1 MK 1\n"), proteins=tmp_path / "p.fasta")


def test_folds_beside_a_test_set_are_a_split(tmp_path):
    text = "id label fold sequence\np 0 1 MK\nq 1 2 MV\nr 0 test MA\n"
    assert read_task(written(tmp_path, text)).splits == ("1", "2", "test")


def test_a_fold_of_scope_is_no_split(tmp_path):
    text = "id class fold sequence\np a a.1 MK\nq b b.1 MV\n"
    task = read_task(written(tmp_path, text), Columns(label="class"))
    assert task.splits is None
    assert "'fold' holds no numbers" in task.notes[0]
    assert read_task(written(tmp_path, text.replace(".1", "")[:15] + text[15:].replace("a.1", "1").replace("b.1", "2")),
                     Columns(label="class")).splits == ("1", "2")  # fmt: skip


REAL = [
    ("residue/binding_bindpredict", "labels_metal", "residue", "binary", 2, 239_602),
    ("residue/disorder_chezod", None, "residue", "regression", 0, 144_782),
    ("residue/ppi_sites_graphppis", None, "residue", "binary", 2, 151_495),
    ("residue/phospho_ST_musite", None, "residue", "binary", 2, 239_514),
    ("protein/ec_number", None, "protein", "multiclass", 100, 5_793),
    ("protein/scl_deeploc", None, "protein", "multiclass", 11, 8_275),
    ("protein/scope35", "class", "protein", "multiclass", 7, 11_392),
    ("protein/thermostability_tm", "tm", "protein", "regression", 0, 9_271),
]


@pytest.mark.parametrize(("name", "label", "level", "kind", "num_classes", "num_rows"), REAL)
def test_real_tables(real_data, name, label, level, kind, num_classes, num_rows):
    task = read_task(real_data / "probes" / f"{name}.tsv.gz", Columns(label=label))
    assert (task.level, task.kind, len(task.classes), len(task)) == (level, kind, num_classes, num_rows)
