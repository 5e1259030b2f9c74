"""How sure a number is: bootstrap intervals and paired tests that resample whole groups, never rows.

Residues of one protein, and proteins of one family, say much the same; an interval that took them for independent would
be several times too narrow. So groups (proteins, clusters) are drawn, with all their rows.

Dimensions: R rows, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""From indices of rows (int64, any number of them, repeats too) to a number; NaN where it is not defined."""
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and the interval of 95% around it; NaN bounds where there are fewer than two groups."""

    value: float
    low: float
    high: float

    def plain(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return format(self)

    def __format__(self, sign: str) -> str:
        """With the `sign` of each number, as of f"{value:+}"; without bounds where there are none."""
        value, low, high = (f"{one:{sign}.3f}" for one in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})" if np.isfinite(self.low) else value


@dataclass(frozen=True)
class Difference(Interval):
    """How far a number is above another over the same rows. `p_value`: two-sided, from the bootstrap."""

    p_value: float = float("nan")

    def plain(self) -> dict[str, float]:
        return {**super().plain(), "p_value": self.p_value}


def resamples(num_rows: int) -> int:
    """How many resamples are affordable: 500 of up to 5,000 rows, fewer of more, never under 200. Scikit-learn
    takes some milliseconds for the measures of even ten rows."""
    return int(np.clip(2.5e6 / max(num_rows, 1), 200, 500))


def bootstrap_interval(
    groups_R: np.ndarray, statistic: Statistic, num_resamples: int | None = None, seed: int = 0
) -> Interval:
    """The percentile interval of `statistic` over groups drawn with replacement (Efron 1979).

    `groups_R` (any dtype) says which group a row is of. Resamples for which the statistic is NaN (no positive in them,
    say) are left out.
    """
    return bootstrap_intervals(groups_R, lambda rows: np.array([statistic(rows)]), num_resamples, seed)[0]


def bootstrap_intervals(
    groups_R: np.ndarray,
    statistics: Callable[[np.ndarray], np.ndarray],
    num_resamples: int | None = None,
    seed: int = 0,
) -> list[Interval]:
    """The same for several numbers at once, over the same draws."""
    values = np.asarray(statistics(np.arange(len(groups_R))), dtype=np.float64)
    drawn = _distribution(groups_R, statistics, num_resamples, seed)
    return [
        Interval(float(value), *_bounds(drawn[:, index] if drawn.size else drawn)) for index, value in enumerate(values)
    ]


def paired_difference(
    groups_R: np.ndarray, first: Statistic, second: Statistic, num_resamples: int | None = None, seed: int = 0
) -> Difference:
    """`first` - `second` over the same draws of groups.

    The p-value is twice the share of draws on the other side of zero, at least 1 / draws (Davison and Hinkley 1997,
    section 4.2).
    """

    def difference(rows: np.ndarray) -> float:
        return float(first(rows)) - float(second(rows))

    drawn = _distribution(groups_R, difference, num_resamples, seed)
    drawn = drawn[~np.isnan(drawn)]
    value = difference(np.arange(len(groups_R)))
    if not len(drawn):
        return Difference(value, float("nan"), float("nan"))
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Difference(value, *_bounds(drawn), min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)))


def permutation_p_value(
    groups_R: np.ndarray,
    difference: Callable[[np.ndarray], float],
    num_resamples: int | None = None,
    seed: int = 0,
) -> float:
    """The two-sided p-value of a paired permutation test: the two sides change places, group by group.

    `difference` is given bool (R,), where the two are exchanged, and says how far the first is then above the second.
    """
    from scipy.stats import permutation_test

    names, inverse_R = np.unique(groups_R, return_inverse=True)
    if len(names) < 2 or np.isnan(difference(np.zeros(len(groups_R), dtype=bool))):
        return float("nan")

    def statistic(first_G: np.ndarray, second_G: np.ndarray) -> float:
        return difference(first_G[inverse_R] > second_G[inverse_R])

    found = permutation_test(
        (np.zeros(len(names)), np.ones(len(names))),
        statistic,
        permutation_type="samples",
        vectorized=False,
        batch=20,  # without it all draws are in memory at once
        n_resamples=num_resamples or resamples(len(groups_R)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _distribution(
    groups_R: np.ndarray, statistic: Callable[[np.ndarray], Any], num_resamples: int | None, seed: int
) -> np.ndarray:
    """A row for each draw of groups; none where there is one group only."""
    names, inverse_R = np.unique(groups_R, return_inverse=True)
    if len(names) < 2:
        return np.empty(0)
    order_R = np.argsort(inverse_R, kind="stable")
    counts_G = np.bincount(inverse_R)
    begins_G = np.cumsum(counts_G) - counts_G
    # Not scipy.stats.bootstrap: it holds all draws at once, and takes a resample without a number for a mistake.
    draw, drawn = np.random.default_rng(seed), []
    for _ in range(num_resamples or resamples(len(groups_R))):
        drawn_G = draw.integers(len(names), size=len(names))
        counts = counts_G[drawn_G]
        # The rows of each drawn group, one after the other.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        drawn.append(statistic(order_R[np.repeat(begins_G[drawn_G], counts) + within]))
    return np.array(drawn, dtype=np.float64)


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
