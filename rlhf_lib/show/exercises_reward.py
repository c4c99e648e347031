"""The checks behind the exercises of notebook 2, the reward model; how they work: `exercises`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import expit

from rlhf_lib.measure import rankings
from rlhf_lib.show.exercises import differs, judge, refuse_blank


def check(name: str, answer: object, *given: object) -> None:
    """`exercises.judge` by the checks of this module."""
    judge(CHECKS, name, answer, *given)


def _difference(difference: Callable) -> str | None:
    for probability in (0.5, 0.9, 0.2):
        answer = difference(probability)
        refuse_blank(answer)
        if differs(expit(answer), probability, 1e-6):
            return f"Your difference for {probability} does not give it back. Solve σ(z) = p for z."
    return None


def _last_scores(last_scores: Callable) -> str | None:
    hidden, weight, lengths = torch.randn(3, 6, 4), torch.randn(4), torch.tensor([6, 2, 4])
    truth = [hidden[i, int(n) - 1] @ weight for i, n in enumerate(lengths)]
    if differs(last_scores(hidden, weight, lengths), torch.stack(truth)):
        return "Row i has lengths[i] real tokens, the first of them at place 0: where is the last?"
    return None


def _expected_error(ece: Callable) -> str | None:
    preferences = np.random.default_rng(0).normal(0.7, 2.0, size=42)
    confidence, won = expit(np.abs(preferences)), rankings.wins(preferences)
    for bins in (1, 6):
        truth = rankings.calibration(preferences, bins, samples=10)["ece"]["mean"]
        if differs(ece(confidence, won, bins), truth, 1e-6):
            return f"Wrong with {bins} bin(s). Sort by confidence, cut, and weigh each bin by size."
    return None


def _surer_half(accuracy: float, preferences: np.ndarray) -> str | None:
    surest = np.argsort(-np.abs(preferences))[: len(preferences) // 2]
    if differs(accuracy, rankings.wins(preferences[surest]).mean(), 1e-6):
        return "Sure means far from 0 on either side; right means above 0."
    return None


CHECKS: dict[str, Callable[..., str | None]] = {
    "02-1": _difference, "02-2": _last_scores, "02-3": _expected_error, "02-4": _surer_half,
}  # fmt: skip
