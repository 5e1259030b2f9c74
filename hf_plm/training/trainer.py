"""The loop of a run, which reads from top to bottom.

What the engines divide is undone here: the sum of a micro-batch's losses is multiplied by world size x accumulation /
targets of the step, so that any split of a step over processes and accumulation gives the gradient of the global mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import EsmForMaskedLM

from hf_plm.config import Recipe, UserError
from hf_plm.data.loader import Step, Steps, load_steps
from hf_plm.inference.evaluate import Evaluation
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import Progress, save_checkpoint
from hf_plm.training.meter import PLAN_AFTER_STEPS, Meter
from hf_plm.training.runtime import StopRequest, sum_over_processes
from hf_plm.training.schedule import rate_factor


class StoppedError(Exception):
    """The run was asked to stop and did, its checkpoint written; `signal_name` says by what."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"Stopped by {signal_name} after step {step}; the same command goes on from there.")
        self.signal_name = signal_name


@dataclass(frozen=True)
class Parts:
    """What the loop works with; the loop itself holds no more state than `Progress`."""

    recipe: Recipe
    accelerator: Accelerator
    module: nn.Module  # as the engine wrapped it
    model: EsmForMaskedLM
    optimizer: Any
    steps: Steps
    validate: Callable[[int], Evaluation]  # of so many held-out sequences
    facts: dict[str, Any]
    request: StopRequest


def run_steps(parts: Parts, meter: Meter, progress: Progress) -> Progress:
    """Every step from `progress` to the end of the run, or to the step at which it was asked to stop."""
    recipe, accelerator, module = parts.recipe, parts.accelerator, parts.module
    assert recipe.validation.every is not None
    assert recipe.checkpoint.every is not None
    workers = recipe.data.workers if recipe.data.workers is not None else 4 * (accelerator.device.type == "cuda")
    steps = load_steps(parts.steps, workers, pin_memory=accelerator.device.type == "cuda")
    world_size, rounds = accelerator.num_processes, accelerator.gradient_accumulation_steps
    read: Callable[[], None] | None = None
    is_saved = True

    while True:
        step = next(steps)
        num_targets, share, is_asked_to_stop = _agree(parts, meter, step)
        if share >= 1 or is_asked_to_stop:
            break
        factor = rate_factor(recipe.schedule, step.step, share)
        for group in parts.optimizer.param_groups:
            group["lr"] = recipe.optimizer.learning_rate * factor
        sums = []
        for batch in (micro_batch.to(accelerator.device) for micro_batch in step.micro_batches):
            with accelerator.accumulate(module):
                loss_sum, _, num_correct = module(
                    batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
                )
                accelerator.backward(loss_sum * (world_size * rounds / max(num_targets, 1)))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(module.parameters(), recipe.optimizer.clip or math.inf)
                parts.optimizer.step()
                parts.optimizer.zero_grad()
                sums.append(torch.stack([loss_sum.detach(), num_correct.float()]))

        done = step.step + 1
        meter.count(step.num_tokens)
        progress = Progress(done, step.next_cursor, progress.tokens + step.num_tokens, meter.seconds)
        if read:
            read()  # the numbers of the step before: reading them now does not make the device wait
        read = _reader(parts, meter, step, progress, torch.stack(sums), num_targets, norm, factor)
        is_planned = done - meter.first_step == PLAN_AFTER_STEPS
        is_last = recipe.schedule.budget is None and done == recipe.schedule.steps  # validated on more, afterwards
        is_validated = done % recipe.validation.every == 0 and not is_last
        is_saved = done % recipe.checkpoint.every == 0
        if is_planned or is_validated or is_saved:
            read()
            read = None
        if is_planned:
            meter.say_plan(done, progress.tokens / done, parts.steps.epoch_tokens)
        if is_validated:
            _validate(parts, meter, progress)
        if is_saved:
            _save(parts, meter, progress)
        meter.pause()

    if read:
        read()
    if not is_saved:
        _save(parts, meter, progress)
    if is_asked_to_stop and share < 1:
        raise StoppedError(parts.request.signal_name or "another process", progress.step)
    return progress


def _agree(parts: Parts, meter: Meter, step: Step) -> tuple[float, float, bool]:
    """What all processes must know before a step, in one reduction.

    The targets of the step over all of them, the share of the run spent by the main process's clock, and whether any
    was asked to stop.
    """
    accelerator = parts.accelerator
    num_targets, share, num_stops = sum_over_processes(
        accelerator,
        sum(batch.num_targets for batch in step.micro_batches),
        meter.share(step.step) if accelerator.is_main_process else 0.0,
        bool(parts.request.signal_name),
    )
    return num_targets, share, num_stops > 0


def _reader(
    parts: Parts,
    meter: Meter,
    step: Step,
    progress: Progress,
    sums: torch.Tensor,
    num_targets: float,
    norm: Any,
    factor: float,
) -> Callable[[], None]:
    """Reads a step's numbers off the device, refuses NaN, and writes the line of a log step."""
    is_first_or_last = progress.step in (1, parts.recipe.schedule.steps)
    is_logged = progress.step % parts.recipe.run.log_every == 0 or is_first_or_last
    speed = meter.tokens_per_second() if is_logged else 0.0

    def read() -> None:
        # The norm is that of all processes' gradients: if any of them had a NaN, each sees it here.
        local_loss, local_correct = sums.sum(dim=0).tolist()
        loss_sum, num_correct = sum_over_processes(parts.accelerator, local_loss, local_correct)
        loss, gradient_norm = loss_sum / max(num_targets, 1), float(norm)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            folder = parts.recipe.run_folder
            raise UserError(
                f"The loss of step {step.step} is {loss} and its gradient norm {gradient_norm}: the run stopped, the "
                f"last checkpoint is kept. hf-plm inspect {folder} --step {step.step} shows what the step held, "
                "the same command replays it, and a lower --optimizer.learning_rate in a new run often avoids it."
            )
        if is_logged:
            meter.write(
                {
                    "step": progress.step,
                    "loss": loss,
                    "recovery": num_correct / max(num_targets, 1),
                    "learning_rate": parts.recipe.optimizer.learning_rate * factor,
                    "gradient_norm": gradient_norm,
                    "tokens": progress.tokens,
                    "tokens_per_second": speed,
                    "padding_share": 1 - step.num_tokens / step.num_slots,
                    "epoch": step.cursor.epoch,
                    "place": step.cursor.place,
                    "seconds": progress.seconds,
                }
            )
            meter.show(progress.step, loss, speed)

    return read


def _validate(parts: Parts, meter: Meter, progress: Progress) -> None:
    assert parts.recipe.validation.sequences is not None
    numbers = parts.validate(parts.recipe.validation.sequences).summary()
    meter.write({"step": progress.step, "tokens": progress.tokens, **numbers})
    meter.say_validation(progress.step, numbers)


def _save(parts: Parts, meter: Meter, progress: Progress) -> None:
    if parts.accelerator.is_main_process:
        meter.sync()
        inner = getattr(parts.optimizer, "optimizer", parts.optimizer)
        folder = parts.recipe.run_folder / run_folder.CHECKPOINTS
        save_checkpoint(folder, progress, parts.model, inner, parts.facts, parts.recipe.checkpoint.keep)
    parts.accelerator.wait_for_everyone()
