"""Training step, checkpoint and export under FSDP2: on gloo with Accelerate's sharding, on a GPU with the YAML."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
KNOBS = {
    "schedule.steps": 12,
    "batch.tokens": 512,
    "batch.micro_batches": 4,
    "data.crop": 128,
    "checkpoint.every": 3,
    "checkpoint.keep": 9,
    "validation.every": 3,  # with each checkpoint: after a validation some parameters are whole
    "run.log_every": 1,
    "run.trackers": "none",
}
FLAGS = [word for name, value in KNOBS.items() for word in (f"--{name}", str(value))]


def command(engine: str) -> list[str]:
    if engine == "one":
        return [sys.executable, "-m", "hf_plm.cli", "pretrain", "demo"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*torchrun, str(ROOT / "tests" / "support" / "fsdp2_run.py"), "demo"]


def run(engine: str, folder: Path, fasta: Path, *flags: str) -> str:
    words = [*command(engine), "--data.train", str(fasta), "--run.folder", str(folder), *FLAGS, *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: Path, other: Path, name: str) -> float:
    pairs = list(zip(lines(one), lines(other), strict=True))
    assert [a["step"] for a, _ in pairs] == [b["step"] for _, b in pairs]
    return max(abs(a[name] - b[name]) for a, b in pairs if name in a)


def stop_after_step_6(folder: Path) -> None:
    """Leave what a crash after step 6 would have left."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "hub")
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > "step-00000006":
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, family_fasta: Path) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    for engine in ("one", "fsdp2"):
        run(engine, folder / engine, family_fasta)
    return folder


def test_sharded_losses_norms_and_validations_are_those_of_one_process(runs: Path) -> None:
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4), ("validation_loss", 1e-5)):
        assert largest_difference(runs / "one", runs / "fsdp2", name) < tolerance


def test_the_run_is_sharded(runs: Path) -> None:
    """No process holds a whole gradient between the rounds of a step."""
    seen = json.loads((runs / "fsdp2" / "fsdp2.json").read_text())
    assert seen == {"whole_gradient_elements": 0, "computed_in": "torch.float32"}


@pytest.mark.slow
def test_the_run_computes_in_the_precision_it_says(runs: Path, family_fasta: Path, tmp_path: Path) -> None:
    """bf16 is bf16 (the twin: fp32 is not)."""
    run("fsdp2", tmp_path / "run", family_fasta, "--run.precision", "bf16")
    seen = json.loads((tmp_path / "run" / "fsdp2.json").read_text())
    assert seen == {"whole_gradient_elements": 0, "computed_in": "torch.bfloat16"}
    assert largest_difference(runs / "one", tmp_path / "run", "loss") < 0.02


def test_the_hub_folder_is_the_checkpoint_to_the_last_bit(runs: Path) -> None:
    hub = load_file(runs / "fsdp2" / "hub" / "model.safetensors")
    last = runs / "fsdp2" / "checkpoints" / "step-00000012"
    shares = [load_file(path) for path in sorted(last.glob("model-*.safetensors"))]
    assert len(shares) == 2
    assert all(shares)  # both processes wrote some of it
    weights = shares[0] | shares[1]
    assert weights.keys() <= hub.keys()
    assert all(torch.equal(weights[name], hub[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("one", "fsdp2"), ("fsdp2", "one")])
def test_a_run_goes_on_under_another_engine(
    runs: Path, family_fasta: Path, tmp_path: Path, first: str, second: str
) -> None:
    shutil.copytree(runs / first, tmp_path / "run")
    stop_after_step_6(tmp_path / "run")
    assert "Going on from" in run(second, tmp_path / "run", family_fasta)
    assert largest_difference(runs / "one", tmp_path / "run", "loss") < 1e-5


@pytest.mark.slow
def test_twin_without_the_moments_the_losses_differ(runs: Path, family_fasta: Path, tmp_path: Path) -> None:
    """What the comparison above would miss, had it no power: moments of zeros in the checkpoint."""
    from safetensors.torch import save_file

    from hf_plm.training.checkpoint import checksum, sync_and_hash

    shutil.copytree(runs / "fsdp2", tmp_path / "run")
    stop_after_step_6(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    state = json.loads((checkpoint / "state.json").read_text())
    for path in checkpoint.glob("optimizer-*.safetensors"):
        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
        state["sha256"][path.name] = sync_and_hash(path)
    del state["checksum"]
    (checkpoint / "state.json").write_text(json.dumps({**state, "checksum": checksum(state)}))
    run("one", tmp_path / "run", family_fasta)
    assert largest_difference(runs / "one", tmp_path / "run", "loss") > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "engine"), [("fsdp2", "FSDP2"), ("zero2", "ZeRO-2"), ("zero3", "ZeRO-3")])
def test_the_yaml_gives_its_engine_on_a_gpu(family_fasta: Path, tmp_path: Path, name: str, engine: str) -> None:
    """One process holds one share of everything; the losses are those of one process without an engine, in bf16, and a
    run that stopped under the engine goes on without it."""
    if engine != "FSDP2":
        pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    script = [str(ROOT / "launch" / "pretrain.py"), "demo", "--data.train", str(family_fasta), *FLAGS]

    def train(config: str, folder: Path) -> None:
        yaml = str(ROOT / "accelerate_configs" / f"{config}.yaml")
        words = [*launch, "--config_file", yaml, *script, "--run.folder", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    train("single_gpu", tmp_path / "single_gpu")
    train(name, tmp_path / name)
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    assert (summary["engine"], summary["precision"]) == (engine, "bf16")
    assert largest_difference(tmp_path / "single_gpu", tmp_path / name, "loss") < 0.02
    stop_after_step_6(tmp_path / name)
    train("single_gpu", tmp_path / name)
    assert largest_difference(tmp_path / "single_gpu", tmp_path / name, "loss") < 0.02
