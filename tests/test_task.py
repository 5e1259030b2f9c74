"""The three forms of a task, the real tables, and rows that contradict themselves."""

import numpy as np
import pytest

from hf_plm.config import UserError
from hf_plm.judging.probes.columns import Columns
from hf_plm.judging.probes.task import read_task


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


PEPTIDES = ["".join(letters) for letters in np.random.default_rng(0).choice(list("ACDEFGHIKL"), (60, 8))]


def table_of(tmp_path, column, cells, sequences=PEPTIDES):
    rows = [
        f"p{number} {sequence} {cell}" for number, (sequence, cell) in enumerate(zip(sequences, cells, strict=True))
    ]
    return written(tmp_path, "\n".join([f"id sequence {column}", *rows]) + "\n")


@pytest.mark.parametrize("column", ["label", "outcome"])
def test_names_as_long_as_peptides_are_names(tmp_path, column):
    path = table_of(tmp_path, column, ["positive", "negative"] * 30)
    task = read_task(path)
    assert (task.level, task.classes, len(task)) == ("protein", ("negative", "positive"), 60)
    assert "are taken for 2 names; --level residue" in task.notes[0]
    task = read_task(path, level="residue")
    assert (task.level, len(task)) == ("residue", 480)
    task = read_task(path, level="protein")
    assert (task.level, task.notes) == ("protein", ())


def test_labels_of_peptides_are_told_by_the_column(tmp_path):
    strings = ["".join(digits) for digits in np.random.default_rng(1).choice(list("01"), (60, 8))]
    for column in ("labels", "sites"):
        assert read_task(table_of(tmp_path, column, strings)).level == "residue"
    few = ["00000000"] * 50 + strings[:10]  # digits are no names, however few they are
    assert read_task(table_of(tmp_path, "sites", few)).level == "residue"
    with pytest.raises(UserError, match=r"line 2: the label '\d+' is as long as its sequence .* give --level residue"):
        read_task(table_of(tmp_path, "label", strings))
    assert read_task(table_of(tmp_path, "label", strings), level="residue").level == "residue"
    decimals = [f"{number:.6f}" for number in np.random.default_rng(2).random(60)]
    assert read_task(table_of(tmp_path, "outcome", decimals)).kind == "regression"
    with pytest.raises(UserError, match="line 2: p0 has 8 residues, and its column 'labels' 3 labels"):
        read_task(table_of(tmp_path, "labels", ["yes"] * 60))
    assert read_task(table_of(tmp_path, "labels", ["yes", "no"] * 30), level="protein").level == "protein"


@pytest.mark.parametrize("column", ["label", "labels", "outcome"])
@pytest.mark.parametrize("letters", ["01", "HEC", "0;1;"])
def test_labels_of_residues_that_are_one_too_few(tmp_path, column, letters):
    draw = np.random.default_rng(0)
    sequences = ["".join(draw.choice(list("ACDEFGHIKL"), 60)) for _ in range(40)]
    separator = ";" if ";" in letters else ""
    cells = [separator.join(draw.choice(list(letters.replace(";", "")), 59)) for _ in range(40)]
    path = table_of(tmp_path, column, cells, sequences)
    with pytest.raises(UserError, match=f"line 2: p0 has 60 residues, and its column '{column}' 59 labels"):
        read_task(path)
    with pytest.raises(UserError, match="59 labels"):
        read_task(path, level="residue")
    names = ["Mitochondrion_inner_membrane", "Endoplasmic_reticulum_lumen"]
    assert read_task(table_of(tmp_path, "location", names * 20, [one[:50] for one in sequences])).level == "protein"


def test_a_protein_without_labels_of_residues(tmp_path):
    task = read_task(written(tmp_path, "id sequence labels\np MKS 010\nq MKSV NA\n"))
    assert (task.ids, task.notes) == (("p",), ("4 residues have no label and are left out.",))


def test_levels_that_cannot_be(tmp_path):
    path = written(tmp_path, "id position sequence label\np 1 MK 1\n")
    with pytest.raises(UserError, match=r"lists sites .its column 'position'.; leave --level protein out"):
        read_task(path, level="protein")
    with pytest.raises(UserError, match="--level is one of protein, residue"):
        read_task(path, level="site")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("p MKAAA yes\nq GAAAA no\np MKAAA no", "line 4: p has the label 'no', and in line 2 'yes'"),
        ("MKAAA MKAAA yes\nMKAAA MKAAA no", "line 3: MKAAA has the label 'no', and in line 2 'yes'"),
    ],
)
def test_a_protein_that_contradicts_itself(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_task(written(tmp_path, f"id sequence label\n{rows}\n"))


def test_without_ids_a_protein_is_its_sequence(tmp_path):
    with pytest.raises(UserError, match="line 4: the same sequence has the label 'no', and in line 2 'yes'"):
        read_task(written(tmp_path, "sequence label\nMKAAA yes\nGAAAA no\nMKAAA no\n"))
    # Other ids may be other measurements, and keep together in any split.
    assert len(read_task(written(tmp_path, "id sequence label\na MKAAA yes\nb MKAAA no\n"))) == 2


def test_repeated_rows_are_left_out_and_counted(tmp_path):
    text = "id sequence label split\np MK 1.0 train\np MK 1 train\nq GA 0 train\np MK 1 test\nq GA - train\n"
    task = read_task(written(tmp_path, text))
    assert (task.ids, task.lines, task.splits) == (("p", "q", "p"), (2, 4, 5), ("train", "train", "test"))
    assert task.notes == (
        "1 of 5 rows repeat an earlier one and are left out.",
        "1 of 4 rows have no label and are left out.",
    )
    with pytest.raises(UserError, match="line 3: p is in cluster b, and before in a"):
        read_task(written(tmp_path, "id sequence label cluster\np MK 1 a\np MK 1 b\nq GA 0 b\n"))


def test_a_table_with_semicolons(tmp_path):
    path = written(tmp_path, "id;sequence;value\n" + "".join(f"p{n};MK{'A' * n};{n}.5\n" for n in range(12)))
    task = read_task(path)
    assert (task.kind, task.ids[0], task.labels_R[0]) == ("regression", "p0", 0.5)
    path.write_text(path.read_text().replace(".5", ",5"))
    with pytest.raises(UserError, match="line 2: '0,5' has a decimal comma"):
        read_task(path)


def test_another_reading_has_another_name(tmp_path):
    path = written(tmp_path, "id sequence label split\np MK 1 a\nq MV 0 b\n")
    assert read_task(path).name == "task"
    columns = Columns(label="label", split="none")
    assert read_task(path, columns, "binary", level="protein").name == "task_label_split-none_kind-binary_level-protein"


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


def test_labels_of_residues_are_compared_letter_by_letter(tmp_path):
    """As numbers in fp64 the two would be one."""
    sequence = "MK" * 20
    rows = f"p {sequence} {'1' * 40}\np {sequence} {'1' * 39}0\nq MKSTA 01010"
    with pytest.raises(UserError, match="line 3: p has the label"):
        read_task(written(tmp_path, f"id sequence labels\n{rows}\n"))


def test_variants_may_share_the_id_of_their_parent(tmp_path):
    rows = "\n".join(f"P1 MK{letter}A {number / 7}" for number, letter in enumerate("ACDEFGHIKLMNPQRSTVWY"))
    task = read_task(written(tmp_path, f"protein sequence label\n{rows}\n"))
    assert (len(task), task.kind) == (20, "regression")
    assert "Ids that stand for several sequences: 1;" in " ".join(task.notes)
