"""A published encoder in torch: proteins in, vectors out, on whatever the machine has.

ESM-2 and T5 encoders take proteins end to end, without a slot of padding. Any other encoder is run as transformers has
it: on a CPU one protein at a time, or several of one length, since a core is busy with one; on a GPU sorted by length
and padded a little. On a CPU each call gets one core and several calls run at once: small products share badly.

Dimensions: T tokens of a micro-batch, B proteins, L tokens of a padded row, R residues, D width.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    EsmModel,
    PreTrainedModel,
    T5EncoderModel,
)

from hf_plm.config import UserError
from hf_plm.models.families import Spelling, longest
from hf_plm.models.packed import packed_hidden_states
from hf_plm.models.stock import DTYPES, open_encoder
from hf_plm.models.t5 import packed_t5_hidden_states
from hf_plm.models.threads import CPU_TOKENS, calls_at_once

GPU_TOKENS = 16384
"""Of a call."""
LEAST_FULL = 0.9
"""Of a padded batch on a GPU, the shortest row against the longest."""


class TorchEncoder:
    """An encoder ready to use. `encode` may be called from several threads at once, `num_calls` of them with profit."""

    def __init__(
        self,
        model: PreTrainedModel,
        spelling: Spelling,
        layer: int,
        limit: int,
        facts: dict[str, str],
        precision: str = "fp32",
        device: torch.device | None = None,
        threads: int | None = None,
    ):
        self.spelling, self.limit, self.facts = spelling, limit, facts
        self.width, self.has_cls = int(model.config.hidden_size), facts.get("cls") != "none"
        self._dtype, self._device = DTYPES[precision], device or torch.device("cpu")
        self.layer = layer % (num_layers(model.config) + 1)
        self._layer = cut_above(model, layer)
        self._model = lowered(model, self._dtype).to(self._device).eval()
        is_packed_esm = isinstance(model, EsmModel) and model.config.position_embedding_type == "rotary"
        self._run = (
            self._packed_esm
            if is_packed_esm and not model.config.attention_probs_dropout_prob
            else self._packed_t5
            if isinstance(model, T5EncoderModel)
            else self._stock
        )
        is_cpu = self._device.type == "cpu"
        self._threads_before = torch.get_num_threads()
        self.num_calls, self._threads_per_call = calls_at_once(threads)
        if not is_cpu:
            # On CUDA one call is prepared while another runs; Apple's may not be called from two threads.
            self.num_calls = 2 if self._device.type == "cuda" else 1
        self.tokens_per_call = CPU_TOKENS if is_cpu else GPU_TOKENS

    def prepare_thread(self) -> None:
        """To be called once in each thread that will call `encode`."""
        if self._device.type == "cpu":
            torch.set_num_threads(self._threads_per_call)

    def leave_threads(self) -> None:
        """To be called where those threads have ended: torch takes what one of them set for new threads, too."""
        if self._device.type == "cpu":
            torch.set_num_threads(self._threads_before)

    def encode(self, proteins: Sequence[bytes], wants: Collection[str]) -> dict[str, np.ndarray]:
        """fp32 arrays by the names in `wants`: "none" (R, D), the residues of all proteins end to end; "mean", "max"
        (B, D), over the residues of each; "cls" (B, D), its first token.

        Where a GPU has not the memory, the proteins are taken in two halves, and later calls get fewer. Raises
        `UserError` where it has not the memory for one, and where numbers come out that are none.
        """
        try:
            return self._checked(proteins, self._encode(proteins, wants))
        except torch.OutOfMemoryError:
            if len(proteins) == 1:
                raise UserError(
                    f"The memory of {self._device} does not suffice for a protein of {len(proteins[0]):,} residues; "
                    "begin again with a smaller --max-length, which takes it in shorter windows."
                ) from None
        torch.cuda.empty_cache()
        self.tokens_per_call = max(self.tokens_per_call // 2, CPU_TOKENS)
        half = len(proteins) // 2
        parts = self.encode(proteins[:half], wants), self.encode(proteins[half:], wants)
        return {name: np.concatenate([part[name] for part in parts]) for name in wants}

    def _checked(self, proteins: Sequence[bytes], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if all(np.isfinite(array).all() for array in arrays.values()):
            return arrays
        hint = "" if self._dtype == torch.float32 else "; begin again with --precision fp32"
        raise UserError(
            f"{self.facts['model']} gives numbers that are none (NaN or infinity) in {self.facts['precision']}, in one "
            f"of {len(proteins)} proteins of which the first begins {proteins[0][:20].decode()}{hint}."
        )

    @torch.inference_mode()
    def _encode(self, proteins: Sequence[bytes], wants: Collection[str]) -> dict[str, np.ndarray]:
        ids = [self.spelling.encode(residues) for residues in proteins]
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden_TD = self._run(ids)
        lengths = [len(residues) for residues in proteins]
        begins = [end - len(one) for end, one in zip(accumulate(map(len, ids)), ids, strict=True)]
        rows_R = np.concatenate(
            [
                np.arange(begin + len(self.spelling.prefix), begin + len(self.spelling.prefix) + length)
                for begin, length in zip(begins, lengths, strict=True)
            ]
        )
        residues_RD = hidden_TD[self._to_device(rows_R)]
        found = {}
        if "none" in wants:
            found["none"] = residues_RD
        for name, pool in (("mean", lambda x_ND: x_ND.mean(0)), ("max", lambda x_ND: x_ND.amax(0))):
            if name in wants:
                found[name] = torch.stack([pool(one_ND) for one_ND in residues_RD.split(lengths)])
        if "cls" in wants:
            found["cls"] = hidden_TD[self._to_device(np.array(begins))]
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _packed_esm(self, ids: list[np.ndarray]) -> torch.Tensor:
        input_ids_T = self._to_device(np.concatenate(ids))
        positions_T = self._to_device(np.concatenate([np.arange(len(one)) for one in ids]))
        bounds = np.cumsum([0, *map(len, ids)], dtype=np.int32)
        longest_one = max(map(len, ids))
        return packed_hidden_states(self._model, input_ids_T, positions_T, self._to_device(bounds), longest_one)[-1]

    def _packed_t5(self, ids: list[np.ndarray]) -> torch.Tensor:
        return packed_t5_hidden_states(self._model, self._to_device(np.concatenate(ids)), list(map(len, ids)))

    def _stock(self, ids: list[np.ndarray]) -> torch.Tensor:
        """The stock forward, over batches of like length; what comes of it is put back in order."""
        pieces: list[torch.Tensor] = [torch.empty(0)] * len(ids)
        for chosen in self._batches([len(one) for one in ids]):
            length = len(ids[chosen[-1]])
            input_ids_BL = np.full((len(chosen), length), self.spelling.pad_id)
            mask_BL = np.zeros((len(chosen), length), dtype=np.int64)
            for row, index in enumerate(chosen):
                input_ids_BL[row, : len(ids[index])] = ids[index]
                mask_BL[row, : len(ids[index])] = 1
            outputs = self._model(
                input_ids=self._to_device(input_ids_BL),
                attention_mask=self._to_device(mask_BL),
                output_hidden_states=self._layer is not None,
            )
            hidden_BLD = outputs.last_hidden_state if self._layer is None else outputs.hidden_states[self._layer]
            for row, index in enumerate(chosen):
                pieces[index] = hidden_BLD[row, : len(ids[index])]
        return torch.cat(pieces)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places of proteins, by length: on a CPU of one length in each batch, elsewhere of like length."""
        least = 1.0 if self._device.type == "cpu" else LEAST_FULL
        batch: list[int] = []
        for index in np.argsort(lengths, kind="stable").tolist():
            length = lengths[index]
            is_full = (len(batch) + 1) * length > self.tokens_per_call
            if batch and (is_full or lengths[batch[0]] < least * length):
                yield batch
                batch = []
            batch.append(index)
        yield batch


def load_encoder(
    folder: Path, name: str, layer: int, precision: str, device: torch.device, threads: int | None
) -> TorchEncoder:
    """The encoder in a folder of safetensors or, where there are none, of `pytorch_model*.bin`, and its tokenizer.

    `layer` counts as transformers' hidden states do: 0 the embeddings, -1 what the last layer gives. Raises `UserError`
    where the folder cannot be opened, lacks weights, or its tokenizer does not give one token per residue.
    """
    model, spelling, facts = open_encoder(folder, name)
    limit = longest(model.config, spelling)
    facts |= {"backend": "torch", "precision": precision}
    return TorchEncoder(model, spelling, layer, limit, facts, precision, device, threads)


def num_layers(config: Any) -> int:
    """Layers of an encoder, whatever its configuration calls them."""
    return int(getattr(config, "num_hidden_layers", None) or config.num_layers)


def cut_above(model: PreTrainedModel, layer: int) -> int | None:
    """Takes the layers off that hidden state `layer` does not need; its number where the model was left whole.

    Raises `UserError` for a layer that is not there.
    """
    total = num_layers(model.config)
    if not -total - 1 <= layer <= total:
        raise UserError(f"--layer is from 0 (the embeddings) to {total}, or from -1 (the last) down, not {layer}.")
    layer %= total + 1
    if layer == total:
        return None
    # A hidden state below the last is not normed; the last is.
    if isinstance(model, EsmModel):
        model.encoder.layer = model.encoder.layer[:layer]
        model.encoder.emb_layer_norm_after = nn.Identity()
        return None
    if isinstance(model, T5EncoderModel):
        model.encoder.block = model.encoder.block[:layer]
        model.encoder.final_layer_norm = nn.Identity()
        return None
    return layer


def lowered(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The weights of products in the precision of the products; norms and what is added up stay fp32."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model
