"""Evaluations during a run: the tasks of the section `evaluate`, on a small sample, always the same one.

The main process works on a stock copy of the model while the others wait, so that what is measured is what would be
exported, and no number of the training changes. The last step is evaluated too, whatever `--evaluate.every`.
The functions are those of the commands; with a sample of 200 all of them take seconds to a minute for a small model,
which `--evaluate.every` should be chosen for.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EsmForMaskedLM

from hf_plm.config import Recipe, UserError
from hf_plm.inference.worklist import Cleaning
from hf_plm.judging.probes.measures import LABELS
from hf_plm.models.encoder import TorchEncoder
from hf_plm.models.families import Spelling, longest
from hf_plm.models.masked_lm import MaskedLM
from hf_plm.proteins.vocabulary import CLS_ID, EOS_ID, MASK_ID, PAD_ID, RESIDUES, TOKEN_TO_ID

SPELLING = Spelling((CLS_ID,), (EOS_ID,), tuple(TOKEN_TO_ID[letter] for letter in RESIDUES), PAD_ID)
FACTS = {"model": "the model in training", "family": "ESM-2", "cls": "first"}
SHOWN = (
    ("evaluate_loss", "loss", "evaluate_context_free_loss", "context-free"),
    ("dms_spearman", "variants' Spearman", "dms_blosum62_spearman", "BLOSUM62"),
    ("contacts_long", "long-range contacts' P@L", "contacts_long_chance", "chance"),
)
PREFIXES = ("evaluate_", "dms_", "contacts_", "probe_")
MOST_ASSAYS, FIT_PROTEINS, TEST_PROTEINS = 20, 10, 20


def check_tasks(recipe: Recipe) -> None:
    """Raises `UserError` for tasks without `--evaluate.every`, or that without tasks."""
    tasks = recipe.evaluate
    has_tasks = bool(tasks.data or tasks.dms or tasks.contacts or tasks.probe)
    if tasks.every is not None and not has_tasks:
        raise UserError(
            "--evaluate.every needs something to evaluate on: --evaluate.data, --evaluate.dms, --evaluate.contacts or "
            "--evaluate.probe."
        )
    if has_tasks and tasks.every is None:
        raise UserError("--evaluate.every says how many steps there are between evaluations; give it too.")
    if tasks.every is not None and tasks.every < 1:
        raise UserError(f"--evaluate.every is a number of steps from 1, not {tasks.every}.")
    if tasks.sample < 10:
        raise UserError(f"--evaluate.sample is a number from 10, not {tasks.sample}.")


class Judge:
    """What the main process evaluates on. `read` is called once, before the first step; `lines` say what was read."""

    def __init__(self, recipe: Recipe):
        self._knobs = recipe.evaluate
        self._cleaning = Cleaning(
            recipe.data.illegal, recipe.data.gaps, recipe.data.max_rejected, recipe.data.sequence_column
        )
        self._tasks: list[Callable[[EsmForMaskedLM, torch.device], dict[str, float]]] = []
        self.lines: list[str] = []

    def read(self, limit: int) -> None:
        """`limit`: residues that the model takes. Raises `UserError` for what does not fit, before the first step."""
        knobs = self._knobs
        if knobs.every is None:
            return
        if knobs.dms or knobs.contacts or knobs.probe:
            from hf_plm.judging.requirements import require_judge

            require_judge()
        if knobs.data:
            self._read_data()
        if knobs.dms:
            self._read_dms(Path(knobs.dms))
        if knobs.contacts:
            self._read_contacts(Path(knobs.contacts), limit)
        names: set[str] = set()
        for path in knobs.probe:
            self._read_probe(path, names)

    def _read_data(self) -> None:
        from hf_plm.judging.protocol import Protocol, read_sample

        sample = read_sample(self._knobs.data, Protocol(), self._knobs.sample, cleaning=self._cleaning)
        self._tasks.append(partial(_protocol, sample))
        rejected = f" ({sample.facts['rejected']:,} records rejected)" if sample.facts["rejected"] else ""
        self.lines.append(f"{sample.facts['proteins']:,} of {sample.facts['read']:,} held-out proteins{rejected}")

    def _read_dms(self, folder: Path) -> None:
        from hf_plm.judging.scores.dms import find_assays, read_quick

        assays, _ = find_assays(folder)
        drawn = read_quick(assays[:MOST_ASSAYS], self._knobs.sample)
        self._tasks.append(partial(_dms, drawn))
        self.lines.append(f"{self._knobs.sample:,} variants of each of {len(drawn)} of {len(assays)} assays")

    def _read_contacts(self, path: Path, limit: int) -> None:
        from hf_plm.judging.contacts.fit import read_quick
        from hf_plm.judging.contacts.structures import read_structures

        structures = read_structures(path)
        fitted, tested = read_quick(structures, FIT_PROTEINS, TEST_PROTEINS, 0, limit)
        self._tasks.append(partial(_contacts, fitted, tested))
        self.lines.append(
            f"contacts of {len(tested)} of {len(structures):,} structures (fitted on {len(fitted)} others)"
        )

    def _read_probe(self, path: str, names: set[str]) -> None:
        from hf_plm.judging.probes.probe import prepare_quick
        from hf_plm.judging.probes.task import read_task

        task = read_task(path)
        if task.name in names:
            raise UserError(
                f"--evaluate.probe names two tasks {task.name}, whose numbers would have one name; rename one."
            )
        names.add(task.name)
        self._tasks.append(partial(_probe, prepare_quick(task, self._knobs.sample)))
        self.lines.append(f"{task.name} on at most {self._knobs.sample:,} of {len(task.ids):,} proteins")

    def numbers(self, stock: EsmForMaskedLM, device: torch.device) -> tuple[dict[str, float], list[str]]:
        """By name, as they stand in the metrics, and what went wrong: a task that fails is no reason to stop a run."""
        found: dict[str, float] = {}
        complaints = []
        for task in self._tasks:
            try:
                found |= task(stock.to(device).eval(), device)
            except (UserError, ValueError, RuntimeError) as error:  # a GPU without room for another model, too
                complaints.append((str(error).strip().splitlines() or [type(error).__name__])[0])
        return found, complaints


def probed(name: str) -> str:
    """`probe_TASK_MEASURE` in words: the task's name as it is, and its measure."""
    name = name.removeprefix("probe_")
    for measure, label in LABELS.items():
        if name.endswith(f"_{measure}"):
            return f"{name.removesuffix(measure)[:-1]} {label}"
    return name


def is_judged(metrics: Path, step: int) -> bool:
    """Whether `metrics.jsonl`, as `Meter` has written it by this step, has an evaluation of it."""
    for text in reversed(metrics.read_text(encoding="utf-8").splitlines()):
        line = json.loads(text)
        if line["step"] < step:
            break
        if any(name.startswith(PREFIXES) for name in line):
            return True
    return False


def told(numbers: dict[str, float]) -> str:
    """The chief numbers, each with what it has to beat in brackets."""
    words = [
        f"{text} {numbers[name]:.4f} ({than} {numbers[baseline]:.4f})"
        for name, text, baseline, than in SHOWN
        if name in numbers
    ]
    words += [
        f"{probed(name)} {value:.4f} ({numbers[f'{name}_baseline']:.4f})"
        for name, value in numbers.items()
        if f"{name}_baseline" in numbers
    ]
    return ", ".join(words)


def _masked_lm(stock: EsmForMaskedLM, device: torch.device) -> MaskedLM:
    return MaskedLM(stock, SPELLING, MASK_ID, FACTS, "fp32", device)


def _protocol(sample: Any, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.evaluation import evaluate_sample

    numbers = evaluate_sample(_masked_lm(stock, device), sample).summary()
    return {f"evaluate_{name.removeprefix('validation_')}": value for name, value in numbers.items()}


def _dms(drawn: Any, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.scores.dms import quick_dms

    return quick_dms(_masked_lm(stock, device), drawn)


def _contacts(fitted: Any, tested: Any, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.contacts.fit import quick_contacts

    return quick_contacts(stock, SPELLING, fitted, tested)


def _probe(prepared: Any, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.probes.probe import quick_probe

    encoder = TorchEncoder(stock.esm, SPELLING, -1, longest(stock.config, SPELLING), FACTS, "fp32", device)
    return quick_probe(encoder, prepared)
