"""95 % intervals, paired comparisons corrected for their number, and what may be said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from rlhf_lib.measure.two_errors import error_variances, quantile, tail, total

LEVEL = 0.95
POWER = 0.8
UNCLEAR = "not distinguishable"
ANY, SHARE = (-math.inf, math.inf), (0.0, 1.0)  # bounds of an interval
Values = Mapping[int, np.ndarray]  # of each seed that has them


def bootstrap(values: ArrayLike, samples: int = 2000) -> dict:
    """Mean of independent values, e.g. one per pair, with a percentile-bootstrap interval."""
    array = np.asarray(values, dtype=float)
    low = high = array.mean()
    if len(array) > 1 and np.ptp(array) > 0:
        low, high = resampled((array,), np.mean, samples).confidence_interval
    return _record(array.mean(), low, high, len(array), "items")


def over_seeds(means: Sequence[float]) -> dict:
    """Mean of one value per seed with Student's t interval; it speaks of a new seed's runs.

    A single seed's value has no interval: `low` and `high` are None.
    """
    if len(means) == 1:
        return {"mean": means[0], "low": None, "high": None, "n": 1, "per_seed": list(means)}
    array = np.asarray(means, dtype=float)
    half = stats.sem(array) * stats.t.ppf((1 + LEVEL) / 2, len(array) - 1)
    record = _record(array.mean(), array.mean() - half, array.mean() + half, len(array), "seeds")
    return record | {"per_seed": array.tolist()}


def estimate(
    per_seed: Sequence[ArrayLike],
    units: Sequence[ArrayLike] | None = None,
    bounds: tuple[float, float] = ANY,
) -> dict:
    """Mean over seeds of each seed's mean, with an interval over new seeds *and* new prompts.

    `per_seed`: one array of values a seed. `units`: which prompt each value belongs to; equal ones
    are one unit, in all seeds (default: a value's place in its seed). `bounds`: of the interval.

    The error has two parts (`two_errors`): seeds, with S - 1 degrees of freedom, and prompts. Why
    not seeds alone: all of them answer the same prompts, whose luck the seeds' spread does not
    show. With one seed the interval is over prompts alone, and `over` says so.

    Besides `mean`, `low`, `high`: the standard error `se` and its parts, `errors`, each with its
    degrees of freedom; none where one seed and one unit leave them unknown.
    """
    arrays = [np.asarray(values, dtype=float) for values in per_seed]
    means = [float(array.mean()) for array in arrays]
    mean, seeds = float(np.mean(means)), len(arrays)
    places = [np.arange(len(a)) for a in arrays] if units is None else units
    names, codes = np.unique(np.concatenate([np.asarray(p) for p in places]), return_inverse=True)
    starts = np.cumsum([len(array) for array in arrays])[:-1]
    added = np.stack([
        np.bincount(code, weights=(array - array.mean()) / len(array), minlength=len(names))
        for array, code in zip(arrays, np.split(codes, starts), strict=True)
    ])  # fmt: skip
    added[np.abs(added) < 1e-12 * max(1.0, abs(mean)) / len(names)] = 0.0  # rounding is no spread
    between = np.sqrt(error_variances(np.array(means), added))
    freedom = seeds - 1, len(names) - 1
    errors = [[float(e), float(df)] for e, df in zip(between, freedom, strict=True) if df]
    half = quantile((1 + LEVEL) / 2, errors)
    low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    over = "seeds and prompts" if seeds > 1 else "prompts"
    record = _record(mean, low, high, seeds if seeds > 1 else len(names), over)
    known = {"se": total(errors), "errors": errors, "units": len(names)}
    return record | {"per_seed": means} | known


def minus(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Differences, seed by seed and place by place; between means of equal values it is 0."""
    return [
        np.where(np.isclose(a, b, rtol=1e-12, atol=0.0), 0.0, np.subtract(a, b))
        for a, b in zip(one, other, strict=True)
    ]


def seed_by_seed(
    one: Values | Sequence[np.ndarray], other: Values | Sequence[np.ndarray]
) -> dict[int, np.ndarray]:
    """`minus` in the seeds that both have. A list is of the first seeds."""
    found = [dict(v) if isinstance(v, Mapping) else dict(enumerate(v)) for v in (one, other)]
    both = [seed for seed in found[0] if seed in found[1]]
    less = minus(*([values[seed] for seed in both] for values in found))
    return dict(zip(both, less, strict=True))


def differences(
    values: Mapping[str, Values] | Mapping[str, Sequence[np.ndarray]],
    pairs: Mapping[str, tuple[str, str]],
    average: Callable[[list[np.ndarray]], dict],
) -> dict[str, dict]:
    """The first policy's values less the second's for each of `pairs`, as one family (`compare`).

    `average`: an `estimate` of values that are given seed by seed, of the seeds that both have.
    """
    return compare(
        {
            name: average(list(seed_by_seed(values[one], values[other]).values()))
            for name, (one, other) in pairs.items()
        }
    )


def compare(family: Mapping[str, Mapping]) -> dict[str, dict]:
    """The `estimate`s of a family of differences, each with what may be said of it.

    Adds `p` (two-sided, of no difference), `p_adjusted` (Holm 1979: the chance of *any* wrong claim
    in the family stays under 5 %), `detectable` and `verdict`, which follows `p_adjusted`.
    """
    p = [p_value(record) for record in family.values()]
    table = {}
    for (name, record), one, adjusted in zip(family.items(), p, holm(p), strict=True):
        corrected = {**record, "p": one, "p_adjusted": adjusted, "detectable": detectable(record)}
        table[name] = corrected | {"verdict": direction(corrected)}
    return table


def p_value(difference: Mapping) -> float:
    """Two-sided p of "no difference"; 1 where nothing is known of the error."""
    if not difference["errors"] or difference["mean"] == 0:
        return 1.0
    if difference["se"] == 0:
        return 0.0
    return 2 * tail(abs(difference["mean"]), difference["errors"])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (scipy has none)."""
    order = np.argsort(p, kind="stable")
    raised = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.tolist()


def detectable(difference: Mapping, comparisons: int = 1) -> float | None:
    """The minimum detectable effect: the true difference that a study like this one would call one
    in 80 of 100 repetitions, at a two-sided 5 %; as the smallest p of that many `comparisons`, at
    what Holm's correction leaves of it.

    None where the error is unknown, or there is none: of two that reply alike nothing is found.
    """
    level = 1 - (1 - LEVEL) / comparisons
    errors, se = difference["errors"], difference["se"]
    if not errors or se == 0:
        return None
    critical = quantile((1 + level) / 2, errors) / se
    # the one t with the same critical value says how much the error itself may be off
    few = min(df for error, df in errors if error > 0)
    df = optimize.brentq(lambda df: stats.t.ppf((1 + level) / 2, df) - critical, 0.5 * few, 1e7)
    shift = optimize.brentq(lambda x: stats.nct.sf(critical, df, x) - POWER, 0.0, 5.0 * critical)
    return float(shift * se)  # type: ignore[operator]


def direction(difference: Mapping) -> str:
    """What a difference allows to say: "higher", "lower" or UNCLEAR.

    Its interval has to leave 0 out and, in a family that was corrected, so has the corrected p.
    """
    if difference.get("p_adjusted", 0.0) >= 1 - LEVEL:
        return UNCLEAR
    if difference["low"] > 0:
        return "higher"
    return "lower" if difference["high"] < 0 else UNCLEAR


def resampled(columns: Sequence[np.ndarray], statistic: Callable, samples: int) -> Any:
    """A statistic's percentile interval and standard error by scipy's bootstrap.

    Rows of `columns` are drawn whole. `statistic` takes the columns, and all resamples at once
    where it has an argument `axis`.
    """
    return stats.bootstrap(
        columns,
        statistic,
        n_resamples=samples,
        batch=200,  # as many in memory at once; it changes no number
        paired=len(columns) > 1,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )


def _record(mean: float, low: float, high: float, n: int, over: str) -> dict:
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": n, "over": over}


def share(won: np.ndarray) -> dict:
    """Mean of `won` (values in [0, 1]) with Jeffreys' interval (Brown, Cai and DasGupta 2001).

    Unlike the bootstrap's, it has a width in a small group where every pair was ranked right. For
    wins averaged over seeds it is a little too wide.
    """
    right, n = float(won.sum()), len(won)
    low, high = stats.beta.interval(LEVEL, right + 0.5, n - right + 0.5)
    mean = right / n  # at 0 and 1 the paper's interval ends there too
    return _record(mean, min(low, mean), max(high, mean), n, "items")


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


def interval(estimate: Mapping | None, digits: int = 2, percent: bool = False) -> str:
    """`0.52 [0.41, 0.63]`; a lone value without interval; a dash where nothing is known."""
    if estimate is None:
        return "–"
    scale, unit = (100, "%") if percent else (1, "")

    def shown(value: float) -> str:
        return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # -0.0 + 0.0 is 0.0

    mean = shown(estimate["mean"]) + unit
    if estimate["low"] is None or estimate["low"] == estimate["high"]:
        return mean
    return f"{mean} [{shown(estimate['low'])}, {shown(estimate['high'])}]"


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def contrast(before: Sequence[float], after: Sequence[float]) -> dict[str, float | str]:
    """Means of two sets of training steps, and what their difference allows to say.

    `verdict` is "higher", "lower" or "not distinguishable", `word` the same as a verb, judged by
    Welch's t at 95 % on the spread between steps. A rough rule: neighbouring steps resemble each
    other, and one run says nothing of another seed. A single step a side distinguishes nothing.
    """
    a, b = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    p = 1.0
    if min(len(a), len(b)) > 1:
        # `ttest_ind` says the same, but warns of a side that never moved
        sides = [number for x in (a, b) for number in (x.mean(), x.std(ddof=1), len(x))]
        p = stats.ttest_ind_from_stats(*sides, equal_var=False).pvalue
    called = UNCLEAR
    if p < 1 - LEVEL:
        called = "higher" if b.mean() > a.mean() else "lower"
    verb = {"higher": "rose", "lower": "fell"}.get(called, "no clear change")
    return {"first": float(a.mean()), "last": float(b.mean()), "verdict": called, "word": verb}
