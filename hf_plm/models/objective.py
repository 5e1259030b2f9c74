"""The one module that Accelerate is given: a packed micro-batch in, the sum of its losses out.

The loss of a step is the mean over all its targets, wherever they lie. So this returns a sum and a count, not a mean:
the trainer multiplies each sum by world size x accumulation / (targets of the step), which undoes what Accelerate,
DeepSpeed and the averaging over ranks divide. The head runs on target positions only, about a seventh of the tokens.
No parameter is used outside `forward`, because sharded engines gather parameters around it.

Dimensions: T tokens of a packed micro-batch, K targets, B sequences, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import EsmForMaskedLM

from hf_plm.models.layers import use_packed_layers
from hf_plm.models.packed import packed_hidden_states, sequence_index
from hf_plm.proteins.vocabulary import EOS_ID, RESIDUES, TOKEN_TO_ID

_FIRST_RESIDUE = min(TOKEN_TO_ID[letter] for letter in RESIDUES)
assert sorted(TOKEN_TO_ID[letter] for letter in RESIDUES) == list(range(_FIRST_RESIDUE, _FIRST_RESIDUE + len(RESIDUES)))


class Shape(NamedTuple):
    """What compiled layers are made for: tokens of every micro-batch, and of its longest sequence."""

    tokens: int
    crop: int


class PackedMaskedLM(nn.Module):
    """Holds the stock model as `.model` and computes the masked-language-model objective on packed micro-batches."""

    def __init__(self, model: EsmForMaskedLM, compiled_for: Shape | None = None) -> None:
        """With `compiled_for` the layers are compiled, and every micro-batch is filled up to its number of tokens."""
        super().__init__()
        self.compiled_for = compiled_for
        use_packed_layers(model)
        # It has no part in this loss, and DDP raises for a trained parameter without a gradient.
        model.esm.contact_head.requires_grad_(False)
        self.model = model

    def forward(
        self,
        input_ids_T: torch.Tensor,
        labels_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        targets_K: torch.Tensor,
        per_target: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """(loss sum in nats, fp32; number of targets, int64; number predicted correctly, int64), each of shape ().

        With `per_target`: (losses_K fp32, is_correct_K bool, sequence_index_K, input_ids_K, labels_K int64) instead.
        `targets_K` are the positions of the targets, those whose label is not -100. A prediction is the most likely
        residue. A micro-batch without targets, or without tokens, has loss 0 and gives every trained parameter a
        gradient of zeros.
        """
        if len(input_ids_T) == 0:
            # An idle rank still runs every layer, or the collectives of the others would wait for it for ever.
            input_ids_T = input_ids_T.new_full((1,), EOS_ID)
            position_ids_T = position_ids_T.new_zeros(1)
            cu_seqlens, max_seqlen = torch.arange(2, dtype=torch.int32, device=cu_seqlens.device), 1
        packed = (input_ids_T, position_ids_T, cu_seqlens, max_seqlen)
        if self.compiled_for:
            packed = filled(*packed, self.compiled_for)
        hidden_TD = packed_hidden_states(self.model, *packed, is_compiled=self.compiled_for is not None)[-1]
        labels_K = labels_T[targets_K]
        logits_KV = self.model.lm_head(hidden_TD[targets_K]).float()
        losses_K = cross_entropy(logits_KV, labels_K, reduction="none")
        residue_logits = logits_KV.detach()[:, _FIRST_RESIDUE : _FIRST_RESIDUE + len(RESIDUES)]
        is_correct_K = residue_logits.argmax(1) + _FIRST_RESIDUE == labels_K
        if per_target:
            sequence_index_K = sequence_index(cu_seqlens, len(input_ids_T))[targets_K]
            return losses_K, is_correct_K, sequence_index_K, input_ids_T[targets_K], labels_K
        num_targets = torch.full((), len(labels_K), device=labels_K.device)
        return losses_K.sum(), num_targets, is_correct_K.sum()


def filled(
    input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The micro-batch with sequences of `<eos>` after its own, up to the number of tokens that the layers know.

    One shape means one graph: nothing is compiled anew for a micro-batch that is a few tokens shorter. The filling
    attends to itself, has no targets, and so changes no number; on real proteins it is a percent of the tokens.
    """
    assert max_seqlen <= shape.crop
    num_tokens = len(input_ids_T)
    missing = shape.tokens - num_tokens
    assert missing >= 0
    # Made on the device: nothing is sent to it, and nothing waits for it.
    ends = torch.arange(
        num_tokens + shape.crop, shape.tokens + shape.crop, shape.crop, dtype=torch.int32, device=cu_seqlens.device
    )
    return (
        pad(input_ids_T, (0, missing), value=EOS_ID),
        pad(position_ids_T, (0, missing)),
        torch.cat([cu_seqlens, ends.clamp_(max=shape.tokens)]),
        shape.crop,
    )
