"""A run under FSDP2 on gloo: Accelerate shards as on GPUs, but has to be told so, since it takes a CPU for DDP.

Everything else is the real thing: Accelerate's own preparation, the loop, checkpoints, validation and export.
Usage: torchrun --standalone --nproc_per_node 2 tests/support/fsdp2_run.py RECIPE --section.knob value ...

`fsdp2.json` in the run folder says what was seen: the precision that a layer computed in, and how many elements of
gradient were held whole after a backward pass.
"""

import gc
import json
import sys
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor

from hf_plm.cli import parse_knobs
from hf_plm.cli.process import leave
from hf_plm.recipe import load_recipe
from hf_plm.training import pretrain as training

recipe = load_recipe(sys.argv[1], parse_knobs(sys.argv[2:]))
start_accelerator, prepare = training.start_accelerator, Accelerator.prepare
seen: dict[str, Any] = {"whole_gradient_elements": 0}


def start_sharded(*arguments: Any) -> Accelerator:
    accelerator = start_accelerator(*arguments)
    assert accelerator.num_processes > 1
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["EsmLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def prepare_sharded(accelerator: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    plugin = accelerator.state.fsdp_plugin
    layer = module.model.esm.encoder.layer[0].intermediate.dense
    prepared = prepare(accelerator, module, optimizer)
    # Accelerate has looked again at what machine this is.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    layer.register_forward_hook(lambda module, inputs, output: seen.update(computed_in=str(output.dtype)))
    return prepared


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    loss_of_round = loss / accelerator.gradient_accumulation_steps
    loss_of_round.backward()
    held = sum(
        part.unsharded_accumulated_grad.numel()
        for part in gc.get_objects()
        if isinstance(part, FSDPParam) and part.unsharded_accumulated_grad is not None
    )
    whole = [
        part._unsharded_param.grad.numel()
        for part in gc.get_objects()
        if isinstance(part, FSDPParam) and hasattr(part, "_unsharded_param") and part._unsharded_param.grad is not None
    ]
    seen["whole_gradient_elements"] = max(seen["whole_gradient_elements"], held + sum(whole))


training.start_accelerator = start_sharded
Accelerator.prepare = prepare_sharded
Accelerator.backward = backward
training.pretrain(recipe)
(recipe.run_folder / "fsdp2.json").write_text(json.dumps(seen))
if __name__ == "__main__":
    leave(0)
