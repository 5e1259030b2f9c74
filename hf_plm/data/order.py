"""Which sequence stands at which place of which epoch, without a table.

The order of an epoch is a keyed permutation computed place by place (a Feistel network with cycle walking), so that
65 million sequences need no memory, no start-up time and no state: any place can be asked for at any moment. A
table would cost 0.5 GB per process and epoch. Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
All random numbers here are integer mixes of their keys (the finaliser of SplitMix64, Steele et al. 2014): the same on
every machine and NumPy version.
"""

from dataclasses import dataclass

import numpy as np

# What a random number is for; never renumber, or the batches of old runs change.
ORDER, CROP, VALIDATION_CROP, VALIDATION_CORRUPTION, TRAINING_CORRUPTION = range(1, 6)

_ROUNDS = 6


@dataclass(frozen=True)
class Cursor:
    """Where a step begins: the epoch, and the place in that epoch's order."""

    epoch: int = 0
    place: int = 0


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """uint64 hash of the keys (integers or integer arrays that broadcast), uniform over all 64 bits."""
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for key in keys:
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
        return state


def uniform_below(bits: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """int64 in [0, bound) from uint64 bits, by multiplication of the upper 32; bound below 2**31."""
    return (((bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def order(places: np.ndarray, num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """Indices, int64, of the sequences at `places` (each in [0, num_sequences)) of an epoch: a bijection."""
    half_bits = max(1, (int(num_sequences - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << half_bits) - 1)
    round_keys = [int(mix(seed, ORDER, epoch, r)) for r in range(_ROUNDS)]

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half_bits), values & half_mask
        for key in round_keys:
            left, right = right, left ^ (mix(key, right) & half_mask)
        return (left << np.uint64(half_bits)) | right

    values = encrypt(np.asarray(places).astype(np.uint64))
    # Walking on until the value falls into the range keeps the map a bijection of the range onto itself.
    while (outside := values >= np.uint64(num_sequences)).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)
