"""Contacts from attention: fair-esm's own, transformers' own, a head that is planted and found again, and bad input."""

import argparse
import csv
import gzip
import json
import subprocess
import sys
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from esm.pretrained import load_model_and_alphabet_local
from support.encoders import UBIQUITIN, save_encoder
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_plm.cli import contacts as command
from hf_plm.config import UserError
from hf_plm.judging.contacts.fit import (
    check_apart,
    fit_regression,
    fitted_on,
    logistic_l1,
    quick_contacts,
    read_quick,
    split,
)
from hf_plm.judging.contacts.maps import Protein, contact_figure, write_contacts
from hf_plm.judging.contacts.precision import as_table, evaluate_contacts, means, precisions, verdict
from hf_plm.judging.contacts.predictor import ContactPredictor, far_pairs, open_contact_predictor, windows
from hf_plm.judging.contacts.structures import Structure, read_structures
from hf_plm.judging.findings import read_findings
from hf_plm.models.fair_esm import write_fair_esm
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.layers import use_packed_layers
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.tokenizer import ProteinTokenizer

TOLERANCE = 1e-5  # found: 5e-7, in probabilities of standard deviation 0.3
SEQUENCES = [UBIQUITIN, "MKTVRQERLKSIVRILERSKEPVSGAQ", "MKTXRQXXBUZO", "ACDEFGHIKLMNPQRSTVWY" * 8]
CARD = (
    "---\nlibrary_name: transformers\n---\n\n# small\n\n- The contact head is in the file, and is untrained.\n- Last.\n"
)
HEAD = 5
"""The attention map that says where the planted contacts are."""


def randomized(model, with_head=True):
    """Weights at which every part shows in the output, attention above all."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "contact_head" in name and not with_head:
            continue
        # Attention maps have small entries.
        scale = 20 if name.endswith("regression.weight") else 0.25
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def new_model(kind="ESM-2", with_head=True):
    config = esm_config("3x48x4")
    if kind == "ESM-1b":
        config.position_embedding_type, config.emb_layer_norm_before = "absolute", True
    return randomized(build_model(config, seed=0), with_head)


@pytest.fixture(scope="module")
def predictor(folder):
    return open_contact_predictor(str(folder), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose contact head is fitted to nothing in particular."""
    return save_hub_folder(new_model(), tmp_path_factory.mktemp("contacts") / "fitted", CARD)


@pytest.fixture(scope="module")
def unfitted(tmp_path_factory):
    return save_hub_folder(new_model(with_head=False), tmp_path_factory.mktemp("contacts") / "unfitted", CARD)


@torch.no_grad()
def as_transformers_does(model, sequences):
    """One padded batch, from a model with plain attention; each protein's own square of it."""
    batch = ProteinTokenizer()(sequences, padding=True, return_tensors="pt")
    found = model.predict_contacts(batch["input_ids"], batch["attention_mask"])
    return [one[: len(s), : len(s)].numpy() for one, s in zip(found, sequences, strict=True)]


def test_the_same_as_fair_esm_one_by_one_and_batched(tmp_path, predictor):
    path, _ = write_fair_esm(predictor.model, tmp_path / "esm2_t3_test.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        reference = load_model_and_alphabet_local(path)[0].eval()
    batch = ProteinTokenizer()(SEQUENCES, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        batched = reference.predict_contacts(batch)
        alone = [
            reference.predict_contacts(row[: len(s) + 2][None])[0] for row, s in zip(batch, SEQUENCES, strict=True)
        ]
    for sequence, one, of_batch in zip(SEQUENCES, alone, batched, strict=True):
        found_NN = predictor.probabilities(sequence.encode())
        assert found_NN.std() > 0.1  # otherwise anything would be equal
        np.testing.assert_allclose(found_NN, one.numpy(), atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(found_NN, of_batch[: len(sequence), : len(sequence)], atol=TOLERANCE, rtol=0)


def test_other_layers_or_no_correction_would_show(predictor):
    residues = UBIQUITIN.encode()
    right_NN = predictor.probabilities(residues)
    head = predictor.model.esm.contact_head.regression
    weights = head.weight.detach().clone()
    try:
        predictor.set_head(weights.view(3, -1).flip(0).flatten().numpy(), head.bias.item())
        assert np.abs(predictor.probabilities(residues) - right_NN).max() > 1e-3
    finally:
        predictor.set_head(weights[0].numpy(), head.bias.item())
    uncorrected_NN = np.zeros_like(right_NN)

    def add(layer, maps_HNN):
        both_HNN = (maps_HNN + maps_HNN.mT).numpy()
        uncorrected_NN[:] += np.tensordot(weights.view(3, -1)[layer].numpy(), both_HNN, 1)

    predictor._attend(residues, add)
    uncorrected_NN = 1 / (1 + np.exp(-uncorrected_NN - head.bias.item()))
    assert np.abs(uncorrected_NN - right_NN).max() > 1e-3
    np.testing.assert_array_equal(predictor.probabilities(residues), right_NN)


@pytest.mark.parametrize("kind", ["ESM-2", "ESM-1b"])
def test_layer_by_layer_as_transformers_does_it_at_once(tmp_path, kind):
    model = new_model(kind)
    model.save_pretrained(tmp_path)
    ProteinTokenizer().save_pretrained(tmp_path)
    predictor = open_contact_predictor(str(tmp_path), "cpu")
    model.set_attn_implementation("eager")
    for sequence, expected_NN in zip(SEQUENCES, as_transformers_does(model, SEQUENCES), strict=True):
        found_NN = predictor.probabilities(sequence.encode())
        np.testing.assert_allclose(found_NN, expected_NN, atol=TOLERANCE, rtol=0)
        pairs_P2 = far_pairs(len(sequence))
        regression = model.esm.contact_head.regression
        logits_P = predictor.features(sequence.encode(), pairs_P2) @ regression.weight[0].detach().numpy()
        of_features_P = 1 / (1 + np.exp(-logits_P - regression.bias.item()))
        np.testing.assert_allclose(of_features_P, expected_NN[tuple(pairs_P2.T)], atol=TOLERANCE, rtol=0)


def test_no_layer_is_kept_and_the_model_stays_as_it_was(predictor):
    before = predictor.model.config._attn_implementation
    assert before != "eager"
    predictor.model.train()
    alive = []

    def add(layer, maps_HNN):
        assert not predictor.model.training
        assert [one() for one in alive] == [None] * layer
        alive.append(weakref.ref(maps_HNN))

    predictor._attend(UBIQUITIN.encode(), add)
    assert len(alive) == 3
    assert predictor.model.training
    assert predictor.model.config._attn_implementation == before
    assert not predictor.model.esm.encoder.layer[0].attention.self._forward_hooks
    predictor.model.eval()


def test_the_layers_of_a_training_give_the_same(folder, predictor):
    trained = open_contact_predictor(str(folder), "cpu")
    use_packed_layers(trained.model)
    residues = UBIQUITIN.encode()
    np.testing.assert_array_equal(trained.probabilities(residues), predictor.probabilities(residues))


def test_windows_of_a_long_protein_are_averaged_and_the_rest_is_unknown(monkeypatch, predictor):
    residues = (UBIQUITIN * 2).encode()
    assert predictor.limit == 1022
    assert windows(1022, 1022) == [(0, 1022)]
    assert windows(2044, 1022) == [(0, 1022), (511, 1533), (1022, 2044)]
    parts = {cut: predictor.probabilities(residues[slice(*cut)]) for cut in windows(len(residues), 60)}
    assert sorted(parts) == [(0, 60), (30, 90), (60, 120), (90, 150), (92, 152)]
    monkeypatch.setattr(predictor, "limit", 60)
    found_NN = predictor.probabilities(residues)
    np.testing.assert_allclose(found_NN[35, 50], (parts[0, 60][35, 50] + parts[30, 90][5, 20]) / 2, atol=1e-7)
    np.testing.assert_allclose(found_NN[20, 50], parts[0, 60][20, 50], atol=1e-7)
    assert np.isnan(found_NN[0, 60])
    assert np.isnan(found_NN[29, 60])
    assert np.isfinite(found_NN[30, 89])
    np.testing.assert_allclose(found_NN, found_NN.T, atol=1e-6)


def structure_of(residues, pairs, id_="one", set_="planted", resolved=None):
    is_resolved_N = np.ones(len(residues), dtype=bool) if resolved is None else resolved
    return Structure(id_, set_, "CB", 8.0, residues, np.array(pairs, dtype=np.int64).reshape(-1, 2), is_resolved_N)


def planted(predictor, count, length=60, seed=0):
    """Proteins whose contacts are the strongest 2 L pairs of one attention map, corrected."""
    draw = np.random.default_rng(seed)
    structures = []
    for number in range(count):
        residues = "".join(draw.choice(list("ACDEFGHIKLMNPQRSTVWY"), length + number)).encode()
        pairs_P2 = far_pairs(len(residues))
        map_P = predictor.features(residues, pairs_P2)[:, HEAD]
        structures.append(structure_of(residues, pairs_P2[np.argsort(-map_P)[: 2 * len(residues)]], f"p{number}"))
    return structures


def write_list(path, structures):
    rows = [
        {
            "id": one.id,
            "set": one.set,
            "atom": one.atom,
            "cutoff": one.cutoff,
            "seq": one.residues.decode(),
            "pairs": one.pairs_P2.tolist(),
            "unresolved": np.flatnonzero(~one.is_resolved_N).tolist(),
        }
        for one in structures
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A model with an unfitted head and sharp attention, and proteins whose contacts one of its heads knows."""
    model = new_model(with_head=False)
    with torch.no_grad():
        for layer in model.esm.encoder.layer:
            layer.attention.self.query.weight.mul_(2)
    place = tmp_path_factory.mktemp("contacts")
    folder = save_hub_folder(model, place / "sharp", CARD)
    predictor = open_contact_predictor(str(folder), "cpu")
    return folder, write_list(place / "planted.jsonl.gz", planted(predictor, 14)), predictor


def test_a_planted_head_is_found(sharp):
    _, path, predictor = sharp
    fitted, others = split(read_structures(path), 8, 0, predictor.limit)
    regression = fit_regression(predictor, fitted)
    assert np.argmax(regression.weights_C) == HEAD
    halves = read_quick(read_structures(path), 8, 5, 0, predictor.limit)
    assert list(map(len, halves)) == [8, 5]
    numbers = quick_contacts(predictor.model, predictor.spelling, *halves)
    assert numbers["contacts_long"] > 0.9
    assert numbers["contacts_long_chance"] < 0.2
    draw = np.random.default_rng(0)
    shuffled = [
        structure_of(one.residues, draw.permutation(far_pairs(len(one.residues)))[: len(one.pairs_P2)], one.id)
        for one in fitted + others
    ]
    halves = read_quick(shuffled, 8, 20, 0, predictor.limit)
    assert list(map(len, halves)) == [8, 6]
    numbers = quick_contacts(predictor.model, predictor.spelling, *halves)
    assert numbers["contacts_long"] < 0.3
    assert not predictor.is_fitted  # it only asked
    with pytest.raises(UserError, match="none is left to judge them by"):
        read_quick(fitted, 8, 5, 0, predictor.limit)
    with pytest.raises(UserError, match="there are 5 different ones"):
        read_quick(fitted[:5], 8, 5, 0, predictor.limit)


def test_the_penalty_leaves_out_maps_that_know_nothing_and_nobody_warns():
    draw = np.random.default_rng(0)
    features_PC = draw.normal(size=(4000, 30)).astype(np.float32) * 0.1
    logits_P = 25 * features_PC[:, 3] - 15 * features_PC[:, 7] - 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_C, bias = logistic_l1(features_PC, draw.random(4000) < 1 / (1 + np.exp(-logits_P)))
    assert set(np.argsort(-np.abs(weights_C))[:2]) == {3, 7}
    assert weights_C[3] > 5 > 0 > weights_C[7]
    assert np.count_nonzero(weights_C) < 25
    assert bias < 0


def test_precision_by_hand():
    """Ten residues shown, so L is 10, L/2 5, L/5 2; only separations of 6 to 9 exist."""
    pairs_P2 = far_pairs(10)
    separations_P = pairs_P2[:, 1] - pairs_P2[:, 0]
    assert separations_P.tolist() == [6, 7, 8, 9, 6, 7, 8, 6, 7, 6]
    is_contact_P = np.array([1, 0, 1, 0, 0, 0, 0, 1, 0, 0], dtype=bool)
    scores_P = np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.5, 0.2, np.nan, 0.3, 0.4])
    found = precisions(scores_P, is_contact_P, separations_P, 10)
    assert found["short P@L/5"] == 1 / 2  # the first and the second pair
    assert found["short P@L/2"] == 2 / 5
    assert found["short P@L"] == 3 / 10
    assert found["short chance"] == 3 / 10
    assert found["short nearest P@L/2"] == 2 / 5  # four pairs of separation 6 with two contacts, and one of 7
    assert np.isnan(found["long P@L"])
    assert np.isnan(found["medium chance"])
    assert precisions(-scores_P, is_contact_P, separations_P, 10)["short P@L/5"] == 0


def test_a_score_that_says_nothing_is_at_chance():
    """Though the contacts stand first in the list of pairs."""
    pairs_P2 = far_pairs(200)
    is_contact_P = pairs_P2[:, 0] < 50
    found = precisions(np.full(len(pairs_P2), 0.03), is_contact_P, pairs_P2[:, 1] - pairs_P2[:, 0], 200)
    assert 0.2 < found["long chance"] < 0.6
    assert abs(found["long P@L"] - found["long chance"]) < 0.1


def test_means_and_words(predictor):
    rows = [
        {"id": str(n), "set": "a", **precisions(scores, scores > 0.5, np.full(50, 30), 20)}
        for n, scores in enumerate(np.random.default_rng(0).random((12, 50)))
    ]
    found = means(rows)
    assert found["long P@L"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "num_proteins": 12}
    assert found["long margin"]["low"] > 0
    assert "has learnt contacts" in verdict(found)
    assert "long 24 and more" in as_table(found)
    assert found["short P@L"]["num_proteins"] == 0
    none = means([{**row, "long P@L": row["long chance"]} for row in rows])
    assert "has not been shown" in verdict(none)


def test_a_protein_is_never_on_both_sides(predictor):
    draw = np.random.default_rng(0)
    structures = []
    for number in range(12):
        residues = "".join(draw.choice(list("ACDEFGHIKLMNPQRSTVWY"), 30)).encode()
        structures.append(structure_of(residues, [[0, 20]], f"p{number}"))
    twins = [structure_of(one.residues, [[0, 9]], f"twin of {one.id}") for one in structures]
    fitted, others = split(structures + twins, 5, 0, 1022)
    assert len(fitted) == 5
    assert len(others) == 14
    check_apart(fitted, others)
    assert not {one.residues for one in fitted} & {one.residues for one in others}
    again, _ = split((structures + twins)[::-1], 5, 0, 1022)
    assert {one.id for one in again} == {one.id for one in fitted}
    assert {one.id for one in split(structures + twins, 5, 1, 1022)[0]} != {one.id for one in fitted}
    with pytest.raises(UserError, match="1 of the proteins to evaluate on are among those to fit on"):
        check_apart(fitted, [*others, structure_of(fitted[2].residues, [[0, 7]], "planted leak")])
    with pytest.raises(UserError, match=r"20 proteins .* there are 12 different ones"):
        split(structures + twins, 20, 0, 1022)
    with pytest.raises(UserError, match="at most 29"):
        split(structures, 1, 0, 29)


def test_contacts_that_no_coordinates_show_are_none(predictor, tmp_path):
    hidden_N = np.ones(30, dtype=bool)
    hidden_N[20] = False
    some = [structure_of(f"{letter * 29}K".encode(), [[0, 20]], letter, resolved=hidden_N) for letter in "ACDEF"]
    with pytest.raises(UserError, match="there are 0 different ones"):
        split(some, 1, 0, 1022)
    with pytest.raises(UserError, match=r"None of the 1,\d+ pairs .* touch"):
        fit_regression(predictor, some)
    seen = [structure_of(one.residues, one.pairs_P2, one.id) for one in some]
    assert len(split(seen, 5, 0, 1022)[0]) == 5
    assert fit_regression(predictor, seen).num_pairs == 5 * len(far_pairs(30))
    with pytest.raises(UserError, match="All of the 1 pairs"):
        fit_regression(predictor, [structure_of(b"MKTAYIA", [[0, 6]])])


@pytest.mark.gpu
def test_a_head_fitted_on_a_gpu_is_stored(sharp, tmp_path):
    folder, path, _ = sharp
    out = tmp_path / "with_contacts"
    run(folder, "--fit", path, "--proteins", 8, "--out", out, device="cuda")
    assert read_findings(tmp_path / "with_contacts-contacts.json")["means"]["all"]["long P@L"]["mean"] > 0.9


def run(*words, device="cpu"):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    parsed = parser.parse_args(["contacts", *map(str, words), "--device", device])
    parsed.run(parsed, [])


def test_the_stored_head_is_read_by_plain_transformers(sharp, tmp_path, capsys):
    folder, path, predictor = sharp
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    out = tmp_path / "with_contacts"
    run(folder, "--fit", path, "--proteins", 8, "--out", out)
    said = capsys.readouterr().out
    assert "Fitted on 8 proteins" in said
    assert "8 of planted (CB < 8 A)" in said
    assert "has learnt contacts" in said
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before

    tokens = AutoTokenizer.from_pretrained(out)(UBIQUITIN, return_tensors="pt")
    stock = AutoModelForMaskedLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        expected_NN = stock.predict_contacts(tokens["input_ids"], tokens["attention_mask"])[0].numpy()
        untouched = AutoModelForMaskedLM.from_pretrained(folder).eval()
        np.testing.assert_array_equal(stock.lm_head.dense.weight, untouched.lm_head.dense.weight)
    found_NN = open_contact_predictor(str(out), "cpu").probabilities(UBIQUITIN.encode())
    np.testing.assert_allclose(found_NN, expected_NN, atol=TOLERANCE, rtol=0)
    assert np.abs(found_NN - predictor.probabilities(UBIQUITIN.encode())).max() > 0.01

    card = (out / "README.md").read_text()
    assert "untrained" not in card
    assert "- Last." in card
    fitted, others = split(read_structures(path), 8, 0, 1022)
    assert fitted_on(card) == {one.sha256 for one in fitted}

    run(out, "--evaluate", path, "--out", tmp_path / "again.json")
    assert "8 of 14 proteins are left out" in capsys.readouterr().out
    first, second = (read_findings(tmp_path / name) for name in ("with_contacts-contacts.json", "again.json"))
    assert first["kind"] == "contacts"
    assert {row["id"] for row in second["rows"]} == {one.id for one in others}
    assert sorted(second["left_out"]) == sorted(first["fit"]["proteins"]) == sorted(one.id for one in fitted)
    assert first["means"] == second["means"]
    assert first["means"]["all"]["long P@L"]["mean"] > 0.9
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"ends in \.json"):
        run(out, "--evaluate", path, "--out", tmp_path / "again.png")
    with pytest.raises(UserError, match="was fitted on all proteins"):
        run(out, "--evaluate", write_list(tmp_path / "seen.jsonl.gz", fitted))
    with pytest.raises(UserError, match="no protein may be on both sides"):
        run(folder, "--fit", path, "--proteins", 8, "--evaluate", path, "--out", tmp_path / "leak")
    assert not (tmp_path / "leak").exists()


def test_maps_of_proteins_as_files(folder, tmp_path, capsys):
    fasta = tmp_path / "some.fasta"
    fasta.write_text(f">sp|P1/x first\n{UBIQUITIN}\n>tiny\nMKT\n>TINY\n{UBIQUITIN[:30]}\n")
    run(folder, fasta, "--out", tmp_path / "csv")
    assert "1 has fewer than 7 residues" in capsys.readouterr().out
    index = list(csv.DictReader((tmp_path / "csv" / "proteins.csv").open()))
    assert [(one["id"], one["file"], one["pairs"]) for one in index] == [
        ("sp|P1/x", "sp_P1_x.csv", str(len(far_pairs(76)))),
        ("tiny", "tiny.csv", "0"),
        ("TINY", "TINY_2.csv", str(len(far_pairs(30)))),
    ]
    rows = list(csv.DictReader((tmp_path / "csv" / "sp_P1_x.csv").open()))
    expected_NN = open_contact_predictor(str(folder), "cpu").probabilities(UBIQUITIN.encode())
    assert rows[0].keys() == {"i", "j", "probability"}
    assert (rows[0]["i"], rows[0]["j"]) == ("1", "7")
    for row in rows:
        expected = expected_NN[int(row["i"]) - 1, int(row["j"]) - 1]
        assert float(row["probability"]) == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "csv" / "sp_P1_x.png").is_file()
    run(folder, fasta, "--out", tmp_path / "npz", "--format", "npz", "--no-pictures")
    with np.load(tmp_path / "npz" / "sp_P1_x.npz") as arrays:
        np.testing.assert_array_equal(arrays["probability"], expected_NN)
        assert arrays["sequence"] == UBIQUITIN
    assert not list((tmp_path / "npz").glob("*.png"))
    with pytest.raises(UserError, match="is there already"):
        run(folder, fasta, "--out", tmp_path / "npz")
    (tmp_path / "npz" / "request.json").unlink()
    (tmp_path / "npz" / "proteins.csv").unlink()
    with pytest.raises(UserError, match=r"holds files that are not of such a command \(TINY_2\.npz\)"):
        run(folder, fasta, "--out", tmp_path / "npz")


def test_a_stopped_command_goes_on(monkeypatch, folder, tmp_path, capsys):
    """As if it had never stopped; a protein of which a file is missing is predicted again, and no other."""
    fasta, out, whole = tmp_path / "some.fasta", tmp_path / "out", tmp_path / "whole"
    fasta.write_text(f">a\n{UBIQUITIN}\n>b\n{UBIQUITIN[:40]}\n>c\n{UBIQUITIN[:30]}\n>d\nMKT\n")
    predict, lengths = ContactPredictor.probabilities, []

    def until_the_third(self, residues):
        if len(lengths) == 2:
            raise KeyboardInterrupt
        lengths.append(len(residues))
        return predict(self, residues)

    with monkeypatch.context() as patch:
        patch.setattr(ContactPredictor, "probabilities", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(folder, fasta, "--out", out)
    assert sorted(one.name for one in out.glob("[!.]*")) == ["a.csv", "a.png", "b.csv", "b.png", "request.json"]
    (out / ".c.csv.123.tmp").write_text("i,j")
    (out / "b.png").unlink()
    before = (out / "a.csv").stat().st_mtime_ns
    other = tmp_path / "other.fasta"
    other.write_text(fasta.read_text().replace(">d", ">e"))
    another = save_hub_folder(randomized(new_model()), tmp_path / "another", CARD)
    for words, told in (
        ((folder, other), "holds unfinished contacts of other proteins"),
        ((another, fasta), "with revision sha256:.*, where sha256:.* was asked for"),
        ((folder, fasta, "--format", "npz"), "with format csv, where npz was asked for"),
        ((folder, fasta, "--no-pictures"), "with pictures True, where False was asked for"),
    ):
        with pytest.raises(UserError, match=told):
            run(*words, "--out", out)
    capsys.readouterr()
    run(folder, fasta, "--out", out)
    assert f"1 of 4 proteins have their contacts in {out} already" in capsys.readouterr().out
    assert (out / "a.csv").stat().st_mtime_ns == before
    run(folder, fasta, "--out", whole)
    found, expected = ({one.name: one.read_bytes() for one in place.glob("[!.]*")} for place in (out, whole))
    assert found == expected
    assert not list(out.glob(".*.tmp"))
    (out / "request.json").write_text("[")
    (out / "proteins.csv").unlink()
    with pytest.raises(UserError, match=r"request\.json is damaged"):
        run(folder, fasta, "--out", out)


def test_a_killed_command_goes_on(folder, tmp_path):
    """A real process, killed where it cannot tidy up; the files that it has written are not written again."""
    fasta, out = tmp_path / "some.fasta", tmp_path / "out"
    draw = np.random.default_rng(0)
    fasta.write_text("".join(f">p{n}\n{''.join(draw.choice(list(UBIQUITIN), 60))}\n" for n in range(40)))
    command_line = [sys.executable, "-m", "hf_plm.cli", "contacts", folder, "--out", out, fasta, "--device", "cpu"]
    with subprocess.Popen(list(map(str, command_line)), stdout=subprocess.PIPE) as process:
        while not list(out.glob("p2.csv")) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert not (out / "proteins.csv").exists()
    written = {one: one.stat().st_mtime_ns for one in out.glob("*.csv") if one.with_suffix(".png").exists()}
    assert 2 <= len(written) < 40
    run(folder, fasta, "--out", out)
    assert {one: one.stat().st_mtime_ns for one in written} == written
    assert len(list(csv.DictReader((out / "proteins.csv").open()))) == 40


def test_the_proteins_stand_before_or_after_the_flags(folder, tmp_path):
    """argparse's own way of saying that they may be left out takes them for absent behind a flag."""
    fasta = tmp_path / "some.fasta"
    fasta.write_text(f">a\n{UBIQUITIN}\n")
    for number, words in enumerate(([folder, fasta], [fasta])):
        out = tmp_path / str(number)
        run(*([folder] if number else []), "--no-pictures", "--out", out, *words)
        assert (out / "a.csv").is_file()
    with pytest.raises(UserError, match="--proteins goes with --fit"):
        run(folder, "--proteins", 5, fasta, "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run()


def test_a_sequence_is_evaluated_once(folder, tmp_path, capsys):
    draw = np.random.default_rng(0)
    proteins = [
        structure_of("".join(draw.choice(list(UBIQUITIN), 50)).encode(), [[0, 30], [5, 40]], f"p{number}")
        for number in range(4)
    ]
    of_another_set = structure_of(proteins[0].residues, [[0, 30]], "elsewhere", "another")
    different = structure_of(proteins[1].residues, [[0, 30]], "different")
    once = write_list(tmp_path / "once.jsonl.gz", [*proteins, of_another_set])
    again = write_list(tmp_path / "again.jsonl.gz", [*proteins, of_another_set, proteins[0], different])
    run(folder, "--evaluate", once, "--out", tmp_path / "once.json")
    assert "left out" not in capsys.readouterr().out
    run(folder, "--evaluate", again, "--out", tmp_path / "again.json")
    said = capsys.readouterr().out
    assert "2 repeats of a sequence of their set are left out, 1 with other contacts than the first, which" in said
    first, second = (read_findings(tmp_path / f"{name}.json") for name in ("once", "again"))
    assert first["means"] == second["means"]
    assert [row["id"] for row in second["rows"]] == ["p0", "p1", "p2", "p3", "elsewhere"]
    assert second["repeats"] == ["p0", "different"]
    assert first["repeats"] == []


def test_pairs_are_counted_and_written_row_by_row(monkeypatch, predictor, tmp_path):
    monkeypatch.setattr(predictor, "limit", 60)
    residues = (UBIQUITIN * 2).encode()
    write_contacts(predictor, [Protein("long", residues)], tmp_path / "out", has_pictures=False)
    map_NN, pairs_P2 = predictor.probabilities(residues), far_pairs(len(residues))
    known_P2 = pairs_P2[np.isfinite(map_NN[tuple(pairs_P2.T)])]
    (index,) = csv.DictReader((tmp_path / "out" / "proteins.csv").open())
    assert (int(index["pairs"]), int(index["pairs_not_predicted"])) == (len(known_P2), len(pairs_P2) - len(known_P2))
    assert 0 < len(known_P2) < len(pairs_P2)
    rows = csv.DictReader((tmp_path / "out" / "long.csv").open())
    assert [(int(row["i"]) - 1, int(row["j"]) - 1) for row in rows] == [tuple(pair) for pair in known_P2.tolist()]


def test_a_protein_too_long_for_a_map_is_told_before_anything_is_computed(predictor, folder, tmp_path):
    fasta = tmp_path / "titin.fasta"
    fasta.write_text(f">a\nMKTAYIAK\n>titin\n{'M' * 35213}\n>b\n{'M' * 5001}\n")
    with pytest.raises(UserError, match=r"record 2 \(titin\), has 35,213 residues \(and 1 more are .* at most 5,000"):
        run(folder, fasta, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path = write_list(tmp_path / "long.jsonl.gz", [structure_of(b"M" * 5001, [[0, 30]])])
    for words in (("--evaluate", path), ("--fit", path, "--out", tmp_path / "out"), (path, "--out", tmp_path / "out")):
        with pytest.raises(UserError, match=r"long\.jsonl\.gz, one, has 5,001 residues; "):
            run(folder, *words)
    with pytest.raises(UserError, match="The protein that begins MMM"):
        predictor.probabilities(b"M" * 5001)


def test_the_picture_has_the_model_above_and_the_structure_below():
    structure = structure_of(b"A" * 40, [[2, 30]])
    map_NN = np.full((40, 40), 0.01)
    map_NN[5, 20] = map_NN[20, 5] = 0.9
    above, below = (image.get_array() for image in contact_figure("one", map_NN, structure).axes[0].images)
    assert above[5, 20] == 0.9
    assert above.mask[20, 5]
    assert below[30, 2] == 1
    assert below[31, 2] == 0
    assert below.mask[2, 30]
    assert above.mask[3, 8]  # too near along the chain
    (mirrored,) = (image.get_array() for image in contact_figure("one", map_NN).axes[0].images)
    assert mirrored[20, 5] == 0.9


THREE = {"A": "ALA", "G": "GLY", "M": "MSE", "K": "LYS", "S": "SER"}


def write_pdb(path, sequence, missing=(), seqres=True):
    """A chain along a zigzag that folds back on itself, C-beta 1 A above C-alpha; a DNA chain; water."""
    lines = []
    if seqres:
        words = [THREE[one] for one in sequence]
        for line, begin in enumerate(range(0, len(words), 13), start=1):
            lines.append(f"SEQRES {line:3d} A {len(words):4d}  {' '.join(words[begin : begin + 13])}")
    serial = 0
    for place, letter in enumerate(sequence):
        if place in missing:
            continue
        half = len(sequence) // 2
        x, y = (place * 3.8, 0.0) if place < half else ((len(sequence) - 1 - place) * 3.8, 6.0)
        kind = "HETATM" if letter == "M" else "ATOM  "
        for atom, z in (("CA", 0.0), ("CB", 1.0)):
            if letter == "G" and atom == "CB":
                continue
            serial += 1
            lines.append(
                f"{kind}{serial:5d}  {atom:3} {THREE[letter]} A{place + 101:4d}    "
                f"{x:8.3f}{y:8.3f}{z:8.3f}{1:6.2f}{20:6.2f}          {'C':>2}"
            )
    lines.append(f"ATOM  {serial + 1:5d}  P    DA B   1    {0:8.3f}{0:8.3f}{0:8.3f}{1:6.2f}{20:6.2f}           P")
    lines.append(f"HETATM{serial + 2:5d}  O   HOH A 900    {0:8.3f}{0:8.3f}{0:8.3f}{1:6.2f}{20:6.2f}           O")
    path.write_text("\n".join([*lines, "END"]) + "\n")
    return path


@pytest.mark.parametrize("form", ["SEQRES", "no SEQRES", "mmCIF"])
def test_structures_from_coordinates(tmp_path, form):
    sequence, missing = "AGMKSAAAKSGAAMKSSAAK", (3, 4, 12)
    path = write_pdb(tmp_path / "1abc.pdb", sequence, missing, form != "no SEQRES")
    if form == "mmCIF":
        from Bio.PDB import MMCIFIO, PDBParser
        from Bio.PDB.MMCIF2Dict import MMCIF2Dict

        io = MMCIFIO()
        io.set_structure(PDBParser(QUIET=True).get_structure("1abc", path))
        path.unlink()
        path = tmp_path / "1abc.cif"
        io.save(str(path))
        table = MMCIF2Dict(str(path))
        numbers, chains = table["_atom_site.auth_seq_id"], table["_atom_site.auth_asym_id"]
        table["_atom_site.label_seq_id"] = [
            str(int(number) - 100) if chain == "A" and int(number) < 900 else "."
            for number, chain in zip(numbers, chains, strict=True)
        ]
        table["_pdbx_poly_seq_scheme.pdb_strand_id"] = ["A"] * len(sequence)
        table["_pdbx_poly_seq_scheme.seq_id"] = [str(place + 1) for place in range(len(sequence))]
        table["_pdbx_poly_seq_scheme.mon_id"] = [THREE[one] for one in sequence]
        io.set_dict(table)
        io.save(str(path))
    (structure,) = read_structures(path)
    assert structure.id == "1abc:A"
    expected = sequence if form != "no SEQRES" else "".join("X" if n in missing else c for n, c in enumerate(sequence))
    assert structure.residues.decode() == expected
    assert np.flatnonzero(~structure.is_resolved_N).tolist() == list(missing)
    contacts_NN = structure.contacts_NN()
    assert contacts_NN[0, 19]  # 6 A apart
    assert contacts_NN[0, 18]  # 7.1 A
    assert not contacts_NN[0, 17]  # 9.7 A
    assert not contacts_NN[3].any()
    assert contacts_NN[1, 18]  # of glycine the C-alpha: 6.08 A


def test_a_folder_of_structures_and_what_is_none(tmp_path):
    write_pdb(tmp_path / "one.pdb", "AGMKSAAAKSGAAMKSSAAK")
    packed = write_pdb(tmp_path / "two.ent", "KKKKSAAAKSGAAMKSSAAK")
    (tmp_path / "two.ent.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    (tmp_path / "notes.txt").write_text("none")
    assert [one.id for one in read_structures(tmp_path)] == ["one:A", "two:A"]
    assert {one.set for one in read_structures(tmp_path)} == {tmp_path.name}
    (tmp_path / "bad.cif").write_text("no structure")
    with pytest.raises(UserError, match=r"bad\.cif cannot be read as mmCIF"):
        read_structures(tmp_path)
    (tmp_path / "empty.pdb").write_text("HEADER\n")
    with pytest.raises(UserError, match=r"empty\.pdb"):
        read_structures(tmp_path / "empty.pdb")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"id": "a", "seq": "MKT"}', "row 2: the field 'pairs' is missing"),
        ('{"id": "a", "seq": "MK-T", "pairs": []}', "row 2, seq: .*'-'"),
        ('{"id": "a", "seq": "MKT", "pairs": [[0, 3]]}', r"row 2.*pairs names residue 3 \(0-based\) of 3"),
        ('{"id": "a", "seq": "MKT", "pairs": [[-1, 2]]}', "residue -1"),
        ('{"id": "a", "seq": "MKT", "pairs": [[0, 1.5]]}', "whole numbers"),
        ('{"id": "a", "seq": "MKT", "pairs": [[0, 1, 2]]}', "row 2"),
        ('{"id": "a", "seq": "MKT", "pairs": [], "unresolved": [7]}', "unresolved names residue 7"),
        ("[1]", "row 2"),
        ("not json", "row 2"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "good", "seq": "MKT", "pairs": [[0, 2]]}\n' + row + "\n")
    with pytest.raises(UserError, match=words):
        read_structures(path)


def test_mistakes_are_told(folder, unfitted, tmp_path):
    fasta = tmp_path / "some.fasta"
    fasta.write_text(f">a\n{UBIQUITIN}\n")
    structures = write_list(tmp_path / "few.jsonl.gz", [structure_of(UBIQUITIN.encode(), [[0, 20]], set_="few")])
    (tmp_path / "dash.fasta").write_text(">a\nMKT\n>b\nMK-T\n")
    save_encoder("ProtBert", tmp_path / "protbert")
    out = ("--out", tmp_path / "out")
    for words, told in (
        ((folder,), "Give proteins"),
        ((folder, fasta), "Say where to write"),
        ((folder, fasta, "--fit", structures, *out), "a command of its own"),
        ((folder, fasta, "--format", "pdb", *out), "--format is one of csv, npz"),
        ((folder, fasta, "--threads", 0, *out), "--threads"),
        ((folder, fasta, "--sets", "few", *out), "--sets goes with --fit and --evaluate"),
        ((folder, fasta, "--seed", 0, *out), "--seed goes with --fit"),
        ((folder, "--evaluate", structures, "--proteins", 0), "--proteins goes with --fit"),
        ((folder, "--evaluate", structures, "--format", "csv"), "--format goes with proteins to predict for"),
        ((unfitted, "--fit", structures, "--no-pictures", *out), "--no-pictures goes with proteins"),
        ((unfitted, "--fit", structures, "--evaluate", structures, "--sets", "many", *out), "has no set 'many'"),
        ((folder, tmp_path / "none.fasta", *out), "There is no file"),
        ((folder, tmp_path / "dash.fasta", *out), r"dash\.fasta, record 2 \(b\)"),
        ((tmp_path / "protbert", fasta, *out), "has no contact head"),
        ((unfitted, fasta, *out), "was never fitted.*--fit"),
        ((unfitted, "--evaluate", structures), "was never fitted"),
        ((unfitted, "--fit", structures), "Say where to write"),
        ((unfitted, "--fit", structures, "--out", unfitted), "is the model itself"),
        ((unfitted, "--fit", structures, "--proteins", 0, *out), "--proteins"),
        ((unfitted, "--fit", structures, *out), "there are 1 different ones"),
        ((unfitted, "--fit", structures, "--sets", "many", *out), "has no set 'many'; it has few"),
        ((unfitted, "--fit", fasta, *out), "is no list of contacts"),
        ((unfitted, "--fit", tmp_path / "none.jsonl", *out), "There are no structures"),
    ):
        with pytest.raises(UserError, match=told):
            run(*words)
    assert not (tmp_path / "out").exists()


def test_real_structures_and_a_head_that_knows_nothing(real_data, folder):
    structures = read_structures(real_data / "probes" / "structure" / "contacts.jsonl.gz")
    assert len(structures) == 424
    assert {(one.set, one.atom) for one in structures} == {
        ("ts50", "CB(virtual)"),
        ("pfam40_kortemme", "CB"),
        ("graphppis_train", "CA"),
    }
    shortest = sorted(structures, key=lambda one: len(one.residues))[:12]
    found = means(evaluate_contacts(open_contact_predictor(str(folder), "cpu"), shortest))
    assert found["long P@L"]["low"] < found["long chance"]["mean"] + 0.05
    assert "has not been shown" in verdict(found)
