"""ONNX Runtime computes what torch does, for each kind of encoder, layer and length; anything else is not written."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    EsmcConfig,
    EsmcModel,
    EsmConfig,
    EsmForMaskedLM,
    EsmModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from hf_plm.config import UserError
from hf_plm.models import graphs, session
from hf_plm.models.anatomy import describe
from hf_plm.models.families import Spelling
from hf_plm.models.graphs import TOLERANCE, write_graphs
from hf_plm.models.session import OnnxEncoder
from hf_plm.proteins.vocabulary import RESIDUES

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LIMIT = 1100
FILES = ["encoder.json", "model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"]
LENGTHS = (1, 2, 7, 62, 63, 64, 65, 127, 128, 129, 130, 193, 300, 1100)
"""Residues: on both sides of T5's squares of 64 tokens, and of its largest distance of 128."""
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
ESM = {
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "max_position_embeddings": 1104,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "emb_layer_norm_before": False,
    **SIZE,
}
# Heads of 16, five of them: their width together is not that of the model.
T5 = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "num_heads": 5, "d_ff": 96, "num_layers": 3}


def new_esm(**options):
    return EsmModel(EsmConfig(**ESM | options), add_pooling_layer=False)


def new_t5(**options):
    return T5EncoderModel(T5Config(**T5, relative_attention_num_buckets=64, **options))


MODELS = {
    "ESM-2": new_esm,
    "ESM-2 without token dropout": lambda: new_esm(token_dropout=False, emb_layer_norm_before=True),
    "ESM-1b": lambda: new_esm(position_embedding_type="absolute", emb_layer_norm_before=True),
    "ESM C": lambda: EsmcModel(EsmcConfig(max_position_embeddings=2048, **SIZE)),
    "Ankh": lambda: new_t5(feed_forward_proj="gated-gelu"),
    "ProtT5": lambda: new_t5(feed_forward_proj="relu"),
    "ProtBert": lambda: BertModel(BertConfig(vocab_size=30, max_position_embeddings=2000, **SIZE)),
}


def new_model(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def new_spelling(kind):
    ids = tuple(range(4, 4 + len(RESIDUES)))
    return Spelling((), (1,), ids, 0) if kind in ("Ankh", "ProtT5") else Spelling((0,), (2,), ids, 1)


def proteins_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [bytes(generator.choice(list(RESIDUES.encode()), length).tolist()) for length in lengths]


def write(kind, folder, layer=-1, limit=LIMIT):
    facts = {"model": kind, "family": kind, "cls": "first"}
    return write_graphs(new_model(kind), folder, layer, new_spelling(kind), facts, limit)


@torch.no_grad()
def stock(model, spelling, residues, layer=-1):
    """(L, D) of the stock forward of one protein alone."""
    input_ids_1L = torch.from_numpy(spelling.encode(residues))[None]
    outputs = model(input_ids=input_ids_1L, attention_mask=torch.ones_like(input_ids_1L), output_hidden_states=True)
    return outputs.hidden_states[layer][0].numpy()


def off_by(folder, kind, layer=-1, lengths=LENGTHS):
    """The largest difference of fp32 to torch, relative to the largest number or 1, over residues and first tokens."""
    model, encoder = new_model(kind), OnnxEncoder(folder, is_int8=False)
    difference, largest = 0.0, 1.0
    for residues in proteins_of(lengths):
        expected_LD = stock(model, encoder.spelling, residues, layer)
        first = len(encoder.spelling.prefix)
        found = encoder.encode([residues], ["none", "cls"])
        pairs = ((found["none"], expected_LD[first : first + len(residues)]), (found["cls"], expected_LD[:1]))
        difference = max(difference, *(np.abs(one - other).max() for one, other in pairs))
        largest = max(largest, np.abs(expected_LD).max())
    return difference / largest


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The last layer of each kind of model."""
    root = tmp_path_factory.mktemp("graphs")
    return {kind: write(kind, root / kind.replace(" ", "-")) for kind in MODELS}


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_layer_is_that_of_torch(kind, written):
    assert off_by(written[kind], kind) < TOLERANCE
    assert sorted(path.name for path in written[kind].iterdir()) == FILES


@pytest.mark.parametrize("layer", [0, 1, 2, -2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_below_is_that_of_torch_and_smaller(kind, layer, written, tmp_path):
    folder = write(kind, tmp_path / "onnx", layer, limit=200)
    assert OnnxEncoder(folder, is_int8=False).layer == layer % 4
    assert off_by(folder, kind, layer, [1, 64, 200]) < TOLERANCE
    # The test would see another layer.
    assert off_by(folder, kind, layer + 1, [64]) > 100 * TOLERANCE
    sizes = [(path / "model.onnx.data").stat().st_size for path in (folder, written[kind])]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("kind", MODELS)
def test_int8_is_close(kind, written):
    exact, rough = (OnnxEncoder(written[kind], is_int8) for is_int8 in (False, True))
    for residues in proteins_of([1, 30, 300, 1100]):
        one_ND, other_ND = (encoder.encode([residues], ["none"])["none"] for encoder in (exact, rough))
        norms_N = np.linalg.norm(one_ND, axis=1) * np.linalg.norm(other_ND, axis=1)
        assert ((one_ND * other_ND).sum(1) / norms_N).mean() > 0.99
        assert np.abs(one_ND - other_ND).max() > 1e-3  # it is another graph
    facts = json.loads((written[kind] / "encoder.json").read_text())
    assert 0.99 < facts["int8_cosine"] < 1
    assert facts["difference"] < TOLERANCE
    sizes = [(written[kind] / f"{name}.data").stat().st_size for name in session.GRAPH_FILES.values()]
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize(
    ("kind", "breakage"),
    [
        ("ESM-2", lambda encoder: {"cos_sin": encoder.cos_sin[::-1]}),
        ("ESM-2", lambda encoder: {"cos_sin": tuple(table_MK.roll(1, 1) for table_MK in encoder.cos_sin)}),
        ("ESM-2", lambda encoder: {"embedding_VD": encoder.embedding_VD / 0.88}),
        ("ESM-2", lambda encoder: {"scale": 1.0}),
        ("ESM-2", lambda encoder: {"final_norm": None}),
        ("ESM-2", lambda encoder: {"activation": "gelu_new"}),
        ("ESM-1b", lambda encoder: {"positions_MD": encoder.positions_MD.roll(1, 0)}),
        ("ESM-1b", lambda encoder: {"embedding_norm": None}),
        ("ESM C", lambda encoder: {"divisor": 1.0}),
        ("ESM C", lambda encoder: {"layers": [dataclasses.replace(x, key_norm=x.query_norm) for x in encoder.layers]}),
        ("Ankh", lambda encoder: {"bias_HNSS": encoder.bias_HNSS.roll(1, 3)}),
        ("Ankh", lambda encoder: {"bias_HNSS": encoder.bias_HNSS.transpose(2, 3)}),
        ("Ankh", lambda encoder: {"bias_HNSS": encoder.bias_HNSS[:, 1:-1]}),
        ("Ankh", lambda encoder: {"activation": "silu"}),
        ("ProtBert", lambda encoder: {"is_pre_norm": True}),
    ],
)
def test_a_graph_that_is_wrong_is_not_written(kind, breakage, tmp_path, monkeypatch):
    def describe_wrongly(model, num_positions):
        encoder = describe(model, num_positions)
        return dataclasses.replace(encoder, **breakage(encoder))

    monkeypatch.setattr(graphs, "describe", describe_wrongly)
    with pytest.raises(RuntimeError, match="was not written"):
        write(kind, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
    # This file's own comparison sees it too.
    monkeypatch.setattr(graphs, "TOLERANCE", np.inf)
    assert off_by(write(kind, tmp_path / "onnx"), kind) > TOLERANCE


def test_numbers_that_are_none_are_not_written(tmp_path):
    model = new_model("ESM-2")
    model.encoder.layer[0].output.dense.bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="off by nan"):
        write_graphs(model, tmp_path / "onnx", -1, new_spelling("ESM-2"), {}, 100)
    assert list(tmp_path.iterdir()) == []


def test_pools_are_over_residues_alone(written):
    encoder = OnnxEncoder(written["ESM-2"], is_int8=False)
    proteins = proteins_of([3, 1, 40, 7], seed=1)
    vectors = [stock(new_model("ESM-2"), encoder.spelling, residues) for residues in proteins]
    found = encoder.encode(proteins, {"none", "mean", "max", "cls"})
    expected = {
        "none": np.concatenate([x_LD[1:-1] for x_LD in vectors]),
        "mean": np.stack([x_LD[1:-1].mean(0) for x_LD in vectors]),
        "max": np.stack([x_LD[1:-1].max(0) for x_LD in vectors]),
        "cls": np.stack([x_LD[0] for x_LD in vectors]),
    }
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, atol=1e-4)
    with_specials = np.stack([x_LD.mean(0) for x_LD in vectors])
    assert np.abs(found["mean"] - with_specials).max() > 1e-2
    for name in expected:
        alone = encoder.encode(proteins, [name])
        assert list(alone) == [name]
        assert np.array_equal(alone[name], found[name])


def test_threads_and_neighbours_change_nothing(written):
    encoder = OnnxEncoder(written["Ankh"], is_int8=True, threads=4)
    assert encoder.num_calls == 4
    proteins = proteins_of([300, 5, 64, 1, 700, 12] * 4, seed=2)
    alone = [encoder.encode([residues], ["none"])["none"] for residues in proteins]
    with ThreadPoolExecutor(4, initializer=encoder.prepare_thread) as pool:
        at_once = list(pool.map(lambda residues: encoder.encode([residues], ["none"])["none"], proteins))
    assert all(map(np.array_equal, alone, at_once))
    assert np.array_equal(np.concatenate(alone), encoder.encode(proteins, ["none"])["none"])
    shared = OnnxEncoder(written["Ankh"], is_int8=True, threads=32)  # two to a call
    assert shared.num_calls == 16
    np.testing.assert_allclose(shared.encode(proteins[:1], ["none"])["none"], alone[0], atol=1e-3)
    with pytest.raises(AssertionError, match="limit"):
        encoder.encode([b"M" * (LIMIT + 1)], ["mean"])


def test_what_the_folder_says(written):
    encoder = OnnxEncoder(written["Ankh"], is_int8=True)
    assert (encoder.width, encoder.limit, encoder.layer) == (64, LIMIT, 3)
    assert encoder.spelling == new_spelling("Ankh")
    assert encoder.facts["model"] == "Ankh"
    assert encoder.facts["precision"] == "int8"
    assert OnnxEncoder(written["Ankh"], is_int8=False).facts["precision"] == "fp32"


def test_on_cpus_without_vnni_int8_takes_the_way_that_does_not_overflow(written, monkeypatch):
    residues, has_vnni = proteins_of([200]), not session._may_overflow()
    exact_ND = OnnxEncoder(written["ESM-2"], is_int8=False).encode(residues, ["none"])["none"]
    fast_ND = OnnxEncoder(written["ESM-2"], is_int8=True).encode(residues, ["none"])["none"]
    # Either the file of what the CPU can do says nothing of VNNI, or there is none.
    monkeypatch.setattr(session.Path, "read_text", lambda *_, **__: "flags : avx2 avx512f")
    assert session._may_overflow()
    monkeypatch.undo()
    monkeypatch.setattr(session, "_may_overflow", lambda: True)
    slow_ND = OnnxEncoder(written["ESM-2"], is_int8=True).encode(residues, ["none"])["none"]
    assert np.abs(slow_ND - exact_ND).max() < 0.2
    if has_vnni:
        np.testing.assert_allclose(slow_ND, fast_ND, atol=1e-4)


def test_runs_without_torch_and_transformers(written, tmp_path):
    script = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None, onnx=None)\n"
        "import numpy, pathlib\n"
        "from hf_plm.models.session import OnnxEncoder\n"
        "encoder = OnnxEncoder(pathlib.Path(sys.argv[1]), is_int8=False)\n"
        "numpy.save(sys.argv[2], encoder.encode([b'MKTAYIAK', b'G'], ['mean'])['mean'])\n"
    )
    path = tmp_path / "mean.npy"
    subprocess.run([sys.executable, "-c", script, written["ESM-2"], path], check=True)
    here = OnnxEncoder(written["ESM-2"], is_int8=False).encode([b"MKTAYIAK", b"G"], ["mean"])["mean"]
    assert np.array_equal(np.load(path), here)


def test_the_model_stays_as_it_was(written, tmp_path):
    head = EsmForMaskedLM(EsmConfig(**ESM))
    head.esm.load_state_dict(new_model("ESM-2").state_dict(), strict=False)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    folder = write_graphs(head, tmp_path / "onnx", -1, new_spelling("ESM-2"), {}, LIMIT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    # The head is left out.
    for name in FILES[1:]:
        assert (folder / name).read_bytes() == (written["ESM-2"] / name).read_bytes()


def test_int8_that_is_far_off_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "LEAST_COSINE", 1.1)
    folder = write("ESM-2", tmp_path / "onnx", limit=50)
    assert sorted(path.name for path in folder.iterdir()) == FILES[:3]
    assert len(OnnxEncoder(folder, is_int8=False).encode([b"MKT"], ["none"])["none"]) == 3
    with pytest.raises(UserError, match=r"holds no model_int8.onnx: its vectors had a cosine of 1.00"):
        OnnxEncoder(folder, is_int8=True)


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert write("ESM-2", tmp_path / "empty", limit=50).name == "empty"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("Chapter 1")
    with pytest.raises(UserError, match="full is not empty"):
        write("ESM-2", tmp_path / "full", limit=50)
    with pytest.raises(UserError, match=r"cannot be written"):
        write("ESM-2", tmp_path / "full" / "thesis.txt" / "onnx", limit=50)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(graphs, "compare", fail)
    with pytest.raises(KeyboardInterrupt):
        write("ESM-2", tmp_path / "stopped", limit=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "Chapter 1"


def test_what_a_killed_export_left_is_swept_after_a_day(tmp_path):
    old, young, other = (tmp_path / name for name in (".onnx.0123456789abcdef", ".onnx." + "a" * 16, ".onnx.backup"))
    for path in (old, young, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (0, 0))
    write("ESM-2", tmp_path / "onnx", limit=50)
    assert not old.exists()
    assert young.exists()
    assert other.exists()


def test_of_two_that_write_the_same_the_first_wins(tmp_path, monkeypatch):
    compare = graphs.compare

    def compare_late(*arguments):
        monkeypatch.setattr(graphs, "compare", compare)
        write("ESM-2", tmp_path / "onnx", limit=50)
        (tmp_path / "onnx" / "first").touch()
        return compare(*arguments)

    monkeypatch.setattr(graphs, "compare", compare_late)
    folder = write("ESM-2", tmp_path / "onnx", limit=50)
    assert (folder / "first").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch):
    spelling = new_spelling("ESM-2")

    def export(model, layer=-1, limit=50):
        write_graphs(model, tmp_path / "onnx", layer, spelling, {}, limit)

    with pytest.raises(UserError, match="not of RobertaModel, which torch alone can run"):
        export(RobertaModel(RobertaConfig(**SIZE)))
    with pytest.raises(UserError, match=r"0 \(the embeddings\) to 3, .* not 4"):
        export(new_model("ESM-2"), layer=4)
    with pytest.raises(UserError, match=r"The model has 1102 positions, but 1103 are asked for"):
        export(new_model("ESM-1b"), limit=1101)
    with pytest.raises(UserError, match="but the model 'tanh'"):
        export(BertModel(BertConfig(hidden_act="tanh", **SIZE)))
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf'need {name}, .* pip install "hf_plm\[onnx\]"'):
                export(new_model("ESM-2"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no exported encoder"):
        OnnxEncoder(tmp_path, is_int8=False)
    folder = write("ESM-2", tmp_path / "onnx", limit=50)
    (folder / "model_int8.onnx.data").unlink()
    with pytest.raises(UserError, match=r"model_int8.onnx cannot be opened by ONNX Runtime"):
        OnnxEncoder(folder, is_int8=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UserError, match=r'needs onnxruntime, .* pip install "hf_plm\[onnx\]"'):
            OnnxEncoder(folder, is_int8=False)
    facts = folder / "encoder.json"
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"is of format 2, where this hf_plm reads 1"):
        OnnxEncoder(folder, is_int8=False)
    for text in ("", "[]", "{"):
        facts.write_text(text)
        with pytest.raises(UserError):
            OnnxEncoder(folder, is_int8=False)
