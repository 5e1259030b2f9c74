"""A run from recipe to Hub folder: everything around the loop."""

import math
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import EsmForMaskedLM

from hf_plm.config import Recipe, UserError
from hf_plm.data.corpus import Corpus, open_corpus
from hf_plm.data.loader import Steps, count_tokens, validation_micro_batches, validation_windows
from hf_plm.data.pack import Packing
from hf_plm.data.prepare import ensure_prepared
from hf_plm.inference.evaluate import Evaluation, evaluate
from hf_plm.models.attention import attention_route
from hf_plm.models.hub import load_hub_folder
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import Progress, newest_whole, restore, sweep
from hf_plm.training.finish import finish, is_simulated, summary_lines
from hf_plm.training.meter import Meter, check_trackers
from hf_plm.training.optim import build_optimizer
from hf_plm.training.runtime import machine_facts, measure_speed, start_accelerator, stop_on_signals
from hf_plm.training.schedule import resolve
from hf_plm.training.trainer import Parts, run_steps


@dataclass(frozen=True)
class Result:
    """A finished run: the stock model, its tokenizer, the Hub folder they were written to, and summary.json."""

    model: EsmForMaskedLM = field(repr=False)
    tokenizer: ProteinTokenizer = field(repr=False)
    hub_folder: Path
    summary: dict[str, Any]


def pretrain(recipe: Recipe) -> Result:
    """Run a recipe, or go on with the run in its folder; returns when it is finished.

    Raises `UserError` for the user's mistakes and `StoppedError` when a signal ended the run early.
    """
    esm_config(recipe.model.preset)  # a misspelt one is told now, not after an hour of preparing
    check_trackers(recipe)
    accelerator = start_accelerator(recipe)
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(run_folder.take(recipe.run_folder))
        with accelerator.main_process_first():
            train, held_out = open_corpora(recipe)
        earlier = run_folder.stored_recipe(recipe, train, held_out)
        if run_folder.read_summary(recipe.run_folder) is None or not (recipe.run_folder / run_folder.HUB).is_dir():
            _run(recipe, earlier, accelerator, train, held_out)
        accelerator.wait_for_everyone()
        summary = run_folder.read_summary(recipe.run_folder)
        assert summary is not None
        accelerator.print(summary_lines(summary, recipe.run_folder))
        model, tokenizer = load_hub_folder(recipe.run_folder / run_folder.HUB)
        accelerator.end_training()
    return Result(model, tokenizer, recipe.run_folder / run_folder.HUB, summary)


def _run(asked: Recipe, earlier: Recipe | None, accelerator: Accelerator, train: Corpus, held_out: Corpus) -> None:
    """Train to the end and leave everything that a finished run leaves."""
    recipe = earlier or asked
    folder = recipe.run_folder
    set_seed(recipe.run.seed)  # nothing of ours draws from it; it holds what a library might
    model = build_model(esm_config(recipe.model.preset, token_dropout=recipe.model.token_dropout), recipe.run.seed)
    if recipe.model.activation_checkpointing:
        _recompute_activations(model)
    module = PackedMaskedLM(model.to(accelerator.device))
    if earlier is None:
        recipe = _resolve(recipe, accelerator, module, train, held_out)
        if accelerator.is_main_process:
            run_folder.write_config(recipe, train, held_out)
    assert recipe.batch.micro_batches is not None
    accelerator.gradient_accumulation_steps = math.ceil(recipe.batch.micro_batches / accelerator.num_processes)

    optimizer = build_optimizer(module, recipe.optimizer)
    facts = machine_facts(accelerator)
    progress = _resume(folder, accelerator, model, optimizer, facts)
    wrapped, prepared = accelerator.prepare(module, optimizer)

    packing = Packing(recipe.data.crop, recipe.batch.tokens, recipe.batch.micro_batches, recipe.run.seed)
    ranks = (accelerator.process_index, accelerator.num_processes)
    steps = Steps(train, packing, recipe.mask, progress.step, progress.cursor, *ranks)

    def validate(num_sequences: int) -> Evaluation:
        chosen = validation_windows(held_out, recipe.data.crop, num_sequences, recipe.run.seed)
        batches = validation_micro_batches(held_out, *chosen, recipe.batch.tokens, recipe.run.seed, recipe.mask)
        return evaluate(wrapped, batches, len(chosen[0]), recipe.mask, accelerator.device)

    with (
        closing(Meter(recipe, folder, progress.step, progress.seconds, accelerator.is_main_process)) as meter,
        stop_on_signals() as request,
    ):
        parts = Parts(recipe, accelerator, wrapped, model, prepared, steps, validate, facts, request)
        _announce(parts, meter, train, held_out)
        progress = run_steps(parts, meter, progress)
        evaluation = validate(recipe.validation.final_sequences)
        if accelerator.is_main_process:
            finish(recipe, model, progress, evaluation, train, held_out, facts, meter)


def _recompute_activations(model: EsmForMaskedLM) -> None:
    # transformers 5.23 renamed it and warns of the old name; 5.17 has only the old one.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def open_corpora(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """The training and the held-out split, prepared first where they are not."""
    data = recipe.data
    if not data.train:
        raise UserError(
            "Nothing to train on: name a FASTA file, a folder or a dataset with --data.train "
            "(hf-plm simulate makes a small FASTA to try with)."
        )
    folder = ensure_prepared(
        data.train,
        recipe.cache_folder,
        validation=data.validation,
        illegal=data.illegal,
        gaps=data.gaps,
        duplicates=data.duplicates,
        max_rejected=data.max_rejected,
        sequence_column=data.sequence_column,
    )
    train = open_corpus(folder, "train")
    if "validation" not in train.manifest.splits:
        raise UserError(
            f"The corpus {train.name} has {len(train):,} sequences, too few to hold some out; "
            "give more, or others to validate on with --data.validation."
        )
    return train, open_corpus(folder, "validation")


def _resolve(
    recipe: Recipe, accelerator: Accelerator, module: PackedMaskedLM, train: Corpus, held_out: Corpus
) -> Recipe:
    """The recipe with every `auto` replaced by what this machine and corpus suggest, the same on every process."""
    epoch_tokens = count_tokens(train, recipe.data.crop)
    is_cpu = accelerator.device.type == "cpu"
    speed = None
    if recipe.budget_seconds is not None:
        accelerator.print("Measuring the speed of this machine, a few seconds ...", flush=True)
        speed = measure_speed(accelerator, module, train, recipe)
    mean_tokens = count_tokens(held_out, recipe.data.crop) / len(held_out)
    resolved = resolve(recipe, speed, epoch_tokens, mean_tokens, is_cpu)
    resolved = resolved.replace(run__precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32")
    assert resolved.batch.micro_batches is not None
    step_tokens = resolved.batch.micro_batches * resolved.batch.tokens
    if epoch_tokens < step_tokens:
        micro_batches = epoch_tokens // resolved.batch.tokens
        smaller = f"--batch.micro_batches {micro_batches}"
        if not micro_batches:
            crop = min(epoch_tokens, recipe.data.crop)
            smaller = f"--batch.micro_batches 1 --batch.tokens {epoch_tokens} --data.crop {crop}"
        raise UserError(
            f"The corpus {train.name} has {epoch_tokens:,} tokens to train on, fewer than one step takes "
            f"({step_tokens:,}); give a smaller step, such as {smaller}, or more sequences."
        )
    return resolved


def _resume(
    folder: Path,
    accelerator: Accelerator,
    model: EsmForMaskedLM,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> Progress:
    if accelerator.is_main_process:
        sweep(folder / run_folder.CHECKPOINTS)
    checkpoint, state, complaints = newest_whole(folder / run_folder.CHECKPOINTS)
    for complaint in complaints:
        accelerator.print(complaint)
    if checkpoint is None:
        return Progress()
    progress = restore(checkpoint, state, model, optimizer)
    for name, was in state["facts"].items():
        if facts.get(name) != was:
            accelerator.print(
                f"Since the checkpoint {name} changed from {was} to {facts.get(name)}: losses may differ."
            )
    accelerator.print(f"Going on from {checkpoint} (step {progress.step:,}, {progress.tokens:,} tokens).")
    return progress


def _announce(parts: Parts, meter: Meter, train: Corpus, held_out: Corpus) -> None:
    recipe, facts = parts.recipe, parts.facts
    dtype = torch.bfloat16 if facts["precision"] == "bf16" else torch.float32
    num_parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    head_dim = parts.model.config.hidden_size // parts.model.config.num_attention_heads
    processes, threads = facts["processes"], facts["threads"]
    rows = {
        "model": f"{recipe.model.preset}, {num_parameters:,} parameters",
        "corpus": f"{train.name}, {len(train):,} sequences, {parts.steps.epoch_tokens:,} tokens an epoch",
        "held out": f"{len(held_out):,} sequences ({held_out.manifest.split_kind})",
        "machine": f"{processes} x {facts['device']}, {facts['precision']}, {threads} thread{'s' * (threads > 1)}",
        "attention": attention_route(parts.accelerator.device, dtype, head_dim),
        "step": f"{recipe.batch.micro_batches} x {recipe.batch.tokens:,} tokens",
        "run": f"{recipe.run_folder}",
    }
    num_cores = os.cpu_count() or 1
    if parts.accelerator.device.type == "cpu" and processes == 1 and threads < num_cores:
        rows["machine"] += f" of {num_cores} cores (OMP_NUM_THREADS={num_cores} uses them all)"
    if is_simulated(train):
        rows["corpus"] += ", simulated"
    meter.say("\n".join(f"{name:<10} {text}" for name, text in rows.items()))
    idle = torch.cuda.device_count() - parts.accelerator.num_processes if torch.cuda.is_available() else 0
    if idle > 0 and parts.accelerator.num_processes == 1:
        meter.say(
            f"{idle} more GPUs are idle; use them all with: accelerate launch --multi_gpu "
            f"--num_processes {idle + 1} -m hf_plm.cli pretrain ..."
        )
