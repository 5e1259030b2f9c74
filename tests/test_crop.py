"""Every window of a long sequence is equally likely, both ends included."""

import numpy as np

from hf_plm.data.crop import crop_windows
from hf_plm.data.order import CROP

LENGTHS = np.array([30, 98, 99, 300])


def test_a_sequence_that_fits_is_whole() -> None:
    starts, num_tokens = crop_windows(LENGTHS, 100, 0, CROP, 0, np.arange(4))
    assert starts[:2].tolist() == [0, 0]
    assert num_tokens.tolist() == [32, 100, 100, 100]


def test_every_window_is_equally_likely_and_both_ends_are_reached() -> None:
    """302 tokens have 203 windows of 100; 200 draws of each are expected, and five standard deviations allowed."""
    num_windows, draws = 203, 203 * 200
    starts, _ = crop_windows(np.full(draws, 300), 100, 0, CROP, np.arange(draws), 5)
    counts = np.bincount(starts, minlength=num_windows)
    assert len(counts) == num_windows
    assert counts[0] > 0
    assert counts[-1] > 0
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_squared - (num_windows - 1)) < 5 * np.sqrt(2 * (num_windows - 1))


def test_twin_a_crop_that_cannot_reach_the_last_window_is_told_apart() -> None:
    """The off-by-one of drawing below L - crop instead of L - crop + 1 would fail the test above."""
    starts, _ = crop_windows(np.full(203 * 200, 300 - 1), 100, 0, CROP, np.arange(203 * 200), 5)
    assert np.bincount(starts, minlength=203)[-1] == 0


def test_each_epoch_has_a_new_crop() -> None:
    starts, _ = crop_windows(np.full(50, 5000), 100, 0, CROP, np.arange(50), 5)
    assert len(set(starts.tolist())) > 40
