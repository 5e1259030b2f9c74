"""docs/scaling.md holds what benchmarks/scaling.py computes, and the engines send what it says."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from hf_plm.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return pytest.importorskip("scaling")


def tables_of_page() -> dict[str, str]:
    """What stands between `<!-- NAME -->` and `<!-- end -->`."""
    return dict(re.findall(r"<!-- (\w+) -->\n+(.*?)\n+<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def test_the_page_holds_the_tables_that_the_script_computes(scaling: ModuleType) -> None:
    assert tables_of_page() == scaling.paper()


def test_twin_with_another_size_of_weights_the_tables_differ(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_per_step = scaling.bytes_per_step
    monkeypatch.setattr(scaling, "bytes_per_step", lambda *arguments: bytes_per_step(*arguments) / 2)
    differ = {name for name, text in scaling.paper().items() if text != tables_of_page()[name]}
    assert differ == {"moved", "bound", "accumulation"}


def test_the_recipes_are_as_the_tables_assume(scaling: ModuleType) -> None:
    for preset in scaling.SIZES:
        recipe = load_recipe(f"esm2_{preset}", {"data.train": "proteins.fasta", "run.folder": "run"})
        assert recipe.model.activation_checkpointing == (preset in scaling.RECOMPUTED)
        assert (recipe.batch.tokens, recipe.data.crop) == (scaling.MICRO_BATCH, scaling.CONTEXT)
        assert recipe.batch.micro_batches == (384 if preset == "15b" else scaling.MICRO_BATCHES)


def test_what_accumulation_saves_by_engine(scaling: ModuleType) -> None:
    """With 4 times the tokens in a step DDP and ZeRO-1 send as much as before, the others nearly 4 times as much."""
    sizes = scaling.sizes_of("650m")
    ratios = {
        name: scaling.bytes_per_step(name, sizes, 8, 4) / scaling.bytes_per_step(name, sizes, 8, 1)
        for name in scaling.ENGINES
    }
    assert ratios["DDP"] == ratios["ZeRO-1"] == 1
    assert ratios["ZeRO-2"] == pytest.approx(3)
    assert ratios["FSDP2"] == 4
    assert ratios["ZeRO-3"] == pytest.approx(4, abs=0.01)
    assert all(scaling.bytes_per_step(name, sizes, 1, 1) == 0 for name in scaling.ENGINES)


@pytest.mark.slow
def test_the_engines_send_what_the_paper_says(scaling: ModuleType, family_fasta: Path, tmp_path: Path) -> None:
    """Three processes and two micro-batches each, which tells W from W-1 and what is sent once from what is not."""
    pytest.importorskip("deepspeed")
    rows = scaling.count_bytes(tmp_path, family_fasta, processes=3, rounds=2)[1]
    assert len(rows) == 12
    for name, value, _ in rows:
        if value is not None:  # sockets are counted on Linux only
            assert value == pytest.approx(1, abs=0.02), name
