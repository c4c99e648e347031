"""The checks behind the exercises of notebook 7, the evaluation; how they work: `exercises`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from rlhf_lib.measure import rankings
from rlhf_lib.show.exercises import differs, judge
from rlhf_lib.show.widgets import kl_divergence


def check(name: str, answer: object, *given: object) -> None:
    """`exercises.judge` by the checks of this module."""
    judge(CHECKS, name, answer, *given)


def _paired_error(error: Callable) -> str | None:
    rng = np.random.default_rng(0)
    easy = rng.normal(size=50)  # how easy each prompt is, for both policies alike
    one, other = easy + 0.3 * rng.normal(size=50), easy + 0.3 * rng.normal(size=50)
    if differs(error(one, other), stats.sem(one - other), 1e-6):
        return (
            "Subtract prompt by prompt first; then the error of a mean, with n − 1 in the spread."
        )
    return None


def _win_rate(rate: Callable) -> str | None:
    one, other = np.array([1.0, 0.0, 2.0, 2.0, -1.0]), np.array([0.0, 0.0, 3.0, 1.0, -1.0])
    if differs(rate(one, other), rankings.wins(one - other).mean(), 1e-6):
        return "What does a tie count?"
    return None


def _best_of_n(kl: Callable) -> str | None:
    size = 100_000  # so many equally likely replies, each with a reward of its own
    share = np.arange(size + 1) / size
    for n in (1, 2, 16):
        best = np.diff(share**n)  # P(the best of n is this one)
        if differs(kl(n), kl_divergence(best, np.full(size, 1 / size))):
            return f"Wrong for n = {n}. The formula is above."
    return None


def _seed_interval(interval: Callable) -> str | None:
    for means in ([0.2, 0.5, 0.3], [1.0, -1.0, 0.5, 0.0, 2.0]):
        truth = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
        if differs(interval(means), [truth.low, truth.high], 1e-6):
            return f"Wrong for the seeds {means}. How many degrees of freedom are left?"
    return None


CHECKS: dict[str, Callable[..., str | None]] = {
    "07-1": _paired_error, "07-2": _win_rate, "07-3": _best_of_n, "07-4": _seed_interval,
}  # fmt: skip
