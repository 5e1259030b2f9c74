"""Exports of runs and of published weights, through the function that the command calls."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import esm
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_plm.cli import main
from hf_plm.config import UserError
from hf_plm.training.export import export
from hf_plm.training.push import push
from hf_plm.training.shipment import Request

SEQUENCE = "MKTVRQERLKSIV<mask>ILERSKEPVSGAQL"


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "mine"))


def logits(folder, revision=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return AutoModelForMaskedLM.from_pretrained(folder)(**tokenizer(SEQUENCE, return_tensors="pt")).logits


def test_a_checkpoint_becomes_a_hub_folder_with_the_numbers_of_its_step(run):
    files = export(str(run), step=2)
    folder = run / "exports" / "mine-step-2-hub"
    assert (
        {path.name for path in files} == {path.name for path in folder.iterdir()} >= {"model.safetensors", "README.md"}
    )
    found = load_file(folder / "model.safetensors")
    saved = load_file(next((run / "checkpoints" / "step-00000002").glob("model-*.safetensors")))
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [line["validation_loss"] for line in lines if line["step"] == 2 and "validation_loss" in line]
    card = (folder / "README.md").read_text()
    assert f"| all targets | {loss:.4f} |" in card
    assert "after step 2" in card
    assert "simulated, not natural" in card


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("chapter 1")
    for out in (tmp_path / "out", run / "hub", tmp_path / "out" / "thesis.tex"):
        with pytest.raises(UserError, match=r"is there already; name another place with --out"):
            export(str(run), "hub", out, step=2)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "chapter 1"


def test_what_the_author_wrote_below_the_checksums_stays(run, tmp_path):
    card = run / "hub" / "README.md"
    card.write_text(card.read_text() + "\n## Acknowledgements\n\nThanks.\n")
    export(str(run), "hub", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Acknowledgements" in text
    assert text.count("## Files") == 1


def test_the_last_checkpoint_is_the_finished_model(run):
    export(str(run), step=4)
    assert torch.equal(logits(run / "exports" / "mine-step-4-hub"), logits(run / "hub"))
    assert "middle of the run" not in (run / "exports" / "mine-step-4-hub" / "README.md").read_text()
    assert not torch.equal(logits(run / "exports" / "mine-step-4-hub"), torch.zeros(1))


def test_an_unfinished_run_gives_its_newest_whole_checkpoint(run):
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "step-00000004"
    weights = next(newest.glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    export(str(run), out=run.parent / "out")
    assert "after step 2" in (run.parent / "out" / "README.md").read_text()
    assert newest.exists()
    with pytest.raises(UserError, match=r"step-00000004 is damaged \(model-.* is not as it was written\) and is not"):
        export(str(run), step=4)


def test_there_and_back_through_fair_esm(run, tmp_path):
    model_file, regression = export(str(run), "fair-esm")
    assert (model_file.name, regression.name) == ("esm2_mine.pt", "esm2_mine-contact-regression.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs, alphabet = esm.pretrained.load_model_and_alphabet_local(model_file)
    _, _, tokens = alphabet.get_batch_converter()([("one", SEQUENCE)])
    with torch.no_grad():
        difference = (theirs.eval()(tokens)["logits"] - logits(run / "hub")).abs().max()
    assert difference < 1e-4
    export(str(model_file), "hub", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(run / "hub"))
    assert "Converted from `esm2_mine.pt`" in (tmp_path / "back" / "README.md").read_text()


def test_onnx_of_a_checkpoint(run):
    pytest.importorskip("onnxruntime")
    files = export(str(run), "onnx", step=2)
    assert {path.name for path in files} >= {"model.onnx", "config.json", "vocab.txt"}
    with pytest.raises(UserError, match=r"--out names a folder for ONNX"):
        export(str(run), "onnx", run / "model.onnx")


def test_a_hub_folder_keeps_its_card(hub, run, tmp_path):
    push(Request(run, "tester/plm"), print)
    export("tester/plm", "hub", tmp_path / "copy")
    here, there = (tmp_path / "copy" / "README.md").read_text(), hub.files("tester/plm")["README.md"].decode()
    assert here.split("## Files")[0].rstrip() == there.split("## Files")[0].rstrip()
    assert (tmp_path / "copy" / "curves.png").read_bytes() == (run / "curves.png").read_bytes()


def test_what_is_not_whole_is_not_exported(run, tmp_path):
    path = run / "hub" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for kind in ("hub", "fair-esm", "onnx"):
        with pytest.raises(UserError, match=r"is not the file that the model card names by its checksum"):
            export(str(run), kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for words in (
        ["export", str(run), "--format", "fair-esm"],
        ["push", str(run), "a/b"],
        ["push", str(run), "a/b", "--dry-run"],
    ):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hub", "--step", "2"], r"is no run folder, so it has no checkpoint of step 2"),
        (["hub"], r"Say where to write: hf-plm export .* --out PATH"),
        ([".", "--step", "3"], r"has no checkpoint of step 3; there are 2, 4 \(--checkpoint.keep\)"),
        (["checkpoints", "--out", "out"], r"is not a Hub folder"),
        (["nothing", "--out", "out"], r"There are no weights .*nothing"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_1(run, arguments, sentence):
    command = [sys.executable, "-m", "hf_plm.cli", "export", str(run / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.search(sentence, done.stderr), done.stderr
