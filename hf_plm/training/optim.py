"""AdamW as ESM-2 used it: no decay on biases and layer norms."""

import torch
from torch import nn

from hf_plm.config import Optimizer


def build_optimizer(module: nn.Module, knobs: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `module`, in two groups: matrices and embeddings decay, vectors do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": knobs.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One kernel for all of it: at most 2% of a step on a CPU, hundreds of launches on a GPU.
    is_fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW(
        groups, lr=knobs.learning_rate, betas=(knobs.beta1, knobs.beta2), eps=knobs.epsilon, fused=is_fused
    )
