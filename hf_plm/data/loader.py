"""Steps of a run, one after another, for one process of many.

Worker processes only read ahead: what a step holds is a function of (corpus, knobs, step), so any number of workers and
processes yields the same steps, and resuming is starting at another step and cursor. Worker w of W builds the steps
w, w + W, ... and plans the ones between from lengths alone, a microsecond per sequence.
"""

import multiprocessing
import signal
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_plm.config import Mask
from hf_plm.data.corpus import Corpus
from hf_plm.data.crop import NUM_SPECIALS, crop_windows
from hf_plm.data.mask import mask_tokens, validation_bits
from hf_plm.data.order import VALIDATION_CROP, Cursor, mix
from hf_plm.data.pack import (
    MicroBatch,
    Packing,
    Windows,
    best_fit,
    build_micro_batch,
    empty_micro_batch,
    plan_steps,
    read_tokens,
    to_micro_batch,
)


@dataclass(frozen=True)
class Step:
    """One optimizer step as one process sees it; `num_tokens` and `num_slots` count all processes."""

    step: int
    cursor: Cursor
    next_cursor: Cursor
    num_tokens: int
    num_slots: int
    micro_batches: list[MicroBatch]

    def pin_memory(self) -> "Step":
        return replace(self, micro_batches=[micro_batch.pin_memory() for micro_batch in self.micro_batches])

    def __reduce__(self) -> tuple[Any, ...]:
        """How a step comes from a worker: ids and labels as one tensor, 2 bytes a token, of which all else is made.

        torch sends each tensor as a file of shared memory. With four for each micro-batch, 24 bytes a token, receiving
        8,192 tokens took the process that trains 1 ms, three times what making them takes; and containers often have
        little shared memory. Bytes in the message itself would be faster still, but a worker that died while it
        wrote a message longer than a pipe holds (64 KB) would leave the others waiting for its end.
        """
        sent = torch.stack(
            [
                torch.cat([batch.input_ids.to(torch.uint8) for batch in self.micro_batches]),
                torch.cat([batch.labels.to(torch.int8) for batch in self.micro_batches]).view(torch.uint8),
            ]
        )
        bounds = [batch.cu_seqlens.numpy() for batch in self.micro_batches]
        return _received, (self.step, self.cursor, self.next_cursor, self.num_tokens, self.num_slots, sent, bounds)


def _received(
    step: int,
    cursor: Cursor,
    next_cursor: Cursor,
    num_tokens: int,
    num_slots: int,
    sent: torch.Tensor,
    bounds: list[np.ndarray],
) -> Step:
    """The other side of it."""
    ends = np.cumsum([cu_seqlens[-1] for cu_seqlens in bounds])[:-1]
    input_ids = np.split(sent[0].to(torch.int64).numpy(), ends)
    labels = np.split(sent[1].view(torch.int8).to(torch.int64).numpy(), ends)
    batches = [to_micro_batch(*arrays) for arrays in zip(input_ids, labels, bounds, strict=True)]
    return Step(step, cursor, next_cursor, num_tokens, num_slots, batches)


class Steps(IterableDataset[Step]):
    """The steps of a run from `step` on, without end; process r of W takes micro-batches r, r + W, ..."""

    def __init__(
        self,
        corpus: Corpus,
        packing: Packing,
        mask: Mask,
        step: int,
        cursor: Cursor,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.corpus, self.packing, self.mask = corpus, packing, mask
        self.step, self.cursor = step, cursor
        self.rank, self.world_size = rank, world_size

    @cached_property
    def epoch_tokens(self) -> int:
        return count_tokens(self.corpus, self.packing.crop)

    def __iter__(self) -> Iterator[Step]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for plan in plan_steps(self.corpus.lengths, self.packing, self.step, self.cursor):
            if (plan.step - self.step) % num_workers == worker_id:
                mine = range(self.rank, self.packing.micro_batches, self.world_size)
                batches = [build_micro_batch(self.corpus, plan, m, self.packing.seed, self.mask) for m in mine]
                while len(batches) * self.world_size < self.packing.micro_batches:
                    batches.append(empty_micro_batch())
                num_slots = self.packing.micro_batches * self.packing.tokens
                yield Step(plan.step, plan.cursor, plan.next_cursor, plan.num_tokens, num_slots, batches)


def count_tokens(corpus: Corpus, crop: int) -> int:
    """Tokens of one epoch: of one window of each sequence. A million at a time, since all at once would take a GB."""
    blocks = (corpus.lengths[begin : begin + 1_000_000] for begin in range(0, len(corpus), 1_000_000))
    return sum(int(np.minimum(block.astype(np.int64) + NUM_SPECIALS, crop).sum()) for block in blocks)


def load_steps(steps: Steps, num_workers: int, pin_memory: bool) -> Generator[Step, None, None]:
    """The steps, read ahead by worker processes where there are any; `close` ends these.

    Raises RuntimeError where one of them has died, in the call that misses its step. torch would raise it through
    SIGCHLD, anywhere in the main thread, in the middle of an update too, so its handler is taken out again.
    """
    loader: DataLoader[Step] = DataLoader(
        steps, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=_leave_signals_to_main
    )
    handler = signal.getsignal(signal.SIGCHLD) if num_workers and hasattr(signal, "SIGCHLD") else None
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from iterator
    finally:
        # Its deletion tells the workers to end, unless a traceback still holds it. At the end of the program they would
        # be sent SIGTERM, which they ignore, and waited for; they only read, so nothing is lost.
        del iterator
        for worker in workers:
            worker.kill()


def stop_signals() -> list[signal.Signals]:
    """What asks a run to stop: Ctrl-C, a scheduler, a closed terminal, a scheduler's warning ahead of a time limit
    (SIGUSR1). Windows has no word for the last two."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _leave_signals_to_main(worker_id: int) -> None:
    """A scheduler signals the whole group, and a worker that died of it would take the unfinished step with it."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def validation_windows(corpus: Corpus, crop: int, num_sequences: int, seed: int) -> tuple[Windows, np.ndarray]:
    """Windows of the held-out sequences, and a key, uint64 (B,), of each that depends on its residues alone.

    With `num_sequences` > 0 only as many are taken, those of the smallest keys: the same ones in any order.
    """
    keys = sequence_keys(corpus)
    chosen = np.argsort(keys, kind="stable")[: num_sequences or None]
    keys = keys[chosen]
    starts, num_tokens = crop_windows(corpus.lengths[chosen], crop, seed, VALIDATION_CROP, 0, keys)
    return Windows(chosen, starts, num_tokens), keys


def sequence_keys(corpus: Corpus) -> np.ndarray:
    """uint64 (N,): a hash of each sequence's residues."""
    keys = np.empty(len(corpus.lengths), dtype=np.uint64)
    for begin in range(0, len(keys), 256):
        indices = np.arange(begin, min(begin + 256, len(keys)))
        keys[indices] = keys_of(*corpus.read(indices))
    return keys


def keys_of(residues_R: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64 (B,): a hash of each of B sequences, which stand end to end as `Corpus.read` gives them."""
    position_R = np.arange(len(residues_R)) - np.repeat(offsets[:-1], np.diff(offsets))
    # A sum of position-wise mixes is a hash that needs no loop over residues.
    mixed_R = np.concatenate([mix(residues_R, position_R), np.zeros(1, dtype=np.uint64)])
    return mix(np.add.reduceat(mixed_R, offsets[:-1]))


def validation_micro_batches(
    corpus: Corpus, windows: Windows, keys: np.ndarray, tokens: int, seed: int, mask: Mask
) -> Iterator[tuple[MicroBatch, np.ndarray]]:
    """All windows, packed, corrupted the same way every time; with each micro-batch, the window of each sequence."""
    # Longest first packs best, and the order does not matter here.
    remaining = np.argsort(-windows.num_tokens, kind="stable")
    while len(remaining):
        (bin_,) = best_fit(iter(windows.num_tokens[remaining].tolist()), tokens, 1)
        chosen, remaining = remaining[bin_], remaining[len(bin_) :]
        packed = windows[chosen]
        ids_T, cu_seqlens = read_tokens(corpus, packed)
        key_T = np.repeat(keys[chosen], packed.num_tokens)
        position_T = np.arange(len(ids_T)) + np.repeat(packed.starts - cu_seqlens[:-1], packed.num_tokens)
        bits = validation_bits(seed, key_T, position_T)
        yield to_micro_batch(*mask_tokens(ids_T, bits, mask), cu_seqlens), chosen


def share_of(
    batches: Iterator[tuple[MicroBatch, np.ndarray]], rank: int, world_size: int
) -> Iterator[tuple[MicroBatch, np.ndarray]]:
    """Validation micro-batches `rank`, `rank + world_size`, ...; an empty one at the end where others have one more."""
    count = 0
    for batch in batches:
        if count % world_size == rank:
            yield batch
        count += 1
    if 0 < count % world_size <= rank:
        yield empty_micro_batch(), np.zeros(1, dtype=np.int64)
