"""Shared by all tests: no network, one thread, a cache of prepared corpora that is thrown away, and the real data.

The libraries read the address of the Hub once, when they are imported. So it is an address of this machine from the
start, and a server answers there only in tests that ask for the `hub`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.hub_server import HubServer, free_port
from support.small import FOUR_STEPS

HUB_PORT = free_port()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_PORT}"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that huggingface_hub would have slept before each of its retries: noted, not slept."""
    seconds: list[float] = []
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, naps: list[float]) -> Iterator[HubServer]:
    """A Hub of this test's own, which this process is logged in to; `hub.environment` does it for another process."""
    import datasets
    import huggingface_hub

    def forget_the_last_one() -> None:
        huggingface_hub.close_session()
        huggingface_hub.HfFileSystem.clear_instance_cache()

    home = tmp_path / "hf_home"
    with HubServer(HUB_PORT, home=home) as server:
        # transformers asks huggingface_hub whether it is offline, and where the cache is.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS", "USE_PARQUET_EXPORT"):
            # The last two would call hosts that HF_ENDPOINT does not name.
            monkeypatch.setattr(datasets.config, name, False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        for name, path in (("HF_HOME", "."), ("HF_HUB_CACHE", "hub"), ("HF_TOKEN_PATH", "token")):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(home / path))
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        forget_the_last_one()
        yield server
        forget_the_last_one()
        assert not [fault for fault in server.faults if fault.times], "a fault that was never met proves nothing"


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


@pytest.fixture(scope="session")
def finished_run(family_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after the second and the last, in a folder with a name that tells."""
    from hf_plm import load_recipe, pretrain

    folder = tmp_path_factory.mktemp("home_of_somebody") / "mine"
    pretrain(load_recipe("demo", {"data.train": str(family_corpus), "run.folder": str(folder), **FOUR_STEPS}))
    return folder
