"""The packed forward of a stock T5 encoder (Ankh, ProtT5, ProstT5): proteins end to end, each as if it were alone.

T5 adds a bias to every attention score, by the distance between the two positions. The stock forward writes it out for
each pair of tokens, which for a protein of 4,096 residues and 16 heads is 1 GB. Here keys and values lie backwards, so
that the bias of query i and key j depends on i + j: a view of one short vector with the same stride along both, which
takes no memory at all and, on a CPU, costs nothing (350 residues, 6 heads of 64: 2.7 ms with it, 2.6 without).

Dimensions: T tokens of a packed micro-batch, L tokens of one protein, D width, H heads, K width of a head.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, relu, rms_norm, scaled_dot_product_attention
from transformers import T5EncoderModel
from transformers.activations import ACT2FN

QUERIES = 2048
"""Rows of the bias that are written out at a time on devices whose kernels want it in memory."""


@torch.no_grad()
def packed_t5_hidden_states(model: T5EncoderModel, input_ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(T, D): the last hidden state of an encoder, proteins of `lengths` tokens one after the other.

    Tolerance against the stock model on each protein alone: 1e-4 in fp32.
    """
    stack: Any = model.encoder
    hidden_TD = stack.embed_tokens(input_ids_T)
    if not len(stack.block):
        return hidden_TD
    bias = _Bias(distance_bias(stack.block[0].layer[0].SelfAttention, max(lengths)))
    for block in stack.block:
        attention, feed_forward = block.layer[0], block.layer[1]
        heads = attention.SelfAttention
        normed_TD = _norm(attention.layer_norm, hidden_TD)
        query_THK, key_THK, value_THK = (
            project(normed_TD).unflatten(-1, (-1, heads.key_value_proj_dim)) for project in (heads.q, heads.k, heads.v)
        )
        attended_THK = _attend(query_THK, key_THK, value_THK, bias, lengths)
        hidden_TD = hidden_TD + heads.o(attended_THK.flatten(1))
        hidden_TD = hidden_TD + _feed_forward(feed_forward.DenseReluDense, _norm(feed_forward.layer_norm, hidden_TD))
    return _norm(stack.final_layer_norm, hidden_TD)


def distance_bias(attention: Any, length: int) -> torch.Tensor:
    """(H, 2 x length - 1): what is added to a score, for key minus query from length - 1 down to 1 - length."""
    table = attention.relative_attention_bias
    distances_M = torch.arange(length - 1, -length, -1, device=table.weight.device)
    buckets_M = attention._relative_position_bucket(
        distances_M,
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return table(buckets_M).T.contiguous()


class _Bias:
    """What is added to the scores of a protein, keys last to first, for all layers of a call."""

    def __init__(self, bias_HM: torch.Tensor):
        self._bias_HM, self._longest = bias_HM, (bias_HM.shape[1] + 1) // 2
        # CPUs read the view; other devices' kernels want it in memory, once for all proteins of a length.
        self._is_view = bias_HM.device.type == "cpu"
        self.most_queries = self._longest if self._is_view else QUERIES
        self._written: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, begin: int, num_queries: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """(1, H, Q, L) of the queries from `begin` on of a protein of `length` tokens."""
        if self._bias_HM.dtype != dtype:
            self._bias_HM = self._bias_HM.to(dtype)
        num_heads, num_distances = self._bias_HM.shape
        if (begin, length) not in self._written:
            # Query i and the key that lies at place j are i + j - (length - 1) apart, with a minus.
            bias_1HQL = self._bias_HM.as_strided(
                (1, num_heads, num_queries, length), (0, num_distances, 1, 1), self._longest - length + begin
            )
            if self._is_view:
                return bias_1HQL
            self._written[begin, length] = bias_1HQL.contiguous()
        return self._written[begin, length]


def _attend(
    query_THK: torch.Tensor, key_THK: torch.Tensor, value_THK: torch.Tensor, bias: _Bias, lengths: Sequence[int]
) -> torch.Tensor:
    """(T, H, K): each protein's attention over itself, T5's way: scores are not scaled."""
    dtype = value_THK.dtype
    queries = query_THK.to(dtype).split(list(lengths))
    # The micro-batch as a whole is turned around: the last protein comes first, its last token first.
    backwards = list(lengths)[::-1]
    keys = key_THK.to(dtype).flip(0).split(backwards)[::-1]
    values = value_THK.flip(0).split(backwards)[::-1]
    attended = []
    for query_LHK, key_LHK, value_LHK in zip(queries, keys, values, strict=True):
        length = len(query_LHK)
        key_1HLK, value_1HLK = (x_LHK.transpose(0, 1)[None] for x_LHK in (key_LHK, value_LHK))
        for begin in range(0, length, bias.most_queries):
            query_1HQK = query_LHK[begin : begin + bias.most_queries].transpose(0, 1)[None]
            bias_1HQL = bias.of(begin, query_1HQK.shape[2], length, dtype)
            out_1HQK = scaled_dot_product_attention(query_1HQK, key_1HLK, value_1HLK, attn_mask=bias_1HQL, scale=1.0)
            attended.append(out_1HQK[0].transpose(0, 1))
    return torch.cat(attended)


def _norm(norm: Any, hidden_TD: torch.Tensor) -> torch.Tensor:
    """T5's layer norm: no mean is taken off, and no bias added; where the last one was taken out, nothing."""
    if isinstance(norm, nn.Identity):
        return hidden_TD
    return rms_norm(hidden_TD, hidden_TD.shape[-1:], norm.weight, norm.variance_epsilon)


def _feed_forward(dense: Any, normed_TD: torch.Tensor) -> torch.Tensor:
    act = _activation(dense.act)
    if hasattr(dense, "wi_0"):
        return dense.wo(act(dense.wi_0(normed_TD)).mul_(dense.wi_1(normed_TD)))
    return dense.wo(act(dense.wi(normed_TD)))


_GELU_NEW = type(ACT2FN["gelu_new"])


def _activation(act: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same function in fewer passes."""
    if isinstance(act, _GELU_NEW):
        return _gelu_tanh
    return relu if isinstance(act, nn.ReLU) else act


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh.

    0.5 (1 + tanh(u)) is sigmoid(2u), and a sigmoid costs a CPU so much less that six passes take half the time of one
    (2,048 x 1,024, one core: 1.8 ms, not 3.5; difference 5e-7).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return gelu(x, approximate="tanh")
    double = 2 * math.sqrt(2 / math.pi)
    return x.square().mul_(0.044715 * double).add_(double).mul_(x).sigmoid_().mul_(x)
