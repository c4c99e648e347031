"""How often a comparison errs: simulated studies in which no method is better than another.

Four candidates are compared on the same prompts in every seed, as a study does it: six differences,
Holm's correction, intervals of `measure.two_errors`. A study's noise is drawn at many ratios to the
spread of its seeds, half of it the prompts' and half the luck of single replies; one candidate's
seeds spread less or more than the others', which no pooled error would stand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations, product

import numpy as np
from scipy import stats

from rlhf_lib.measure.statistics import LEVEL
from rlhf_lib.measure.two_errors import error_variances, quantile
from rlhf_lib.proofs.claims import Proof

SEEDS = (3, 4, 5, 8)
NOISE = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # of a seed's mean, over the seeds' spread
SPREADS = (0.5, 1.0, 2.0, 3.0)  # of the first candidate's seeds, over the others'
CANDIDATES, PROMPTS, DRAWS, PART = 4, 8, 20_000, 2_000
COVERED, WRONG = 0.94, 0.055  # an interval's promise less 1 %, a family's and a tenth
SOURCE = "Fisher 1935; Holm 1979"

Critical = Callable[[float, np.ndarray, np.ndarray, int], np.ndarray]


def error_rates() -> list[Proof]:
    """Worst coverage and family-wise error of all ratios and spreads, by number of seeds."""
    rows = []
    for seeds in SEEDS:
        cells = [rates(seeds, noise, spread) for noise, spread in product(NOISE, SPREADS)]
        covered, wrong = min(c for c, _ in cells), max(w for _, w in cells)
        of = f"{seeds} seeds, worst of {len(cells)} cells"
        rows += [
            _at_least(f"95 % intervals cover, {of}", covered, COVERED),
            _at_least(f"family without a wrong claim, {of}", 1 - wrong, 1 - WRONG),
        ]
    _, wrong = rates(3, 0.2, 1.0, satterthwaite)
    claim = "family without a wrong claim, 3 seeds: Satterthwaite's t instead"
    return [*rows, _at_least(claim, 1 - wrong, 1 - WRONG, judged=False)]


def _at_least(claim: str, measured: float, limit: float, judged: bool = True) -> Proof:
    luck = 2 * float(np.sqrt(limit * (1 - limit) / DRAWS))
    error = max(0.0, limit - measured)
    tolerance = luck if judged else float("inf")
    return Proof(
        claim, measured, limit, error, tolerance, SOURCE, "share below the limit", "simulation"
    )


def behrens_fisher(
    p: float, of_seeds: np.ndarray, of_prompts: np.ndarray, seeds: int
) -> np.ndarray:
    """`quantile` of many errors at once: it depends on the share that each has in the whole."""
    whole = of_seeds + of_prompts
    share = of_seeds / np.where(whole > 0, whole, 1.0)
    return np.interp(share, _SHARES, _quantiles(p, seeds)) * np.sqrt(whole)


_SHARES = np.linspace(0, 1, 101)


@cache
def _quantiles(p: float, seeds: int) -> list[float]:
    errors = [[[np.sqrt(x), seeds - 1], [np.sqrt(1 - x), PROMPTS - 1]] for x in _SHARES]
    return [quantile(p, both) for both in errors]


def satterthwaite(p: float, of_seeds: np.ndarray, of_prompts: np.ndarray, seeds: int) -> np.ndarray:
    """One t instead, with estimated degrees of freedom (Biometrics Bulletin 2, 1946)."""
    whole = of_seeds + of_prompts
    df = whole**2 / (of_seeds**2 / (seeds - 1) + of_prompts**2 / (PROMPTS - 1))
    return stats.t.ppf(p, df) * np.sqrt(whole)


def rates(
    seeds: int, noise: float, spread: float, critical: Critical = behrens_fisher
) -> tuple[float, float]:
    """Share of intervals that cover 0 (of the difference that has fewest), and share of families
    in which Holm's correction leaves a claim: all differences are 0.
    """
    rng = np.random.default_rng([seeds, round(1000 * noise), round(10 * spread)])
    pairs = np.array(list(combinations(range(CANDIDATES), 2)))
    wide = np.ones((CANDIDATES, 1))
    wide[0] = spread
    covered, wrong = np.zeros(len(pairs)), 0
    for _ in range(DRAWS // PART):
        luck = rng.normal(size=(PART, CANDIDATES, seeds, PROMPTS))
        luck += rng.normal(size=(PART, CANDIDATES, 1, PROMPTS))
        values = noise * luck / np.sqrt(2 * PROMPTS)  # of a prompt: what it moves the mean by
        means = wide * rng.normal(size=(PART, CANDIDATES, seeds)) + values.sum(-1)
        values -= values.mean(-1, keepdims=True)
        one, other = pairs.T
        gaps = means[:, one] - means[:, other]
        errors = error_variances(gaps, values[:, one] - values[:, other])
        size = np.abs(gaps.mean(-1))
        covered += (size <= critical((1 + LEVEL) / 2, *errors, seeds)).sum(0)
        # Holm begins with the smallest p, at the level over the number of differences
        first = 1 - (1 - LEVEL) / 2 / len(pairs)
        wrong += int((size > critical(first, *errors, seeds)).any(1).sum())
    return float(covered.min() / DRAWS), wrong / DRAWS
