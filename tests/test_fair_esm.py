"""fair-esm's files: both packages compute the same from one file, and what is no ESM-2 file is refused in words."""

import argparse
import os
import pickle

import pytest
import torch
from esm.model.esm2 import ESM2
from esm.pretrained import load_model_and_alphabet_local

from hf_plm.config import UserError
from hf_plm.models import fair_esm
from hf_plm.models.fair_esm import read_fair_esm, write_fair_esm
from hf_plm.models.layers import use_packed_layers
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.tokenizer import ProteinTokenizer

LAYERS, WIDTH, HEADS = 3, 64, 4
SIZES = {"num_layers": LAYERS, "width": WIDTH, "num_heads": HEADS}
SEQUENCES = [
    "MKTVRQERLKSIVRILERSKEPVSGAQ",
    "MKT<mask>RQ<mask>XBUZO",
    "<mask><mask>LA",
    "ACDEFGHIKLMNPQRSTVWY" * 15 + "<mask>",
]
TOLERANCE = 1e-4  # found: 2.9e-5 in logits of standard deviation 9, 6.2e-6 where it is 1.8
CONTACT_TOLERANCE = 1e-5  # found: 4.1e-7 in contacts of standard deviation 0.09
SAFE = [argparse.Namespace]


def randomize(module, seed=0):
    """Weights at which every part shows in the output: a fresh model's biases are zero and its norms ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        # Attention maps have small entries.
        scale = 20 if name.endswith("regression.weight") else 0.2
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def new_model(**options):
    return randomize(build_model(esm_config("demo", **SIZES, **options), 0))


def open_with_fair_esm(path):
    with torch.serialization.safe_globals(SAFE):
        return load_model_and_alphabet_local(path)[0].eval()


def write_published(folder, *, half=False, name="esm2_t3_test.pt"):
    """The two files as fair-esm publishes them, made from fair-esm's own class."""
    reference = randomize(ESM2(LAYERS, WIDTH, HEADS), seed=1)
    weights = {key: tensor.half() if half else tensor for key, tensor in reference.state_dict().items()}
    head = {key: weights.pop(key) for key in list(weights) if key.startswith("contact_head.")}
    prefixes = {key: "encoder." if key.startswith("lm_head.") else "encoder.sentence_encoder." for key in weights}
    settings = argparse.Namespace(
        encoder_layers=LAYERS, encoder_embed_dim=WIDTH, encoder_attention_heads=HEADS, token_dropout=True, arch="esm2"
    )
    data = {"cfg": {"model": settings}, "model": {prefixes[key] + key: tensor for key, tensor in weights.items()}}
    path = folder / name
    torch.save(data, path)
    torch.save({"model": head}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def change(path, edit):
    with torch.serialization.safe_globals(SAFE):
        data = torch.load(path)
    edit(data)
    torch.save(data, path)


@torch.no_grad()
def differences(model, reference):
    """The largest difference in logits and in contacts, over the sequences one by one and in one padded batch."""
    logits, contacts = [], []
    for sequences in [*([sequence] for sequence in SEQUENCES), SEQUENCES]:
        batch = ProteinTokenizer()(sequences, padding=True, return_tensors="pt")
        expected = reference(batch["input_ids"], return_contacts=True)
        here = batch["attention_mask"].bool()
        model.set_attn_implementation("sdpa")
        logits.append((model(**batch).logits - expected["logits"])[here].abs().max().item())
        model.set_attn_implementation("eager")  # the one that gives attention maps
        found = model.predict_contacts(batch["input_ids"], batch["attention_mask"])
        pairs = here[:, None, 2:] & here[:, 2:, None]  # both residues are there
        contacts.append((found - expected["contacts"])[pairs].abs().max().item())
        assert expected["logits"][here].std() > 0.5
        assert expected["contacts"][pairs].std() > 0.02
    return max(logits), max(contacts)


def assert_equal(model, reference):
    logits, contacts = differences(model, reference)
    assert logits < TOLERANCE
    assert contacts < CONTACT_TOLERANCE


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fair_esm_opens_what_is_written(tmp_path):
    model = new_model()
    paths = write_fair_esm(model, tmp_path / "esm2_mine.pt")
    assert [path.name for path in paths] == ["esm2_mine.pt", "esm2_mine-contact-regression.pt"]
    assert names(tmp_path) == sorted(path.name for path in paths)
    reference = open_with_fair_esm(paths[0])
    assert reference.token_dropout is True
    assert_equal(model, reference)


@pytest.mark.parametrize(
    "part", ["layers.1.fc1.bias", "contact_head.regression.bias", "layers.0.self_attn.rot_emb.inv_freq"]
)
def test_a_small_change_is_seen(tmp_path, part):
    """The twin of the parity tests."""
    model = new_model()
    reference = open_with_fair_esm(write_fair_esm(model, tmp_path / "esm2_mine.pt")[0])
    reference.state_dict()[part] += 0.01
    logits, contacts = differences(model, reference)
    assert logits > 10 * TOLERANCE or contacts > 10 * CONTACT_TOLERANCE


def test_without_token_dropout(tmp_path):
    model = new_model(token_dropout=False)
    path = write_fair_esm(model, tmp_path / "esm2_mine.pt")[0]
    assert read_fair_esm(path).config.token_dropout is False
    reference = open_with_fair_esm(path)
    assert_equal(model, reference)
    reference.token_dropout = True
    assert differences(model, reference)[0] > 100 * TOLERANCE


@pytest.mark.parametrize("half", [False, True])
def test_a_file_in_the_published_form_is_read(tmp_path, half):
    path = write_published(tmp_path, half=half)
    model, reference = read_fair_esm(path), open_with_fair_esm(path)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert_equal(model, reference)
    assert not model.training
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in model.named_parameters()} - trained == {
        "esm.contact_head.regression.weight",
        "esm.contact_head.regression.bias",
    }
    assert model.lm_head.decoder.weight is model.esm.embeddings.word_embeddings.weight
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_rounded_frequencies_are_kept(tmp_path):
    """fair-esm computes with what is in a half-precision file, and so did the model that was trained so."""
    found = read_fair_esm(write_published(tmp_path, half=True)).esm.rotary_embeddings.inv_freq
    exact = new_model().esm.rotary_embeddings.inv_freq
    assert torch.equal(found, exact.half().float())
    assert not torch.equal(found, exact)


def test_the_same_model_as_one_built_here(tmp_path):
    """No field of the configuration or buffer is otherwise; `position_ids` is in no file."""
    model = build_model(esm_config("demo", **SIZES), 0)
    found = read_fair_esm(write_fair_esm(model, tmp_path / "esm2_mine.pt")[0])
    assert found.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(found.esm.embeddings.position_ids, model.esm.embeddings.position_ids)
    assert "position_ids" not in str(found.state_dict().keys())


def test_a_round_trip_is_bit_equal(tmp_path):
    model = new_model()
    first = write_fair_esm(model, tmp_path / "esm2_a.pt")
    found = read_fair_esm(first[0])
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    second = write_fair_esm(found, tmp_path / "esm2_b.pt")
    with torch.serialization.safe_globals(SAFE):
        for a, b in zip(first, second, strict=True):
            weights, again = torch.load(a)["model"], torch.load(b)["model"]
            assert all(torch.equal(weights[key], again[key]) for key in weights.keys() | again.keys())


def test_writing_leaves_the_model_as_it_was(tmp_path):
    model = new_model()
    use_packed_layers(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    path = write_fair_esm(model, tmp_path / "esm2_mine.pt")[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.lm_head.bias.dtype == torch.bfloat16
    assert model.config._attn_implementation == implementation
    assert torch.equal(read_fair_esm(path).lm_head.bias, before["lm_head.bias"].float())


def test_the_generator_is_left_alone(tmp_path):
    path = write_published(tmp_path)
    before = torch.get_rng_state()
    read_fair_esm(path)
    assert torch.equal(torch.get_rng_state(), before)


PREFIX = "encoder.sentence_encoder."
FIRST = PREFIX + "layers.0.self_attn."


def drop(key):
    return lambda data: data["model"].pop(key)


def put(key, edit):
    return lambda data: data["model"].update({key: edit(data["model"].get(key))})


def scale_frequencies(data):
    for key, tensor in data["model"].items():
        if key.endswith("inv_freq"):
            tensor *= 1.01


def setting(**settings):
    return lambda data: vars(data["cfg"]["model"]).update(settings)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(FIRST + "q_proj.bias"), r"layers\.0\.self_attn\.q_proj\.bias is missing"),
        (drop("encoder.lm_head.weight"), r"lm_head\.weight is missing"),
        (drop(FIRST + "rot_emb.inv_freq"), r"rot_emb\.inv_freq is missing"),
        (put(PREFIX + "layers.3.fc1.bias", lambda _: torch.zeros(4)), r"layers\.3\.fc1\.bias is unexpected"),
        (put(FIRST + "k_proj.weight", lambda x: x[:-1]), r"k_proj\.weight is not a floating.* of shape \(64, 64\)"),
        (put(FIRST + "k_proj.weight", lambda x: x.int()), r"k_proj\.weight is not a floating"),
        (put(FIRST + "k_proj.weight", lambda x: "text"), r"k_proj\.weight is not a floating"),
        (put("lm_head.bias", lambda _: torch.zeros(33)), "holds a weight twice"),
        (put("encoder.lm_head.weight", lambda x: x + 1e-3), r"lm_head\.weight is not its embed_tokens\.weight"),
        (put(FIRST + "rot_emb.inv_freq", lambda x: x.half().float()), r"layers\.1\S+inv_freq is not ESM-2's table"),
        (scale_frequencies, r"layers\.0\S+inv_freq is not ESM-2's table"),
        (setting(encoder_layers=2), r"layers\.2\.fc1\.bias is unexpected.* and 13 more faults"),
        (setting(encoder_layers="3"), r"encoder_layers is '3', not int"),
        (setting(encoder_attention_heads=3), "esm2_t3_test.pt: A model of .* cannot be built"),
        (lambda data: data.pop("cfg"), r"no settings under cfg\.model"),
        (lambda data: data.pop("model"), "or no weights under model"),
        (lambda data: data.update(args=argparse.Namespace(arch="roberta_large")), "'roberta_large'; only .* ESM-2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, edit, message):
    path = write_published(tmp_path)
    read_fair_esm(path)
    change(path, edit)
    with pytest.raises(UserError, match=message):
        read_fair_esm(path)


def test_settings_may_be_a_dictionary(tmp_path):
    path = write_published(tmp_path)
    change(path, lambda data: data["cfg"].update(model=vars(data["cfg"]["model"])))
    assert read_fair_esm(path).config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("arch", ["roberta_large", "protein_bert_base", "msa_transformer", "invariant_gvp"])
def test_other_models_of_fair_esm_are_refused(tmp_path, arch):
    path = tmp_path / "esm1b_t33_650M_UR50S.pt"
    torch.save({"args": argparse.Namespace(arch=arch), "model": {}}, path)
    with pytest.raises(UserError, match=f"model of kind '{arch}'; only fair-esm's files of ESM-2 are read"):
        read_fair_esm(path)


def test_a_missing_regression_is_named(tmp_path):
    path = write_published(tmp_path)
    regression = tmp_path / "esm2_t3_test-contact-regression.pt"
    with torch.serialization.safe_globals(SAFE):
        head = torch.load(regression)["model"]
    regression.unlink()
    with pytest.raises(UserError, match=r"esm2_t3_test-contact-regression\.pt, which belongs beside it, is missing"):
        read_fair_esm(path)
    change(path, lambda data: data["model"].update(head))
    assert torch.equal(read_fair_esm(path).esm.contact_head.regression.bias, head["contact_head.regression.bias"])
    torch.save([head], regression)
    with pytest.raises(UserError, match="holds a list instead of a model"):
        read_fair_esm(path)


class Command:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["model", "regression", "bare"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, place):
    path, mark = write_published(tmp_path), tmp_path / "it_ran"
    victim = path.with_name("esm2_t3_test-contact-regression.pt") if place == "regression" else path
    if place == "bare":
        victim.write_bytes(pickle.dumps({"model": Command(str(mark))}, protocol=2))
    else:
        change(victim, lambda data: data.update(extra=Command(str(mark))))
    with pytest.raises(UserError, match=rf"{victim.name} was not opened: it asks to run \S+mkdir") as caught:
        read_fair_esm(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if place != "bare":
        torch.load(victim, weights_only=False)  # the twin: it would have run
        assert mark.exists()


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "pickle", "folder", "nothing", "tensor"])
def test_what_is_no_such_file_is_refused(tmp_path, kind, recwarn):
    path = write_published(tmp_path)
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind != "nothing":
        contents = {"truncated": content[: len(content) // 2], "empty": b"", "text": b">sp|1\nMKTV\n"}
        path.write_bytes({**contents, "pickle": pickle.dumps(Command("x"), protocol=4)}[kind])
    expected = {"folder": "cannot be read", "nothing": "cannot be read", "tensor": "holds a Tensor instead of a model"}
    with pytest.raises(UserError, match=expected.get(kind, "is damaged, or no file of PyTorch's")) as caught:
        read_fair_esm(path)
    assert "\n" not in str(caught.value)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "proposed"),
    [("mine.pt", "esm2_mine.pt"), ("esm2_mine.bin", "esm2_mine.bin.pt"), ("esm2_esm1v_b.pt", "esm2_b.pt")],
)
def test_names_that_fair_esm_takes_for_other_models_are_refused(tmp_path, name, proposed):
    with pytest.raises(UserError, match=f"{name} should be called {proposed}"):
        write_fair_esm(new_model(), tmp_path / name)
    write_fair_esm(new_model(), tmp_path / proposed)


@pytest.mark.parametrize("name", ["esm2_mine.pt", "esm2_mine-contact-regression.pt"])
def test_files_that_are_there_stay(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"already has {name}"):
        write_fair_esm(new_model(), tmp_path / "esm2_mine.pt")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_models_that_are_no_esm2_are_refused(tmp_path):
    config = esm_config("demo", **SIZES)
    config.intermediate_size, config.layer_norm_eps = 96, 1e-6
    with pytest.raises(UserError, match="its intermediate_size, layer_norm_eps differ"):
        write_fair_esm(build_model(config, 0), tmp_path / "esm2_mine.pt")
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["weight", "setting", "disk", "rename", "file"])
def test_what_does_not_read_back_is_not_written(tmp_path, monkeypatch, fault):
    """The twin of the verification: each thing it compares is broken in turn."""
    model, save = new_model(), torch.save

    def save_wrongly(data, file):
        if fault == "weight" and "encoder.lm_head.bias" in data["model"]:
            data["model"]["encoder.lm_head.bias"] = data["model"]["encoder.lm_head.bias"] + 1e-6
        elif fault == "setting" and "cfg" in data:
            data["cfg"]["model"].token_dropout = False
        elif fault == "disk":
            raise OSError(28, "No space left on device")
        save(data, file)

    def rename_the_first(path, target, rename=fair_esm.Path.rename):
        if "regression" not in path.name:
            raise OSError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(torch, "save", save_wrongly)
    if fault == "rename":
        monkeypatch.setattr(fair_esm.Path, "rename", rename_the_first)
    folder = tmp_path
    if fault == "file":
        (tmp_path / "folder").write_text("")
        folder = tmp_path / "folder"
    expected = {"weight": r"read back otherwise: \['lm_head.bias'\]", "setting": "its logits on a probe are off by"}
    with pytest.raises(
        RuntimeError if fault in expected else UserError, match=expected.get(fault, "cannot be written")
    ):
        write_fair_esm(model, folder / "esm2_mine.pt")
    assert names(tmp_path) == (["folder"] if fault == "file" else [])
