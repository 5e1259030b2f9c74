"""The model card: what the Hub reads of it, and that it says what a stranger must know."""

import dataclasses

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_plm.config import Recipe
from hf_plm.data.manifest import read_manifest
from hf_plm.models.card import Facts, model_card

NUMBERS = {
    "validation_loss": 2.5012,
    "context_free_loss": 2.7201,
    "validation_loss_masked": 2.6,
    "unigram_entropy": None,
    "validation_perplexity": 12.2,
    "validation_recovery": 0.25,
    "margin_context_free": [0.2189, 0.2, 0.23],
    "margin_unigram_masked": [0.3, 0.28, 0.32],
}


@pytest.fixture
def facts(family_corpus):
    recipe = Recipe().replace(
        data__train=("/home/somebody/proteins.fasta.gz", "agroup/uniref"),
        data__cache="/home/somebody/cache",
        run__folder="/home/somebody/runs/mine",
        hub__push="somebody/plm",
        hub__license="cc-by-4.0",
    )
    machine = {"device": "NVIDIA H200", "processes": 4, "engine": "DDP", "precision": "bf16", "torch": "2.13.0"}
    corpus = read_manifest(family_corpus)
    numbers = (814_386, 300, 2_457_600, 5400.0, NUMBERS)
    return Facts("somebody/plm", recipe, *numbers, machine, corpus, "0123abcd", datasets=("agroup/uniref",))


def test_front_matter_is_what_the_hub_reads(facts):
    card = ModelCard(model_card(facts))
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("transformers", "fill-mask", "cc-by-4.0")
    assert {"protein", "esm", "biology"} <= set(data["tags"])
    assert data["datasets"] == ["agroup/uniref"]
    assert "base_model" not in data
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "agroup/uniref"
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {
        "loss": 2.5012,
        "context_free_loss": 2.7201,
        "masked_loss": 2.6,
        "perplexity": 12.2,
        "recovery": 0.25,
    }


def test_the_text_has_what_a_stranger_asks(facts):
    card = model_card(facts)
    wanted = [
        "814,386",
        "2,457,600",
        "300",
        "0123abcd",
        "2.5012",
        "2.7201",
        "not measured",
        "torch 2.13.0",
        "| hours | 1.5 |",
    ]
    wanted += ["4 x NVIDIA H200", "DDP, bf16", "+0.2189 (+0.2000 to +0.2300)", "## Intended use", "## Limits", "cite"]
    wanted += ['AutoModelForMaskedLM.from_pretrained("somebody/plm")', "--init.from somebody/plm ", "records read"]
    assert [text for text in wanted if text not in card] == []
    assert "somebody/cache" not in card
    assert "/home" not in card


def test_the_recipe_in_it_is_a_recipe(facts):
    block = model_card(facts).split("```yaml\n")[1].split("```")[0]
    recipe = yaml.safe_load(block)
    assert recipe["data"]["train"] == ["proteins.fasta.gz", "agroup/uniref"]
    assert recipe["optimizer"]["learning_rate"] == 4e-4
    assert "hub" not in recipe
    assert "folder" not in recipe["run"]


def test_nothing_is_left_unsaid(facts):
    card = model_card(facts)
    for note in ("not natural", "middle of the run", "not been shown to have learned", "No licence was chosen"):
        assert note not in card
    unlearned = {**NUMBERS, "margin_unigram_masked": [0.01, -0.02, 0.03]}
    changes = {
        "simulated, not natural": {"is_simulated": True},
        "checkpoint from the middle of the run, after step 300": {"is_finished": False},
        "not been shown to have learned": {"numbers": unlearned},
        "No licence was chosen": {"recipe": facts.recipe.replace(hub__license=None)},
        "![loss": {"has_curves": True},
        "from the weights of `a/b@v1`": {"start": "a/b@v1"},
    }
    for sentence, change in changes.items():
        assert sentence in model_card(dataclasses.replace(facts, **change))


def test_weights_that_it_started_from_are_its_base_model(facts):
    named = dataclasses.replace(facts, start="a/b@v1", start_sha256="77aa")
    assert "(sha256 `77aa`)" in model_card(named)
    assert ModelCard(model_card(named)).data.to_dict()["base_model"] == "a/b"
    path = facts.recipe.replace(init__from="/home/somebody/runs/old/hub")
    local = dataclasses.replace(facts, recipe=path, start="hub")
    card = model_card(local)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "from the weights of `hub`" in card
    assert "/home" not in card


def test_without_a_validation_nothing_is_claimed(facts):
    card = ModelCard(model_card(dataclasses.replace(facts, numbers={})))
    assert "model-index" not in card.data.to_dict()
    assert card.text.count("not measured") == 6
    assert "not been shown to have learned" in card.text
