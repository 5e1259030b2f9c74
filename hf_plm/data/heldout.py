"""Which sequences are held out, and which were seen before: both in one pass over a stream of unknown length.

Held out are the sequences (or whole clusters) with the smallest hash. How many is known only at the end, but never
more than 2,000, so the 2,000 smallest are kept aside as the stream goes by and the surplus goes to train at the end:
one pass and a few megabytes instead of two passes over the corpus. Sequences are known by 8 bytes of BLAKE2b: 65
million of them take 0.5 GB, and two different ones are taken for the same with a chance of about 1 in 10,000.
"""

import heapq
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

SHARE = 0.01
FEWEST, MOST = 20, 2_000
LARGEST_CLUSTER = 200  # a larger one is never held out: a single family would be most of validation


class Row(NamedTuple):
    """A cleaned record on its way into a Parquet file."""

    id: str
    residues: bytes
    cluster: str | None


def hash_of(data: bytes) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every version."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def num_held_out(num_sequences: int) -> int:
    """1% of the sequences, at least 20 and at most 2,000, but never more than half."""
    return min(max(int(num_sequences * SHARE), FEWEST), MOST, num_sequences // 2)


class SeenHashes:
    """A set of 64-bit hashes in 8 bytes each, asked by the batch.

    Sorted runs whose sizes fall by at least half, so that adding costs a merge per doubling and asking a few searches.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def contains(self, hashes_B: np.ndarray) -> np.ndarray:
        """bool (B,): which of the uint64 hashes (B,) are in the set."""
        is_in_B = np.zeros(len(hashes_B), dtype=bool)
        for run in self._runs:
            places_B = np.minimum(np.searchsorted(run, hashes_B), len(run) - 1)
            is_in_B |= run[places_B] == hashes_B
        return is_in_B

    def add(self, hashes_B: np.ndarray) -> np.ndarray:
        """Add uint64 hashes (B,); bool (B,): which were new, the first of equal ones only."""
        is_new_B = np.zeros(len(hashes_B), dtype=bool)
        is_new_B[np.unique(hashes_B, return_index=True)[1]] = True
        is_new_B &= ~self.contains(hashes_B)
        if is_new_B.any():
            self._runs.append(np.sort(hashes_B[is_new_B]))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last, before = self._runs.pop(), self._runs.pop()
            merged = np.concatenate([before, last])
            merged.sort(kind="stable")  # two sorted runs: numpy's stable sort merges them in linear time
            self._runs.append(merged)
        return is_new_B


class HeldOut:
    """The groups (equal sequences, or clusters) with the smallest hashes so far, and what they displace."""

    def __init__(self) -> None:
        self._groups: dict[int, list[Row]] = {}
        self._largest_first: list[int] = []
        self._limit = 1 << 64  # a group at or above it has been displaced, or would be at once
        self._released: set[int] = set()

    def offer(self, keys: Iterable[int], rows: Iterable[Row]) -> list[Row]:
        """Take rows with the hashes of their groups; return the rows that are now certain to be in train."""
        certain: list[Row] = []
        for key, row in zip(keys, rows, strict=True):
            if key >= self._limit or key in self._released:
                certain.append(row)
            elif key in self._groups:
                self._groups[key].append(row)
                if len(self._groups[key]) > LARGEST_CLUSTER:
                    self._released.add(key)
                    certain.extend(self._groups.pop(key))
            else:
                self._groups[key] = [row]
                heapq.heappush(self._largest_first, -key)
                if len(self._groups) > MOST:
                    certain.extend(self._displace())
        return certain

    def _displace(self) -> list[Row]:
        while (key := -heapq.heappop(self._largest_first)) not in self._groups:
            pass  # released before
        self._limit = key
        return self._groups.pop(key)

    def finish(self, num_sequences: int) -> tuple[list[Row], list[Row]]:
        """(held out, train): what was kept aside, divided now that the number of all sequences is known."""
        wanted = num_held_out(num_sequences)
        room = min(2 * wanted, num_sequences // 2)  # a cluster may overshoot what is wanted, within reason
        held_out: list[Row] = []
        train: list[Row] = []
        for key in sorted(self._groups):
            rows = self._groups[key]
            fits = len(held_out) < wanted and len(held_out) + len(rows) <= room
            (held_out if fits else train).extend(rows)
        return held_out, train
