"""Two models on the same rows: nothing between a model and itself, something between knowledge and noise."""

import numpy as np
import pytest
from test_probe import OPTIONS, planted, random_task
from test_probing import model, run, table  # noqa: F401

from hf_plm.judging.findings import read_findings
from hf_plm.judging.probes.comparison import draw, paired, sentence, short_names
from hf_plm.judging.probes.measures import NAMES
from hf_plm.judging.probes.probe import predictions, prepare_task


@pytest.mark.parametrize("kind", NAMES)
def test_a_model_is_as_good_as_itself_and_better_than_noise(kind, tmp_path):
    prepared = prepare_task(random_task(kind), OPTIONS)
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
    worse = paired(prepared, "cross-validation", noise, good)
    assert worse["value"] == -better["value"]
    assert "B is above A" in sentence(("A", "B"), "linear", kind, worse)
    draw(prepared, "cross-validation", {"good": good, "noise": noise, "again": again}, "linear", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


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


def test_from_the_command_line(model, table, tmp_path, capsys):  # noqa: F811
    from support.encoders import save_encoder

    other = save_encoder("ProtT5", tmp_path / "prott5")
    run("--compare", model, other, "--task", table, "--sites", "STY", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "model phosboost" in said
    assert "prott5 phosboost" in said
    for group in ("sites_ST", "sites_Y"):
        plain = read_findings(tmp_path / "out" / group / "findings.json")
        assert (plain["kind"], plain["features"], plain["labels"]) == ("comparison", "site", ["model", "prott5"])
        assert len(plain["models"]) == 2
        assert set(plain["tests"]["test"]["differences"]["phosboost"]) >= {"value", "low", "high", "p_value"}
        assert (tmp_path / "out" / group / "test.png").exists()
        head, first = (tmp_path / "out" / group / "predictions.csv").read_text().splitlines()[:2]
        assert head.count("phosboost") == 2
        assert len(first.split(",")) == 5 + 4
