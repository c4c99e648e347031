"""A mean with two errors that are known apart: of seeds, of which there are few, and of prompts.

Each error alone would make a Student's t. Their sum has the distribution of Behrens and Fisher
(Fisher 1935, Annals of Eugenics 6, p. 391): of two t's added, each as wide as its own standard
error. Its intervals cover at least as often as they say (Robinson 1976, Annals of Statistics 4, p.
963). One t with Satterthwaite's estimated degrees of freedom does not: with three seeds whose
spread is large against the prompts', it calls too much a difference. `proofs.errors` shows both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import optimize, stats

# Gauss-Legendre's nodes on (0, 1): probabilities at which the narrower t is taken
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_PLACES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2

Errors = Sequence[Sequence[float]]  # standard error and degrees of freedom of each, one or two


def error_variances(means: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances of a mean over seeds and prompts: of its seeds, and of its prompts.

    means (..., S) of the seeds; added (..., S, U): what each of U prompts moves them by, so that a
    row's sum is 0. Two-way analysis of variance: prompts are the same in all seeds, and what is
    neither seed's nor prompt's (the luck of single replies) is in the spread of the seeds, and
    taken off that of the prompts. One seed has no spread, and its prompts hold all.
    """
    seeds, units = added.shape[-2:]
    freedom = max(1, units - 1) / units
    of_prompts = added.mean(-2, keepdims=True)
    prompts = (of_prompts**2).sum((-2, -1)) / freedom
    if seeds == 1:
        return np.zeros_like(prompts), prompts
    luck = ((added - of_prompts) ** 2).sum((-2, -1)) / freedom / (seeds * (seeds - 1))
    return means.var(-1, ddof=1) / seeds, np.maximum(prompts - luck, 0.0)


def tail(x: float, errors: Errors) -> float:
    """P(sum of the errors > x), for x >= 0."""
    wide, *narrow = sorted((tuple(e) for e in errors if e[0] > 0), reverse=True)
    shift = narrow[0][0] * _at_places(narrow[0][1]) if narrow else np.zeros(200)
    return float(_WEIGHTS @ stats.t.sf((x - shift) / wide[0], wide[1]))


@cache
def _at_places(df: float) -> np.ndarray:
    return stats.t.ppf(_PLACES, df)


def quantile(p: float, errors: Errors) -> float:
    """What the sum of the errors stays below with probability p >= 1/2; 0 where there are none."""
    # two t's add up to less than their quantiles do
    above = float(sum(error * stats.t.ppf(p, df) for error, df in errors if error > 0))
    if above == 0:
        return 0.0
    while tail(above, errors) > 1 - p:  # by as much as the sum over nodes is off
        above *= 1.01
    place = optimize.brentq(lambda x: tail(x, errors) - (1 - p), 0.0, above)
    return float(place)  # type: ignore[arg-type]


def total(errors: Errors) -> float:
    """The standard error of the mean."""
    return math.sqrt(sum(error**2 for error, _ in errors))
