"""launch/pretrain.py with a fault in it, which the variable HF_PLM_FAULT names.

nan:RANK:STEP      the loss of that step is NaN on that rank, as a broken device would give it
unguarded          the sentences for lost processes and dead workers are not there, and tracebacks are seen instead
"""

import contextlib
import os
from typing import Any

import torch

from hf_plm.cli import main
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.training import pretrain, trainer


def give_nan(rank: int, step: int) -> None:
    """On the rank, in the forward pass of the step, counted from the start of the process."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    forward = PackedMaskedLM.forward
    calls = 0

    def broken(self: PackedMaskedLM, *arguments: Any, **knobs: Any) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        loss_sum, *rest = forward(self, *arguments, **knobs)
        if torch.is_grad_enabled():  # not in a validation
            loss_sum = loss_sum * float("nan") if calls == step else loss_sum
            calls += 1
        return loss_sum, *rest

    PackedMaskedLM.forward = broken  # type: ignore[method-assign]


def take_guards_away() -> None:
    pretrain.told_of_lost_processes = lambda accelerator: contextlib.nullcontext()  # type: ignore[assignment]
    trainer._next = lambda steps: (next(steps), None)


if __name__ == "__main__":
    name, *where = os.environ["HF_PLM_FAULT"].split(":")
    if name == "nan":
        give_nan(*map(int, where))
    else:
        take_guards_away()
    import sys

    main(["pretrain", *sys.argv[1:]])
