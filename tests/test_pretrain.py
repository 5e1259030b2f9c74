"""The main job, through the real launcher: a FASTA file becomes a folder that plain transformers opens."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import hf_plm
from hf_plm import build_model, esm_config
from hf_plm.config import Mask, UserError
from hf_plm.data.corpus import open_corpus
from hf_plm.data.loader import Steps
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.training.inspection import inspect_folder

ROOT = Path(__file__).parents[1]
SMALL = {
    "schedule.steps": "24",
    "batch.tokens": "512",
    "data.crop": "128",
    "checkpoint.every": "5",
    "validation.every": "6",
    "run.log_every": "1",
}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", value)]


def launch(folder: Path, fasta: Path, *flags: str) -> subprocess.Popen[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "launch" / "pretrain.py")]
    recipe = [str(ROOT / "launch" / "recipes" / "demo.yaml"), "--data.train", str(fasta)]
    command = [*accelerate, *config, *recipe, "--run.folder", str(folder), *FLAGS, *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def numbers(folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl, without what a clock put there."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, family_fasta: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, finished(launch(folder, family_fasta))


def test_a_run_leaves_what_it_promises(whole_run: tuple[Path, str]) -> None:
    folder, output = whole_run
    assert "Plan: 24 steps" in output
    assert "from_pretrained" in output
    training = [line for line in numbers(folder) if "loss" in line]
    validation = [line for line in numbers(folder) if "validation_loss" in line]
    assert [line["step"] for line in training] == list(range(1, 25))
    assert [line["step"] for line in validation] == [6, 12, 18, 24]
    assert {"learning_rate", "gradient_norm", "tokens", "padding_share"} <= training[0].keys()
    assert {"validation_loss_masked", "validation_perplexity", "validation_recovery"} <= validation[0].keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert {"unigram_entropy", "context_free_loss", "margin_context_free"} <= summary.keys()
    assert training[-1]["loss"] < training[0]["loss"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["schedule"]["warmup"] == 1
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000020", "step-00000024"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob(".partial-*"))
    assert [line["step"] for line in validation if line.get("final")] == [24]


def test_plain_transformers_opens_the_folder(whole_run: tuple[Path, str]) -> None:
    """In a process of its own in which hf_plm cannot be imported."""
    script = (
        "import sys; sys.modules['hf_plm'] = None\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        "model, info = AutoModelForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "batch = tokenizer(['MKTAYIAK', 'MK<mask>A'], padding=True, return_tensors='pt')\n"
        "print(type(model).__name__, tuple(model(**batch).logits.shape))\n"
    )
    command = [sys.executable, "-c", script, str(whole_run[0] / "hub")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n")[0] == "EsmForMaskedLM (2, 10, 33)", done.stderr


def test_a_finished_run_says_so_and_does_nothing(whole_run: tuple[Path, str], family_fasta: Path) -> None:
    folder, _ = whole_run

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    before = times()
    output = finished(launch(folder, family_fasta))
    assert "Finished: 24 steps" in output
    assert times() == before


def wait_for_step(folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} never came")


@pytest.mark.parametrize(
    ("how", "step", "workers"),
    [  # 6 is a step of a validation
        pytest.param(signal.SIGKILL, 8, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, 8, 2),
        pytest.param(signal.SIGTERM, 5, 0, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    whole_run: tuple[Path, str], family_fasta: Path, tmp_path: Path, how: signal.Signals, step: int, workers: int
) -> None:
    """Bit for bit: losses, gradient norms and validation after a kill are those of the run that was left alone."""
    folder = tmp_path / "stopped"
    process = launch(folder, family_fasta, "--data.workers", str(workers))
    wait_for_step(folder, step)
    os.killpg(process.pid, how)
    output, _ = process.communicate(timeout=60)
    assert not (folder / "summary.json").exists()
    if how == signal.SIGTERM:
        assert re.search(r"Stopped by SIGTERM after step \d+; the same command goes on from there", output)
        assert "Traceback" not in output
    output = finished(launch(folder, family_fasta))
    assert "Going on from" in output
    assert numbers(folder) == numbers(whole_run[0])


def test_a_run_killed_while_it_finishes_has_each_line_once(
    whole_run: tuple[Path, str], family_fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_plm.training.finish.draw_curves", killed)
        with pytest.raises(KeyboardInterrupt):
            run_here(family_fasta, tmp_path / "run")
    run_here(family_fasta, tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(whole_run[0])


def test_a_hub_folder_that_was_deleted_is_made_again(family_fasta: Path, tmp_path: Path) -> None:
    first = run_here(family_fasta, tmp_path / "run", schedule__steps="4")
    shutil.rmtree(first.hub_folder)
    again = run_here(family_fasta, tmp_path / "run", schedule__steps="4")
    assert again.summary["validation_loss"] == first.summary["validation_loss"]
    assert (again.hub_folder / "model.safetensors").exists()


def test_inspect_shows_a_step_and_refuses_one_that_never_was(whole_run: tuple[Path, str]) -> None:
    shown = inspect_folder(whole_run[0], 20)
    line = next(line for line in numbers(whole_run[0]) if line["step"] == 21)
    assert f"begins at epoch {line['epoch']}, place {line['place']}:" in shown
    with pytest.raises(UserError, match="has no step 24; the last that can be shown is 23"):
        inspect_folder(whole_run[0], 24)


def test_two_processes_do_not_share_a_folder(family_fasta: Path, tmp_path: Path) -> None:
    from hf_plm.training.run_folder import take

    with take(tmp_path / "run"):
        process = launch(tmp_path / "run", family_fasta)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert f"Process {os.getpid()} of {platform.node()} runs in {tmp_path / 'run'} already" in output


def test_twin_another_seed_has_other_numbers(whole_run: tuple[Path, str], family_fasta: Path, tmp_path: Path) -> None:
    other = hf_plm.load_recipe(
        "demo", {**SMALL, "data.train": str(family_fasta), "run.folder": str(tmp_path / "other")}
    )
    hf_plm.pretrain(other.replace(run__seed=1))
    assert numbers(tmp_path / "other") != numbers(whole_run[0])


def run_here(fasta: Path, folder: Path, **knobs: str) -> hf_plm.Result:
    small = {
        name: value for name, value in SMALL.items() if name != "schedule.steps" or "schedule__budget" not in knobs
    }
    overrides = {**small, "data.train": str(fasta), "run.folder": str(folder), "run.trackers": "none"}
    return hf_plm.pretrain(
        hf_plm.load_recipe("demo", {**overrides, **{k.replace("__", "."): v for k, v in knobs.items()}})
    )


def test_the_gradient_is_that_of_the_mean_over_all_targets_of_a_step(family_fasta: Path, tmp_path: Path) -> None:
    """Step 0 over four micro-batches, against sums and one division written out here."""
    result = run_here(
        family_fasta, tmp_path / "run", batch__micro_batches="4", batch__tokens="256", schedule__steps="3"
    )
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    corpus = open_corpus(stored["corpus"]["folder"])
    step = next(iter(Steps(corpus, Packing(128, 256, 4, 0), Mask(), 0, Cursor())))
    module = PackedMaskedLM(build_model(esm_config("demo"), seed=0))
    loss_sum, num_targets = torch.zeros(()), 0
    for batch in step.micro_batches:
        loss_sum = loss_sum + module(*batch.inputs())[0]
        num_targets += batch.num_targets
    loss = loss_sum / num_targets
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    line = numbers(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # The twin: the mean of the micro-batches' means is another number.
    counts = [batch.num_targets for batch in step.micro_batches]
    assert max(counts) > min(counts)
    assert result.summary["steps"] == 3
    assert type(result.model).__name__ == "EsmForMaskedLM"


def count_layer_calls(run: Callable[[], object]) -> int:
    calls = []

    def count(module: torch.nn.Module, *_: object) -> None:
        if type(module).__name__ == "EsmIntermediate" and torch.is_grad_enabled():
            calls.append(1)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    run()
    hook.remove()
    return len(calls)


def test_activation_checkpointing_changes_no_number(family_fasta: Path, tmp_path: Path) -> None:
    """Each layer runs a second time in the backward pass, and the losses stay."""
    plain = count_layer_calls(lambda: run_here(family_fasta, tmp_path / "plain", schedule__steps="4"))
    recomputed = count_layer_calls(
        lambda: run_here(family_fasta, tmp_path / "again", schedule__steps="4", model__activation_checkpointing="true")
    )
    assert recomputed == 2 * plain
    losses = [[line.get("loss") for line in numbers(tmp_path / name)] for name in ("plain", "again")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_bf16_and_a_wall_clock_budget(family_fasta: Path, tmp_path: Path) -> None:
    """A run of four seconds: it ends by the clock, its rate falls by the clock, and what was auto is in its config."""
    result = run_here(
        family_fasta,
        tmp_path / "run",
        run__precision="bf16",
        schedule__budget="4s",
        batch__micro_batches="auto",
        validation__every="auto",
    )
    assert result.summary["precision"] == "bf16"
    assert result.summary["seconds"] > 3
    lines = [line for line in numbers(tmp_path / "run") if "learning_rate" in line]
    assert lines[-1]["learning_rate"] < max(line["learning_rate"] for line in lines)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "auto" not in (stored["batch"]["micro_batches"], stored["validation"]["every"], stored["schedule"]["warmup"])


def test_nan_stops_the_run_and_keeps_the_checkpoint(family_fasta: Path, tmp_path: Path) -> None:
    knobs = {"optimizer__learning_rate": "1e30", "checkpoint__every": "1", "schedule__steps": "9"}
    with pytest.raises(
        UserError, match=r"loss of step \d+ is nan .* hf-plm inspect .* --step \d+ shows|weights .* are not finite"
    ):
        run_here(family_fasta, tmp_path / "run", **knobs)
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("knob", "value"), [("mask.rate", "0.2"), ("model.preset", "8m"), ("schedule.steps", "25"), ("run.seed", "3")]
)
def test_a_run_folder_of_another_recipe_is_refused_by_name(
    whole_run: tuple[Path, str], family_fasta: Path, knob: str, value: str
) -> None:
    with pytest.raises(UserError, match=rf"has {knob} = .* but {value} is asked for now"):
        run_here(family_fasta, whole_run[0], **{knob.replace(".", "__"): value})


def test_a_run_folder_of_other_sequences_is_refused(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    from hf_plm.data.simulate import write_simulated_fasta

    other = tmp_path / "other.fasta"
    write_simulated_fasta(other, num_families=2, members_per_family=60, seed=9)
    with pytest.raises(UserError, match=r"other sequences than data\.train names now"):
        run_here(other, whole_run[0])


def test_other_validation_sequences_are_refused(
    whole_run: tuple[Path, str], family_fasta: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.fasta").write_text(">a\nMKVLAA\n>b\nMKWLAAC\n")
    with pytest.raises(UserError, match=r"other sequences than data\.(train|validation) names now"):
        run_here(family_fasta, whole_run[0], data__validation=str(tmp_path / "own.fasta"))


def test_without_masked_targets_there_is_still_a_run(family_fasta: Path, tmp_path: Path) -> None:
    knobs = {"mask__mask": "0", "mask__random": "0.5", "schedule__steps": "3"}
    result = run_here(family_fasta, tmp_path / "run", **knobs)
    assert result.summary["validation_loss_masked"] is None
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_folder_of_something_else_is_refused(family_fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        run_here(family_fasta, tmp_path)


def test_an_unwritable_run_folder_is_refused(family_fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* give another one with --run.folder"):
        run_here(family_fasta, tmp_path / "file" / "run")


def test_a_corpus_smaller_than_a_step_is_refused(family_fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fewer than one step takes .* --batch\.micro_batches \d+"):
        run_here(family_fasta, tmp_path / "run", batch__micro_batches="100000")
    with pytest.raises(UserError, match=r"fewer than one step takes .* --batch\.tokens \d+"):
        run_here(family_fasta, tmp_path / "run", batch__tokens="1000000")


def test_a_handful_of_sequences_is_no_corpus_for_a_budget(tmp_path: Path) -> None:
    (tmp_path / "few.fasta").write_text("".join(f">p{number}\n{'MKVLA' * (9 + number)}\n" for number in range(5)))
    knobs = {"data.train": str(tmp_path / "few.fasta"), "run.folder": str(tmp_path / "run"), "model.preset": "2x32x2"}
    with pytest.raises(UserError, match=r"has \d+ tokens to train on, fewer than one step takes \(4,096\)"):
        hf_plm.pretrain(hf_plm.load_recipe("mine", knobs))


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Nothing to train on"):
        hf_plm.pretrain(hf_plm.load_recipe("demo", {"run.folder": str(tmp_path)}))
