"""Models on one protocol: the same targets for all, the trainer's numbers, honest intervals and differences."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest
import torch
from support.encoders import esm2

from hf_plm.cli import main
from hf_plm.config import Mask, UserError
from hf_plm.data.corpus import open_corpus
from hf_plm.data.loader import validation_micro_batches, validation_windows
from hf_plm.inference.evaluate import evaluate
from hf_plm.judging.evaluation import evaluate_sample, one_by_one, paired_difference, pseudo_perplexity, summarise
from hf_plm.judging.findings import read_findings
from hf_plm.judging.protocol import Protocol, read_sample
from hf_plm.models.hub import load_hub_folder
from hf_plm.models.masked_lm import LETTER_INDEX, Query, open_masked_lm
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.models.presets import build_model, esm_config


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    build_model(esm_config("1x32x2"), seed=3).save_pretrained(folder)
    esm2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "some.fasta"
    proteins = ["".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=draw.randint(40, 160))) for _ in range(30)]
    proteins += ["MKXXBUZOJ" * 4, "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=1500))]
    path.write_text("".join(f">p{index} some\n{residues}\n" for index, residues in enumerate(proteins)))
    return path


def test_the_numbers_are_those_of_validation_during_a_run(finished_run, family_corpus):
    """The same corruption through another route: on whole proteins of standard residues both give one loss."""
    corpus = open_corpus(family_corpus, "validation")
    windows, keys = validation_windows(corpus, 1024, 0, seed=0)
    batches = validation_micro_batches(corpus, windows, keys, 2048, 0, Mask())
    module = PackedMaskedLM(load_hub_folder(finished_run / "hub")[0])
    expected = evaluate(module, batches, len(windows), Mask(), torch.device("cpu"))
    sample = read_sample([family_corpus], Protocol(), split="validation")
    found = evaluate_sample(open_masked_lm(finished_run), sample)
    assert len(found.losses_K) == len(expected.losses_K)
    overall = summarise(found, sample)["overall"]
    numbers = expected.summary()
    assert overall["loss"][0] == pytest.approx(numbers["validation_loss"], abs=1e-6)
    assert overall["recovery"][0] == pytest.approx(numbers["validation_recovery"])
    assert overall["context_free_loss"] == pytest.approx(numbers["context_free_loss"])
    assert overall["unigram_entropy"] == pytest.approx(numbers["unigram_entropy"])
    assert overall["margin_context_free"] == pytest.approx(expected.margins()["margin_context_free"], abs=1e-6)
    # The twin: another protocol has other targets, and another loss.
    other = read_sample([family_corpus], Protocol(crop=60), split="validation")
    assert summarise(evaluate_sample(open_masked_lm(finished_run), other), other)["overall"]["loss"][
        0
    ] != pytest.approx(numbers["validation_loss"], abs=1e-4)


def test_the_sample_is_the_same_in_any_order(fasta, tmp_path):
    records = fasta.read_text().split(">")[1:]
    random.Random(1).shuffle(records)
    other = tmp_path / "shuffled.fasta"
    first = read_sample([fasta], Protocol(), 12)
    again = next(record for record in records if record.startswith(f"{first.proteins[3].id} "))
    other.write_text("".join(f">{record}" for record in [*records, again]))
    second = read_sample([other], Protocol(), 12)
    assert first.facts["fingerprint"] == second.facts["fingerprint"]
    assert second.facts["repeated"] == 1
    for one, same in zip(first.proteins, second.proteins, strict=True):
        assert (one.id, one.shown, one.window) == (same.id, same.shown, same.window)
        np.testing.assert_array_equal(one.masked, same.masked)
    assert read_sample([fasta], Protocol(), 13).facts["fingerprint"] != first.facts["fingerprint"]


def test_what_is_shown_and_asked(fasta):
    sample = read_sample([fasta], Protocol())
    long = next(protein for protein in sample.proteins if len(protein.residues) == 1500)
    assert long.window[1] - long.window[0] == 1022
    rare = next(protein for protein in sample.proteins if b"U" in protein.residues)
    assert all(chr(rare.residues[place]) in "MK" for place in rare.targets)
    num_targets = num_masked = num_random = 0
    for protein in sample.proteins:
        window = np.frombuffer(protein.residues[slice(*protein.window)], dtype=np.uint8)
        shown = np.frombuffer(protein.shown, dtype=np.uint8)
        changed = np.flatnonzero(window != shown)
        assert set(protein.masked) <= set(protein.targets)
        assert set(changed) <= set(protein.targets) - set(protein.masked)
        num_targets += len(protein.targets)
        num_masked += len(protein.masked)
        num_random += len(changed)
    num_residues = sum(end - begin for begin, end in (protein.window for protein in sample.proteins))
    assert num_targets / num_residues == pytest.approx(0.15, abs=0.02)
    assert num_masked / num_targets == pytest.approx(0.8, abs=0.06)
    assert num_random / num_targets == pytest.approx(0.095, abs=0.05)


def test_a_model_against_itself_and_against_noise(finished_run, random_model, family_corpus):
    sample = read_sample([family_corpus], Protocol(), split="validation")
    trained, noise = (evaluate_sample(open_masked_lm(name), sample) for name in (finished_run, random_model))
    same = paired_difference(trained, trained)
    assert same["loss"] == [0, 0, 0]
    assert same["share_of_proteins_better"] == 0
    value, low, high = paired_difference(trained, noise)["loss"]
    assert low <= value <= high < 0
    assert value == pytest.approx(trained.losses_K.mean() - noise.losses_K.mean())
    # Paired, it is surer than the two intervals beside each other.
    first, second = (summarise(one, sample)["overall"]["loss"] for one in (trained, noise))
    assert high - low < (first[2] - first[1]) + (second[2] - second[1])


def test_only_the_split_that_is_asked_for(family_corpus):
    sizes = {
        split: read_sample([family_corpus], Protocol(), 0, split).facts["proteins"] for split in ("train", "validation")
    }
    assert sizes == {split: len(open_corpus(family_corpus, split)) for split in sizes}
    with pytest.raises(UserError, match="has no split for test"):
        read_sample([family_corpus], Protocol(), 0, "test")


def test_one_protein_has_no_interval(random_model, fasta):
    sample = read_sample([fasta], Protocol(), 1)
    value, low, high = summarise(evaluate_sample(open_masked_lm(random_model), sample), sample)["overall"]["loss"]
    assert np.isfinite(value)
    assert np.isnan([low, high]).all()


def test_depth_is_the_size_of_the_cluster(fasta, tmp_path):
    clusters = tmp_path / "clusters.tsv"
    clusters.write_text("".join(f"c{max(number - 29, 0)}\tp{number}\n" for number in range(32)) + "c1\telsewhere\n")
    sample = read_sample([fasta], Protocol(), clusters=clusters)
    depths = {protein.id: protein.depth for protein in sample.proteins}
    assert (depths["p3"], depths["p29"], depths["p30"], depths["p31"]) == (30, 30, 2, 1)


def test_parts_add_up(random_model, fasta):
    sample = read_sample([fasta], Protocol())
    found = summarise(evaluate_sample(open_masked_lm(random_model), sample), sample)
    for name in ("by_residue", "by_length"):
        sizes = np.array([row["num_targets"] for row in found[name]])
        assert sizes.sum() == sample.facts["targets"]
        losses = np.array([row["loss"][0] for row in found[name]])
        assert (losses * sizes).sum() / sizes.sum() == pytest.approx(found["overall"]["loss"][0])


def test_pseudo_perplexity_is_one_residue_at_a_time(random_model, fasta):
    sample = read_sample([fasta], Protocol(), 2)
    model = open_masked_lm(random_model)
    found = pseudo_perplexity(model, sample.proteins)
    losses = []
    for protein in sample.proteins:
        for query in one_by_one(protein):
            (answer,) = model.log_probs([query])
            losses.append(-answer[0, LETTER_INDEX[query.residues[query.masked[0]]]])
    assert found["residues"] == len(losses)
    assert found["pseudo_perplexity"][0] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)
    # The twin: nothing masked, another number.
    seen = []
    for protein in sample.proteins:
        letters = LETTER_INDEX[np.frombuffer(protein.residues, dtype=np.uint8)]
        (answer,) = model.log_probs([Query(protein.residues, letters[:0], np.arange(len(letters)))])
        seen += list(-answer[np.arange(len(letters)), letters])
    assert len(seen) == len(losses)
    assert np.mean(seen) != pytest.approx(np.mean(losses), abs=1e-6)


def test_the_command(finished_run, random_model, fasta, tmp_path, capsys):
    run = tmp_path / "mine"
    shutil.copytree(finished_run, run)  # which gets findings
    clusters = tmp_path / "clusters.tsv.gz"
    with gzip.open(clusters, "wt") as file:
        file.write("cluster\tmember\n" + "".join(f"c{number // 6}\tp{number}\n" for number in range(32)))
    out = tmp_path / "found.json"
    words = ["evaluate", str(run), str(random_model), "--data", str(fasta), "--out", str(out), "--pseudo", "2"]
    main([*words, "--clusters", str(clusters)])
    shown = capsys.readouterr().out
    assert "hf_plm-1" in shown
    assert "pseudo-perplexity" in shown
    assert "cluster members" in shown
    assert "are few" in shown
    found = read_findings(out)
    assert [model["model"] for model in found["models"]] == [str(run), str(random_model)]
    assert found["models"][0]["revision"].startswith("sha256:")
    assert found["protocol"]["name"] == "hf_plm-1"
    assert found["differences"][0]["a"] == str(random_model)
    (kept,) = (run / "findings").glob("evaluation-some.fasta-32-*.json")
    assert read_findings(kept) == found
    assert json.loads(out.read_text())["format"] == 1

    # What is asked otherwise is kept beside it, the run's own numbers first.
    main(["evaluate", str(random_model), str(run), "--data", str(fasta), "--sequences", "5"])
    (few,) = (run / "findings").glob("evaluation-some.fasta-5-*.json")
    assert kept.exists()
    few = read_findings(few)
    assert [one["model"] for one in few["results"]] == [one["model"] for one in few["models"]]
    assert few["results"][0]["model"] == str(run)
    assert few["differences"][0]["a"] == str(run)

    # A file of the same name with as many proteins, too.
    (tmp_path / "other").mkdir()
    lines = [line if line.startswith(">") else line[::-1] for line in fasta.read_text().splitlines()]
    (tmp_path / "other" / fasta.name).write_text("\n".join(lines) + "\n")
    words = ["evaluate", str(random_model), str(run), "--data", str(tmp_path / "other" / fasta.name)]
    main([*words, "--sequences", "5"])
    assert len(list((run / "findings").glob("evaluation-some.fasta-5-*.json"))) == 2


def test_nothing_is_lost_where_the_reader_goes_away(random_model, fasta, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise BrokenPipeError

    out = tmp_path / "found.json"
    monkeypatch.setattr("builtins.print", broken)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", str(random_model), "--data", str(fasta), "--out", str(out)])
    assert read_findings(out)["data"]["proteins"] == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "MODEL", "--data", "FASTA"], "named twice"),
        (["MODEL", "--data", "nowhere.fasta"], "nowhere.fasta"),
        (["MODEL", "--data", "FASTA", "--sequences", "-1"], "--sequences is a number from 0"),
        (["MODEL", "--data", "FASTA", "--crop", "2000"], "--crop 1022"),
        (["MODEL", "--data", "BAD"], "of 1 records are rejected"),
        (["MODEL", "--data", "FASTA", "--clusters", "FASTA"], "a tab between"),
        (["MODEL", "--data", "FASTA", "--out", "FASTA"], "is what is read"),
        (["MODEL", "--data", "FASTA", "--out", "."], ". is a folder"),
        (["MODEL", "--data", "FASTA", "--split", "test"], "--split goes with a prepared corpus"),
        (["HEADLESS", "--data", "FASTA"], "EsmModel, which has no head"),
        (["BARE", "--data", "FASTA"], "holds no tokenizer"),
    ],
)
def test_mistakes_are_one_sentence(words, message, random_model, fasta, tmp_path, capsys):
    bad = tmp_path / "bad.fasta"
    bad.write_text(">one\nMK1\n")
    places = {"MODEL": random_model, "FASTA": fasta, "BAD": bad, "HEADLESS": tmp_path / "1", "BARE": tmp_path / "2"}
    for name in ("1", "2"):
        shutil.copytree(random_model, tmp_path / name)
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    (tmp_path / "1" / "config.json").write_text(json.dumps({**config, "architectures": ["EsmModel"]}))
    for path in [*(tmp_path / "2").glob("*token*"), *(tmp_path / "2").glob("vocab*")]:
        path.unlink()
    given = [str(places.get(word, word)) for word in words]
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", *given])
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
