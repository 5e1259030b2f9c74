"""A masked language model in use, against the stock forward of each kind, one query at a time."""

import numpy as np
import pytest
import torch
from support.encoders import save_encoder
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hf_plm.config import UserError
from hf_plm.models.masked_lm import LETTERS, Query, open_masked_lm
from hf_plm.models.presets import build_model, esm_config

PROTEINS = (
    b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ",
    b"ACDEFGHIKLMNPQRSTVWYXBUZO",
    b"GG",
    b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVA" * 9,
)


def queries():
    draw = np.random.default_rng(0)
    for residues in PROTEINS:
        length = len(residues)
        yield Query(residues, np.array([], dtype=int), np.arange(length))
        for place in draw.choice(length, size=min(length, 3), replace=False):
            yield Query(residues, np.array([place]), np.array([place]))
        yield Query(residues, np.array([0, length - 1]), np.array([0, length - 1]))


def one_at_a_time(folder, asked):
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = tokenizer.convert_tokens_to_ids(list(LETTERS))
    for query in asked:
        letters = query.residues.decode()
        if model.config.model_type == "bert":
            letters = " ".join(letters.translate(str.maketrans("UZOB", "XXXX")))
        ids = tokenizer(letters, return_tensors="pt")["input_ids"]
        ids[0, 1 + query.masked] = tokenizer.mask_token_id
        with torch.no_grad():
            yield model(input_ids=ids).logits[0].log_softmax(-1)[1 + query.wanted][:, columns].numpy()


@pytest.fixture(scope="module", params=["ESM-2", "ESM-1b", "ProtBert"])
def folder(request, tmp_path_factory):
    """A small random masked language model of each kind, with a trained one's spread of logits."""
    from support.encoders import esm2, protbert
    from transformers import BertConfig, BertForMaskedLM

    path = tmp_path_factory.mktemp("masked_lm") / request.param
    torch.manual_seed(0)
    if request.param == "ProtBert":
        tokenizer = protbert()
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=400,
            )
        )
    else:
        tokenizer = esm2()
        model = build_model(esm_config("2x32x2"), seed=0)
        if request.param == "ESM-1b":
            model.config.position_embedding_type = "absolute"
            model = type(model)(model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_each_kind_as_the_stock_model_one_by_one(folder):
    asked = list(queries())
    found = list(open_masked_lm(folder, threads=2).log_probs(iter(asked)))
    assert len(found) == len(asked)
    for query, one, expected in zip(asked, found, one_at_a_time(folder, asked), strict=True):
        assert one.shape == (len(query.wanted), 20)
        np.testing.assert_allclose(one, expected, atol=1e-4)
        assert expected.std() > 0.1  # otherwise anything would be equal


def test_a_mask_changes_the_answer(folder):
    place = np.array([4])
    seen, hidden = open_masked_lm(folder).log_probs(
        [Query(PROTEINS[0], place[:0], place), Query(PROTEINS[0], place, place)]
    )
    assert np.abs(seen - hidden).max() > 1e-3


def test_an_encoder_without_a_head_is_refused(tmp_path):
    save_encoder("Ankh", tmp_path / "ankh")
    with pytest.raises(UserError, match="no masked language model"):
        open_masked_lm(tmp_path / "ankh")
    save_encoder("ESM-2", tmp_path / "esm2")
    AutoModel.from_pretrained(tmp_path / "esm2").save_pretrained(tmp_path / "esm2")
    with pytest.raises(UserError, match="EsmModel, which has no head"):
        open_masked_lm(tmp_path / "esm2")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.15)])
def test_a_gpu_answers_as_the_cpu_does(precision, tolerance, tmp_path):
    from support.encoders import esm2

    build_model(esm_config("2x64x2"), seed=0).save_pretrained(tmp_path)
    esm2().save_pretrained(tmp_path)
    asked = list(queries())
    on_cpu = open_masked_lm(tmp_path, device="cpu", precision="fp32").log_probs(iter(asked))
    on_gpu = open_masked_lm(tmp_path, device="cuda", precision=precision).log_probs(iter(asked))
    for one, expected in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_allclose(one, expected, atol=tolerance)
