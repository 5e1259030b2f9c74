"""The Hub folder: stock keys, verified before it counts, opened by transformers alone."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.models import hub
from hf_plm.models.hub import load_hub_folder, save_hub_folder
from hf_plm.models.layers import use_packed_layers
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.tokenizer import ProteinTokenizer

OPEN_STOCK = Path(__file__).parent / "support" / "open_stock.py"
FILES = ["README.md", "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
SIZES = {"num_layers": 2, "width": 32, "num_heads": 2}


def new_model(seed=0):
    model = build_model(esm_config("demo", **SIZES), seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    use_packed_layers(model)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = new_model()
    return model, save_hub_folder(model, tmp_path_factory.mktemp("run") / "hub", "# A card\n")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_whole_and_leaves_nothing_beside_it(saved):
    _, folder = saved
    assert names(folder) == FILES
    assert names(folder.parent) == ["hub"]
    card = (folder / "README.md").read_text()
    assert card.startswith("# A card\n\n## Files\n")
    for name in set(FILES) - {"README.md"}:
        assert f"| `{name}` | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |" in card


def test_weights_are_stock_and_the_same(saved):
    model, folder = saved
    loaded, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is EsmForMaskedLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.config._attn_implementation == "sdpa"


def test_keys_are_those_of_the_published_files(saved):
    """facebook/esm2_*: rotary frequencies in every layer, a contact head, the decoder tied to the embedding."""
    keys = set(load_file(saved[1] / "model.safetensors"))
    layer_0 = {key.removeprefix("esm.encoder.layer.0.") for key in keys if key.startswith("esm.encoder.layer.0.")}
    linear = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    modules = (*linear, "attention.LayerNorm", "intermediate.dense", "output.dense", "LayerNorm")
    assert layer_0 == {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} | {
        "attention.self.rotary_embeddings.inv_freq"
    }
    rest = {key for key in keys if not key.startswith("esm.encoder.layer.")}
    assert rest == {
        "esm.embeddings.word_embeddings.weight",
        "esm.encoder.emb_layer_norm_after.weight",
        "esm.encoder.emb_layer_norm_after.bias",
        "esm.contact_head.regression.weight",
        "esm.contact_head.regression.bias",
        "lm_head.bias",
        "lm_head.dense.weight",
        "lm_head.dense.bias",
        "lm_head.layer_norm.weight",
        "lm_head.layer_norm.bias",
    }
    assert len(keys) == len(rest) + 2 * len(layer_0)


def test_config_shows_nothing_of_the_training(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["dtype"]) == (["EsmForMaskedLM"], "esm", "float32")
    assert "auto_map" not in config
    assert "attn_implementation" not in (saved[1] / "config.json").read_text()
    assert json.loads((saved[1] / "tokenizer_config.json").read_text())["tokenizer_class"] == "EsmTokenizer"


def test_a_stranger_opens_it(saved):
    """Another process, transformers alone, hf_plm unimportable; `make compat` runs it under transformers 4.57 too."""
    model, folder = saved
    command = [sys.executable, "-I", str(OPEN_STOCK), str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(finished.stdout)
    assert report["model_class"] == "EsmForMaskedLM"
    assert report["tokenizer_class"] == "EsmTokenizer"
    assert (report["missing"], report["unexpected"], report["mismatched"]) == ([], [], [])
    tokenizer = ProteinTokenizer()
    batches = [tokenizer(sequence, return_tensors="pt") for sequence in report["sequences"]]
    assert report["ids"] == [batch["input_ids"][0].tolist() for batch in batches]
    assert report["padded_ids"] == tokenizer(report["sequences"], padding=True)["input_ids"]
    with torch.no_grad():
        logits = [model(**batch).logits[0].double() for batch in batches]
    assert report["logits_sum"] == pytest.approx(sum(part.sum().item() for part in logits), abs=1e-3)
    assert report["logits_masked"] == pytest.approx(logits[1][3].tolist(), abs=1e-5)


def test_load_hub_folder_gives_back_what_was_saved(saved):
    model, folder = saved
    loaded, tokenizer = load_hub_folder(folder)
    assert isinstance(tokenizer, ProteinTokenizer)
    batch = tokenizer("MKTV<mask>RQ", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not loaded.training


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_load_refuses_what_does_not_fit(saved, tmp_path, fault):
    for path in saved[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    if fault == "missing":
        del weights["lm_head.dense.weight"]
    elif fault == "unexpected":
        weights["esm.encoder.layer.9.output.dense.weight"] = torch.zeros(2)
    else:
        weights["lm_head.dense.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"dense\.weight|cannot be loaded"):
        load_hub_folder(tmp_path)


def test_load_refuses_a_folder_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"is not a Hub folder: it should hold config.json and model.safetensors"):
        load_hub_folder(tmp_path)


def test_a_later_save_replaces_the_folder(tmp_path):
    save_hub_folder(new_model(0), tmp_path / "hub", "first")
    folder = save_hub_folder(new_model(1), tmp_path / "hub", "second")
    assert (folder / "README.md").read_text().startswith("second\n")
    assert torch.equal(load_hub_folder(folder)[0].lm_head.bias, new_model(1).lm_head.bias)
    assert names(tmp_path) == ["hub"]


@pytest.mark.parametrize("fault", ["weight", "key", "tokenizer", "card"])
def test_what_does_not_read_back_is_not_written(tmp_path, monkeypatch, fault):
    """The twin of the verification: each thing it compares is broken in turn, and the older folder stays."""
    folder = save_hub_folder(new_model(), tmp_path / "hub", "first")
    write = hub.save_torch_state_dict

    def write_wrongly(weights, *arguments, **options):
        weights = {key: tensor.clone() for key, tensor in weights.items()}
        if fault == "weight":
            weights["lm_head.bias"][0] += 1e-6
        elif fault == "key":
            weights["esm.extra"] = weights.pop("lm_head.bias")
        elif fault == "card":
            raise OSError("No space left on device")
        write(weights, *arguments, **options)

    monkeypatch.setattr(hub, "save_torch_state_dict", write_wrongly)
    if fault == "tokenizer":
        monkeypatch.setattr("hf_plm.proteins.tokenizer.TOKENS", ("L", "A", "G"))
    expected = (UserError, "No space left") if fault == "card" else (RuntimeError, "was not written")
    with pytest.raises(expected[0], match=expected[1]):
        save_hub_folder(new_model(1), folder, "second")
    assert (folder / "README.md").read_text().startswith("first\n")
    assert names(tmp_path) == ["hub"]


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(UserError, match=r"holds thesis.tex, which would be lost"):
        save_hub_folder(new_model(), tmp_path, "card")
    assert names(tmp_path) == ["thesis.tex"]


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The Hub folder .* cannot be written"):
        save_hub_folder(new_model(), tmp_path / "file" / "hub", "card")


def test_a_bf16_model_is_saved_in_fp32_with_exact_rotary_frequencies(tmp_path):
    model = new_model()
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for parameter in model.parameters():  # not model.bfloat16(), which rounds the frequencies too
        parameter.data = parameter.data.bfloat16()
    found = load_file(save_hub_folder(model, tmp_path / "hub", "card") / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    inv_freq = "attention.self.rotary_embeddings.inv_freq"
    assert torch.equal(found[f"esm.encoder.layer.1.{inv_freq}"], expected["esm.rotary_embeddings.inv_freq"])
    assert torch.equal(found["lm_head.bias"], expected["lm_head.bias"].bfloat16().float())
