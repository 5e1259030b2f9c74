"""The loop of a run, which reads from top to bottom.

What the engines divide is undone here: the sum of a micro-batch's losses is multiplied by world size x accumulation /
targets of the step, so that any split of a step over processes and accumulation gives the gradient of the global mean.
All that the processes must agree on before a step travels in one reduction of a few numbers, over gloo.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import EsmForMaskedLM

from hf_plm.config import Recipe, UserError
from hf_plm.data.loader import Step, Steps, load_steps
from hf_plm.inference.evaluate import Evaluation
from hf_plm.training.checkpoint import Progress, Saver, step_of
from hf_plm.training.engine import gather_stock, reshard
from hf_plm.training.judging import Judge, told
from hf_plm.training.meter import PLAN_AFTER_STEPS, Meter
from hf_plm.training.pushes import BackgroundPushes
from hf_plm.training.record import Record
from hf_plm.training.runtime import Numbers, StopRequest, on_main, sum_over_processes, together
from hf_plm.training.schedule import rate_factor
from hf_plm.training.spikes import MAX_IN_A_ROW, Trend


class StoppedError(Exception):
    """The run was asked to stop and did, its checkpoint written; `signal_name` says by what."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"Stopped by {signal_name} after step {step}; the same command goes on from there.")
        self.signal_name = signal_name


class SpikeError(Exception):
    """The loss of step `step` is a spike and the recipe asks to go back; `progress` is behind the sequences it held."""

    def __init__(self, loss: float, progress: Progress) -> None:
        super().__init__(f"The loss of step {progress.step - 1} is a spike: {loss:.4g}.")
        self.loss, self.progress = loss, progress


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
    request: StopRequest
    saver: Saver
    record: Record | None = None
    pushes: BackgroundPushes | None = None  # on the main process, where the recipe asks for them
    judge: Judge | None = None  # the same


@dataclass(frozen=True)
class Unread:
    """A step whose numbers are on the device still, to be read after later steps were sent."""

    step: Step
    progress: Progress
    num_targets: float
    factor: float
    numbers: Numbers  # loss in nats and correct predictions of this process, norm of the gradient of all
    is_skipped: bool
    speed: float | None  # tokens/s where the step is logged


def run_steps(parts: Parts, meter: Meter, progress: Progress) -> Progress:
    """Every step from `progress` to the end of the run, or to the step at which it was asked to stop."""
    is_cuda = parts.accelerator.device.type == "cuda"
    workers = parts.recipe.data.workers if parts.recipe.data.workers is not None else 4 * is_cuda
    with closing(load_steps(parts.steps, workers, pin_memory=is_cuda)) as steps:
        return _run_steps(parts, meter, progress, steps)


def _run_steps(parts: Parts, meter: Meter, progress: Progress, steps: Iterator[Step]) -> Progress:
    recipe, accelerator, module, optimizer = parts.recipe, parts.accelerator, parts.module, parts.optimizer
    assert recipe.validation.every is not None
    assert recipe.checkpoint.every is not None
    world_size, rounds = accelerator.num_processes, accelerator.gradient_accumulation_steps
    unread: deque[Unread] = deque()
    trend, skipped_in_a_row = progress.trend, 0
    is_saved = True

    while True:
        step, mistake = _next(steps)
        agreed = _agree(parts, meter, step, unread[0] if len(unread) == 2 else None)
        if len(unread) == 2:
            trend = _read(parts, meter, unread.popleft(), agreed, trend)
        if agreed.num_ready == world_size:
            settle(parts, meter)
        if agreed.share >= 1 or agreed.is_asked_to_stop or agreed.has_failed:
            break
        assert step is not None
        if parts.record:
            parts.record.write(step)
        factor = rate_factor(recipe.schedule, step.step, agreed.share)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.learning_rate * factor
        sums, norm, is_skipped = torch.zeros(2, device=accelerator.device), None, False
        for batch in (micro_batch.to(accelerator.device) for micro_batch in step.micro_batches):
            with accelerator.accumulate(module):
                with accelerator.autocast():  # which Accelerate leaves out under FSDP2
                    loss_sum, _, num_correct = module(*batch.inputs())
                accelerator.backward(loss_sum * (world_size * rounds / max(agreed.num_targets, 1)))
                sums += torch.stack([loss_sum.detach(), num_correct.float()])
                is_skipped = accelerator.sync_gradients and _is_spike(parts, sums, agreed.num_targets, trend)
                if accelerator.sync_gradients and not is_skipped:
                    norm = accelerator.clip_grad_norm_(module.parameters(), recipe.optimizer.clip or math.inf)
                    optimizer.step()
                optimizer.zero_grad()

        done = step.step + 1
        meter.count(step.num_tokens)
        tokens = progress.tokens + step.num_tokens
        progress = Progress(done, step.next_cursor, tokens, meter.seconds, progress.skipped + is_skipped, trend)
        skipped_in_a_row = _count_skipped(parts, step, skipped_in_a_row, is_skipped)
        is_logged = done % recipe.run.log_every == 0 or done in (1, recipe.schedule.steps) or is_skipped
        speed = meter.tokens_per_second() if is_logged else None
        numbers = _send(sums, norm)
        unread.append(Unread(step, progress, agreed.num_targets, factor, numbers, bool(is_skipped), speed))
        is_planned = done - meter.first_step == PLAN_AFTER_STEPS
        is_last = recipe.schedule.budget is None and done == recipe.schedule.steps  # validated on more, afterwards
        is_validated = done % recipe.validation.every == 0 and not is_last
        is_judged = recipe.evaluate.every is not None and done % recipe.evaluate.every == 0
        is_saved = done % recipe.checkpoint.every == 0
        if is_planned or is_validated or is_judged or is_saved or recipe.spike.action == "skip":
            trend = _read_all(parts, meter, unread, trend)
            progress = replace(progress, trend=trend)
        if is_planned:
            meter.say_plan(done, progress.tokens / done, parts.steps.epoch_tokens)
        if is_validated:
            _validate(parts, meter, progress)
        if is_judged:
            judge_now(parts, meter, progress)
        if is_saved:
            save(parts, meter, progress)
        meter.pause()

    trend = _read_all(parts, meter, unread, trend)
    if not is_saved:
        save(parts, meter, replace(progress, trend=trend))
    settle(parts, meter)
    if agreed.has_failed and agreed.share < 1:  # the step after the last one is nobody's
        together(accelerator, partial(_raise, mistake))
    if agreed.is_asked_to_stop and agreed.share < 1:
        raise StoppedError(parts.request.signal_name or "a signal to another process", progress.step)
    return progress


def _send(sums: torch.Tensor, norm: Any) -> Numbers:
    """`sums` and the norm of the gradient, NaN where there is none, on their way to the CPU."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    elif not isinstance(norm, torch.Tensor):
        norm = torch.full((), math.nan if norm is None else norm, device=sums.device)
    return Numbers(torch.cat([sums, norm.reshape(1).to(sums)]))


def _next(steps: Iterator[Step]) -> tuple[Step | None, UserError | None]:
    """The next step, or what went wrong in reading it, of which the other processes must hear before it is raised."""
    try:
        return next(steps), None
    except UserError as mistake:
        return None, mistake
    except (RuntimeError, OSError) as error:
        return None, UserError(
            f"Reading the next step failed ({error}): a checkpoint was written, and the same command goes on from "
            "there; fewer --data.workers need less memory."
        )


def _raise(mistake: UserError | None) -> None:
    if mistake is not None:
        raise mistake


@dataclass(frozen=True)
class Agreed:
    """What all processes know before a step, the same on each."""

    num_targets: float  # of the step
    share: float  # of the run spent, by the main process's clock
    is_asked_to_stop: bool
    has_failed: bool  # a process could not read the step
    num_ready: float  # processes whose share of a checkpoint is on disk, or failed
    loss_sum: float  # of an earlier step, whose numbers are read now
    num_correct: float


def _agree(
    parts: Parts, meter: Meter, step: Step | None, unread: Unread | None, is_only_reading: bool = False
) -> Agreed:
    accelerator = parts.accelerator
    sums = unread.numbers.read()[:2] if unread else [0.0, 0.0]
    num_targets, share, num_stops, num_failed, num_ready, loss_sum, num_correct = sum_over_processes(
        accelerator,
        sum(batch.num_targets for batch in step.micro_batches) if step else 0,
        meter.share(step.step) if step and accelerator.is_main_process else 0.0,
        bool(parts.request.signal_name),
        step is None and not is_only_reading,
        parts.saver.is_ready,
        *sums,
    )
    return Agreed(num_targets, share, num_stops > 0, num_failed > 0, num_ready, loss_sum, num_correct)


def _read_all(parts: Parts, meter: Meter, unread: deque[Unread], trend: Trend) -> Trend:
    while unread:
        agreed = _agree(parts, meter, None, unread[0], is_only_reading=True)
        trend = _read(parts, meter, unread.popleft(), agreed, trend)
    return trend


def _read(parts: Parts, meter: Meter, unread: Unread, agreed: Agreed, trend: Trend) -> Trend:
    """Judges a step by its numbers, writes the line of a log step, and returns the trend of the losses after it."""
    recipe, progress, step = parts.recipe, unread.progress, unread.step
    loss = agreed.loss_sum / max(unread.num_targets, 1)
    gradient_norm, is_skipped = unread.numbers.read()[2], unread.is_skipped
    is_finite = math.isfinite(loss) and math.isfinite(gradient_norm)
    if recipe.spike.action == "rollback" and (not is_finite or trend.is_spike(loss, recipe.spike.deviations)):
        raise SpikeError(loss, progress)
    if not is_finite and not is_skipped:
        raise UserError(
            f"The loss of step {step.step} is {loss} and its gradient norm {gradient_norm}: the run stopped, the "
            f"last checkpoint is kept. hf-plm inspect {recipe.run_folder} --step {step.step} shows what the step held, "
            "the same command replays it, and a lower --optimizer.learning_rate in a new run often avoids it."
        )
    if unread.speed is not None:
        line = {
            "step": progress.step,
            "loss": loss,
            "recovery": agreed.num_correct / max(unread.num_targets, 1),
            "learning_rate": recipe.optimizer.learning_rate * unread.factor,
            "gradient_norm": gradient_norm,
            "tokens": progress.tokens,
            "tokens_per_second": unread.speed,
            "padding_share": 1 - step.num_tokens / step.num_slots,
            "epoch": step.cursor.epoch,
            "place": step.cursor.place,
            "seconds": progress.seconds,
        }
        if recipe.spike.action == "skip":
            line["skipped"] = progress.skipped
        meter.write(line)
        meter.show(progress.step, loss, unread.speed)
        if parts.pushes:
            parts.pushes.poll()
    return trend if is_skipped or not is_finite else trend.then(loss)


def _is_spike(parts: Parts, sums: torch.Tensor, num_targets: float, trend: Trend) -> bool:
    """Whether the update of the step is to be skipped; asks only where the recipe says so, because the device waits."""
    if parts.recipe.spike.action != "skip":
        return False
    loss = sum_over_processes(parts.accelerator, float(sums[0]))[0] / max(num_targets, 1)
    return trend.is_spike(loss, parts.recipe.spike.deviations)


def _count_skipped(parts: Parts, step: Step, in_a_row: int, is_skipped: bool) -> int:
    """Updates skipped one after another; raises `UserError` when they are too many."""
    in_a_row = in_a_row + 1 if is_skipped else 0
    if in_a_row == MAX_IN_A_ROW:
        raise UserError(
            f"The losses of {in_a_row} steps in a row, up to step {step.step}, are spikes: the run stopped, the last "
            f"checkpoint is kept. hf-plm inspect {parts.recipe.run_folder} --step {step.step} shows what the last "
            "held; raise --spike.deviations, or lower --optimizer.learning_rate in a new run."
        )
    return in_a_row


def _validate(parts: Parts, meter: Meter, progress: Progress) -> None:
    assert parts.recipe.validation.sequences is not None
    numbers = parts.validate(parts.recipe.validation.sequences).summary()
    meter.write({"step": progress.step, "tokens": progress.tokens, **numbers})
    meter.say_validation(progress.step, numbers)


def judge_now(parts: Parts, meter: Meter, progress: Progress) -> None:
    """Evaluate the model as it is on the recipe's tasks: the main process works, the others wait."""
    reshard(parts.module)
    stock = gather_stock(parts.accelerator, parts.model, parts.optimizer.optimizer)

    def work() -> tuple[dict[str, float], list[str]]:
        assert parts.judge is not None
        return parts.judge.numbers(stock, parts.accelerator.device)

    numbers, complaints = on_main(parts.accelerator, work)
    if numbers:
        meter.write({"step": progress.step, "tokens": progress.tokens, **numbers})
        meter.say(f"evaluation at step {progress.step:,}: {told(numbers)}")
    for complaint in complaints:
        meter.say(f"warning: not evaluated at step {progress.step:,}: {complaint}")


def save(parts: Parts, meter: Meter, progress: Progress) -> None:
    """Begin a checkpoint, the one before it being finished first; all processes together."""
    settle(parts, meter)
    reshard(parts.module)
    parts.saver.begin(progress, parts.model, parts.optimizer.optimizer)
    if not parts.recipe.checkpoint.background:
        settle(parts, meter)


def settle(parts: Parts, meter: Meter) -> None:
    """Wait until the checkpoint that is being written, if there is one, is visible; all processes together."""
    if not parts.saver.is_pending:
        return

    def commit() -> None:
        meter.sync()  # lines on disk before the checkpoint that counts on them
        parts.saver.held = parts.pushes.held if parts.pushes else set()
        checkpoint = parts.saver.commit()
        if parts.pushes:
            parts.pushes.offer(step_of(checkpoint))

    try:
        together(parts.accelerator, parts.saver.wait)
        on_main(parts.accelerator, commit)
    finally:
        parts.saver.forget()
