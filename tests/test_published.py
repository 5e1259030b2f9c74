"""Runs that start from published weights: the right ones, all of them, or none at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small import FOUR_STEPS

from hf_plm import load_recipe, pretrain
from hf_plm.config import UserError
from hf_plm.models.hub import load_hub_folder, save_hub_folder
from hf_plm.models.presets import build_model, esm_config
from hf_plm.models.published import find_published, read_published
from hf_plm.training.push import push
from hf_plm.training.shipment import Request

# The client's own way of giving httpx a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def odd_size(tmp_path_factory):
    """A Hub folder of a network that is no preset."""
    model = build_model(esm_config("2x32x2"), seed=3)
    return save_hub_folder(model, tmp_path_factory.mktemp("odd") / "hub", "---\nlicense: mit\n---\n# odd\n")


def recipe(corpus, folder, name="mine", **knobs):
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    given = {"data.train": str(corpus), "run.folder": str(folder), **FOUR_STEPS, **named}
    return load_recipe(name, given)


def first_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_a_run_starts_where_the_weights_are_and_has_their_size(family_corpus, tmp_path, odd_size):
    """With a learning rate of next to nothing it ends there, too."""
    still = {"optimizer__learning_rate": "1e-20", "optimizer__weight_decay": "0"}
    result = pretrain(recipe(family_corpus, tmp_path / "run", init__from=str(odd_size), **still))
    expected = load_file(odd_size / "model.safetensors")
    found = load_file(result.hub_folder / "model.safetensors")
    assert all(torch.allclose(found[name], tensor, rtol=0, atol=1e-15) for name, tensor in expected.items())
    assert result.summary["preset"] == "2x32x2"
    card = (result.hub_folder / "README.md").read_text()
    assert "from the weights of `hub`" in card
    assert str(odd_size) not in card


def test_a_run_on_published_weights_goes_on_without_them(family_corpus, tmp_path, odd_size):
    copy = Path(shutil.copytree(odd_size, tmp_path / "published"))
    asked = recipe(family_corpus, tmp_path / "run", init__from=str(copy))
    pretrain(asked)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(copy)
    for part in ("hub", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "run" / part)
    (tmp_path / "run" / "summary.json").unlink()
    pretrain(asked)

    def without_clock(text):
        read = [json.loads(line) for line in text.splitlines()]
        return [{key: value for key, value in line.items() if "second" not in key} for line in read]

    assert without_clock((tmp_path / "run" / "metrics.jsonl").read_text()) == without_clock(lines)
    other = recipe(family_corpus, tmp_path / "run")
    with pytest.raises(UserError, match=r"has (model.preset = 2x32x2|init.from = )"):
        pretrain(other)


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_weights_again(family_corpus, tmp_path, odd_size):
    copy = Path(shutil.copytree(odd_size, tmp_path / "published"))
    asked = recipe(family_corpus, tmp_path / "run", init__from=str(copy))
    pretrain(asked)
    first = first_loss(tmp_path / "run")
    for part in ("hub", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / part)
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    pretrain(asked)
    assert first_loss(tmp_path / "run") == first

    for part in ("hub", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / part)
    (tmp_path / "run" / "summary.json").unlink()
    save_hub_folder(build_model(esm_config("2x32x2"), seed=4), copy, "---\nlicense: mit\n---\n# other\n")
    with pytest.raises(UserError, match=r"are not the weights any more that the run in .* began from"):
        pretrain(asked)


def test_it_learns_on_from_a_run_of_ours_on_the_hub(hub, family_corpus, tmp_path, finished_run):
    push(Request(finished_run, "tester/plm", "step-2"), print)
    result = pretrain(recipe(family_corpus, tmp_path / "run", "demo", init__from="tester/plm@step-2"))
    assert result.summary["preset"] == "demo"
    assert first_loss(tmp_path / "run") < first_loss(finished_run)
    assert "base_model: tester/plm\n" in (result.hub_folder / "README.md").read_text()


def test_the_published_layout_is_read(tmp_path, odd_size):
    """facebook/esm2_* have a table of positions that nothing uses, and some have the tied decoder."""
    folder = Path(shutil.copytree(odd_size, tmp_path / "published"))
    weights = load_file(folder / "model.safetensors")
    weights["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 32)
    weights["lm_head.decoder.weight"] = weights["esm.embeddings.word_embeddings.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "special_tokens_map.json").write_text('{"mask_token": "<mask>"}')
    expected, _ = load_hub_folder(odd_size)
    found = read_published(folder)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert not any(parameter.requires_grad for parameter in found.esm.contact_head.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position_embedding_type": "absolute"}, r"missing weights: esm.embeddings.position_embeddings.weight"),
        ({"layer_norm_eps": 1e-12}, r"is no ESM-2 as published: its layer_norm_eps is 1e-12, not 1e-05"),
        ({"emb_layer_norm_before": True}, r"missing weights: esm.embeddings.layer_norm"),
        ({"intermediate_size": 64}, r"mismatched weights: esm"),
        ({"vocab_size": 40}, r"mismatched weights: esm"),
        (
            {"num_hidden_layers": 3},
            r"mismatched weights: esm.contact_head.regression.weight; missing weights: esm.encoder.layer.2",
        ),
        (
            {"num_hidden_layers": 1},
            r"mismatched weights: esm.contact.*; unexpected weights: esm.encoder.layer.1.* and 13 more",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            r"cannot be loaded|does not fit|BertForMaskedLM",
        ),
    ],
)
def test_what_is_not_esm2_or_not_whole_is_refused(tmp_path, odd_size, change, sentence):
    folder = Path(shutil.copytree(odd_size, tmp_path / "published"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=sentence):
        read_published(folder)


def test_sizes_and_dropout_that_contradict_the_weights_are_refused(family_corpus, tmp_path, odd_size):
    with pytest.raises(UserError, match=r"is a network of size 2x32x2, and model.preset says 8m; leave"):
        pretrain(recipe(family_corpus, tmp_path / "run", init__from=str(odd_size), model__preset="8m"))
    with pytest.raises(UserError, match=r"trained with token dropout on; give --model.token_dropout true"):
        pretrain(recipe(family_corpus, tmp_path / "run", init__from=str(odd_size), model__token_dropout="false"))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["no/such/folder", "missing.pt", "esm2"])
def test_what_is_nowhere_is_told(name):
    with pytest.raises(UserError, match=rf"There are no weights {name}: neither a file, a folder, nor a repository"):
        find_published(name)


def test_what_is_not_on_the_hub_is_told(hub):
    with pytest.raises(UserError, match=r"The Hub has not got the model nobody/nothing, or it is private"):
        find_published("nobody/nothing")


def test_preset_auto_needs_weights():
    with pytest.raises(UserError, match=r"model.preset auto takes the size of published weights"):
        load_recipe("demo", {"model.preset": "auto"})
