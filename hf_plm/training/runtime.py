"""The processes, device and precision of a run, as Accelerate gives them, and the few collectives of a step.

Plain numbers travel over gloo, on GPUs too. What one process does for all (choosing a checkpoint, writing a file) goes
through `on_main`: its mistake is then everybody's, in one sentence, instead of one process gone and the others waiting.
"""

import functools
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import accelerate
import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_plm.config import LostProcessError, Recipe, UserError
from hf_plm.data.corpus import Corpus
from hf_plm.data.loader import stop_signals
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing, build_micro_batch, plan_step
from hf_plm.models.objective import PackedMaskedLM
from hf_plm.version import __version__

CALIBRATION_SECONDS = 5.0
# What gloo, NCCL and the store say when the process at the other end is gone.
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|communicator was aborted|was likely closed",
    re.IGNORECASE,
)


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
    # DeepSpeed 0.19 calls them by names that torch 2.13 warns of, at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Its successor is not in torch 2.11, nor in Accelerate's handler.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    precision = choose_precision(recipe.run.precision)
    mixed = "bf16" if precision == "bf16" else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    # The rotary tables are the same everywhere and never change, so that nothing is to be sent around before a forward.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if on_cpu:
        _build_no_kernels()
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=timedelta(minutes=30))
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[ddp, group])
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Told of stage 3, transformers would share out what it loads; the engine does that with what it is given.
        unset_hf_deepspeed_config()
    if accelerator.num_processes > 1:
        try:
            _gloo_group()
        except RuntimeError as error:
            raise UserError(
                f"The processes cannot reach each other over TCP ({str(error).splitlines()[0][:200]}); name the "
                "network interface that the machines share with GLOO_SOCKET_IFNAME, such as eth0."
            ) from error
    return accelerator


def _build_no_kernels() -> None:
    """Keep DeepSpeed from compiling its all-reduce over shared memory, which serves its inference and not training.

    Processes take turns at it by a lock file in the user's cache, and one that is killed in its turn leaves the file:
    every later run on the machine would wait for it without end.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_name(accelerator: Accelerator) -> str:
    """What holds the model, in the words of the field: one process, DDP, FSDP2, ZeRO-1 to 3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "one process"


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
        "device": torch.cuda.get_device_name() if is_cuda else f"{accelerator.device.type} {processor()}",
        "threads": torch.get_num_threads(),
        "engine": engine_name(accelerator),
        "processes": accelerator.num_processes,
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def say(accelerator: Accelerator, text: str) -> None:
    """A line for the person; of all processes on all machines one says it."""
    if accelerator.is_main_process:
        print(text, flush=True)


@functools.cache
def _gloo_group() -> Any:
    """A group for numbers on the CPU, beside the one that the engine uses; made by all processes together.

    It waits for as long as writing or hashing a large model may take; a process that died is noticed by its socket.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=24))


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """The sums of plain numbers over all processes, the same on each."""
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=_gloo_group())
    return sums.tolist()


def gather(accelerator: Accelerator, item: Any) -> list[Any]:
    """The items of all processes, by rank, on each."""
    items = [item]
    if accelerator.num_processes > 1:
        items *= accelerator.num_processes
        dist.all_gather_object(items, item, group=_gloo_group())
    return items


Returned = TypeVar("Returned")


def on_main(accelerator: Accelerator, work: Callable[[], Returned]) -> Returned:
    """What `work` returns on the main process, where alone it runs, on all; a `UserError` of it is raised on all."""
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except UserError as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, group=_gloo_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def together(accelerator: Accelerator, work: Callable[[], Returned]) -> Returned:
    """What `work` returns on this process; a `UserError` of any process is raised on all."""
    result, error = None, None
    try:
        result = work()
    except UserError as mistake:
        error = mistake
    for mistaken in gather(accelerator, error):
        if mistaken is not None:
            raise mistaken
    return result  # type: ignore[return-value]


def in_turn(accelerator: Accelerator, name: str, work: Callable[[], Returned]) -> Returned:
    """Long work that is found done by whoever comes later: the main process, then the first of each node, then all.

    The others wait by asking the store under `name`, because a collective would give up before an hour is over.
    """
    if accelerator.num_processes == 1:
        return work()
    store = dist.distributed_c10d._get_default_store()
    mine = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    result: Returned | None = None
    mistake: UserError | None = None
    for turn in range(3):
        if turn == mine:
            try:
                result = work()
            except UserError as error:
                mistake = error
        key, wait = f"hf_plm: {name}, turn {turn}", 0.05
        arrived = store.add(key, 1)
        while arrived < accelerator.num_processes:
            time.sleep(wait)
            wait = min(2 * wait, 1.0)
            arrived = store.add(key, 0)

    def outcome() -> Returned:
        if mistake is not None:
            raise mistake
        return result  # type: ignore[return-value]

    return together(accelerator, outcome)


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
            loss_sum = module(*batch.inputs())[0]
        loss_sum.backward()
        loss_sum.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    module.zero_grad(set_to_none=True)
    mine = plan.num_tokens / float(np.median(seconds[1:]))
    return sum_over_processes(accelerator, mine)[0]


class Numbers:
    """A few numbers on their way from the device to the CPU; `read` waits for these, not for what was sent later."""

    def __init__(self, on_device: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._numbers = on_device.detach().to("cpu", non_blocking=on_device.is_cuda)
        if on_device.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


class StopRequest:
    """Whether somebody asked the run to stop: set by a signal, read between steps."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name:
            if number == signal.SIGINT:  # asked twice: the person means it
                raise KeyboardInterrupt
            return  # a scheduler signals the launcher too, which passes it on once more
        self.signal_name = signal.Signals(number).name
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # the first process of a machine tells it
        # Not print, which fails where the signal has interrupted another one.
        os.write(2, f"\n{self.signal_name}: finishing this step and writing a checkpoint.\n".encode())


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


@contextmanager
def told_of_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """A collective that failed because another process is gone is told in one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch's errors of the network and of its backends are of this kind
        text = str(error)
        if accelerator.num_processes == 1 or not _LOST.search(text):
            raise
        sentence = (
            f"Process {accelerator.process_index} lost another process of the run ({text.splitlines()[0][:200]}); "
            "the last checkpoint is whole, and the same command goes on from there."
        )
        print(f"hf-plm: {sentence}", file=sys.stderr, flush=True)
        raise LostProcessError(sentence) from error
