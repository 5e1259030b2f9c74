"""Two models on the same rows: nothing between a model and itself, something between knowledge and noise."""

import dataclasses

import numpy as np
import pytest
from test_probe import OPTIONS, planted, random_task
from test_probing import model, run, table  # noqa: F401

from hf_plm.judging.findings import read_findings
from hf_plm.judging.probes import predictors
from hf_plm.judging.probes.comparison import draw, paired, sentence, short_names
from hf_plm.judging.probes.measures import NAMES
from hf_plm.judging.probes.preparation import prepare_task
from hf_plm.judging.probes.probe import predictions


@pytest.mark.parametrize("kind", NAMES)
def test_a_model_is_as_good_as_itself_and_better_than_noise(kind, tmp_path):
    prepared = prepare_task(random_task(kind), dataclasses.replace(OPTIONS, resamples=40))
    good, again, noise = (
        predictions(prepared, planted(prepared.task, strength), ["linear"], "t")["linear"].scores_RC
        for strength in (3, 3, 0)
    )
    same = paired(prepared, "cross-validation", good, again)
    assert same == {"value": 0, "low": 0, "high": 0, "p_value": 1, "permutation_p_value": 1}
    assert "no difference shown" in sentence(("A", "B"), "linear", kind, same)
    better = paired(prepared, "cross-validation", good, noise)
    assert better["low"] > 0
    assert better["permutation_p_value"] < 0.05
    assert "A is above B" in sentence(("A", "B"), "linear", kind, better)
    worse = {**better, "value": -better["value"], "low": -better["high"], "high": -better["low"]}
    assert "B is above A" in sentence(("A", "B"), "linear", kind, worse)
    one_group = {**same, "low": np.nan, "high": np.nan, "permutation_p_value": np.nan}
    assert "+0.000 (no interval)." in sentence(("A", "B"), "linear", kind, one_group)
    draw(prepared, "cross-validation", {"good": good, "noise": noise, "again": again}, "linear", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_a_test_set_of_one_label_has_no_picture_and_loses_nothing(kind, tmp_path):
    task = random_task(kind, splits=tuple(["train"] * 60 + ["test"] * 15 + ["test_one"] * 15))
    task.labels_R[75:] = 1
    prepared = prepare_task(task, OPTIONS)
    good = predictions(prepared, planted(prepared.task, 3), ["linear"], "t")["linear"].scores_RC
    (said,) = draw(prepared, "test_one", {"good": good}, "linear", tmp_path / "p.png")
    assert "All rows of test_one have one label: its picture is left out" in said
    assert not (tmp_path / "p.png").exists()
    if kind == "regression":
        found = paired(prepared, "test_one", good, good)
        assert np.isnan(found["permutation_p_value"])
        said = sentence(("A", "B"), "linear", kind, found)
        assert "no difference shown" in said
        assert "such rows have no Spearman" in said


def test_scores_of_another_scale_are_as_good():
    """Only the order counts, so a model that says a tenth of the other's probabilities differs in nothing."""
    prepared = prepare_task(random_task(), OPTIONS)
    good = predictions(prepared, planted(prepared.task, 1), ["linear"], "t")["linear"].scores_RC
    small = np.stack([1 - good[:, 1] / 10, good[:, 1] / 10], axis=1)
    assert paired(prepared, "cross-validation", good, small)["permutation_p_value"] == 1


def test_names():
    assert short_names("facebook/esm2", "Rostlab/prot_t5/") == ("esm2", "prot_t5")
    assert short_names("a/run/hub", "b/run/hub") == ("a/run/hub", "b/run/hub")
    assert short_names("x/hub", "x/hub") == ("hub (A)", "hub (B)")


def test_from_the_command_line(model, table, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(predictors, "MOST_ROUNDS", 10)
    monkeypatch.setattr(predictors, "LEAVES", (7,))
    from support.encoders import save_encoder

    other = save_encoder("ProtT5", tmp_path / "prott5")
    lines = [line.split("\t") for line in table.read_text().splitlines()]
    for cells in lines[-4:]:  # a test set without a positive, which has no curves
        cells[1:] = ["test_none", cells[2], cells[3].replace("1", "0")]
    (path := tmp_path / "sites.tsv").write_text("".join("\t".join(cells) + "\n" for cells in lines))
    run("--compare", model, other, "--task", path, "--sites", "STY", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "model phosboost" in said
    assert "prott5 phosboost" in said
    assert "test_none: 4 proteins" in said
    for group in ("sites_ST", "sites_Y"):
        plain = read_findings(tmp_path / "out" / group / "findings.json")
        assert (plain["kind"], plain["features"], plain["labels"]) == ("comparison", "site", ["model", "prott5"])
        assert len(plain["models"]) == 2
        assert set(plain["tests"]["test"]["differences"]["phosboost"]) >= {"value", "low", "high", "p_value"}
        assert set(plain["tests"]) == {"test", "test_none"}
        assert [one.name for one in (tmp_path / "out" / group).glob("*.png")] == ["test.png"]
        head, first = (tmp_path / "out" / group / "predictions.csv").read_text().splitlines()[:2]
        assert head.count("phosboost") == 2 + 1  # and on the letters
        assert len(first.split(",")) == 5 + 4
