"""Whether a run got the processes, devices and engine that its launcher was asked for.

Accelerate and torchrun fall back silently: `accelerate launch --cpu --num_processes 2` starts one process, two
processes without a GPU train one model each, ACCELERATE_USE_CPU turns DeepSpeed and FSDP into DDP, a misspelt key of a
file is dropped. Nobody notices for a week, so each is refused in one sentence. What was asked stands in the environment
of the process and on the command line of the `accelerate launch` that started it.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_plm.config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

ENGINES = {"NO": "one process", "MULTI_GPU": "DDP", "FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed"}
"""Values of `distributed_type` in a file for Accelerate that hf_plm trains with, and their names in the field."""

KINDS = (*ENGINES, "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU", "MULTI_MLU")
"""The last ones are DDP on other devices."""

# The variables that Accelerate counts processes by (accelerate/state.py, PartialState._prepare_backend).
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Asked:
    """What an `accelerate launch` was asked for by its flags and its configuration file."""

    source: str
    """What the words came from, for sentences: a file's name, or `accelerate launch`."""
    kind: str
    """One of `KINDS`."""
    processes: int | None
    machines: int
    has_cpu_flag: bool
    use_cpu: bool
    """The file says `use_cpu: true`."""
    wants_gpu: bool
    zero_stage: int | None


def check_before_start() -> None:
    """Refuse what Accelerate would fall back from; called before there is an Accelerator.

    Raises:
        UserError: the processes, the engine or the device will not be what the launcher was asked for.
    """
    has_deepspeed, has_fsdp = _is_set("ACCELERATE_USE_DEEPSPEED"), _is_set("ACCELERATE_USE_FSDP")
    if _is_set("ACCELERATE_USE_CPU"):
        if has_deepspeed:
            raise UserError(
                "DeepSpeed was asked for, and ACCELERATE_USE_CPU=true makes Accelerate train with plain DDP instead; "
                "unset it and set DS_ACCELERATOR=cpu."
            )
        if has_fsdp:
            raise UserError(
                "FSDP was asked for, and Accelerate shards on GPUs only: ACCELERATE_USE_CPU=true gives plain DDP; "
                "unset it, or take ddp.yaml, or a zero file with DS_ACCELERATOR=cpu, for a trial on CPUs."
            )
    asked = asked_by(_parent_command())
    if asked is not None:
        _check_command(asked, num_started())
    _check_devices(asked, has_deepspeed, has_fsdp)


def check_launch(accelerator: "Accelerator") -> None:
    """Refuse an Accelerator that is not what was asked for, whatever the reason; a net under `check_before_start`.

    Raises:
        UserError: as above.
    """
    started, kind = num_started(), accelerator.distributed_type.value
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, and each would train alone ({_world_size_name()}={started}, and "
            f"Accelerate counts {accelerator.num_processes}); on CPUs set ACCELERATE_USE_CPU=true, on GPUs start them "
            "with accelerate launch or torchrun."
        )
    if kind not in KINDS:
        raise UserError(
            f"hf_plm trains with {', '.join(ENGINES.values())}, and the launcher chose {kind}; take another."
        )
    for variable, wanted in (("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if _is_set(variable) and kind != wanted:
            raise UserError(
                f"{ENGINES[wanted]} was asked for ({variable}=true), and Accelerate chose {ENGINES.get(kind, kind)}; "
                "start the run with accelerate launch and one of accelerate_configs, with GPUs in sight."
            )
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("hf_plm trains with FSDP2, and FSDP1 was chosen; write fsdp_version: 2 under fsdp_config.")
    asked = asked_by(_parent_command())
    if asked is None:
        return
    if asked.zero_stage is not None and kind == "DEEPSPEED":
        stage = accelerator.deepspeed_plugin.zero_stage
        if stage != asked.zero_stage:
            raise UserError(
                f"{asked.source} asks for ZeRO-{asked.zero_stage}, and DeepSpeed's own file for ZeRO-{stage}; "
                "say one stage in one place."
            )
    on_cpu = accelerator.device.type == "cpu"
    if (asked.has_cpu_flag or asked.use_cpu) and not on_cpu:
        raise UserError(
            f"{asked.source} asks for CPUs, and Accelerate took {accelerator.device}; hide the GPUs from it."
        )


def num_started() -> int:
    """How many processes of this run were started, by the variables that launchers set."""
    return max(int(os.environ.get(name) or 1) for name in _WORLD_SIZES)


def num_gpus() -> int:
    """GPUs that torch sees here, of whatever make."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built for CPUs only"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "nvidia-smi may tell why" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}"


def asked_by(command: list[str]) -> Asked | None:
    """What the `accelerate launch` of a command line was asked for; None where it is another program.

    Raises:
        UserError: its configuration file has keys that Accelerate would drop.
    """
    arguments = _launch_arguments(command)
    if arguments is None:
        return None
    from accelerate.commands.config import default_config_file
    from accelerate.commands.launch import launch_command_parser

    try:
        flags = launch_command_parser().parse_args(arguments)
    except SystemExit:  # not the Accelerate of this environment
        return None
    file = flags.config_file
    if file is None and not flags.cpu and Path(default_config_file).is_file():
        file = default_config_file
    config = None if file is None else read_config(Path(file))
    kind = config.distributed_type.value if config else "NO"
    for flag, name in (("multi_gpu", "MULTI_GPU"), ("use_fsdp", "FSDP"), ("use_deepspeed", "DEEPSPEED")):
        kind = name if getattr(flags, flag) else kind
    processes = flags.num_processes or (config and config.num_processes)
    use_cpu = bool(config and config.use_cpu)
    # A file named on the command line is a choice; what `accelerate config` saved may be older than the machine.
    named_gpus = flags.gpu_ids or (flags.config_file and config and config.gpu_ids)
    zero_stage = flags.zero_stage
    if zero_stage is None and config:
        zero_stage = config.deepspeed_config.get("zero_stage")
    return Asked(
        source=Path(file).name if file else "accelerate launch",
        kind=kind,
        processes=processes if processes and processes > 0 else None,
        machines=flags.num_machines or (config.num_machines if config else 1),
        has_cpu_flag=flags.cpu,
        use_cpu=use_cpu,
        wants_gpu=not (flags.cpu or use_cpu) and bool(kind not in ("NO", "MULTI_CPU") or named_gpus),
        zero_stage=None if zero_stage is None else int(zero_stage),
    )


def read_config(path: Path) -> Any:
    """Accelerate's `ClusterConfig` of a file; unlike Accelerate, refuses misspelt keys in inner sections too.

    Raises:
        UserError: no file, no YAML, unknown keys, or a kind of launch that hf_plm has no use for.
    """
    import accelerate
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a file for Accelerate: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(f"{path} is no file for Accelerate: it has no distributed_type; see accelerate_configs.")
    for key in ("distributed_type", "mixed_precision"):
        if isinstance(content.get(key), bool):
            raise UserError(
                f"{path} says {key}: no, which YAML reads as false; write 'no' in quotes ('NO' for a type)."
            )
    kind = content["distributed_type"]
    if kind not in KINDS:
        raise UserError(f"{path} says distributed_type: {kind}; hf_plm trains with {', '.join(ENGINES)}.")
    options = {action.dest for action in launch_command_parser()._actions}
    # The last two are older spellings that Accelerate still reads.
    _refuse_unknown(path, "", content, {*ClusterConfig.__dataclass_fields__, "fp16", "dynamo_backend"})
    for section, prefix in (("deepspeed_config", ""), ("fsdp_config", "fsdp_")):
        keys = {str(key).removeprefix(prefix) for key in content.get(section) or {}}
        known = {option.removeprefix(prefix) for option in options if option.startswith(prefix)}
        _refuse_unknown(path, f"{section}.", keys, known, prefix)
    try:
        return load_config_from_file(str(path))
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"Accelerate {accelerate.__version__} does not take {path}: {message}") from None


def _refuse_unknown(path: Path, section: str, keys: Any, known: set[str], prefix: str = "") -> None:
    for key in sorted(str(key) for key in keys):
        if key not in known:
            import accelerate

            close = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else "upgrade accelerate, or remove it."
            raise UserError(
                f"{path} has a key {section}{prefix}{key}, unknown to Accelerate {accelerate.__version__}; {hint}"
            )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _world_size_name() -> str:
    return max(_WORLD_SIZES, key=lambda name: int(os.environ.get(name) or 1))


def _parent_command() -> list[str]:
    import psutil

    try:
        return list(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return []


def _launch_arguments(command: list[str]) -> list[str] | None:
    """The words after `accelerate launch`, in whichever of its spellings."""
    for place, word in enumerate(command[:4]):
        name, rest = Path(word).name.removesuffix(".exe"), command[place + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli"):
            return rest[1:] if rest[:1] == ["launch"] else None
        if name in ("accelerate-launch", "accelerate.commands.launch", "slurm_node.py"):
            return rest
    return None


def _check_command(asked: Asked, started: int) -> None:
    engine = ENGINES.get(asked.kind, asked.kind)
    on_cpu = _is_set("ACCELERATE_USE_CPU") or os.environ.get("DS_ACCELERATOR") == "cpu"
    if asked.has_cpu_flag and asked.kind not in ("NO", "MULTI_CPU"):
        raise UserError(
            f"{asked.source} asks for {engine}, and --cpu makes accelerate launch start one plain process instead; "
            "leave --cpu out; for a trial on CPUs: hf-plm launch CONFIG RECIPE --cpu --processes 2."
        )
    if asked.use_cpu and asked.kind not in ("NO", "MULTI_CPU") and not on_cpu:
        raise UserError(
            f"{asked.source} says use_cpu: true, which accelerate launch ignores with distributed_type: {asked.kind}; "
            "set ACCELERATE_USE_CPU=true (DeepSpeed: DS_ACCELERATOR=cpu) in the environment."
        )
    if asked.processes is None or asked.processes == started:
        return
    if started == 1:
        raise UserError(
            f"accelerate launch was asked for {asked.processes} processes and started one, as it does without "
            "--multi_gpu or a file that names an engine; on GPUs add --config_file accelerate_configs/ddp.yaml, on "
            f"CPUs run hf-plm launch ddp RECIPE --cpu --processes {asked.processes}."
        )
    raise UserError(
        f"accelerate launch was asked for {asked.processes} processes and started {started} on {asked.machines} "
        f"machines, the same number on each; make --num_processes a multiple of {asked.machines}."
    )


def _check_devices(asked: Asked | None, has_deepspeed: bool, has_fsdp: bool) -> None:
    gpus = num_gpus()
    if os.environ.get("DS_ACCELERATOR") == "cpu" and has_deepspeed:
        if gpus:
            raise UserError(
                f"DS_ACCELERATOR=cpu keeps DeepSpeed on the CPU, but Accelerate sees {gpus} GPUs and takes them; "
                "set CUDA_VISIBLE_DEVICES= (nothing after the sign) too."
            )
        return
    if _is_set("ACCELERATE_USE_CPU"):
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if 0 < gpus < local:
        raise UserError(
            f"{local} processes were started on a machine where torch sees {gpus} GPU{'s' * (gpus > 1)}, and several "
            f"would share one; start {gpus} (--num_processes {gpus})."
        )
    if gpus:
        return
    started = num_started()
    source = asked.source if asked is not None and asked.wants_gpu else "accelerate launch"
    reason = f"asks for GPUs, and torch sees none here ({why_no_gpu()})"
    if has_deepspeed:
        raise UserError(f"{source} {reason}; for a trial on CPUs set DS_ACCELERATOR=cpu.")
    if has_fsdp:
        raise UserError(f"{source} {reason}; FSDP cannot be tried on CPUs, ddp.yaml and the zero files can.")
    if started > 1:
        raise UserError(
            f"{started} processes were started, and torch sees no GPU here ({why_no_gpu()}), so that each would train "
            "alone; to train together on CPUs set ACCELERATE_USE_CPU=true."
        )
    if asked is not None and asked.wants_gpu:
        raise UserError(f"{source} {reason}; on a CPU take accelerate_configs/cpu.yaml.")
