"""`hf-plm launch CONFIG RECIPE`: a thin front to `accelerate launch`.

It finds the file for Accelerate by name, in a clone or in the wheel, checks what the launcher would trip over later or
not at all, prints the `accelerate launch` line that it stands for, and runs that in this process, so that the one
sentence of a worker is not buried under the launcher's traceback and its exit code is passed on.
"""

import difflib
import importlib
import importlib.util
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

from hf_plm.config import UserError
from hf_plm.recipe import recipe_names
from hf_plm.training.guard import num_gpus, read_config, why_no_gpu

SHUTDOWN_SECONDS = 600
"""How long torch's launcher waits for processes that were told to stop before it kills them; its own 30 are too few for
a checkpoint of billions of parameters."""


@dataclass(frozen=True)
class Request:
    """What the command line of `hf-plm launch` asks for; None is left to the file and the machine."""

    config: str
    processes: int | None = None
    machines: int | None = None
    machine_rank: int | None = None
    main_ip: str | None = None
    port: int | None = None
    on_cpu: bool = False


@dataclass(frozen=True)
class Plan:
    """Words for `accelerate launch`, and variables to set before."""

    words: list[str]
    variables: dict[str, str]

    def line(self) -> str:
        """The same as a line for a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*assignments, "accelerate launch", shlex.join(self.words)])


def config_names() -> list[str]:
    return sorted(path.stem for path in _config_folder().glob("*.yaml"))


def _config_folder() -> Path:
    """The files that a wheel carries, or `accelerate_configs` of the clone that this package is imported from."""
    packaged = Path(str(resources.files("hf_plm"))) / "accelerate_configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "accelerate_configs"


def find_config(name: str) -> Path:
    """The file for Accelerate given by path or by name (`ddp`).

    Raises:
        UserError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = _config_folder() / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if packaged.is_file() and (packaged.stem == name or not Path(name).parent.is_dir()):
        return packaged
    names = config_names()
    if name in recipe_names():
        raise UserError(f"{name!r} is a recipe, and the file for Accelerate comes first: hf-plm launch CONFIG {name}.")
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}."
    raise UserError(f"There is no file for Accelerate {name!r}{hint}")


def plan(request: Request, training: Sequence[str]) -> Plan:
    """Check a request against its file and this machine, and write it in Accelerate's words.

    Args:
        request: what is asked for.
        training: the words after `hf-plm pretrain`.

    Raises:
        UserError: the launcher would refuse it, or silently do something else.
    """
    path = find_config(request.config)
    config = read_config(path)
    kind = config.distributed_type.value
    if kind == "MULTI_CPU":
        raise UserError(
            f"{path.name} is for mpirun (MULTI_CPU); take ddp: hf-plm launch ddp RECIPE --cpu --processes 2."
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{path.name} needs DeepSpeed, which is not installed; pip install deepspeed (on Linux).")
    if request.on_cpu and kind == "FSDP":
        raise UserError(
            f"{path.name} cannot be tried on CPUs, since Accelerate has FSDP on GPUs only; try ddp or zero3 instead."
        )
    machines = request.machines or config.num_machines
    on_cpu = request.on_cpu or config.use_cpu
    processes = _processes(request, config, path, machines, on_cpu)
    words = ["--config_file", _shown(path), "--num_processes", str(processes)]
    variables = {}
    if kind == "DEEPSPEED" and machines > 1:
        # One command on each machine, as for the other engines; Accelerate's default goes through ssh and a host file.
        words += ["--deepspeed_multinode_launcher", "standard"]
    if kind == "NO":
        words += ["--quiet"] + ["--cpu"] * request.on_cpu
    else:
        words += _meeting(request, config, path, machines)
        variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
        if on_cpu and kind == "DEEPSPEED":
            variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        elif on_cpu:
            variables["ACCELERATE_USE_CPU"] = "true"
    if request.on_cpu:
        words += ["--mixed_precision", "no"]
    # Accelerate gives each process one thread, which is right where the GPU works and wrong where CPUs do.
    if on_cpu or "cpu" in config.deepspeed_config.values():
        variables["OMP_NUM_THREADS"] = str(max(1, _num_cores() // (processes // machines)))
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        if name in os.environ:  # the person knows better
            variables.pop(name, None)
    return Plan([*words, "--module", "hf_plm.cli", "pretrain", *training], variables)


def run(plan: Plan) -> int:
    """Run `accelerate launch` until its processes have ended; the exit code of the first that failed, or 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    importlib.import_module("torch.distributed.run")  # its loggers exist from here on
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they repeat in a table what the process has said
    os.environ.update(plan.variables)
    _pass_signals_on()
    try:
        flags = launch_command_parser().parse_args(plan.words)
        flags.quiet = False  # quiet is in the line for a shell; it would turn every exit code into 1
        launch_command(flags)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode, "The process")
    except ChildFailedError as error:
        # The launcher ends the others by SIGTERM when one has failed.
        failures = sorted(error.failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[0]))
        return _exit_code(failures[0][1].exitcode, f"Process {failures[0][0]}")
    except SignalException as error:
        return 128 + error.sigval
    except ConnectionError as error:
        raise UserError(" ".join(str(error).split())) from None
    return 0


def _processes(request: Request, config: Any, path: Path, machines: int, on_cpu: bool) -> int:
    """How many processes to start on all machines together."""
    if config.distributed_type.value == "NO":
        if (request.processes or 1) > 1 or machines > 1:
            raise UserError(f"{path.name} is for one process; for several take ddp: hf-plm launch ddp RECIPE ...")
        if not on_cpu and config.gpu_ids and not num_gpus():
            raise UserError(f"{path.name} asks for a GPU, and torch sees none here ({why_no_gpu()}); take cpu.")
        return 1
    if request.processes is not None and (request.processes < 1 or request.processes % machines):
        raise UserError(
            f"--processes counts those of all machines together, the same number on each; {request.processes} cannot "
            f"be spread over {machines}."
        )
    if on_cpu:
        return request.processes or 2 * machines
    gpus = num_gpus()
    if config.gpu_ids not in (None, "all"):
        gpus = min(gpus, len(str(config.gpu_ids).split(",")))
    if not gpus:
        trial = "FSDP cannot be tried on CPUs" if config.distributed_type.value == "FSDP" else "--cpu tries it on CPUs"
        raise UserError(f"{path.name} asks for GPUs, and torch sees none here ({why_no_gpu()}); {trial}.")
    processes = request.processes or gpus * machines
    if processes // machines > gpus:
        raise UserError(
            f"{processes // machines} processes on this machine need as many GPUs, and torch sees {gpus}; "
            f"give --processes {gpus * machines}."
        )
    return processes


def _meeting(request: Request, config: Any, path: Path, machines: int) -> list[str]:
    """Where the processes find each other."""
    from accelerate.utils.other import is_port_in_use

    asked = request.port or config.main_process_port
    is_main = (request.machine_rank or 0) == 0
    if asked and is_main and is_port_in_use(asked):
        raise UserError(f"Port {asked} of this machine is taken; give another with --port, such as --port {asked + 1}.")
    if machines == 1:
        # 0 is any free port, so that two runs on one machine do not meet.
        return ["--num_machines", "1", "--main_process_port", str(asked or 0)]
    if request.machine_rank is None or request.main_ip is None:
        raise UserError(
            f"{path.name} runs on {machines} machines: say on each which it is and where the first one is, such as "
            "--machine-rank 0 --main-ip 10.0.0.1 (hostname -I on the first)."
        )
    if not 0 <= request.machine_rank < machines:
        raise UserError(
            f"--machine-rank counts from 0 to {machines - 1} on {machines} machines, not {request.machine_rank}."
        )
    where = {
        "--num_machines": machines,
        "--machine_rank": request.machine_rank,
        "--main_process_ip": request.main_ip,
        "--main_process_port": asked or 29500,
    }
    return [word for name, value in where.items() for word in (name, str(value))]


def _shown(path: Path) -> str:
    """As a person would write it: from here where it lies under here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_code(code: int, who: str) -> int:
    if code < 0:
        name = signal.Signals(-code).name
        cause = "; the machine may be out of memory" if name == "SIGKILL" else ""
        print(f"hf-plm: {who} was ended by {name}{cause}.", file=sys.stderr)
        return 128 - code
    return code


def _pass_signals_on() -> None:
    """A stop asked of the launcher of one process reaches it; torch's launcher of several puts its own handlers."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        import psutil

        for child in psutil.Process().children():
            child.send_signal(number)

    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), pass_on)
    # Ctrl-C reaches the process itself, which finishes its step; the launcher only waits.
    signal.signal(signal.SIGINT, lambda number, frame: None)
