"""The simulated studies: what they claim holds, and a mistake put back is seen."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lib.measure import two_errors
from rlhf_lib.measure.statistics import compare, estimate
from rlhf_lib.proofs import errors

CELL = (3, 0.2, 1.0)  # few seeds, and noise that is small against their spread


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer draws, and the cells at the edges."""
    monkeypatch.setattr(errors, "DRAWS", 4000)
    monkeypatch.setattr(errors, "SEEDS", (3, 5))
    monkeypatch.setattr(errors, "NOISE", (0.05, 0.2, 2.0))
    monkeypatch.setattr(errors, "SPREADS", (1.0, 3.0))


def test_intervals_and_families_hold_what_they_promise(quick: None) -> None:
    found = errors.error_rates()
    assert len(found) == 5
    *judged, satterthwaite = found
    assert all(proof.verdict == "holds" for proof in judged)
    assert satterthwaite.verdict == "measured"
    assert satterthwaite.measured < 0.9, "one family in ten has a wrong claim"


def pooled(p: float, of_seeds: np.ndarray, of_prompts: np.ndarray, seeds: int) -> np.ndarray:
    """The seeds' spread of all pairs as one: what unequal spreads do not stand."""
    same = np.broadcast_to(of_seeds.mean(1, keepdims=True), of_seeds.shape)
    df = (seeds - 1) * (errors.CANDIDATES - 1)
    return two_errors.stats.t.ppf(p, df) * np.sqrt(same + of_prompts)


@pytest.mark.parametrize(
    ("mistake", "cell"),
    [
        (errors.satterthwaite, CELL),
        (pooled, (3, 0.02, 3.0)),
        (lambda p, a, b, n: errors.behrens_fisher(p, a, 0 * b, n), (5, 2.0, 1.0)),  # seeds alone
        (lambda p, a, b, n: errors.behrens_fisher(p, 0 * a, b, n), (5, 0.5, 1.0)),  # prompts alone
    ],
)
def test_a_mistake_put_back_is_seen(quick: None, mistake: errors.Critical, cell: tuple) -> None:
    covered, wrong = errors.rates(*cell, mistake)
    right, rare = errors.rates(*cell)
    assert right > errors.COVERED - 0.01
    assert rare < errors.WRONG + 0.01
    assert covered < errors.COVERED - 0.01 or wrong > errors.WRONG + 0.01


def test_what_is_simulated_is_what_a_study_computes() -> None:
    """The interpolated table and the real `estimate` and `compare` call the same differences."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        values = rng.normal(size=(3, 1)) + rng.normal(size=(3, errors.PROMPTS))
        record = estimate(list(values))
        means = values.mean(1)
        parts = two_errors.error_variances(means, (values - means[:, None]) / errors.PROMPTS)
        half = errors.behrens_fisher(0.975, *map(np.array, parts), 3)
        assert record["high"] - record["mean"] == pytest.approx(float(half), rel=0.002)
        called = abs(record["mean"]) > half
        assert (compare({"x": record})["x"]["verdict"] != "not distinguishable") is bool(called)
