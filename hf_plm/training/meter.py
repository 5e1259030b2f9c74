"""What a person sees of a run: a progress bar, one JSON line per log step, trackers, and a plan after ten steps."""

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from tqdm import tqdm

from hf_plm.config import Recipe, UserError
from hf_plm.progress import duration
from hf_plm.training.checkpoint import write_text

PLAN_AFTER_STEPS = 10
LONG_SECONDS = 3 * 86400
MANY_EPOCHS = 50
QUIET_SECONDS = 30.0
"""Seconds between two lines of progress where there is no terminal to draw a bar in."""


def keep_lines_until(path: Path, step: int, keeps_notes: bool = False) -> None:
    """Drop what a resumed run will write again: steps after `step`, the final validation; and a torn last line.

    A note of a return to `step` is written again too, where the run meets that loss spike again: unless `keeps_notes`.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            is_note = "rolled_back_from" in content and content["step"] == step
            if content["step"] <= step and not content.get("final") and (keeps_notes or not is_note):
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))


def check_trackers(recipe: Recipe) -> None:
    """Raises `UserError` for one that is not installed, before anything long is begun."""
    for name in recipe.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"run.trackers asks for {name}, which is not installed: pip install {name}, or leave it out."
            )


def open_trackers(recipe: Recipe, folder: Path, step: int) -> list[GeneralTracker]:
    """Accelerate's trackers, started; TensorBoard forgets what it holds beyond `step`."""
    trackers: list[GeneralTracker] = []
    for name in recipe.run.trackers:
        if name == "tensorboard":
            trackers.append(TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step + 1))
        elif name == "wandb":
            # The same folder is the same run there, and two folders of one name are two.
            unique = f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
            trackers.append(WandBTracker("hf_plm", name=folder.name, resume="allow", id=unique, dir=folder))
        else:
            trackers.append(TrackioTracker("hf_plm", name=folder.name, resume="allow"))
    for tracker in trackers:
        tracker.start()
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(recipe.to_dict())
    return trackers


class Meter:
    """Writes on the main process only; on the others every method returns at once."""

    def __init__(self, recipe: Recipe, folder: Path, step: int, seconds: float, is_main: bool) -> None:
        self.recipe, self.is_main = recipe, is_main
        self.first_step, self.spent_before, self.began = step, seconds, time.monotonic()
        self.window_tokens, self.window_seconds = 0, 0.0
        self.mark = self.began
        self.last_line = self.began
        self.has_heading = False
        self.is_finished = False
        if not is_main:
            return
        self.path = folder / "metrics.jsonl"
        keep_lines_until(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for as long as the run)
        self.trackers = open_trackers(recipe, folder, step)
        self.bar = tqdm(
            total=1000,
            initial=0,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}% |{bar}| {desc}",
            dynamic_ncols=True,
        )

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that the run has taken, over all its resumptions."""
        return self.spent_before + time.monotonic() - self.began

    def share(self, step: int) -> float:
        """Share of the run that is spent once `step` updates are done."""
        budget = self.recipe.budget_seconds
        return min(1.0, self.seconds / budget if budget else step / self.recipe.schedule.steps)

    def count(self, num_tokens: int) -> None:
        """A step of `num_tokens` is done; the time since the last mark was spent on it."""
        now = time.monotonic()
        self.window_tokens += num_tokens
        self.window_seconds += now - self.mark
        self.mark = now

    def pause(self) -> None:
        """What was done since the last mark (a validation, a checkpoint) does not count as training."""
        self.mark = time.monotonic()

    def tokens_per_second(self) -> float:
        """Real tokens/s over all processes since this was last asked."""
        speed = self.window_tokens / max(self.window_seconds, 1e-9)
        self.window_tokens, self.window_seconds = 0, 0.0
        return speed

    def write(self, line: Mapping[str, Any]) -> None:
        if not self.is_main:
            return
        # JSON has no NaN; a loss that cannot be had, for want of targets, is null.
        plain = {key: None if value != value else value for key, value in line.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()
        values = {key: value for key, value in plain.items() if value is not None and key not in ("step", "final")}
        for tracker in self.trackers:
            tracker.log(values, step=line["step"])

    def show(self, step: int, loss: float, speed: float) -> None:
        if not self.is_main:
            return
        share = self.share(step)
        done_here = step - self.first_step
        budget = self.recipe.budget_seconds
        elapsed = time.monotonic() - self.began
        left = budget - self.seconds if budget else (self.recipe.schedule.steps - step) * elapsed / max(done_here, 1)
        of_steps = "" if budget else f"/{self.recipe.schedule.steps:,}"
        text = f"step {step:,}{of_steps}, loss {loss:.3f}, {speed:,.0f} tokens/s, {duration(max(left, 0))} left"
        self.bar.n = round(share * 1000)
        self.bar.set_description_str(text)
        if self.bar.disable and time.monotonic() - self.last_line > QUIET_SECONDS:
            self.last_line = time.monotonic()
            print(f"{share:4.0%}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def say_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """A row of the table that shows each loss beside what a predictor without context would reach."""
        if not self.has_heading:
            self.say(f"{'validation':>10}   {'all targets':^22}   {'masked targets':>16}")
            self.say(f"{'step':>10}   {'loss':>8}{'context-free':>14}   {'loss':>8}{'unigram':>10}   {'recovery':>8}")
            self.has_heading = True
        self.say(
            f"{step:>10,}   {numbers['validation_loss']:>8.4f}{numbers['context_free_loss']:>14.4f}   "
            f"{numbers['validation_loss_masked']:>8.4f}{numbers['unigram_entropy']:>10.4f}   "
            f"{numbers['validation_recovery']:>8.1%}"
        )

    def say_plan(self, step: int, tokens_per_step: float, epoch_tokens: int) -> None:
        """Tokens, epochs and finish time of the whole run, from what it has done since it was started."""
        speed_steps = (step - self.first_step) / max(time.monotonic() - self.began, 1e-9)
        budget = self.recipe.budget_seconds
        steps = step + (budget - self.seconds) * speed_steps if budget else self.recipe.schedule.steps
        left = budget - self.seconds if budget else (steps - step) / speed_steps
        tokens = steps * tokens_per_step
        ends = datetime.now() + timedelta(seconds=min(left, 1e9))
        about = "about " if budget else ""
        self.say(
            f"Plan: {about}{steps:,.0f} steps of {tokens_per_step:,.0f} tokens, {tokens:,.0f} tokens in all, "
            f"{tokens / epoch_tokens:,.3g} epochs; ends {ends:%a %d %b %Y %H:%M}, in {duration(left)}."
        )
        self.has_heading = False  # the table goes on below, under its heading
        if tokens / epoch_tokens > MANY_EPOCHS:
            self.say(
                f"Warning: {tokens / epoch_tokens:,.0f} epochs are many; watch the validation loss, since a model that "
                "sees the same sequences so often may learn them by heart."
            )
        if left > LONG_SECONDS:
            self.say(
                f"Warning: {duration(left)} is long; --schedule.budget 8h fits a run into 8 hours, "
                "--schedule.steps N shortens it to N steps (both start a new run: give it a new --run.folder)."
            )

    def go_back(self, step: int, note: Mapping[str, Any]) -> None:
        """Forget the lines after `step`, which will be written again, and say why in one of that step."""
        if self.is_main:
            self.file.close()
            keep_lines_until(self.path, step, keeps_notes=True)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for as long as the run)
            self.write({"step": step, **note})

    def sync(self) -> None:
        """Lines on disk before the checkpoint that counts on them."""
        if self.is_main:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if not self.is_main:
            return
        if self.is_finished:
            self.bar.n = self.bar.total
            self.bar.refresh()
        self.bar.close()
        self.sync()
        self.file.close()
        for tracker in self.trackers:
            tracker.finish()
