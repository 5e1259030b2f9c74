"""Shared by all tests: no network, one thread, a cache of prepared corpora that is thrown away, and the real data."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    os.environ["HF_PLM_CACHE"] = str(folder / "hf_plm")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(os.environ.get("HF_PLM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real proteins in {folder}; set HF_PLM_DATA to a copy of them")
    return folder


@pytest.fixture(scope="session")
def family_fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated corpus: 4 families of 60 proteins."""
    from hf_plm.data.simulate import write_simulated_fasta

    path = tmp_path_factory.mktemp("simulated") / "families.fasta.gz"
    write_simulated_fasta(path, num_families=4, members_per_family=60, seed=1)
    return path


@pytest.fixture(scope="session")
def family_corpus(family_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, prepared: 220 sequences to train on and 20 held out."""
    from hf_plm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpora") / "families"
    prepare([family_fasta], folder, show_progress=False)
    return folder
