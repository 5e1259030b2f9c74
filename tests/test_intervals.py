"""Intervals that resample groups, and paired tests."""

import numpy as np
import pytest

from hf_plm.judging.intervals import (
    bootstrap_interval,
    bootstrap_intervals,
    paired_difference,
    permutation_p_value,
    resamples,
)


def mean_of(values):
    return lambda rows: float(values[rows].mean())


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_interval(np.arange(400), mean_of(values), 2000)
    error = values.std(ddof=1) / 20
    assert found.value == values.mean()
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_rows_of_a_group_are_drawn_together():
    """Ten rows that say the same are one: the interval is as wide as without the copies."""
    values = np.random.default_rng(0).normal(size=50)
    alone = bootstrap_interval(np.arange(50), mean_of(values), 500)
    copies = np.repeat(values, 10)
    grouped = bootstrap_interval(np.repeat(np.arange(50), 10), mean_of(copies), 500)
    as_if_independent = bootstrap_interval(np.arange(500), mean_of(copies), 500)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert as_if_independent.high - as_if_independent.low < 0.5 * (grouped.high - grouped.low)


def test_groups_of_any_size_and_order():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    seen = []
    bootstrap_interval(groups, lambda rows: seen.append(rows) or 0.0, 50)
    for rows in seen:
        counts = np.bincount(rows, minlength=6)
        for name in "abc":
            assert len(set(counts[groups == name])) == 1
        assert len(seen[0]) == 6


def test_numbers_that_are_not_defined():
    values = np.array([1.0, 0, 0, 0])
    found = bootstrap_interval(np.arange(4), lambda rows: 1.0 if values[rows].any() else float("nan"), 200)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert np.isnan(bootstrap_interval(np.zeros(4), mean_of(values)).low)
    several = bootstrap_intervals(np.arange(4), lambda rows: np.array([values[rows].mean(), np.nan]), 50)
    assert several[0].value == 0.25
    assert np.isnan(several[1].high)


def test_a_difference_is_found_and_none_is_not():
    draw = np.random.default_rng(1)
    base = draw.normal(size=100)
    better, same = base + 0.5 + draw.normal(0, 0.3, 100), base.copy()
    groups = np.arange(100)
    found = paired_difference(groups, mean_of(better), mean_of(base), 400)
    assert found.low > 0.3
    assert found.p_value < 0.01
    nothing = paired_difference(groups, mean_of(same), mean_of(base), 400)
    assert (nothing.value, nothing.low, nothing.high, nothing.p_value) == (0, 0, 0, 1)

    def exchanged(first, second):
        return lambda swap: float(np.where(swap, second, first).mean() - np.where(swap, first, second).mean())

    assert permutation_p_value(groups, exchanged(better, base), 300) < 0.01
    assert permutation_p_value(groups, exchanged(same, base), 300) == 1
    noise = base + draw.normal(0, 0.3, 100)
    assert permutation_p_value(groups, exchanged(noise - noise.mean() + base.mean(), base), 300) > 0.5
    assert np.isnan(permutation_p_value(np.zeros(100), exchanged(better, base), 300))
    assert np.isnan(permutation_p_value(groups, lambda _: float("nan"), 300)), "and not one of the smallest"


def test_fewer_resamples_of_more_rows():
    assert [resamples(count) for count in (10, 5000, 100_000)] == [500, 500, 200]
