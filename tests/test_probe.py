"""A probe finds what is planted and nothing where nothing is; baselines, kept rows and a word during a run."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_plm.config import UserError
from hf_plm.judging.probes import predictors
from hf_plm.judging.probes.features import letters
from hf_plm.judging.probes.preparation import Options, check_labels, kept_as, prepare_task
from hf_plm.judging.probes.probe import (
    PRIOR,
    advantage,
    baselines,
    final,
    measured,
    predictions,
    prepare_quick,
    quick_probe,
    wanted,
)
from hf_plm.judging.probes.task import Task

OPTIONS = Options(folds=3, threads=1, resamples=25)


def random_task(kind="binary", proteins=90, seed=0, splits=None, level="protein", length=20):
    """Unrelated random proteins; of residues, every fourth has a label."""
    draw = np.random.default_rng(seed)
    sequences = ["".join(draw.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for _ in range(proteins)]
    places = np.arange(0, length, 4) if level == "residue" else np.array([0])
    proteins_R, positions_R = np.repeat(np.arange(proteins), len(places)), np.tile(places, proteins)
    labels = draw.normal(size=len(proteins_R))
    if kind != "regression":
        labels = np.digitize(labels, [0.5] if kind == "binary" else [-0.5, 0.5])
    classes = () if kind == "regression" else tuple("abc"[: labels.max() + 1])
    ids = tuple(f"p{index}" for index in range(proteins))
    lines = tuple(range(2, proteins + 2))
    return Task(
        "t", "t.tsv", level, kind, classes, ids, tuple(sequences), lines, splits, None, proteins_R, positions_R, labels
    )


def planted(task, strength):
    """Vectors of which one number in ten knows the label."""
    draw = np.random.default_rng(5)
    X = draw.normal(size=(len(task), 10)).astype(np.float32)
    X[:, 3] += strength * task.labels_R
    return X


@pytest.mark.parametrize(
    ("kind", "level"),
    [("binary", "protein"), ("multiclass", "protein"), ("regression", "protein"), ("binary", "residue")],
)
def test_a_planted_signal_is_found_and_none_is_not(kind, level, monkeypatch):
    monkeypatch.setattr(predictors, "MOST_ROUNDS", 20)
    task = random_task(kind, level=level)
    prepared = prepare_task(task, OPTIONS)
    beside = baselines(prepared)
    assert next(iter(beside)) == PRIOR
    letters = beside[next(name for name in beside if name != PRIOR)]
    for strength, is_there in ((3.0, True), (0.0, False)):
        found = predictions(
            prepared,
            planted(prepared.task, strength),
            ["linear", "knn", "trees"][: 3 if (kind, level) == ("binary", "protein") else 1],
            "t",
        )
        for name, one in found.items():
            assert np.isfinite(one.scores_RC).all()
            assert len(one.settings) == 3
            gained = advantage(prepared, "cross-validation", one.scores_RC, letters)
            assert (gained.low > 0) == is_there, (name, gained)
        table = measured(prepared, {"linear": found["linear"].scores_RC})["cross-validation"]["linear"]
        chance = {"auroc": 0.5, "mcc": 0.0, "spearman": 0.0}
        for measure, value in chance.items():
            if measure in table:
                assert (table[measure].low > value) == is_there


def test_offsets_of_rounds_do_not_count():
    """A fold with more positives leaves fewer to the others' fits: pooled, the shares of labels would be a predictor,
    and a wrong one. In the order within each round they say nothing."""
    for kind in ("binary", "regression"):
        prepared = prepare_task(random_task(kind, proteins=45, level="residue"), OPTIONS)
        prior = baselines(prepared)[PRIOR]
        found = measured(prepared, {PRIOR: prior})["cross-validation"][PRIOR]
        if kind == "regression":
            assert np.isnan(found["spearman"].value)
            continue
        rows = prepared.tests["cross-validation"]
        assert found["auroc"].value == 0.5
        assert found["auprc"].value == prepared.task.labels_R[rows].mean()
        assert roc_auc_score(prepared.task.labels_R[rows], prior[rows, 1]) != 0.5, "as it was pooled"
        good = planted(prepared.task, 1)[:, [0, 3]].astype(float)
        moved = good.copy()
        moved[prepared.rounds[0].tests["cross-validation"]] += 9
        both = measured(prepared, {"as it is": good, "moved": moved})["cross-validation"]
        assert both["moved"]["auroc"] == both["as it is"]["auroc"]
        assert advantage(prepared, "cross-validation", moved, good).value == 0


def test_the_letters_get_the_same_predictor(monkeypatch):
    """One A and neither none nor more: nothing that a line can read, off an embedding or off the letters."""
    monkeypatch.setattr(predictors, "MOST_ROUNDS", 40)
    task = random_task(proteins=150)
    one = np.array([sequence.count("A") == 1 for sequence in task.sequences]).astype(int)
    task = dataclasses.replace(task, labels_R=one, classes=("other", "one"))
    prepared = prepare_task(task, OPTIONS)
    name, said = list(baselines(prepared, "trees").items())[1]
    assert name == "composition, trees"
    same = predictions(prepared, letters(prepared.task), ["trees"], "t")["trees"].scores_RC
    assert advantage(prepared, "cross-validation", same, said).value == 0
    prepared = prepare_task(random_task(proteins=30, level="residue"), OPTIONS)
    assert list(baselines(prepared, "linear", "site"))[1] == "one-hot window and composition, linear"


def test_no_row_is_predicted_by_a_fit_that_saw_its_group():
    """Each protein twice, labels at random: a fit that had seen the other copy would know the label."""
    once = random_task(proteins=40)
    both = np.concatenate([np.arange(40), np.arange(40)])
    task = dataclasses.replace(
        once,
        ids=tuple(f"p{index}" for index in range(80)),
        sequences=once.sequences * 2,
        lines=tuple(range(80)),
        proteins_R=np.arange(80),
        positions_R=np.zeros(80, dtype=int),
        labels_R=once.labels_R[both],
    )
    X = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)[both]

    def known(task):
        prepared = prepare_task(task, dataclasses.replace(OPTIONS, folds=10))
        said = predictions(prepared, X, ["knn"], "t")["knn"].scores_RC[:, 1]
        return average_precision_score(prepared.task.labels_R, said)

    assert known(task) < 0.6
    apart = dataclasses.replace(task, sequences=random_task(proteins=80, seed=9).sequences)
    assert known(apart) > 0.7


def test_the_test_side_is_whole_and_the_train_side_may_be_drawn():
    splits = tuple(["train"] * 60 + ["valid"] * 10 + ["test"] * 12 + ["test_hard"] * 8)
    task = random_task(splits=splits, level="residue")
    prepared = prepare_task(task, dataclasses.replace(OPTIONS, max_rows=100))
    assert {name: len(rows) for name, rows in prepared.tests.items()} == {"test": 60, "test_hard": 40}
    (one,) = prepared.rounds
    assert len(one.fit) == 100
    assert len(prepared.task) == 200
    assert "100 rows are drawn to learn from" in prepared.notes[-1]
    sides = np.array(splits)[prepared.task.proteins_R]
    assert set(sides[one.fit]) == {"train", "valid"}
    ((fit, held),) = one.inner
    assert set(sides[one.fit][fit]) == {"train"}
    assert set(sides[one.fit][held]) == {"valid"}
    few = prepare_task(task, dataclasses.replace(OPTIONS, max_proteins=40))
    assert len(few.task.ids) == 40
    assert {name: len(rows) // 5 for name, rows in few.tests.items()} == {"test": 6, "test_hard": 4}


def test_what_is_kept_is_what_was_tested():
    splits = tuple(["train"] * 70 + ["test"] * 20)
    prepared = prepare_task(random_task(splits=splits), OPTIONS)
    X = planted(prepared.task, 2)
    found = predictions(prepared, X, ["linear"], "t")["linear"]
    kept, learnt = final(prepared, X, found, 1000)
    test = prepared.tests["test"]
    assert np.array_equal(kept.predict(X[test]), found.scores_RC[test])
    assert "as tested" in learnt
    prepared = prepare_task(random_task(), OPTIONS)
    found = predictions(prepared, X, ["linear"], "t")["linear"]
    kept, learnt = final(prepared, X, found, 1000)
    assert learnt.startswith("all rows")
    assert len(kept.arrays["seen"]) == 90
    grown = [{"leaves": 7, "rounds": 30}, {"leaves": 31, "rounds": 10}, {"leaves": 7, "rounds": 10}]
    found = predictions(prepared, X, ["trees"], "t")["trees"]
    assert final(prepared, X, dataclasses.replace(found, settings=grown), 1000)[0].settings == {
        "leaves": 7,
        "rounds": 20,
    }


def test_relatives_across_a_given_split_are_said():
    task = random_task(splits=tuple(["train"] * 70 + ["test"] * 20))
    near = task.sequences[0][:-1] + "A"
    task = dataclasses.replace(task, sequences=(*task.sequences[:-1], near))
    assert "1 of 20 test proteins have a near relative" in prepare_task(task, OPTIONS).notes[-1]


def test_options():
    with pytest.raises(UserError, match="--predictor is one of linear, knn, trees, phosboost, all"):
        Options("svm")
    with pytest.raises(UserError, match="--features site is for labels of residues"):
        prepare_task(random_task(), Options(features="site"))
    with pytest.raises(UserError, match="--max-rows is a number from 10"):
        Options(max_rows=1)
    prepared = prepare_task(random_task("regression"), OPTIONS)
    with pytest.raises(UserError, match="phosboost is for two labels"):
        wanted(Options("phosboost"), prepared)
    many = dataclasses.replace(prepared.task, classes=tuple(map(str, range(99))), kind="multiclass")
    assert wanted(Options(), dataclasses.replace(prepared, task=many)) == ["linear", "knn"]
    assert wanted(Options("trees"), dataclasses.replace(prepared, task=many)) == ["trees"]


def test_a_word_during_a_run(tmp_path):
    from support.encoders import save_encoder

    from hf_plm.inference.embedder import Embedder

    encoder = Embedder(save_encoder("ESM-2", tmp_path / "model"), threads=1).encoder
    task = random_task(proteins=60)
    # The share of alanine is in the mean embedding of any model, and in the composition.
    rich = [("A" * 10 + one[10:]) if label else one for one, label in zip(task.sequences, task.labels_R, strict=True)]
    found = quick_probe(encoder, prepare_quick(dataclasses.replace(task, sequences=tuple(rich)), 50))
    assert list(found) == ["probe_t_auprc", "probe_t_auprc_baseline"]
    assert min(found.values()) > 0.9
    assert max(quick_probe(encoder, prepare_quick(task, 50)).values()) < 0.9


def test_a_label_that_no_part_can_learn_is_named():
    task = dataclasses.replace(random_task(), labels_R=np.array([1] + [0] * 89))
    words = r"label 'b' stands in 1 protein \(1 unrelated\).* for 3 folds 6 unrelated ones are enough"
    with pytest.raises(UserError, match=words):
        check_labels(prepare_task(task, OPTIONS))
    given = dataclasses.replace(task, splits=("test",) + ("train",) * 89)
    with pytest.raises(UserError, match="the given split should have more of them on its train side"):
        check_labels(prepare_task(given, OPTIONS))
    for seed in range(5):
        for folds, enough in ((2, 8), (3, 6), (5, 5)):
            labels = np.random.default_rng(seed).permutation([1] * enough + [0] * (90 - enough))
            options = dataclasses.replace(OPTIONS, folds=folds, seed=seed)
            check_labels(prepare_task(dataclasses.replace(task, labels_R=labels), options))
    check_labels(prepare_task(random_task("regression"), OPTIONS))


def test_a_quick_look_has_another_name():
    task = random_task()
    names = {
        kept_as(task, prepare_task(task, options), options)
        for options in (
            Options(threads=1),
            Options(threads=3),
            Options(max_proteins=500),
            Options(max_proteins=40),
            Options("linear"),
            Options(folds=3),
            Options(resamples=20),
            Options(seed=1),
        )
    }
    assert names == {"t", "t-40-proteins", "t-linear", "t-folds-3", "t-resamples-20", "t-seed-1"}


def test_a_label_too_rare_for_a_look_during_a_run_is_told():
    task = random_task(proteins=60)
    labels = np.zeros_like(task.labels_R)
    labels[0] = 1
    with pytest.raises(UserError, match=r"stands in 1 protein .*, and there should be more\."):
        prepare_quick(dataclasses.replace(task, labels_R=labels), 50)
