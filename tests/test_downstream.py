"""What others do with a Hub folder, without hf_plm: the Auto classes, fill-mask, fine-tuning heads, contacts.

No published file is at hand here, so a folder of ours is compared with itself in the layout of `facebook/esm2_*`.
`make compat` does the same under three versions of transformers.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import TOLERANCE, between_versions, check_alone, difference
from support.published import write_published_layout

from hf_plm import build_model, esm_config
from hf_plm.models.hub import save_hub_folder

OPEN_STOCK = Path(__file__).parent / "support" / "open_stock.py"


def use(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-I", str(OPEN_STOCK), str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(esm_config("demo", num_layers=2, width=32, num_heads=2), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # a new model's answers are all alike
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return save_hub_folder(model, tmp_path_factory.mktemp("downstream") / "ours", "# test\n")


@pytest.fixture(scope="module")
def report(ours: Path) -> dict[str, Any]:
    return use(ours)


def test_everything_works_and_nothing_is_said(report: dict[str, Any]) -> None:
    check_alone(report)
    answer = report["fill_mask"][0][0]
    assert answer["token"] == max(range(33), key=report["logits_masked"].__getitem__)
    assert answer["sequence"] == f"M K {answer['token_str']} V X"


def test_it_is_like_the_published_layout(ours: Path, report: dict[str, Any], tmp_path: Path) -> None:
    write_published_layout(ours, tmp_path / "published")
    published = use(tmp_path / "published")
    check_alone(published)
    assert difference(published, report) < TOLERANCE


def test_a_folder_that_differs_is_seen(ours: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """The twin: two letters of the vocabulary have changed places."""
    write_published_layout(ours, tmp_path / "other")
    vocabulary = tmp_path / "other" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("L\nA\n", "A\nL\n"))
    other = use(tmp_path / "other")
    with pytest.raises(AssertionError, match=r"ids"):
        difference(other, report)


def damaged(report: dict[str, Any], fault: str) -> dict[str, Any]:
    report = copy.deepcopy(report)
    step = report["steps"]["EsmForTokenClassification"]
    if fault == "asymmetric":
        report["contacts"][0][1] += 0.1
    elif fault == "no probability":
        report["contacts"][0][0] = 1.1
    elif fault == "made up":
        step["missing"].append("esm.encoder.layer.0.attention.self.query.weight")
    elif fault == "learned nothing":
        step["losses"] = [1.0, 1.0]
    elif fault == "a warning":
        report["messages"]["fill-mask"].append("Some weights were not used")
    return report


@pytest.mark.parametrize("fault", ["asymmetric", "no probability", "made up", "learned nothing", "a warning"])
def test_the_check_finds_each_fault(report: dict[str, Any], fault: str) -> None:
    with pytest.raises(AssertionError):
        check_alone(damaged(report, fault))


def test_versions_may_say_other_things_but_not_give_other_numbers(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report) | {"transformers": "4.57.6", "messages": {}}
    assert difference(between_versions(report), between_versions(other)) == 0
    other["logits"][0][0][0] += 2 * TOLERANCE
    assert difference(between_versions(report), between_versions(other)) > TOLERANCE
