"""Accuracy in groups of pairs and in bins of a number, each with its interval and its n."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from rlhf_lib.intervals import LEVEL


def share(won: np.ndarray) -> dict:
    """Mean of `won` (values in [0, 1]) with Jeffreys' interval (Brown, Cai and DasGupta 2001).

    Unlike the bootstrap's, it has a width in a small group where every pair was ranked right. For
    wins averaged over seeds it is a little too wide.
    """
    right, n = float(won.sum()), len(won)
    low, high = stats.beta.interval(LEVEL, right + 0.5, n - right + 0.5)
    mean = right / n  # at 0 and 1 the paper's interval ends there too
    return {
        "mean": mean, "low": min(float(low), mean), "high": max(float(high), mean), "n": n,
        "over": "items",
    }  # fmt: skip


def by_group(won: np.ndarray, groups: Sequence[str]) -> dict[str, dict]:
    """`share` of each group of pairs, by name."""
    names = np.asarray(groups)
    return {str(name): share(won[names == name]) for name in sorted(set(groups))}


def by_bins(won: np.ndarray, values: np.ndarray, bins: int = 6) -> list[dict]:
    """`share` in bins of nearly equal numbers, by rising value; equal values are never parted.

    `from`, `to`: the smallest and the largest value in the bin; `middle`: their median.
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, values, side="right")
    rows = []
    for code in np.unique(place):
        inside = values[place == code]
        ends = {"from": inside.min(), "to": inside.max(), "middle": np.median(inside)}
        ends = {name: float(value) for name, value in ends.items()}
        rows.append(ends | share(won[place == code]))
    return rows
