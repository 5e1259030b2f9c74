"""Proteins in, vectors out, as a stream: cut what is too long, fill calls, run several at once, put back in order.

In memory are the proteins of a few calls and one long protein's vectors, however many proteins come. A protein longer
than the model takes is cut into windows that overlap by a quarter and are blended: where two windows see a residue, the
one counts more that has the residue further from its edge.

Dimensions: N residues of a protein, D width.
"""

from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hf_plm.config import UserError
from hf_plm.models.families import Spelling

POOLINGS = ("none", "mean", "max", "cls")
LONG = ("window", "crop", "refuse")
OVERLAP = 0.25
"""Of a window's residues, what the next one sees too."""
AHEAD = 2
"""Calls that wait for each that runs."""


class Encoder(Protocol):
    """What runs a model: `TorchEncoder` or `OnnxEncoder`."""

    spelling: Spelling
    width: int
    layer: int
    limit: int
    facts: dict[str, str]
    has_cls: bool
    num_calls: int
    tokens_per_call: int

    def prepare_thread(self) -> None: ...

    def leave_threads(self) -> None: ...

    def encode(self, proteins: Sequence[bytes], wants: Collection[str]) -> dict[str, np.ndarray]: ...


Vectors = dict[str, np.ndarray]
"""One protein: fp32 arrays by pooling, "none" (N, D), the others (D,)."""


def windows(num_residues: int, limit: int) -> list[tuple[int, int]]:
    """Begins and ends of the fewest windows of at most `limit` residues that overlap by a quarter, evenly spread."""
    if num_residues <= limit:
        return [(0, num_residues)]
    step = max(1, limit - int(limit * OVERLAP))
    count = 1 + -(-(num_residues - limit) // step)
    begins = [index * (num_residues - limit) // (count - 1) for index in range(count)]
    return [(begin, begin + limit) for begin in begins]


class Blend:
    """The vectors of a long protein, as its windows come in."""

    def __init__(self, num_residues: int, limit: int, width: int):
        self._sum_ND = np.zeros((num_residues, width), dtype=np.float32)
        self._weight_N = np.zeros((num_residues, 1), dtype=np.float32)
        self._ramp = max(1, int(limit * OVERLAP))

    def add(self, begin: int, vectors_ND: np.ndarray) -> None:
        """The residues from `begin` on, each weighted by how far it is from the nearer edge, up to the overlap."""
        length = len(vectors_ND)
        places = np.arange(length)
        weight_N = np.minimum(np.minimum(places + 1, length - places), self._ramp).astype(np.float32)[:, None]
        self._sum_ND[begin : begin + length] += weight_N * vectors_ND
        self._weight_N[begin : begin + length] += weight_N

    def result(self) -> np.ndarray:
        return self._sum_ND / self._weight_N


@dataclass
class _Call:
    """What one call of the encoder is given: whole proteins, or windows of one long protein."""

    proteins: list[bytes] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)  # of the windows
    num_residues: int = 0  # of the long protein
    is_last: bool = True


def embed_stream(
    encoder: Encoder, portions: Iterable[Iterable[bytes]], wants: Collection[str], long: str, limit: int
) -> Generator[Vectors, None, None]:
    """The vectors of cleaned proteins, in their order; `wants` are of `POOLINGS`, `long` is of `LONG`.

    No call to the model has proteins of two portions: a portion gives the same vectors whatever came before it.
    """
    check_poolings(encoder, wants)
    pool = ThreadPoolExecutor(encoder.num_calls, "encode", encoder.prepare_thread)
    waiting: deque[tuple[_Call, Future[dict[str, np.ndarray]]]] = deque()
    gather = _Gather(encoder.width, limit, wants)
    try:
        for call in (call for portion in portions for call in _calls(portion, encoder, limit, long)):
            kinds = wants if not call.num_residues else {"none", *({"cls"} & set(wants))}
            waiting.append((call, pool.submit(encoder.encode, call.proteins, kinds)))
            if len(waiting) > (1 + AHEAD) * encoder.num_calls:
                first, future = waiting.popleft()
                yield from gather.finish(first, future.result())
        while waiting:
            first, future = waiting.popleft()
            yield from gather.finish(first, future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        encoder.leave_threads()


def check_poolings(encoder: Encoder, wants: Collection[str]) -> None:
    """Raises `UserError` for a pooling that there is not, or not for this model."""
    for name in wants:
        if name not in POOLINGS:
            raise UserError(f"A pooling is one of {', '.join(POOLINGS)}, not {name!r}.")
    if "cls" in wants and not encoder.has_cls:
        raise UserError(
            f"{encoder.facts['model']} ({encoder.facts['family']}) has no <cls> token that stands for a protein; "
            "--pool mean is what its authors take."
        )


def _calls(proteins: Iterable[bytes], encoder: Encoder, limit: int, long: str) -> Iterator[_Call]:
    special = encoder.spelling.num_special
    call, num_tokens = _Call(), 0
    for number, residues in enumerate(proteins, start=1):
        if len(residues) > limit and long == "crop":
            residues = residues[:limit]
        if len(residues) > limit:
            if long == "refuse":
                raise UserError(
                    f"Protein {number} has {len(residues):,} residues, where at most {limit:,} are taken at once; "
                    "--long window takes it in overlapping windows, --long crop its beginning."
                )
            if call.proteins:
                yield call
                call, num_tokens = _Call(), 0
            yield from _calls_of_long(residues, encoder, limit)
            continue
        if call.proteins and num_tokens + len(residues) + special > encoder.tokens_per_call:
            yield call
            call, num_tokens = _Call(), 0
        call.proteins.append(residues)
        num_tokens += len(residues) + special
    if call.proteins:
        yield call


def _calls_of_long(residues: bytes, encoder: Encoder, limit: int) -> Iterator[_Call]:
    cuts = windows(len(residues), limit)
    per_call = max(1, encoder.tokens_per_call // (limit + encoder.spelling.num_special))
    for first in range(0, len(cuts), per_call):
        some = cuts[first : first + per_call]
        pieces = [residues[begin:end] for begin, end in some]
        is_last = first + per_call >= len(cuts)
        yield _Call(pieces, [begin for begin, _ in some], len(residues), is_last)


class _Gather:
    """From what calls give to what each protein has."""

    def __init__(self, width: int, limit: int, wants: Collection[str]):
        self._width, self._limit, self._wants = width, limit, wants
        self._blend: Blend | None = None
        self._cls: list[np.ndarray] = []

    def finish(self, call: _Call, arrays: dict[str, np.ndarray]) -> Iterator[Vectors]:
        bounds = np.cumsum([0, *map(len, call.proteins)])
        if not call.num_residues:
            for index in range(len(call.proteins)):
                yield {
                    name: arrays[name][bounds[index] : bounds[index + 1]] if name == "none" else arrays[name][index]
                    for name in self._wants
                }
            return
        self._blend = self._blend or Blend(call.num_residues, self._limit, self._width)
        for index, begin in enumerate(call.begins):
            self._blend.add(begin, arrays["none"][bounds[index] : bounds[index + 1]])
        self._cls.extend(arrays.get("cls", ()))
        if call.is_last:
            residues_ND = self._blend.result()
            found = {"none": residues_ND}
            if "mean" in self._wants:
                found["mean"] = residues_ND.mean(0)
            if "max" in self._wants:
                found["max"] = residues_ND.max(0)
            if "cls" in self._wants:
                found["cls"] = np.mean(self._cls, axis=0)  # of all windows
            yield {name: found[name] for name in self._wants}
            self._blend, self._cls = None, []
