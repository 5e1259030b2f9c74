"""ONNX Runtime computes what torch computes, at every length, with masks and padding; anything else is not written."""

import json
import logging
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from hf_plm.config import UserError
from hf_plm.models import onnx
from hf_plm.models.layers import EsmLayer, use_packed_layers
from hf_plm.models.onnx import TOLERANCE, onnx_difference, write_onnx
from hf_plm.models.presets import build_model, esm_config

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = {"num_layers": 2, "width": 32, "num_heads": 2}
FILES = ["config.json", "model.onnx", "tokenizer_config.json", "vocab.txt"]
SEQUENCES = ["M", "MKTVRQERLKSIVRILERS", "MKT<mask>RQ<mask><mask>A", "ACDEFGHIKLMNPQRSTVWY" * 56 + "<mask>"]


def new_model(**sizes):
    model = build_model(esm_config("demo", **sizes), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    use_packed_layers(model)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = new_model(**SMALL)
    return model, write_onnx(model, tmp_path_factory.mktemp("run") / "onnx")


@pytest.fixture
def exporter(monkeypatch, written):
    """Instead of five seconds of export: the file of the same model."""

    def copy_file(model, path):
        shutil.copyfile(written[1] / "model.onnx", path)

    monkeypatch.setattr(onnx, "_export", copy_file)
    return copy_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@torch.no_grad()
def logits_of_both(model, folder, sequences):
    """(tokens, V) of torch and of ONNX Runtime, by what the folder itself offers to others."""
    batch = AutoTokenizer.from_pretrained(folder)(sequences, padding=True, return_tensors="pt")
    here = batch["attention_mask"].bool()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    return model(**batch).logits[here], torch.from_numpy(found)[here]


@pytest.mark.parametrize("sequences", [*([sequence] for sequence in SEQUENCES), SEQUENCES, SEQUENCES[1:3]])
def test_logits_are_those_of_torch(written, sequences):
    model, folder = written
    expected, found = logits_of_both(model.eval(), folder, sequences)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)  # found: 4e-6


def test_a_mask_more_is_seen(written):
    """The twin: tokens and the rescaling by the number of masks both show."""
    _, masked = logits_of_both(written[0], written[1], ["MKT<mask>RQ"])
    _, other = logits_of_both(written[0], written[1], ["MKT<mask>R<mask>"])
    assert (masked - other)[:3].abs().max() > 100 * TOLERANCE


def test_the_folder_is_what_others_expect(written):
    _, folder = written
    assert names(folder) == FILES
    assert names(folder.parent) == ["onnx"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs = {each.name: (each.shape, each.type) for each in session.get_inputs()}
    axes = ["batch", "sequence"]
    assert inputs == {"input_ids": (axes, "tensor(int64)"), "attention_mask": (axes, "tensor(int64)")}
    assert [(each.name, each.shape) for each in session.get_outputs()] == [("logits", [*axes, 33])]
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.architectures) == ("esm", ["EsmForMaskedLM"])
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_nothing_of_this_machine_is_in_the_file(written):
    """The exporter notes for each node which line of which file it comes from."""
    content = (written[1] / "model.onnx").read_bytes()
    assert b"input_ids" in content
    for trace in (b".py", b"site-packages", b"hf_plm", b'File "'):
        assert trace not in content


def test_writing_is_quiet_and_leaves_the_model_as_it_was(tmp_path, capfd, caplog, recwarn, monkeypatch):
    """On a demo model in bf16 and training mode, its weights in a second file, as those above 1.5 GB are."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    model = new_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # torch's handler holds the terminal of an earlier test, and its loggers do not hand on to the root.
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "handlers", [caplog.handler])
    folder = write_onnx(model, tmp_path / "onnx")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")
    assert [str(each.message) for each in recwarn] == []
    assert names(folder) == sorted([*FILES, "model.onnx.data"])
    assert (folder / "model.onnx").stat().st_size < 1_000_000 < (folder / "model.onnx.data").stat().st_size
    assert model.training
    assert all(isinstance(layer, EsmLayer) for layer in model.esm.encoder.layer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    moved = folder.rename(tmp_path / "moved")  # the second file is found wherever the two are
    expected, found = logits_of_both(model.float().eval(), moved, SEQUENCES)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fault", ["weight", "token dropout", "frequencies"])
def test_a_file_that_computes_otherwise_is_not_written(written, exporter, monkeypatch, tmp_path, fault):
    """The twin of the check: the model is changed after its export, so the file is of another one."""

    def export_wrongly(model, path):
        exporter(model, path)
        if fault == "weight":
            model.esm.encoder.layer[1].output.dense.bias.data[0] += 0.01
        elif fault == "token dropout":
            model.esm.embeddings.token_dropout = False
        else:
            model.esm.rotary_embeddings.inv_freq *= 1.0001  # shows in long sequences only

    monkeypatch.setattr(onnx, "_export", export_wrongly)
    with pytest.raises(RuntimeError, match=r"was not written: its logits in ONNX Runtime are off by \d"):
        write_onnx(written[0], tmp_path / "onnx")
    assert names(tmp_path) == []


def test_a_row_with_other_masks_is_what_the_check_needs(written, monkeypatch):
    """Token dropout rescales each row by its masks: a file with the ratio of one row for all would be noticed."""
    model, folder = written
    forward = type(model.esm.embeddings).forward

    def with_the_masks_of_the_first_row(embeddings, input_ids=None, attention_mask=None, **options):
        embedded = forward(embeddings, input_ids=input_ids, attention_mask=attention_mask, **options)
        share = ((input_ids == 32).sum(-1) / attention_mask.sum(-1))[:, None, None]
        return embedded * (1 - share) / (1 - share[:1])

    assert onnx_difference(folder / "model.onnx", model.eval()) < TOLERANCE
    monkeypatch.setattr(type(model.esm.embeddings), "forward", with_the_masks_of_the_first_row)
    assert onnx_difference(folder / "model.onnx", model.eval()) > 100 * TOLERANCE


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_in_one_sentence(written, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'needs {package}, which is not installed: pip install "hf_plm\[onnx\]"\.$'):
        write_onnx(written[0], tmp_path / "onnx")
    assert names(tmp_path) == []


def test_what_is_in_the_folder_stays(written, exporter, tmp_path):
    (tmp_path / "onnx").mkdir()
    write_onnx(written[0], tmp_path / "onnx")  # empty: nothing is lost
    before = (tmp_path / "onnx" / "model.onnx").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"onnx is not empty; name another folder for model\.onnx"):
        write_onnx(written[0], tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx").stat().st_mtime_ns == before
    assert names(tmp_path) == ["onnx"]


def test_an_unwritable_place_is_one_sentence(written, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The ONNX folder .* cannot be written"):
        write_onnx(written[0], tmp_path / "file" / "onnx")
