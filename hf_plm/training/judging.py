"""Evaluations during a run: the tasks of the section `evaluate`, on a small sample, always the same one.

The main process works on a stock copy of the model while the others wait, so that what is measured is what would be
exported, and no number of the training changes. The functions are those of the commands; with a sample of 200 all of
them take seconds to a minute for a small model, which `--evaluate.every` should be chosen for.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EsmForMaskedLM

from hf_plm.config import Recipe, UserError
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
    """What the main process evaluates on. `read` is called once, before the first step."""

    def __init__(self, recipe: Recipe):
        self._knobs = recipe.evaluate
        self._tasks: list[Any] = []

    def read(self) -> None:
        """Raises `UserError` for what cannot be read, while nothing has been trained yet."""
        knobs = self._knobs
        if knobs.every is None:
            return
        if knobs.dms or knobs.contacts or knobs.probe:
            from hf_plm.judging.requirements import require_judge

            require_judge()
        if knobs.data:
            self._tasks.append(partial(_protocol, self._sample()))
        if knobs.dms:
            from hf_plm.judging.scores.dms import find_assays

            assays, _ = find_assays(Path(knobs.dms))
            self._tasks.append(partial(_dms, assays[:MOST_ASSAYS], knobs.sample))
        if knobs.contacts:
            from hf_plm.judging.contacts.structures import read_structures

            self._tasks.append(partial(_contacts, read_structures(Path(knobs.contacts))))
        for path in knobs.probe:
            from hf_plm.judging.probes.probe import prepare_quick
            from hf_plm.judging.probes.task import read_task

            self._tasks.append(partial(_probe, prepare_quick(read_task(path), knobs.sample)))

    def _sample(self) -> Any:
        from hf_plm.judging.protocol import Protocol, read_sample

        return read_sample(self._knobs.data, Protocol(), self._knobs.sample)

    def numbers(self, stock: EsmForMaskedLM, device: torch.device) -> tuple[dict[str, float], list[str]]:
        """By name, as they stand in the metrics, and what went wrong: a task that fails is no reason to stop a run."""
        stock = stock.to(device).eval()
        found: dict[str, float] = {}
        complaints = []
        for task in self._tasks:
            try:
                found |= task(stock, device)
            except UserError as error:
                complaints.append(str(error))
        return found, complaints


def told(numbers: dict[str, float]) -> str:
    """The chief numbers, each with what it has to beat in brackets."""
    words = [
        f"{text} {numbers[name]:.4f} ({than} {numbers[baseline]:.4f})"
        for name, text, baseline, than in SHOWN
        if name in numbers
    ]
    words += [
        f"{name.removeprefix('probe_')} {value:.4f} ({numbers[f'{name}_baseline']:.4f})"
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


def _dms(assays: Any, size: int, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.scores.dms import quick_dms

    return quick_dms(_masked_lm(stock, device), assays, size)


def _contacts(structures: Any, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.contacts.fit import quick_contacts

    return quick_contacts(stock, SPELLING, structures, FIT_PROTEINS, TEST_PROTEINS)


def _probe(prepared: Any, stock: EsmForMaskedLM, device: torch.device) -> dict[str, float]:
    from hf_plm.judging.probes.probe import quick_probe

    encoder = TorchEncoder(stock.esm, SPELLING, -1, longest(stock.config, SPELLING), FACTS, "fp32", device)
    return quick_probe(encoder, prepared)
