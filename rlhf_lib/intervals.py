"""95 % intervals, and what may be said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


def bootstrap(values: ArrayLike, samples: int = 2000) -> dict:
    """Mean of independent values, e.g. one per pair, with a percentile-bootstrap interval."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2 or np.ptp(array) == 0:
        mean = float(array.mean())
        return {"mean": mean, "low": mean, "high": mean, "n": len(array), "over": "items"}
    result = stats.bootstrap(
        (array,), np.mean, n_resamples=samples, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = result.confidence_interval
    return _record(array.mean(), low, high, len(array), "items")


def over_seeds(means: Sequence[float]) -> dict:
    """Mean of one value per seed with Student's t interval; it speaks of a new seed's runs."""
    array = np.asarray(means, dtype=float)
    half = stats.sem(array) * stats.t.ppf((1 + LEVEL) / 2, len(array) - 1)
    record = _record(array.mean(), array.mean() - half, array.mean() + half, len(array), "seeds")
    return record | {"per_seed": array.tolist()}


def estimate(per_seed: Sequence[ArrayLike], samples: int = 2000) -> dict:
    """Interval of a mean measured with one or several seeds: one array of item values per seed.

    With two seeds or more it is over seeds; with one, over items, and `over` says so.
    """
    if len(per_seed) == 1:
        record = bootstrap(per_seed[0], samples)
        return record | {"per_seed": [record["mean"]]}
    return over_seeds([float(np.asarray(values, dtype=float).mean()) for values in per_seed])


def verdict(difference: Mapping) -> str:
    """What an interval of a difference allows: "higher", "lower" or "not distinguishable"."""
    if difference["low"] > 0:
        return "higher"
    return "lower" if difference["high"] < 0 else "not distinguishable"


def _record(mean: float, low: float, high: float, n: int, over: str) -> dict:
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": n, "over": over}
