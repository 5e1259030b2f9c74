"""Same mathematics, different execution: every engine, split of a step and resume gives the run of one process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launches import (
    EVERY,
    EXTENSIONS,
    Difference,
    Member,
    Run,
    Runs,
    cut_after_first_checkpoint,
    difference,
    train_here,
    training_lines,
    without_clock,
)
from members import BF16, FP32, NAMED, ONE, ONE_BF16, QUICK, SAME_BITS, TOLERANCE, TRANSITIONS
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForMaskedLM

from hf_plm import build_model, esm_config
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.training import trainer
from hf_plm.training.checkpoint import checksum, sync_and_hash, write_json

EMBEDDING, DECODER = "esm.embeddings.word_embeddings.weight", "lm_head.decoder.weight"


def parameters(members: list[Member]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(member, id=member.name, marks=() if member.name in QUICK else slow) for member in members]


def canonical_of(member: Member) -> Member:
    return ONE if member.precision == "no" else ONE_BF16


def check_execution(run: Run, member: Member) -> None:
    """That the run had the processes, engine and precision it is named for: a launcher falls back without a word."""
    facts = [run.summary[name] for name in ("engine", "processes", "precision")]
    assert facts == [member.engine, member.processes, "fp32" if member.precision == "no" else "bf16"]


def check_equal(run: Run, member: Member, name: str, runs: Runs, record_property: Any) -> None:
    found = difference(run, runs(canonical_of(member)))
    for what, value in vars(found).items():
        record_property(f"{name}_{what}", f"{value:.1e}")
    assert not found.beyond(TOLERANCE[member.precision]), found


def test_the_canonical_run_crosses_two_ends_of_an_epoch_and_learns(runs: Runs) -> None:
    lines = training_lines(runs(ONE))
    assert lines[-1]["epoch"] == 2
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    check_execution(runs(ONE), ONE)


@pytest.mark.parametrize("member", parameters(SAME_BITS))
def test_one_process_gives_the_same_bits(member: Member, runs: Runs) -> None:
    run, canonical = runs(member), runs(ONE)
    check_execution(run, member)
    assert without_clock(run) == without_clock(canonical)
    assert (run.folder / "hub" / "model.safetensors").read_bytes() == (
        canonical.folder / "hub" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("member", parameters(FP32 + BF16))
def test_a_member_gives_the_run_of_one_process(member: Member, runs: Runs, record_property: Any) -> None:
    run = runs(member)
    check_equal(run, member, member.name, runs, record_property)
    check_execution(run, member)


@pytest.mark.parametrize("member", parameters(SAME_BITS + FP32 + BF16))
def test_a_member_varies_what_it_says_and_nothing_else(member: Member, runs: Runs) -> None:
    asked, canonical = (
        yaml.safe_load((runs(one).folder / "config.yaml").read_text()) for one in (member, canonical_of(member))
    )
    differing = {
        f"{section}.{knob}"
        for section in canonical
        for knob in canonical[section]
        if asked[section][knob] != canonical[section][knob]
    }
    assert differing == {"run.folder", *dict(member.knobs)}


@pytest.mark.parametrize(
    "member", [member for member in parameters(FP32) if member.values[0].engine.startswith("ZeRO")]
)
def test_offload_is_on_where_the_file_says_so_and_nowhere_else(member: Member, runs: Runs) -> None:
    """By the word of DeepSpeed's optimizer in the run itself; on a CPU both places are the same memory."""
    note = json.loads((runs(member).folder / "zero.json").read_text())
    assert note == {
        "offloads_moments": "offload" in member.config,
        "offloads_weights": member.config == "zero3_offload",
        "updates_with": "torch.optim.adamw.AdamW",
    }


def test_no_run_waits_for_a_kernel_to_be_built(runs: Runs) -> None:
    """The turns at building are kept by a lock file, which a killed run leaves and every later one waits for."""
    log = runs(NAMED["zero2_x2"]).log
    assert "built" not in log
    assert not (runs.folder / EXTENSIONS).exists()


@pytest.mark.slow
def test_a_run_from_published_weights_is_the_same_under_stage_3(runs: Runs, record_property: Any) -> None:
    """Whatever loads a model while transformers knows of stage 3 gets empty weights. And evaluating changes nothing."""
    knobs = (("init.from", str(runs(ONE).folder / "hub")),)
    judged = (*knobs, ("evaluate.every", "10"), ("evaluate.data", str(runs.fasta)), ("evaluate.sample", "20"))
    one, member = Member("one_published", "cpu", knobs=knobs), Member("zero3_x2_published", "zero3", 2, knobs=judged)
    found = difference(runs(member), runs(one))
    for what, value in vars(found).items():
        record_property(f"{member.name}_{what}", f"{value:.1e}")
    assert not found.beyond(TOLERANCE["no"]), found
    assert training_lines(runs(one))[0]["loss"] < training_lines(runs(ONE))[0]["loss"]
    losses = [line["evaluate_loss"] for line in runs(member).lines if "evaluate_loss" in line]
    assert len(set(losses)) == 3
    assert max(losses) < 3, losses  # untrained weights would give 3.4


@pytest.mark.slow
def test_zero3_shares_out_weights_that_are_large_enough(runs: Runs, record_property: Any) -> None:
    """DeepSpeed leaves matrices under 100,000 elements whole, and the demo network has no others; the 8M one has."""
    knobs = (("model.preset", "8m"), ("batch.tokens", "256"))
    one, member = Member("one_8m", "cpu", knobs=knobs), Member("zero3_x2_8m", "zero3", 2, knobs=knobs)
    found = difference(runs(member), runs(one))
    for what, value in vars(found).items():
        record_property(f"{member.name}_{what}", f"{value:.1e}")
    # A norm over ten times as many numbers is rounded more.
    assert set(found.beyond(TOLERANCE["no"])) <= {"first_gradient_norm"}, found
    assert found.first_gradient_norm < 1e-5
    check_execution(runs(member), member)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(*pair, id="_to_".join(pair), marks=() if pair == ("zero3_x2", "ddp_x2") else pytest.mark.slow)
        for pair in TRANSITIONS
    ],
)
def test_a_run_goes_on_under_another_engine(source: str, target: str, runs: Runs, record_property: Any) -> None:
    member = NAMED[target]
    run = runs.resumed(NAMED[source], member)
    assert f"Going on from {run.folder}/checkpoints/step-{EVERY:08d} (step {EVERY}," in run.log
    check_equal(run, member, run.folder.name, runs, record_property)
    check_execution(run, member)


@pytest.mark.parametrize("member", parameters([ONE, ONE_BF16, *SAME_BITS, *FP32, *BF16]))
def test_the_hub_folder_has_the_bits_of_the_last_checkpoint(member: Member, runs: Runs) -> None:
    assert not faults_of_export(runs(member))


def faults_of_export(run: Run) -> list[str]:
    """Names of weights that the Hub folder does not have as the last checkpoint has them."""
    saved: dict[str, np.ndarray] = {}
    for path in run.checkpoints[-1].glob("model-*.safetensors"):
        saved |= load_file(path)
    exported = {name: value for name, value in run.hub_weights.items() if "inv_freq" not in name}
    faults = [name for name in saved.keys() | exported.keys() if not has_same_bits(saved.get(name), exported.get(name))]

    model = AutoModelForMaskedLM.from_pretrained(run.folder / "hub")
    opened = model.state_dict()
    faults += [name for name in saved if not has_same_bits(saved[name], opened[name].numpy())]
    if DECODER in saved or model.lm_head.decoder.weight is not model.esm.embeddings.word_embeddings.weight:
        faults.append(DECODER)
    untrained = build_model(esm_config("demo"), seed=0).state_dict()
    for name, value in exported.items():
        is_untrained = has_same_bits(value, untrained[name].numpy())
        if is_untrained != ("contact_head" in name):  # no gradient ever reaches it
            faults.append(name)
    return faults


def has_same_bits(value: np.ndarray | None, other: np.ndarray | None) -> bool:
    if value is None or other is None:
        return value is other
    return value.dtype == other.dtype and value.shape == other.shape and value.tobytes() == other.tobytes()


# What must not pass.


@pytest.mark.parametrize(
    "name", [EMBEDDING, "esm.encoder.layer.0.output.dense.bias", "esm.contact_head.regression.weight"]
)
def test_twin_one_bit_of_the_export_is_noticed(name: str, runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs(ONE).folder, folder)
    weights = load_file(folder / "hub" / "model.safetensors")
    weights[name].view(np.uint32).flat[7] ^= 1
    save_file(weights, folder / "hub" / "model.safetensors", metadata={"format": "pt"})
    assert set(faults_of_export(Run(folder, ""))) == {name}


def test_twin_another_engine_or_number_of_processes_is_noticed(runs: Runs) -> None:
    for wrong in (replace(ONE, processes=2), replace(ONE, config="ddp"), replace(ONE, precision="bf16")):
        with pytest.raises(AssertionError):
            check_execution(runs(ONE), wrong)


def check_unequal(found: Difference, same: set[str], name: str, record_property: Any) -> None:
    """That all numbers of a broken run but those in `same` are beyond the tolerance."""
    for what, value in vars(found).items():
        record_property(f"{name}_{what}", f"{value:.1e}")
    assert set(found.beyond(TOLERANCE["no"])) == vars(found).keys() - same, found


@pytest.mark.slow
def test_twin_another_seed_or_rate_is_another_run(runs: Runs, tmp_path: Path, record_property: Any) -> None:
    """The canonical run in this process has its bits; what is broken below is all that differs."""
    same = train_here(tmp_path / "same", runs.fasta)
    assert without_clock(same) == without_clock(runs(ONE))
    seeded = train_here(tmp_path / "seed", runs.fasta, {"run.seed": "1"})
    with pytest.raises(AssertionError):  # other sequences in each step
        difference(seeded, runs(ONE))
    masked = train_here(tmp_path / "masked", runs.fasta, {"mask.rate": "0.16"})
    check_unequal(difference(masked, runs(ONE)), set(), "twin_mask_rate", record_property)


def test_twin_a_mean_of_the_processes_means_is_noticed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Each micro-batch averages over its own targets, as four processes do that average before they reduce."""
    agree, forward, targets = trainer._agree, PackedMaskedLM.forward, [1.0]

    def agree_and_note(*args: Any, **kwargs: Any) -> trainer.Agreed:
        agreed = agree(*args, **kwargs)
        targets[0] = agreed.num_targets
        return agreed

    def forward_scaled(self: PackedMaskedLM, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if not torch.is_grad_enabled():  # validation
            return forward(self, *args, **kwargs)
        loss_sum, num_targets, num_correct = forward(self, *args)
        scaled = loss_sum * (targets[0] / (4 * num_targets))
        return loss_sum.detach() + scaled - scaled.detach(), num_targets, num_correct  # the loss is told as it is

    monkeypatch.setattr(trainer, "_agree", agree_and_note)
    monkeypatch.setattr(PackedMaskedLM, "forward", forward_scaled)
    broken = train_here(tmp_path / "broken", runs.fasta)
    check_unequal(difference(broken, runs(ONE)), {"first_loss"}, "twin_mean_of_means", record_property)


def test_twin_a_resume_that_forgets_a_moment_is_noticed(runs: Runs, tmp_path: Path, record_property: Any) -> None:
    folder = cut_after_first_checkpoint(runs(ONE).folder, tmp_path / "run")
    checkpoint = Run(folder, "").checkpoints[-1]
    path = next(checkpoint.glob("optimizer-*.safetensors"))
    moments = load_file(path)
    moments[f"{EMBEDDING}/exp_avg"][:] = 0
    save_file(moments, path)
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"][path.name] = sync_and_hash(path)
    del state["checksum"]
    write_json(checkpoint / "state.json", {**state, "checksum": checksum(state)})
    broken = train_here(folder, runs.fasta)
    before = {"first_loss", "first_gradient_norm"}
    check_unequal(difference(broken, runs(ONE)), before, "twin_lost_moment", record_property)


@pytest.mark.slow
def test_twin_fp32_is_no_member_of_the_class_of_bf16(runs: Runs, record_property: Any) -> None:
    found = difference(runs(ONE), runs(ONE_BF16))
    for what, value in vars(found).items():
        record_property(f"twin_precision_{what}", f"{value:.1e}")
    assert {"first_loss", "first_gradient_norm", "weights_max"} <= set(found.beyond(TOLERANCE["bf16"])), found
