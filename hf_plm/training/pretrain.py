"""A run from recipe to Hub folder: everything around the loop."""

import math
import os
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import EsmForMaskedLM

from hf_plm.config import Recipe, UserError
from hf_plm.data.corpus import Corpus
from hf_plm.data.loader import Steps, share_of, validation_micro_batches, validation_windows
from hf_plm.data.pack import Packing, Windows
from hf_plm.data.simulate import is_simulated
from hf_plm.inference.evaluate import Evaluation, evaluation, predict
from hf_plm.models.attention import attention_route
from hf_plm.models.families import longest
from hf_plm.models.hub import load_hub_folder
from hf_plm.models.objective import PackedMaskedLM, Shape
from hf_plm.models.presets import build_model, esm_config, num_parameters
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import Progress, Saver, newest_whole, restore, sweep
from hf_plm.training.engine import configure, gather_stock, reshard, set_up
from hf_plm.training.finish import finish, summary_lines
from hf_plm.training.guard import check_before_start, check_launch
from hf_plm.training.judging import SPELLING, Judge, check_tasks, is_judged
from hf_plm.training.meter import Meter, check_trackers
from hf_plm.training.optim import build_optimizer
from hf_plm.training.pushes import BackgroundPushes, push_finished
from hf_plm.training.record import Record, go_back
from hf_plm.training.runtime import (
    gather,
    in_turn,
    machine_facts,
    on_main,
    say,
    start_accelerator,
    stop_on_signals,
    together,
    told_of_lost_processes,
)
from hf_plm.training.spikes import MAX_IN_A_ROW
from hf_plm.training.start import (
    begin,
    check_split,
    config_of,
    find_weights,
    first_model,
    open_corpora,
    recompute_activations,
    resolve_on,
    shape_to_compile,
)
from hf_plm.training.trainer import Parts, SpikeError, judge_now, run_steps, settle


@dataclass(frozen=True)
class Result:
    """A finished run: the Hub folder that it wrote, what is in it, and summary.json."""

    hub_folder: Path
    summary: dict[str, Any]

    @cached_property
    def _loaded(self) -> tuple[EsmForMaskedLM, ProteinTokenizer]:
        return load_hub_folder(self.hub_folder)

    @property
    def model(self) -> EsmForMaskedLM:
        """The stock model, read from the Hub folder when it is first asked for."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> ProteinTokenizer:
        return self._loaded[1]


def pretrain(recipe: Recipe) -> Result:
    """Run a recipe, or go on with the run in its folder; returns when it is finished.

    Raises `UserError` for the user's mistakes and `StoppedError` when a signal ended the run early, on all processes.
    """
    if recipe.model.preset != "auto":
        esm_config(recipe.model.preset)  # a misspelt one is told now, not after an hour of preparing
    check_trackers(recipe)
    check_tasks(recipe)
    check_before_start()
    if recipe.run.precision == "auto":  # a run goes on in the precision that it began in
        recipe = recipe.replace(run__precision=run_folder.stored_precision(recipe.run_folder))
    accelerator = start_accelerator(recipe)
    check_launch(accelerator)
    with ExitStack() as held:
        held.enter_context(told_of_lost_processes(accelerator))

        def take() -> None:
            held.enter_context(run_folder.take(recipe.run_folder))

        on_main(accelerator, take)
        weights = find_weights(recipe, accelerator)
        train, held_out = in_turn(
            accelerator, f"corpora of {recipe.run_folder}", partial(open_corpora, recipe, accelerator.is_main_process)
        )
        earlier = on_main(accelerator, lambda: run_folder.stored_recipe(recipe, train, held_out))
        if on_main(accelerator, lambda: run_folder.finished(recipe.run_folder)) is None:
            _run(recipe, earlier, accelerator, train, held_out, weights)
        else:
            on_main(accelerator, lambda: run_folder.check_card_knobs(recipe))
        summary = on_main(accelerator, lambda: run_folder.finished(recipe.run_folder))
        assert summary is not None
        say(accelerator, summary_lines(summary, recipe.run_folder))
        accelerator.end_training()
        if accelerator.is_main_process:  # the others need not wait for the network
            push_finished((earlier or recipe).replace(run__folder=recipe.run.folder))
    return Result(recipe.run_folder / run_folder.HUB, summary)


def _run(
    asked: Recipe,
    earlier: Recipe | None,
    accelerator: Accelerator,
    train: Corpus,
    held_out: Corpus,
    weights: Path | None,
) -> None:
    """Train to the end and leave everything that a finished run leaves; it starts from `weights`, or random ones."""
    recipe = earlier or asked
    folder = recipe.run_folder
    set_seed(recipe.run.seed)  # nothing of ours draws from it; it holds what a library might
    if weights is not None:
        recipe, model = together(accelerator, partial(first_model, recipe, weights))
    else:
        model = build_model(config_of(recipe), recipe.run.seed)
    if recipe.model.activation_checkpointing:
        recompute_activations(model)
    shape = shape_to_compile(recipe, accelerator)
    module = PackedMaskedLM(model.to(accelerator.device), shape)
    if earlier is None:
        recipe = resolve_on(recipe, accelerator, module, train, held_out)
    if shape:  # a machine without a GPU may have been given smaller micro-batches
        module.compiled_for = Shape(recipe.batch.tokens, recipe.data.crop)
    assert recipe.batch.micro_batches is not None
    check_split(recipe, accelerator)  # before anything is written: a refused run has not begun
    on_main(accelerator, lambda: begin(recipe, earlier, train, held_out, weights))
    together(accelerator, lambda: run_folder.check_visible(folder))
    rounds = math.ceil(recipe.batch.micro_batches / accelerator.num_processes)
    # Before DeepSpeed is told that its own bf16 is not wanted.
    facts = {**machine_facts(accelerator), "layers": "compiled" if shape else "uncompiled"}
    configure(accelerator, recipe.optimizer, rounds)
    wrapped, optimizer = accelerator.prepare(module, build_optimizer(module, recipe.optimizer))

    ranks = (accelerator.process_index, accelerator.num_processes)
    packing = Packing(recipe.data.crop, recipe.batch.tokens, recipe.batch.micro_batches, recipe.run.seed)

    def steps_from(progress: Progress) -> Steps:
        return Steps(train, packing, recipe.mask, progress.step, progress.cursor, *ranks)

    @cache
    def windows(num_sequences: int) -> tuple[Windows, np.ndarray]:
        return validation_windows(held_out, recipe.data.crop, num_sequences, recipe.run.seed)

    def validate(num_sequences: int) -> Evaluation:
        chosen = windows(num_sequences)
        batches = validation_micro_batches(held_out, *chosen, recipe.batch.tokens, recipe.run.seed, recipe.mask)
        with accelerator.autocast():
            mine = predict(wrapped, share_of(batches, *ranks), accelerator.device)
        # In the order in which one process would have had them, so that the sums are the same.
        in_order = [part for turn in zip(*gather(accelerator, mine), strict=True) for part in turn]
        return evaluation(in_order, len(chosen[0]), recipe.mask)

    progress = _resume(folder, accelerator, model, optimizer.optimizer, facts)
    record = Record(folder, accelerator.process_index) if recipe.run.record else None
    saver = Saver(folder / run_folder.CHECKPOINTS, facts, recipe.checkpoint.keep, *ranks)
    with (
        closing(Meter(recipe, folder, progress.step, progress.seconds, accelerator.is_main_process)) as meter,
        stop_on_signals() as request,
        ExitStack() as held,
        told_of_lost_processes(accelerator),  # before the signal by which the launcher ends this process too
    ):
        steps = steps_from(progress)
        pushes = None
        if recipe.hub.push and accelerator.is_main_process:
            pushes = held.enter_context(closing(BackgroundPushes(recipe.hub, folder, progress.step, meter.say)))
        judge = Judge(recipe)
        on_main(accelerator, lambda: judge.read(longest(model.config, SPELLING)))
        parts = Parts(
            recipe, accelerator, wrapped, model, optimizer, steps, validate, request, saver, record, pushes, judge
        )
        _announce(parts, facts, meter, train, held_out)
        if judge.lines:
            meter.say(f"every {recipe.evaluate.every:,} steps and at the end: {'; '.join(judge.lines)}")
        returns: Counter[int] = Counter()
        while True:
            try:
                progress = run_steps(parts, meter, progress)
                break
            except SpikeError as spike:
                settle(parts, meter)
                progress = _roll_back(parts, meter, spike, returns)
                parts = replace(parts, steps=steps_from(progress))
            except UserError:  # raised on all processes at once; what was being written is still good
                settle(parts, meter)
                raise
        metrics = folder / run_folder.METRICS
        if recipe.evaluate.every is not None and not on_main(accelerator, lambda: is_judged(metrics, progress.step)):
            judge_now(parts, meter, progress)
        final = validate(recipe.validation.final_sequences)
        reshard(wrapped)
        stock = gather_stock(accelerator, model, optimizer.optimizer)
        origin = on_main(accelerator, lambda: run_folder.read_config(folder)[1])
        on_main(accelerator, lambda: finish(recipe, stock, progress, final, train, held_out, facts, meter, origin))


def _resume(
    folder: Path, accelerator: Accelerator, model: EsmForMaskedLM, optimizer: Any, facts: dict[str, Any]
) -> Progress:
    """Go on from the newest whole checkpoint, which the main process chooses for all."""
    checkpoints = folder / run_folder.CHECKPOINTS

    def choose() -> tuple[Path | None, dict[str, Any], list[str]]:
        sweep(checkpoints)
        chosen = newest_whole(checkpoints)
        step = chosen[1]["progress"]["step"] if chosen[0] else 0
        go_back(folder, step)
        return chosen

    checkpoint, state, complaints = on_main(accelerator, choose)
    for complaint in complaints:
        say(accelerator, complaint)
    if checkpoint is None:
        set_up([parameter for parameter in model.parameters() if parameter.requires_grad], optimizer, num_updates=0)
        return Progress()
    progress = together(accelerator, lambda: restore(checkpoint, state, model, optimizer))
    changes = [
        f"{name} from {was} to {facts.get(name)}" for name, was in state["facts"].items() if facts.get(name) != was
    ]
    if changes:
        say(
            accelerator, f"Changed after the checkpoint: {', '.join(changes)}; the steps are the same, rounding is not."
        )
    say(accelerator, f"Going on from {checkpoint} (step {progress.step:,}, {progress.tokens:,} tokens).")
    return progress


def _roll_back(parts: Parts, meter: Meter, spike: SpikeError, returns: Counter[int]) -> Progress:
    """Weights and moments of the newest checkpoint, then the sequences after the spike; `returns` counts by step."""
    folder = parts.recipe.run_folder
    checkpoint, state, complaints = on_main(parts.accelerator, lambda: newest_whole(folder / run_folder.CHECKPOINTS))
    for complaint in complaints:
        meter.say(complaint)
    last = spike.progress.step - 1
    if checkpoint is None:
        raise UserError(
            f"{spike} There is no checkpoint yet to go back to: the run stopped. A lower --optimizer.learning_rate in "
            "a new run often avoids it, or --spike.action none goes on."
        )
    reshard(parts.module)
    restored = together(parts.accelerator, lambda: restore(checkpoint, state, parts.model, parts.optimizer.optimizer))
    returns[restored.step] += 1
    if returns[restored.step] == MAX_IN_A_ROW:
        raise UserError(
            f"{spike} The run went back to {checkpoint} {MAX_IN_A_ROW} times and met one each time: it stopped. Raise "
            "--spike.deviations, or lower --optimizer.learning_rate in a new run."
        )
    progress = replace(restored, cursor=spike.progress.cursor, seconds=meter.seconds)
    after = progress.cursor
    note = {"rolled_back_from": last + 1, "spike_loss": spike.loss, "to_epoch": after.epoch, "to_place": after.place}
    meter.go_back(restored.step, note)
    meter.say(f"{spike} Going back to step {restored.step}, and passing over the sequences up to here.")
    on_main(parts.accelerator, lambda: go_back(folder, restored.step))
    return progress


def _announce(parts: Parts, facts: dict[str, Any], meter: Meter, train: Corpus, held_out: Corpus) -> None:
    recipe = parts.recipe
    dtype = torch.bfloat16 if facts["precision"] == "bf16" else torch.float32
    head_dim = parts.model.config.hidden_size // parts.model.config.num_attention_heads
    processes, threads = facts["processes"], facts["threads"]
    rows = {
        "model": f"{recipe.model.preset}, {num_parameters(parts.model.config):,} parameters"
        + (f", from {recipe.init.from_}" if recipe.init.from_ else ""),
        "corpus": f"{train.name}, {len(train):,} sequences, {parts.steps.epoch_tokens:,} tokens an epoch",
        "held out": f"{len(held_out):,} sequences ({held_out.manifest.split_kind})",
        "machine": f"{processes} x {facts['device']}, {facts['precision']}, {threads} thread{'s' * (threads > 1)}",
        "engine": facts["engine"],
        "attention": attention_route(parts.accelerator.device, dtype, head_dim),
        "layers": str(facts["layers"]),
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
        meter.say(f"{idle} more GPUs are idle; hf-plm launch ddp in the place of hf-plm pretrain uses all {idle + 1}.")
