"""The processes, device and precision of a run, as Accelerate gives them, and the few collectives of a step."""

import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from hf_plm.config import Recipe, UserError
from hf_plm.data.corpus import Corpus
from hf_plm.data.loader import stop_signals
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing, build_micro_batch, plan_step
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.version import __version__

CALIBRATION_SECONDS = 5.0


def choose_precision(wanted: str) -> str:
    """fp32 or bf16: what the recipe says, else what the launcher says, else bf16 on GPUs that have it."""
    if wanted != "auto":
        return wanted
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched == "bf16":
        return "bf16"
    if launched in ("fp16", "fp8"):
        raise UserError(f"The launcher asks for {launched}, which hf_plm does not train in; use bf16 or no.")
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def start_accelerator(recipe: Recipe) -> Accelerator:
    """An accelerator of the recipe's precision, also where an earlier run of this process had another one."""
    precision = choose_precision(recipe.run.precision)
    mixed = "bf16" if precision == "bf16" else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    return Accelerator(mixed_precision=mixed)


def machine_facts(accelerator: Accelerator) -> dict[str, str | int]:
    """What the numbers of a run depend on besides its recipe; recorded in checkpoints, compared at resume."""
    is_cuda = accelerator.device.type == "cuda"
    return {
        "hf_plm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else f"{accelerator.device.type} {_processor()}",
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """The sums of plain numbers over all processes, the same on each."""
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return [float(value) for value in accelerator.reduce(tensor, reduction="sum")]


def measure_speed(accelerator: Accelerator, module: PackedMaskedLM, corpus: Corpus, recipe: Recipe) -> float:
    """Tokens/s of forward and backward, times the number of processes; leaves no gradient behind.

    The first micro-batch of the run is repeated for a few seconds and the median taken: enough to size a batch by.
    """
    packing = Packing(recipe.data.crop, recipe.batch.tokens, 1, recipe.run.seed)
    plan = plan_step(corpus.lengths, packing, 0, Cursor())
    batch = build_micro_batch(corpus, plan, 0, packing.seed, recipe.mask).to(accelerator.device)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - began < CALIBRATION_SECONDS:
        start = time.perf_counter()
        with accelerator.autocast():
            tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            loss_sum = module(*tensors)[0]
        loss_sum.backward()
        loss_sum.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    module.zero_grad(set_to_none=True)
    mine = plan.num_tokens / float(np.median(seconds[1:]))
    return sum_over_processes(accelerator, mine)[0]


class StopRequest:
    """Whether somebody asked the run to stop: set by a signal, read between steps."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name:  # asked twice: the person means it
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        print(f"\n{self.signal_name}: finishing this step and writing a checkpoint.", file=sys.stderr, flush=True)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGHUP set the request while inside; outside of the main thread they cannot, and do not."""
    request, previous = StopRequest(), {}
    for number in stop_signals():
        try:
            previous[number] = signal.signal(number, request)
        except ValueError:
            break
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
