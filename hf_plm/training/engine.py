"""What Accelerate's engines hold, as whole tensors by name: what is read is saved, what is put back is resumed.

DDP keeps a parameter and its moments whole, FSDP2 as DTensors, ZeRO as slices of flat buffers. Checkpoints know none of
that: `read` gives the fp32 weight or moment as one process would have it, `put` takes one, a parameter at a time, so
that no process ever needs room for more than one parameter beyond its share. Both are collectives: all processes call
them in the same order.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from transformers import EsmForMaskedLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_plm.config import Optimizer, UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""


def configure(accelerator: Accelerator, knobs: Optimizer, rounds: int) -> None:
    """Tell the engine what it must know before `prepare`: accumulation, clipping, precision.

    `rounds` are the micro-batches of one process in a step. DeepSpeed clips and accumulates by its own configuration;
    in it and in FSDP2, bf16 is autocast over fp32 weights and gradients, as it is under DDP, so that all give the same
    numbers and 16 bytes a parameter are shared out in each.
    """
    accelerator.gradient_accumulation_steps = rounds
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator.deepspeed_plugin, accelerator.mixed_precision, knobs, rounds)
    elif accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        # Otherwise every process holds the whole gradient, unreduced, until the last round of a step.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def _configure_deepspeed(plugin: DeepSpeedPlugin, precision: str, knobs: Optimizer, rounds: int) -> None:
    config: dict[str, Any] = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2, 3):
        raise UserError(f"Of DeepSpeed the ZeRO stages 1 to 3 are used, not {plugin.zero_stage}; take ddp instead.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise UserError(
                f"The DeepSpeed configuration names its own {name}; leave it out, since the recipe's is used "
                "(--optimizer.*, --schedule.*)."
            )
    config.update(
        gradient_accumulation_steps=rounds,
        gradient_clipping=knobs.clip,
        train_micro_batch_size_per_gpu=1,  # counts micro-batches here, and DeepSpeed wants a whole number
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        bf16={"enabled": False},
        fp16={"enabled": False},
        # Without modules named safe, weights and gradients travel in fp32.
        torch_autocast={"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    )


def reshard(module: nn.Module) -> None:
    """Let FSDP2 put its parameters back in their shares; after a forward without a backward some are whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gather_stock(accelerator: Accelerator, model: EsmForMaskedLM, optimizer: Any) -> EsmForMaskedLM:
    """The whole model on the CPU of the main process, elsewhere one without weights; no engine has a hold on it."""
    is_main = accelerator.is_main_process
    weights = {}
    for name, parameter in model.named_parameters():
        weight = read(parameter, optimizer)
        if is_main:
            weights[name] = weight.to("cpu", copy=True)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # As long as transformers knows of stage 3, building or loading a model in any process would call all of them.
        unset_hf_deepspeed_config()
    config = copy.deepcopy(model.config)
    config._attn_implementation = None
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if is_main else "meta"):
        stock = EsmForMaskedLM(config)
    if is_main:
        faults = stock.load_state_dict(weights, strict=False)
        assert not faults.unexpected_keys
        missing = {name for name, _ in stock.named_parameters()} - weights.keys()
        assert not missing, missing
    return stock


def read(parameter: nn.Parameter, optimizer: Any, moment: str | None = None) -> torch.Tensor:
    """The whole fp32 weight, or one of `MOMENTS` of it, on the parameter's device.

    `optimizer` is what `prepare` put in the place of the one it was given, unwrapped: torch's or DeepSpeed's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return _read_zero(parameter, moment)
    value = (parameter if moment is None else optimizer.state[parameter][moment]).detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).float()


@torch.no_grad()
def put(parameter: nn.Parameter, optimizer: Any, value: torch.Tensor, moment: str | None = None) -> None:
    """Give the weight, or one of `MOMENTS` of it, a whole value, the same on all processes."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        _put_zero(parameter, value, moment)
        return
    # A copy: what was loaded is a view of the file, which will be removed one day.
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    if moment is None:
        parameter.copy_(value)
    else:
        optimizer.state[parameter][moment] = value


@torch.no_grad()
def set_up(parameters: list[nn.Parameter], optimizer: Any, num_updates: int) -> None:
    """AdamW's state for the trained `parameters` as after so many updates, with moments of zero, to be read or put."""
    if isinstance(optimizer, torch.optim.Optimizer):
        inner, stepped = optimizer, parameters
    else:  # ZeRO gives AdamW flat slices in the place of parameters
        name = "single_partition_of_fp32_groups"  # of stages 1 and 2
        inner = optimizer.optimizer
        stepped = getattr(optimizer, name if hasattr(optimizer, name) else "fp32_partitioned_groups_flat")
    for parameter in stepped:
        # Counters of fused AdamW live on the device; those of the plain one must stay on the CPU.
        device = parameter.device if inner.defaults.get("fused") else "cpu"
        inner.state[parameter] = {"step": torch.tensor(float(num_updates), device=device)}
        for moment in MOMENTS:
            inner.state[parameter][moment] = torch.zeros_like(parameter)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Stages 1 and 2 hold views of the moments by parameter. Left alone, DeepSpeed makes them at the first update,
        # when only the first parameter group has moments (0.19.8).
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _read_zero(parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not parameter.requires_grad:  # DeepSpeed's optimizer does not know it
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().float().clone()
    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


def _put_zero(parameter: Any, value: torch.Tensor, moment: str | None) -> None:
    from deepspeed import utils
    from deepspeed.runtime.zero import GatheredParameters

    if hasattr(parameter, "ds_tensor"):
        # Stage 3, whose own setter of whole values fails where the number of processes does not divide their size.
        size = parameter.ds_tensor.numel()
        padded = pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        mine = padded.narrow(0, size * dist.get_rank(), size)
        if moment is not None:
            utils.safe_set_local_optimizer_state(parameter, mine, moment)
            return
        if parameter.requires_grad:
            utils.safe_set_local_fp32_param(parameter, mine)
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    elif moment is not None:
        utils.safe_set_full_optimizer_state(parameter, value, moment)
    else:
        utils.safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
