"""Rates of targets and corruptions, and what may never be a target."""

import numpy as np
import pytest

from hf_plm.config import Mask
from hf_plm.data.mask import mask_tokens, training_bits, validation_bits
from hf_plm.proteins.vocabulary import (
    IGNORED_LABEL,
    MASK_ID,
    MAY_BE_TARGET,
    STANDARD_IDS,
    TOKEN_TO_ID,
    TOKENS,
    VOCABULARY_SIZE,
)

NUM = 400_000
IDS = np.resize(np.arange(VOCABULARY_SIZE, dtype=np.uint8), NUM)


def near(observed: float, expected: float, trials: int) -> bool:
    """Within five standard deviations of a binomial share."""
    return abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / trials)


@pytest.mark.parametrize("mask", [Mask(), Mask(rate=0.4, mask=0.5, random=0.3), Mask(rate=1.0, mask=1.0, random=0.0)])
def test_rates(mask: Mask) -> None:
    ids = np.resize(STANDARD_IDS, NUM)
    inputs, labels = mask_tokens(ids, training_bits(0, 0, 0, NUM), mask)
    is_target = labels != IGNORED_LABEL
    num_targets = int(is_target.sum())
    assert near(is_target.mean(), mask.rate, NUM)
    assert (labels[is_target] == ids[is_target]).all()
    assert (inputs[~is_target] == ids[~is_target]).all()
    shown, true = inputs[is_target], labels[is_target]
    assert near((shown == MASK_ID).mean(), mask.mask, num_targets)
    # A random residue is the true one once in twenty.
    changed = (shown != MASK_ID) & (shown != true)
    assert near(changed.mean(), mask.random * 19 / 20, num_targets)
    if mask.random:
        letters = np.bincount(shown[changed], minlength=VOCABULARY_SIZE)[STANDARD_IDS]
        assert all(near(count / letters.sum(), 1 / 20, int(letters.sum())) for count in letters)
        assert letters.sum() == changed.sum()


def corrupt_one(token: int, first: int, second: int, mask: Mask) -> tuple[int, int]:
    """What the model sees and is asked at one place, as the knobs are defined: in whole numbers, without NumPy."""
    if not MAY_BE_TARGET[token] or (first >> 32) >= round(mask.rate * 2**32):
        return token, IGNORED_LABEL
    action, letter = second & 0xFFFFFFFF, ((second >> 32) * len(STANDARD_IDS)) >> 32
    if action < round(mask.mask * 2**32):
        return MASK_ID, token
    return (int(STANDARD_IDS[letter]) if action < round((mask.mask + mask.random) * 2**32) else token), token


@pytest.mark.parametrize("mask", [Mask(), Mask(rate=1.0, mask=0.3, random=0.4), Mask(rate=0.5, mask=0.0, random=1.0)])
def test_a_micro_batch_is_corrupted_as_each_token_alone(mask: Mask) -> None:
    bits = training_bits(3, 1, 4, 5000)
    inputs, labels = mask_tokens(IDS[:5000], bits, mask)
    alone = [corrupt_one(*map(int, place), mask) for place in zip(IDS, *bits, strict=False)]
    assert inputs.dtype == labels.dtype == np.int64
    assert list(zip(inputs.tolist(), labels.tolist(), strict=True)) == alone
    # The twin: bits that are not those of the place.
    shifted = [corrupt_one(*map(int, place), mask) for place in zip(IDS, *bits[:, ::-1], strict=False)]
    assert shifted != alone


def test_a_micro_batch_without_targets() -> None:
    specials = np.array([TOKEN_TO_ID["<cls>"], TOKEN_TO_ID["X"], TOKEN_TO_ID["<eos>"]], dtype=np.uint8)
    inputs, labels = mask_tokens(specials, training_bits(0, 0, 0, 3), Mask(rate=1.0))
    assert inputs.tolist() == specials.tolist()
    assert labels.tolist() == [IGNORED_LABEL] * 3


def test_targets_are_residues_and_never_specials_gaps_or_x() -> None:
    _, labels = mask_tokens(IDS, training_bits(0, 0, 0, NUM), Mask(rate=1.0))
    seen = {TOKENS[index] for index in set(labels[labels != IGNORED_LABEL].tolist())}
    assert seen == set("LAGVSERTIDPNKQFYMHWCBUZO")
    for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "<null_1>", "X", ".", "-"):
        assert not MAY_BE_TARGET[TOKEN_TO_ID[token]]


def test_replacements_are_standard_residues() -> None:
    ids = np.full(NUM, TOKEN_TO_ID["U"], dtype=np.uint8)
    inputs, _ = mask_tokens(ids, training_bits(0, 0, 0, NUM), Mask(rate=1.0, mask=0.0, random=1.0))
    assert set(inputs.tolist()) == set(STANDARD_IDS.tolist())


def test_training_bits_depend_on_seed_step_and_micro_batch() -> None:
    first = training_bits(1, 2, 3, 50)
    assert (first == training_bits(1, 2, 3, 50)).all()
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (first != training_bits(*other, 50)).all()


def test_golden_values() -> None:
    """Re-record only with a new major version, as in test_order.py."""
    inputs, labels = mask_tokens(IDS[:200], training_bits(7, 11, 13, 200), Mask())
    assert np.flatnonzero(labels >= 0).tolist() == GOLDEN_TARGETS
    assert inputs[labels >= 0].tolist() == GOLDEN_INPUTS


GOLDEN_TARGETS = [5, 18, 39, 41, 46, 48, 51, 53, 54, 70, 85, 103, 105, 108, 122, 124, 137]
GOLDEN_INPUTS = [32, 32, 4, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32]


def test_validation_corruption_depends_on_sequence_and_position_alone() -> None:
    keys, positions = np.array([5, 5, 9], dtype=np.uint64), np.array([0, 1, 0])
    bits = validation_bits(0, keys, positions)
    assert (validation_bits(0, keys[::-1], positions[::-1])[:, ::-1] == bits).all()
    # The twin: another position or another sequence has other bits.
    assert len(set(bits.ravel().tolist())) == 6
