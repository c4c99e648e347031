"""Intervals: as wide as theory says, over seeds where there are several, and read with care."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lib.intervals import bootstrap, estimate, over_seeds, verdict


def test_the_bootstrap_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    record = bootstrap(values)
    assert record["mean"] == pytest.approx(values.mean())
    assert (record["n"], record["over"]) == (400, "items")
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert record["high"] - record["mean"] == pytest.approx(half, rel=0.12)
    assert record["mean"] - record["low"] == pytest.approx(half, rel=0.12)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_promises() -> None:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(150):
        record = bootstrap(rng.uniform(0, 1, size=60), samples=400)
        hits += record["low"] <= 0.5 <= record["high"]
    assert 0.89 <= hits / 150 < 1


def test_the_bootstrap_is_the_same_each_time_whatever_the_global_seed() -> None:
    values = np.random.default_rng(3).normal(size=30)
    np.random.seed(5)
    first = bootstrap(values)
    np.random.seed(6)
    assert bootstrap(values) == first


@pytest.mark.parametrize("values", [[0.7], [1.0, 1.0, 1.0]])
def test_values_without_spread_have_an_interval_without_width(values: list[float]) -> None:
    record = bootstrap(values)
    assert record["low"] == record["mean"] == record["high"] == values[0]
    assert record["n"] == len(values)


def test_over_seeds_is_students_t() -> None:
    record = over_seeds([1.0, 2.0, 3.0])
    # standard error 1/sqrt(3); t(0.975) with 2 degrees of freedom is 4.302653
    half = 4.302653 / np.sqrt(3)
    assert record == {
        "mean": 2.0, "low": pytest.approx(2 - half), "high": pytest.approx(2 + half), "n": 3,
        "over": "seeds", "per_seed": [1.0, 2.0, 3.0],
    }  # fmt: skip


def test_one_seed_speaks_of_its_items_and_says_so() -> None:
    values = np.random.default_rng(4).normal(size=50)
    record = estimate([values], samples=300)
    assert record == bootstrap(values, 300) | {"per_seed": [pytest.approx(values.mean())]}
    assert record["over"] == "items"


def test_several_seeds_count_as_one_value_each_however_many_items_they_have() -> None:
    record = estimate([np.zeros(100), np.ones(2), np.full(7, 2.0)])
    assert record["per_seed"] == [0.0, 1.0, 2.0]
    assert (record["mean"], record["n"], record["over"]) == (1.0, 3, "seeds")
    assert record["low"] < 0 < 2 < record["high"], "a hundred items do not narrow three seeds"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.2, "higher"),
        (-0.2, -0.1, "lower"),
        (-0.1, 0.2, "not distinguishable"),
        (0.0, 0.2, "not distinguishable"),
        (-0.2, 0.0, "not distinguishable"),
        (0.0, 0.0, "not distinguishable"),
    ],
)
def test_a_difference_is_named_only_where_the_interval_leaves_zero_out(
    low: float, high: float, word: str
) -> None:
    assert verdict({"low": low, "high": high}) == word
