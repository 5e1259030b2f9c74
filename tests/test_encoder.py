"""Encoders against their authors' own scripts, protein by protein, and what cannot be opened."""

import json
import sys
import threading

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from support.encoders import (
    KINDS,
    PROTT5_LETTERS,
    RARE,
    SELENOPROTEIN,
    UBIQUITIN,
    authors_vectors,
    random_model,
    save_encoder,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5EncoderModel,
)

from hf_plm.config import UserError
from hf_plm.inference.embedder import Embedder
from hf_plm.models import t5
from hf_plm.models.attention import VARLEN_ROUTE, _varlen_works, attention_route
from hf_plm.models.encoder import TorchEncoder, load_encoder
from hf_plm.models.families import FAMILIES, spelling_of
from hf_plm.models.stock import open_encoder
from hf_plm.models.t5 import packed_t5_hidden_states
from hf_plm.models.threads import calls_at_once

SEQUENCES = [UBIQUITIN, "M", SELENOPROTEIN, RARE, UBIQUITIN[::-1] * 4, "MK", UBIQUITIN]
CPU = torch.device("cpu")


def spelling_of_kind(kind):
    tokenizer = KINDS[kind][1]()
    return spelling_of(next(family for family in FAMILIES if family.name == kind), tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: save_encoder(kind, root / kind.replace(" ", "")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_residues_have_the_vectors_of_the_authors_script(kind, layer, folders):
    embedder = Embedder(folders[kind], layer=layer)
    found = embedder.embed(SEQUENCES, "none")
    for sequence, vectors in zip(SEQUENCES, found, strict=True):
        expected = authors_vectors(kind, folders[kind], sequence, layer)
        assert vectors.shape == expected.shape
        np.testing.assert_allclose(vectors, expected, atol=1e-4)
    # A twin: another layer has other vectors, and so has another protein beside it.
    other = authors_vectors(kind, folders[kind], UBIQUITIN, layer - 1 if layer else 1)
    assert np.abs(found[0] - other).max() > 1e-2
    assert np.abs(found[0][: len(SELENOPROTEIN)] - found[2][: len(UBIQUITIN)]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_is_over_residues_alone(kind, folders):
    embedder = Embedder(folders[kind])
    expected = [authors_vectors(kind, folders[kind], sequence) for sequence in SEQUENCES]
    np.testing.assert_allclose(embedder.embed(SEQUENCES), [one.mean(0) for one in expected], atol=1e-4)
    np.testing.assert_allclose(embedder.embed(SEQUENCES, "max"), [one.max(0) for one in expected], atol=1e-4)
    if KINDS[kind][0] == "t5":
        with pytest.raises(UserError, match="no <cls> token"):
            embedder.embed(SEQUENCES, "cls")
    else:
        first = embedder.embed(SEQUENCES, "cls")
        assert np.abs(first - [one.mean(0) for one in expected]).max() > 1e-2
        with torch.no_grad():
            model, spelling, _ = open_encoder(folders[kind], "m")
            ids = torch.from_numpy(spelling.encode(UBIQUITIN.encode()))[None]
            np.testing.assert_allclose(first[0], model.eval()(ids).last_hidden_state[0, 0], atol=1e-4)


@pytest.mark.parametrize("kind", ["ESM-2", "Ankh", "ProtBert"])
def test_bf16_is_near_fp32(kind, folders):
    exact = np.concatenate(Embedder(folders[kind]).embed(SEQUENCES, "none"))
    rounded = np.concatenate(Embedder(folders[kind], precision="bf16").embed(SEQUENCES, "none"))
    cosines = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert 0.999 < cosines.min() < 1
    assert np.abs(exact - rounded).max() > 1e-4


def test_t5_bias_reaches_every_distance(monkeypatch):
    """Beyond the distances that have buckets of their own, and with proteins of several lengths in one call."""
    model = random_model("Ankh").get_encoder()
    encoder = T5EncoderModel(model.config).eval()
    encoder.encoder = model
    lengths = [300, 1, 700, 40]
    ids = [torch.randint(3, 140, (length,)) for length in lengths]
    packed = packed_t5_hidden_states(encoder, torch.cat(ids), lengths).split(lengths)
    with torch.no_grad():
        for one, found in zip(ids, packed, strict=True):
            torch.testing.assert_close(found, encoder(one[None]).last_hidden_state[0], atol=1e-4, rtol=0)
        monkeypatch.setattr(t5, "QUERIES", 128)
        bias = t5._Bias(t5.distance_bias(encoder.encoder.block[0].layer[0].SelfAttention, 700))
        view = bias.of(0, 300, 300, torch.float32)
        bias._is_view, bias.most_queries = False, 128  # as on a GPU: written out, some queries at a time
        pieces = [bias.of(begin, min(128, 300 - begin), 300, torch.float32) for begin in range(0, 300, 128)]
        assert all(piece.is_contiguous() for piece in pieces)
        assert torch.equal(torch.cat(pieces, dim=2), view)
        table = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        table[-1] += 1  # the bucket of the farthest distances
        assert (packed_t5_hidden_states(encoder, torch.cat(ids), lengths)[:300] - packed[0]).abs().max() > 1e-3


def test_pickled_weights_are_opened_as_tensors_alone(tmp_path):
    save_encoder("ProtT5", tmp_path, pickled=True)
    expected = authors_vectors("ProtT5", tmp_path, UBIQUITIN)
    np.testing.assert_allclose(Embedder(tmp_path).embed([UBIQUITIN], "none")[0], expected, atol=1e-4)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))

    torch.save({"shared.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be opened as a model"):
        Embedder(tmp_path)
    assert not (tmp_path / "was_here").exists()


def test_a_bert_that_does_not_say_what_it_is(tmp_path):
    """Rostlab/prot_bert has no model_type in its config.json."""
    save_encoder("ProtBert", tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    del plain["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert Embedder(tmp_path).encoder.facts["family"] == "ProtBert"


def test_what_cannot_be_opened_is_told_in_a_sentence(tmp_path, folders):
    for layer in (4, -5):
        with pytest.raises(UserError, match="--layer is from 0"):
            Embedder(folders["ESM-2"], layer=layer)
    with pytest.raises(UserError, match="There is no model"):
        Embedder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no model"):
        Embedder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is not finished; hf-plm export"):
        Embedder(tmp_path)
    with pytest.raises(UserError, match="is not to be had here"):
        Embedder(folders["ESM-2"], device="cuda:77")
    cut = save_encoder("ESM-2", tmp_path / "cut")
    plain = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**plain, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"lacks weights of the shape that its config\.json promises"):
        Embedder(cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        Embedder(cut)


def test_a_full_gpu_halves_the_call(folders, monkeypatch):
    encoder = load_encoder(folders["ESM-2"], "m", -1, "fp32", CPU, 1)
    proteins = [sequence.encode() for sequence in SEQUENCES]
    whole, run = encoder.encode(proteins, ("none", "mean")), TorchEncoder._encode
    sizes = []

    def small_memory(self, proteins, wants):
        sizes.append(len(proteins))
        if len(proteins) > 2:
            raise torch.OutOfMemoryError
        return run(self, proteins, wants)

    monkeypatch.setattr(TorchEncoder, "_encode", small_memory)
    halved = encoder.encode(proteins, ("none", "mean"))
    assert sizes[0] == len(proteins)
    assert max(sizes[1:]) < len(proteins)
    for name in whole:
        np.testing.assert_allclose(whole[name], halved[name], atol=1e-5)
    monkeypatch.setattr(TorchEncoder, "_encode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="--max-length"):
        encoder.encode(proteins[:1], ("mean",))


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(tmp_path, monkeypatch):
    """As ProtT5 and ProstT5 are published."""
    sentencepiece = pytest.importorskip("sentencepiece")
    save_encoder("ProtT5", tmp_path)
    expected = authors_vectors("ProtT5", tmp_path, UBIQUITIN)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "do_lower_case": false}')
    (tmp_path / "letters.txt").write_text("\n".join(" ".join(PROTT5_LETTERS) for _ in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "letters.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=3 + 25,
        model_type="word",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    embedder = Embedder(tmp_path)
    assert embedder.encoder.facts["family"] == "ProtT5"
    # The trainer numbers the letters in an order of its own.
    spelling = embedder.encoder.spelling
    object.__setattr__(embedder.encoder, "spelling", spelling_of_kind("ProtT5"))
    np.testing.assert_allclose(embedder.embed([UBIQUITIN], "none")[0], expected, atol=1e-4)
    assert len(set(spelling.ids[:20])) == 20

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("transformers.utils.import_utils._sentencepiece_available", False, raising=False)
    with pytest.raises(UserError, match=r'pip install "hf_plm\[sentencepiece\]"'):
        Embedder(tmp_path)


@pytest.mark.parametrize(("kind", "is_pickled"), [("ESM-2", False), ("ProtT5", True)])
def test_a_repository_on_the_hub(kind, is_pickled, hub, tmp_path):
    """By its name and revision; weights of other kinds and copies of the model are left where they are."""
    folder = save_encoder(kind, tmp_path / "model", is_pickled)
    for name in ("tf_model.h5", "pytorch_model_600k.bin", "flax_model.msgpack"):
        (folder / name).write_bytes(b"not for us")
    api = HfApi()
    api.create_repo("tester/model", private=True)
    commit = api.upload_folder(repo_id="tester/model", folder_path=folder).oid
    embedder = Embedder("tester/model")
    assert embedder.encoder.facts["revision"] == commit
    assert embedder.encoder.facts["model"] == "tester/model"
    expected = authors_vectors(kind, folder, UBIQUITIN)
    np.testing.assert_allclose(embedder.embed([UBIQUITIN], "none")[0], expected, atol=1e-4)
    taken = {path.name for path in (hub.home / "hub").rglob("snapshots/*/*")}
    assert not taken & {"tf_model.h5", "pytorch_model_600k.bin", "flax_model.msgpack"}
    with pytest.raises(UserError, match="has not got"):
        Embedder("tester/nowhere")


def letters_tokenizer(specials, split=True):
    """Of a model that is of none of the families."""
    vocabulary = {token: index for index, token in enumerate([*specials, *"ACDEFGHIKLMNPQRSTVWYX"])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=specials[1]))
    backend.pre_tokenizer = Split("", "isolated") if split else WhitespaceSplit()
    ends = {"single": f"{specials[2]} $A {specials[3]}", "special_tokens": [(specials[2], 2), (specials[3], 3)]}
    backend.post_processor = TemplateProcessing(**ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("split", [True, False])
def test_any_other_encoder(split, tmp_path):
    """DistilBERT and RoBERTa (whose positions begin after the padding's), with plain and with spaced letters."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for name, model in (
        ("distilbert", DistilBertModel(DistilBertConfig(vocab_size=25, dim=32, hidden_dim=64, n_layers=2, n_heads=2))),
        (
            "roberta",
            RobertaForMaskedLM(RobertaConfig(vocab_size=25, pad_token_id=0, max_position_embeddings=400, **size)),
        ),
    ):
        folder = tmp_path / name
        model.eval().save_pretrained(folder)
        tokenizer = letters_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], split)
        tokenizer.save_pretrained(folder)
        embedder = Embedder(folder)
        assert embedder.encoder.facts["family"] == ("letters" if split else "spaced letters")
        stock = getattr(model, "roberta", model)
        for sequence, found in zip(SEQUENCES, embedder.embed(SEQUENCES, "none"), strict=True):
            ids = tokenizer(sequence if split else " ".join(sequence), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = stock(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 1:-1]
            np.testing.assert_allclose(found, expected, atol=1e-4)
        assert embedder.embed(SEQUENCES, "cls").shape == (len(SEQUENCES), 32)
        assert embedder.encoder.limit == (510 if name == "distilbert" else 397)


@pytest.mark.parametrize("kind", ["ESM-2", "Ankh", "ProtBert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_several_threads_give_the_same_to_the_bit(kind, precision, folders, request):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    sequences = [UBIQUITIN[: 1 + number % 70] * 3 for number in range(60)]
    one = Embedder(folders[kind], threads=1, precision=precision).embed(sequences, "none")
    four = Embedder(folders[kind], threads=4, precision=precision)
    assert four.encoder.num_calls == 4
    for a, b in zip(one, four.embed(sequences, "none"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert torch.get_num_threads() == 3
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3]


def test_numbers_that_are_none_are_not_written(folders):
    embedder = Embedder(folders["ESM-2"], precision="bf16")
    with torch.no_grad():
        embedder.encoder._model.encoder.layer[1].output.dense.bias[3] = float("inf")
    with pytest.raises(UserError, match=r"NaN or infinity\) in bf16, in one of 2 proteins.*--precision fp32"):
        embedder.embed(["MKT", "GAV"])


def test_a_language_model_is_warned_of(tmp_path, folders, capsys, monkeypatch):
    monkeypatch.setattr("hf_plm.models.stock.LARGEST_VOCABULARY", 20)
    Embedder(folders["ESM-2"])
    assert "has a vocabulary of 33 tokens, as no model of proteins has" in capsys.readouterr().err


def test_cores_are_shared_out(monkeypatch):
    assert [calls_at_once(cores) for cores in (1, 2, 16, 17, 24, 31, 64)] == [
        *((1, 1), (2, 1), (16, 1), (8, 2), (12, 2), (15, 2), (16, 4)),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert calls_at_once(None) == (3, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_asked_for_vectors_first_trains_by_the_kernel_too():
    _varlen_works.cache_clear()
    with torch.inference_mode():
        assert attention_route(torch.device("cuda"), torch.bfloat16) == VARLEN_ROUTE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_gives_the_vectors_of_a_cpu(kind, precision, folders):
    expected = Embedder(folders[kind], device="cpu").embed(SEQUENCES, "none")
    found = Embedder(folders[kind], device="cuda", precision=precision).embed(SEQUENCES, "none")
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosines.min() > (0.9999 if precision == "fp32" else 0.99)
