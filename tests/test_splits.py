"""Folds that keep relatives together, and splits that leak."""

import gzip
import os
import stat

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_plm.config import UserError
from hf_plm.judging.probes import splits as tested
from hf_plm.judging.probes.columns import Columns
from hf_plm.judging.probes.splits import POOLED, by_kmers, joined, plan
from hf_plm.judging.probes.task import Task, read_task, side


def made(ids, sequences, labels, splits=None, clusters=None, kind="binary"):
    classes = () if kind == "regression" else tuple(sorted({str(label) for label in labels}))
    return Task(
        "t",
        "t.tsv",
        "protein",
        kind,
        classes,
        tuple(ids),
        tuple(sequences),
        tuple(range(2, 2 + len(ids))),
        splits and tuple(splits),
        clusters and tuple(clusters),
        np.arange(len(ids)),
        np.zeros(len(ids), dtype=int),
        np.array(labels),
    )


def random_proteins(count, seed=0, length=60):
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for _ in range(count)]


@pytest.fixture(autouse=True)
def without_mmseqs(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)


def check_folds(found, names_of):
    """Each protein is tested once, and nothing that is fitted on shares a name with what judges it."""
    tested_P = np.concatenate([one.tests[POOLED] for one in found.rounds])
    assert sorted(tested_P.tolist()) == list(range(len(names_of[0])))
    for one in found.rounds:
        assert len(one.inner) >= 2
        for fit, held in [(one.train, one.tests[POOLED]), *one.inner]:
            assert len(fit)
            assert len(held)
            for names in names_of:
                assert not {names[row] for row in fit} & {names[row] for row in held}
        for fit, held in one.inner:
            assert set(fit) | set(held) <= set(one.train)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=40, max_size=90),
    st.integers(2, 4),
    st.sampled_from(["binary", "multiclass", "regression"]),
    st.integers(0, 3),
)
def test_no_fold_shares_a_cluster_or_a_sequence(clusters, folds, kind, seed):
    draw = np.random.default_rng(seed)
    sequences = draw.choice(random_proteins(400, length=20), len(clusters)).tolist()
    labels = draw.integers(0, 2 if kind == "binary" else 4, len(clusters))
    task = made(range(len(clusters)), sequences, labels, clusters=[f"c{one}" for one in clusters], kind=kind)
    groups = joined([np.array(clusters), np.unique(sequences, return_inverse=True)[1]])
    # Sequences may join all clusters to one, and no fold is made of a group that is half of all.
    assume(len(set(groups)) >= folds + 4)
    assume(3 * np.bincount(groups).max() <= len(groups))
    check_folds(plan(task, folds, seed=seed), (clusters, sequences))


def test_the_property_breaks_without_groups(monkeypatch):
    """Where what is joined were apart, the check above would find it."""
    clusters = [f"c{index % 12}" for index in range(60)]
    task = made(range(60), random_proteins(60), np.arange(60) % 2, clusters=clusters)
    check_folds(plan(task, 3), (clusters,))
    monkeypatch.setattr(tested, "joined", lambda keys: np.arange(len(keys[0])))
    with pytest.raises(AssertionError):
        check_folds(plan(task, 3), (clusters,))


@pytest.mark.parametrize("program", [False, True])
def test_relatives_without_a_cluster_are_kept_together(program, tmp_path, monkeypatch):
    """Half of the proteins have no cluster, and each of these has a copy with one letter changed, or a fragment."""
    if program:
        mmseqs(tmp_path, monkeypatch, "$n")
    sequences = random_proteins(40)
    pairs = np.arange(20, 40).reshape(10, 2)
    for row, (one, other) in enumerate(pairs):
        sequences[other] = sequences[one][:-1] + "A" if row % 2 else sequences[one][:30]
    clusters = [f"c{index // 2}" if index < 20 else "" for index in range(40)]
    found = plan(made(range(40), sequences, [0, 1] * 20, clusters=clusters), 4)
    names = [f"c{index // 2}" for index in range(40)]
    check_folds(found, (names,))
    assert "20 of 40 proteins have no cluster" in found.notes[0]
    assert "given clusters and" in found.how
    assert len(np.unique(found.groups_P)) == 20


def test_the_choice_of_settings_keeps_relatives_together():
    """Of a given split: folds beside a test set share nothing, and without valid near relatives are on one side."""
    sequences = random_proteins(30)
    sequences[0] = sequences[9]
    folds = [f"fold{index // 8}" for index in range(24)] + ["test"] * 6
    found = plan(made(range(30), sequences, [0, 1] * 15, folds))
    for fit, held in found.rounds[0].inner:
        assert not {sequences[row] for row in fit} & {sequences[row] for row in held}
    assert "2 proteins of the train side are in another fold too" in found.notes[-1]
    for row in range(12):
        sequences[12 + row] = sequences[row][:-1] + "A"
    found = plan(made(range(30), sequences, [0, 1] * 15, ["train"] * 24 + ["test"] * 6))
    for fit, held in found.rounds[0].inner:
        assert not set(fit % 12) & set(held % 12)
    family = [sequences[0][:place] + "C" + sequences[0][place + 1 :] for place in range(30)]
    of_one = plan(made(range(30), family, [0, 1] * 15, ["train"] * 24 + ["test"] * 6))
    assert len(of_one.rounds[0].inner) == 4


@pytest.mark.parametrize(
    ("change", "what"),
    [({"ids": 0}, "id"), ({"sequences": 0}, "sequence"), ({"clusters": 0}, "cluster")],
)
def test_a_planted_leak_is_refused_and_may_be_dropped(change, what):
    columns = {
        "ids": [f"p{index}" for index in range(20)],
        "sequences": random_proteins(20),
        "clusters": [f"c{index}" for index in range(20)],
    }
    splits = ["train"] * 12 + ["valid"] * 3 + ["test"] * 5
    labels = [0, 1] * 10
    clean = plan(made(labels=labels, splits=splits, **columns))
    assert (len(clean.rounds[0].train), clean.leaks) == (15, ())
    for name in change:
        columns[name][3] = columns[name][17]
    task = made(labels=labels, splits=splits, **columns)
    with pytest.raises(UserError, match=rf"line 5 \(.*, train\) and line 19 \(.*, test\) have the same {what}"):
        plan(task)
    dropped = plan(task, leaks="drop")
    assert dropped.leaks == ((3, 17, what, 1),)
    assert 3 not in dropped.rounds[0].train
    assert 3 not in np.concatenate([np.concatenate(pair) for pair in dropped.rounds[0].inner])
    assert "1 proteins of the train side" in dropped.notes[-1]


def test_given_folds_leak_too():
    sequences = random_proteins(12)
    sequences[0] = sequences[11]
    task = made(range(12), sequences, [0, 1] * 6, [f"fold{1 + index // 4}" for index in range(12)])
    with pytest.raises(UserError, match="have the same sequence"):
        plan(task)
    found = plan(task, leaks="drop")
    assert len(found.rounds) == 3
    assert [len(one.train) for one in found.rounds] == [7, 8, 7]


def test_several_tests_and_folds_to_choose_by():
    splits = ["fold1"] * 5 + ["fold2"] * 5 + ["test"] * 5 + ["independent"] * 5
    found = plan(made(range(20), random_proteins(20), [0, 1] * 10, splits)).rounds
    assert len(found) == 1
    assert {name: len(rows) for name, rows in found[0].tests.items()} == {"test": 5, "independent": 5}
    assert [(len(fit), len(held)) for fit, held in found[0].inner] == [(5, 5), (5, 5)]


def test_valid_shares_nothing_with_what_chooses_by_it():
    sequences = random_proteins(12)
    sequences[0] = sequences[6]
    task = made(range(12), sequences, [0, 1] * 6, ["train"] * 6 + ["valid"] * 3 + ["test"] * 3)
    found = plan(task)
    ((fit, held),) = found.rounds[0].inner
    assert "1 proteins of the train side are in valid too" in found.notes[-1]
    assert (fit.tolist(), held.tolist()) == ([1, 2, 3, 4, 5], [6, 7, 8])
    assert 0 in found.rounds[0].train


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Train", "train"),
        ("train_partial", "train"),
        ("dev", "valid"),
        ("fold 3", "fold 3"),
        ("2", "fold 2"),
        ("test60", "test60"),
        ("independent", "independent"),
        ("tset", ""),
    ],
)
def test_sides(written, meant):
    assert side(written) == meant


def test_what_cannot_be_split(tmp_path):
    task = made(range(6), random_proteins(6), [0, 1] * 3)
    with pytest.raises(UserError, match=r"6 groups .* too few for 7 folds"):
        plan(task, 7)
    with pytest.raises(UserError, match="--folds is a number from 2"):
        plan(task, 1)
    with pytest.raises(UserError, match="--leaks is refuse or drop"):
        plan(task, leaks="keep")
    with pytest.raises(UserError, match=r"line 4: a split is .* not 'tset'"):
        plan(made(range(6), random_proteins(6), [0, 1] * 3, ["train", "test", "tset"] * 2))
    with pytest.raises(UserError, match="no test side"):
        plan(made(range(6), random_proteins(6), [0, 1] * 3, ["train"] * 6))
    table = tmp_path / "c.tsv"
    for text, message in (
        ("c\tsomebody\n", "has none of the proteins"),
        ("c\t1\nd\t1\n", "has '1' in two clusters, 'c' and 'd'"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            plan(task, 2, table)
    (packed := tmp_path / "c.tsv.gz").write_bytes(gzip.compress(b"c\t1\n" * 99)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        plan(task, 2, packed)


def test_relatives_by_kmers():
    one, other, third = random_proteins(3, length=100)
    near = one[:40] + "A" + one[41:80] + "C" + one[81:]
    groups = by_kmers([one, other, near, third, one[:60]])
    assert groups[0] == groups[2] == groups[4]
    assert len({groups[0], groups[1], groups[3]}) == 3
    assert joined([np.array([0, 0, -1, -1]), np.array([-1, 1, 1, -1])]).tolist() == [0, 0, 0, 1]
    found = plan(made(range(40), random_proteins(20) * 2, [0, 1] * 20), 4)
    assert "no distant ones" in found.notes[0]
    assert len(np.unique(found.groups_P)) == 20


def mmseqs(folder, monkeypatch, even="0"):
    """A program that answers as MMseqs2 does: even numbers are of the cluster `even`, others of their own."""
    program = folder / "mmseqs"
    program.write_text(
        f'#!/bin/sh\nfor n in $(seq 0 $(($(grep -c ">" $2) - 1))); do\n'
        f'if [ $((n % 2)) = 0 ]; then printf "{even}\\t$n\\n"; else printf "$n\\t$n\\n"; fi; done > "$3_cluster.tsv"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return program


def test_blocks_are_as_the_whole(monkeypatch):
    one, other = random_proteins(2)
    sequences = [*random_proteins(30, 1), one, other, one[:-2], other[5:]]
    whole = by_kmers(sequences)
    monkeypatch.setattr(tested, "BLOCK", 3)
    assert np.array_equal(by_kmers(sequences), whole)
    assert len(np.unique(whole)) == 32


def test_clusters_from_a_table_and_from_mmseqs(tmp_path, monkeypatch):
    task = made([f"p{index}" for index in range(20)], random_proteins(20), [0, 1] * 10)
    table = tmp_path / "c.tsv"
    table.write_text("".join(f"c{index // 4}\tp{index}\n" for index in range(16)))
    found = plan(task, 3, table)
    assert len(np.unique(found.groups_P)) == 4 + 4
    assert "4 of 20 proteins have no cluster in" in found.notes[0]
    program = mmseqs(tmp_path, monkeypatch)
    found = plan(task, 3)
    assert "MMseqs2" in found.how
    assert len(np.unique(found.groups_P)) == 1 + 10
    program.write_text("#!/bin/sh\necho no memory >&2; exit 3\n")
    with pytest.raises(UserError, match=r"failed with 3 \(no memory\)"):
        plan(task, 3)


def test_real_leaks_are_found(real_data):
    """Sequences of both sides that are in the published splits."""
    for name, label, count in (("residue/phospho_ST_musite", None, 105), ("protein/thermostability_tm", "tm", 6)):
        task = read_task(real_data / "probes" / f"{name}.tsv.gz", Columns(label=label))
        with pytest.raises(UserError, match=f"{count} rows of the train side are such"):
            plan(task)
        assert len(plan(task, leaks="drop").leaks) == count
