"""A run from recipe to Hub folder: everything around the loop."""

import math
from dataclasses import dataclass
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
from hf_plm.training.checkpoint import Progress, newest_whole, restore
from hf_plm.training.finish import finish, is_simulated, summary_lines
from hf_plm.training.meter import Meter
from hf_plm.training.optim import build_optimizer
from hf_plm.training.runtime import machine_facts, measure_speed, start_accelerator, stop_on_signals
from hf_plm.training.schedule import resolve
from hf_plm.training.trainer import Parts, run_steps


@dataclass(frozen=True)
class Result:
    """A finished run: the stock model, its tokenizer, the Hub folder they were written to, and summary.json."""

    model: EsmForMaskedLM
    tokenizer: ProteinTokenizer
    hub_folder: Path
    summary: dict[str, Any]


def pretrain(recipe: Recipe) -> Result:
    """Run a recipe, or go on with the run in its folder; returns when it is finished.

    Raises `UserError` for the user's mistakes and `StoppedError` when a signal ended the run early.
    """
    accelerator = start_accelerator(recipe)
    folder = recipe.run_folder
    with accelerator.main_process_first():
        run_folder.make(folder)
        train, held_out = open_corpora(recipe)
    earlier = run_folder.stored_recipe(recipe, train.fingerprint)
    recipe = earlier or recipe

    set_seed(recipe.run.seed)  # nothing of ours draws from it; it holds what a library might
    model = build_model(esm_config(recipe.model.preset, token_dropout=recipe.model.token_dropout), recipe.run.seed)
    if recipe.model.activation_checkpointing:
        _recompute_activations(model)
    module = PackedMaskedLM(model.to(accelerator.device))
    if (summary := run_folder.read_summary(folder)) is not None:
        return _finished(recipe, accelerator, model, summary)

    recipe = _resolve(recipe, accelerator, module, train, held_out) if earlier is None else recipe
    assert recipe.batch.micro_batches is not None
    if accelerator.is_main_process:
        run_folder.write_config(recipe, train.name, train.fingerprint)
    accelerator.gradient_accumulation_steps = math.ceil(recipe.batch.micro_batches / accelerator.num_processes)

    optimizer = build_optimizer(module, recipe.optimizer)
    facts = machine_facts(accelerator) | {"corpus": train.fingerprint}
    progress = _resume(folder, accelerator, model, optimizer, facts)
    wrapped, prepared = accelerator.prepare(module, optimizer)

    packing = Packing(recipe.data.crop, recipe.batch.tokens, recipe.batch.micro_batches, recipe.run.seed)
    ranks = (accelerator.process_index, accelerator.num_processes)
    steps = Steps(train, packing, recipe.mask, progress.step, progress.cursor, *ranks)

    def validate(num_sequences: int) -> Evaluation:
        chosen = validation_windows(held_out, recipe.data.crop, num_sequences, recipe.run.seed)
        batches = validation_micro_batches(held_out, *chosen, recipe.batch.tokens, recipe.run.seed, recipe.mask)
        return evaluate(wrapped, batches, len(chosen[0]), recipe.mask, accelerator.device)

    meter = Meter(recipe, folder, progress.step, progress.seconds, accelerator.is_main_process)
    try:
        with stop_on_signals() as request:
            parts = Parts(recipe, accelerator, wrapped, model, prepared, steps, validate, facts, request)
            _announce(parts, meter, train, held_out, progress)
            progress = run_steps(parts, meter, progress)
            evaluation = validate(recipe.validation.final_sequences)
            if accelerator.is_main_process:
                summary = finish(recipe, model, progress, evaluation, train, held_out, facts, meter)
                meter.bar.close()
                meter.say(summary_lines(summary, folder))
    finally:
        meter.close()
        accelerator.end_training()
    accelerator.wait_for_everyone()
    return _finished(recipe, accelerator, model, run_folder.read_summary(folder) or {}, is_trained=True)


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
    return open_corpus(folder, "train"), open_corpus(folder, "validation")


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
    assert resolved.batch.micro_batches is not None
    step_tokens = resolved.batch.micro_batches * resolved.batch.tokens
    if epoch_tokens < step_tokens:
        fits = max(1, epoch_tokens // resolved.batch.tokens)
        knob, value = ("micro_batches", fits) if epoch_tokens >= resolved.batch.tokens else ("tokens", epoch_tokens)
        raise UserError(
            f"The corpus {train.name} has {epoch_tokens:,} tokens to train on, fewer than one step takes "
            f"({step_tokens:,}); give a smaller step, such as --batch.{knob} {value}, or more sequences."
        )
    return resolved


def _resume(
    folder: Path,
    accelerator: Accelerator,
    model: EsmForMaskedLM,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> Progress:
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


def _announce(parts: Parts, meter: Meter, train: Corpus, held_out: Corpus, progress: Progress) -> None:
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
    if is_simulated(train):
        rows["corpus"] += ", simulated"
    meter.say("\n".join(f"{name:<10} {text}" for name, text in rows.items()))
    idle = torch.cuda.device_count() - parts.accelerator.num_processes if torch.cuda.is_available() else 0
    if idle > 0 and parts.accelerator.num_processes == 1:
        meter.say(
            f"{idle} more GPUs are idle; use them all with: accelerate launch --multi_gpu "
            f"--num_processes {idle + 1} -m hf_plm.cli pretrain ..."
        )


def _finished(
    recipe: Recipe, accelerator: Accelerator, model: EsmForMaskedLM, summary: dict[str, Any], is_trained: bool = False
) -> Result:
    folder = recipe.run_folder
    if not is_trained:
        model, _ = load_hub_folder(folder / run_folder.HUB)
        accelerator.print(summary_lines(summary, folder))
    return Result(model, ProteinTokenizer(), folder / run_folder.HUB, summary)
