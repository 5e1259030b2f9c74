"""A masked language model in use: proteins with some residues masked in, log-probabilities of the 20 letters out.

What evaluates, scores and scans asks many small questions, most of them about one residue of a protein that differs
from the last in one mask. They are packed end to end; the last layer and the head run for the residues asked about and
no others; on a CPU each core has a call of its own. Models that do not pack (ProtBert, ESM-1b, ESM C) are run as
transformers has them, over batches of like length.

Dimensions: T tokens of a call, P residues asked about, B proteins, L tokens of a padded row, A letters (20).
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from transformers import EsmForMaskedLM, PreTrainedModel

from hf_plm.config import UserError
from hf_plm.models.encoder import lowered
from hf_plm.models.families import Spelling, longest
from hf_plm.models.locate import locate, revision
from hf_plm.models.packed import packed_hidden_states_at
from hf_plm.models.stock import DTYPES, masked_lm_parts, open_stock_masked_lm, pick_device, pick_precision
from hf_plm.models.threads import CPU_TOKENS, calls_at_once
from hf_plm.proteins.vocabulary import RESIDUES

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
"""The standard residues, in the order of the columns."""
LETTER_INDEX = np.full(256, -1, dtype=np.int64)
LETTER_INDEX[list(LETTERS.encode())] = np.arange(len(LETTERS))
"""int64 (256,): the column of each byte, -1 of what is no standard residue."""
GPU_TOKENS = 32768
"""Of a call."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
GPU_STEP = 64
"""Tokens by which the rows of a padded batch may differ on a GPU."""
AHEAD = 2
"""Calls that wait for each that runs."""


@dataclass(frozen=True)
class Query:
    """A protein as the model shall see it, and where it is asked what stands there. Places are 0-based residues."""

    residues: bytes  # as `fasta.clean` leaves them, at most the model's limit
    masked: np.ndarray  # int: residues shown as <mask>
    wanted: np.ndarray  # int: residues asked about, ascending


class MaskedLM:
    """A model ready to be asked. `facts` say which it is: model, family, revision, precision."""

    def __init__(
        self,
        model: PreTrainedModel,
        spelling: Spelling,
        mask_id: int,
        facts: dict[str, str],
        precision: str = "fp32",
        device: torch.device | None = None,
        threads: int | None = None,
    ):
        self.spelling, self.mask_id = spelling, mask_id
        self.facts = {**facts, "precision": precision}
        self.limit = longest(model.config, spelling)
        self._device, self._dtype = device or torch.device("cpu"), DTYPES[precision]
        columns = dict(zip(RESIDUES, spelling.ids, strict=True))
        self._columns = torch.tensor([columns[letter] for letter in LETTERS], device=self._device)
        self._packs = packs(model)
        if self._packs:
            # The head stays fp32: what comes of it is compared in small differences.
            lowered(model.esm, self._dtype)
        elif self._dtype != torch.float32:
            lowered(model.base_model, self._dtype)
        self.model = model.to(self._device).eval()
        is_cpu = self._device.type == "cpu"
        self._threads_before = torch.get_num_threads()
        self._num_calls, self._threads_per_call = calls_at_once(threads) if is_cpu else (1, 1)
        self.tokens_per_call = CPU_TOKENS if is_cpu else GPU_TOKENS

    def __repr__(self) -> str:
        return f"MaskedLM({self.facts['model']!r}, {self.facts['precision']})"

    def log_probs(self, queries: Iterable[Query]) -> Generator[np.ndarray, None, None]:
        """fp32 (P, A) for each query, in order: log-probabilities over the model's whole vocabulary, of `LETTERS`.

        Queries are read a few calls ahead. Raises `UserError` where numbers come out that are none.
        """
        pool = ThreadPoolExecutor(self._num_calls, "masked_lm", self._prepare_thread)
        waiting: deque[Future[list[np.ndarray]]] = deque()
        try:
            for call in self._calls(queries):
                waiting.append(pool.submit(self._answer, call))
                if len(waiting) > (1 + AHEAD) * self._num_calls:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            if self._device.type == "cpu":  # torch takes what a thread set for new threads, too
                torch.set_num_threads(self._threads_before)

    def _prepare_thread(self) -> None:
        if self._device.type == "cpu":
            torch.set_num_threads(self._threads_per_call)

    def _calls(self, queries: Iterable[Query]) -> Iterator[list[Query]]:
        call: list[Query] = []
        num_tokens = 0
        for query in queries:
            assert len(query.residues) <= self.limit
            assert len(query.wanted)
            length = len(query.residues) + self.spelling.num_special
            if call and num_tokens + length > self.tokens_per_call:
                yield call
                call, num_tokens = [], 0
            call.append(query)
            num_tokens += length
        if call:
            yield call

    def _answer(self, call: list[Query]) -> list[np.ndarray]:
        try:
            return self._run(call)
        except torch.OutOfMemoryError:
            if len(call) == 1:
                raise UserError(
                    f"The memory of {self._device} does not suffice for one of {len(call[0].residues):,} residues."
                ) from None
        torch.cuda.empty_cache()
        self.tokens_per_call = max(self.tokens_per_call // 2, CPU_TOKENS)
        half = len(call) // 2
        return self._answer(call[:half]) + self._answer(call[half:])

    @torch.inference_mode()
    def _run(self, call: list[Query]) -> list[np.ndarray]:
        first = len(self.spelling.prefix)
        ids, places = [], []
        for query in call:
            one = self.spelling.encode(query.residues)
            one[first + np.asarray(query.masked, dtype=np.int64)] = self.mask_id
            ids.append(one)
            places.append(first + np.asarray(query.wanted, dtype=np.int64))
        logits_PV = self._packed(ids, places) if self._packs else self._stock(ids, places)
        log_probs_PA = logits_PV.float().log_softmax(-1)[:, self._columns].cpu().numpy()
        if not np.isfinite(log_probs_PA).all():
            raise UserError(
                f"{self.facts['model']} gives numbers that are none (NaN or infinity) in {self.facts['precision']}, "
                f"for a protein that begins {call[0].residues[:20].decode()}."
            )
        return np.split(log_probs_PA, np.cumsum([len(one) for one in places])[:-1])

    def _packed(self, ids: list[np.ndarray], places: list[np.ndarray]) -> torch.Tensor:
        lengths = [len(one) for one in ids]
        bounds = [0, *accumulate(lengths)]
        rows_P = np.concatenate([begin + place for begin, place in zip(bounds, places, strict=False)])
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden_PD = packed_hidden_states_at(
                self.model,
                self._to_device(np.concatenate(ids)),
                self._to_device(np.concatenate([np.arange(length) for length in lengths])),
                self._to_device(np.array(bounds, dtype=np.int32)),
                max(lengths),
                self._to_device(rows_P),
                [len(place) for place in places],
            )
        return self.model.lm_head(hidden_PD.float())

    def _stock(self, ids: list[np.ndarray], places: list[np.ndarray]) -> torch.Tensor:
        """The stock forward, over batches of one length on a CPU and of like length elsewhere."""
        groups: dict[int, list[int]] = {}
        for index, one in enumerate(ids):
            groups.setdefault(len(one) if self._device.type == "cpu" else len(one) // GPU_STEP, []).append(index)
        found: list[torch.Tensor] = [torch.empty(0)] * len(ids)
        for chosen in groups.values():
            length = max(len(ids[index]) for index in chosen)
            input_ids_BL = np.full((len(chosen), length), self.spelling.pad_id)
            mask_BL = np.zeros((len(chosen), length), dtype=np.int64)
            for row, index in enumerate(chosen):
                input_ids_BL[row, : len(ids[index])] = ids[index]
                mask_BL[row, : len(ids[index])] = 1
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                logits_BLV = self.model(
                    input_ids=self._to_device(input_ids_BL), attention_mask=self._to_device(mask_BL)
                ).logits
            for row, index in enumerate(chosen):
                found[index] = logits_BLV[row, self._to_device(places[index])]
        return torch.cat(found)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def open_masked_lm(
    name: str | Path, *, precision: str = "auto", device: str = "auto", threads: int | None = None
) -> MaskedLM:
    """The model of a folder, a finished run or a repository on the Hub. `auto` is fp32, on GPUs bf16 for ESM-2.

    Raises `UserError` for what cannot be opened, and for a model that has no masked-language-model head.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")
    if threads is not None and threads < 1:
        raise UserError(f"--threads is a number from 1, not {threads}.")
    folder = locate(str(name))
    stock, spelling, facts, mask_id = open_stock_masked_lm(folder, str(name))
    facts["revision"] = revision(folder)
    where = pick_device(device)
    if precision == "auto" and not packs(stock):
        precision = "fp32"  # its head would round logits to steps of 1/16, and scores are small differences of them
    return MaskedLM(stock, spelling, mask_id, facts, pick_precision(precision, where), where, threads)


def limit_of(name: str | Path) -> int:
    """Residues that a model takes at once, told by its configuration and tokenizer, before its weights are opened.

    Raises `UserError` as `open_masked_lm` does, but for what only the weights show.
    """
    config, spelling, _, _ = masked_lm_parts(locate(str(name)), str(name))
    return longest(config, spelling)


def packs(model: PreTrainedModel) -> bool:
    """Whether the model takes proteins end to end: ESM-2, and what has its layers."""
    return (
        isinstance(model, EsmForMaskedLM)
        and model.config.position_embedding_type == "rotary"
        and not model.config.attention_probs_dropout_prob
    )
