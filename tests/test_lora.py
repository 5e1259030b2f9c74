"""docs/lora.py: PEFT's LoRA fine-tunes a Hub folder of ours, and nothing but the adapter and the classifier changes."""

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, EsmForSequenceClassification

from hf_plm import build_model, esm_config
from hf_plm.data.simulate import Evolution, simulate_families
from hf_plm.models.hub import save_hub_folder

SCRIPT = Path(__file__).parents[1] / "docs" / "lora.py"
SHORT = Evolution(median_length=50, length_sigma=0.1)
FAMILIES = [(record_id[4:8], sequence) for record_id, _, sequence in simulate_families(3, 40, seed=5, evolution=SHORT)]


def is_charged(letter: str) -> str:
    return "1" if letter in "KRH" else "-" if letter in "LA" else "0"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hub_folder(build_model(esm_config("demo"), seed=0), tmp_path_factory.mktemp("lora") / "hub", "# test\n")


@pytest.fixture(scope="module")
def family_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "families.tsv"
    path.write_text("sequence\tlabel\n" + "".join(f"{sequence}\t{family}\n" for family, sequence in FAMILIES))
    return path


@pytest.fixture(scope="module")
def site_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a split of its own: every fourth protein is for testing."""
    lines = ["id\tsplit\tsequence\tlabels"]
    for index, (_, sequence) in enumerate(FAMILIES):
        labels = "".join(map(is_charged, sequence))
        lines.append(f"{index}\t{('test', 'train', 'train_2', 'train_3')[index % 4]}\t{sequence.lower()}\t{labels}")
    path = tmp_path_factory.mktemp("tables") / "sites.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def lora() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The script as on a stranger's machine, where hf_plm cannot be imported."""
    without = "import sys, runpy; sys.modules['hf_plm'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-I", "-c", without + "runpy.run_path(sys.argv[0], run_name='__main__')", SCRIPT, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def losses(output: str) -> dict[str, float]:
    return {when: float(loss) for when, loss in re.findall(r"^Held out, (.+): loss ([\d.]+)", output, re.MULTILINE)}


@pytest.fixture(scope="module")
def sites(hub: Path, site_table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    adapter = tmp_path_factory.mktemp("adapters") / "sites"
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in hub.iterdir()}
    finished = run(hub, site_table, "--epochs", "2", "--adapter", adapter)
    assert finished.returncode == 0, finished.stderr
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in hub.iterdir()}
    return finished.stdout, adapter


def test_labels_of_residues_are_learned(sites: tuple[str, Path]) -> None:
    output, adapter = sites
    found = losses(output)
    num_labels = sum(letter not in "LA" for _, sequence in FAMILIES[::4] for letter in sequence)
    assert "90 proteins to learn from, 30 held out; labels: 0, 1" in output
    assert f"on {num_labels} labels" in output
    assert found["after epoch 2"] < 0.5 * found["before"]
    assert found[f"read back from {adapter}"] == found["after epoch 2"]


def test_the_adapter_holds_lora_and_classifier_only(sites: tuple[str, Path]) -> None:
    adapter = sites[1]
    layers = [f"base_model.model.esm.encoder.layer.{layer}.attention.self" for layer in range(4)]
    lora = {
        f"{layer}.{name}.lora_{side}.weight" for layer in layers for name in ("query", "key", "value") for side in "AB"
    }
    classifier = {f"base_model.model.classifier.{kind}" for kind in ("weight", "bias")}
    assert set(load_file(adapter / "adapter_model.safetensors")) == lora | classifier
    assert AutoConfig.from_pretrained(adapter).id2label == {0: "0", 1: "1"}


def test_only_the_adapter_is_trained_and_it_reads_back(
    lora: ModuleType, hub: Path, family_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lora.main(str(hub), str(family_table), epochs=1, adapter=str(tmp_path / "adapter"))
    found = losses(capsys.readouterr().out)
    assert found["after epoch 1"] < 0.5 * found["before"]

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("base_model.model.classifier.modules_to_save") for name in trained)
    assert sum("lora_" in name for name in trained) == 4 * 3 * 2
    published = load_file(hub / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name not in trained and "classifier" not in name:
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, published[key]), key

    tokenizer = AutoTokenizer.from_pretrained(hub)
    batch = tokenizer([sequence for _, sequence in FAMILIES[::10]], padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    assert config.id2label == {0: "F000", 1: "F001", 2: "F002"}
    base = EsmForSequenceClassification.from_pretrained(hub, config=config)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = again(**batch).logits
        assert torch.equal(logits, model.eval()(**batch).logits)
        with again.disable_adapter():  # the twin: without what was trained the answers are others
            assert (again(**batch).logits - logits).abs().max() > 0.1
        assert (again.merge_and_unload()(**batch).logits - logits).abs().max() < 1e-4


def test_labels_that_do_not_fit_are_refused(lora: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    table.write_text("sequence\tlabels\nMKTV\t010\n")
    with pytest.raises(SystemExit, match="3 labels for the 4 residues of MKTV"):
        lora.read_table(str(table))
    table.write_text("sequence\tlabel\tsplit\nMKTV\tx\ttest\n")
    with pytest.raises(SystemExit, match="0 rows to learn from and 1 held out"):
        lora.read_table(str(table))


def test_batches_of_real_tables(lora: ModuleType, hub: Path) -> None:
    """Labels sit at their residues, also in proteins that are cut, and those not seen in training are passed over."""
    rows = [("MKTV", list("01-2")), ("A" * 1100, list("1" * 1100))]
    (batch,) = lora.batches(rows, AutoTokenizer.from_pretrained(hub), {"0": 0, "1": 1})
    assert batch["labels"][0, :7].tolist() == [-100, 0, 1, -100, -100, -100, -100]
    assert batch["labels"].shape == (2, 1024)
    assert (batch["labels"][1] == 1).sum() == 1022
    assert batch["labels"][1, [0, -1]].tolist() == [-100, -100]
