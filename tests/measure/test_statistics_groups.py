"""Groups and bins: their numbers, their order, and intervals that hold in small groups."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rlhf_lib.measure.statistics import by_bins, by_group, share


def test_a_share_has_a_width_even_where_all_were_right() -> None:
    right, wrong = share(np.ones(8)), share(np.zeros(8))
    assert (right["mean"], right["high"], right["n"]) == (1.0, 1.0, 8)
    # Jeffreys' posterior, beta(8.5, 0.5), drawn as a ratio of two gammas
    one = np.random.default_rng(0).gamma(8.5, size=400_000)
    other = np.random.default_rng(1).gamma(0.5, size=400_000)
    assert right["low"] == pytest.approx(np.quantile(one / (one + other), 0.025), abs=2e-3)
    assert (wrong["low"], wrong["high"]) == (0.0, pytest.approx(1 - right["low"]))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for truth in (0.5, 0.9):
        records = [share((rng.random(40) < truth).astype(float)) for _ in range(400)]
        held = np.mean([r["low"] <= truth <= r["high"] for r in records])
        assert 0.92 <= held <= 0.985


def test_groups_are_named_and_none_is_lost() -> None:
    won = np.array([1.0, 0.0, 0.5, 1.0])
    groups = by_group(won, ["b", "a", "b", "a"])
    assert list(groups) == ["a", "b"]
    assert (groups["a"]["mean"], groups["b"]["mean"]) == (0.5, 0.75)
    assert [g["n"] for g in groups.values()] == [2, 2]


def test_bins_go_up_hold_all_and_never_part_equal_values() -> None:
    values = np.array([3, 1, 2, 2, 2, 2, 9, 8, 7, 1])
    won = (values > 2).astype(float)
    rows = by_bins(won, values, bins=4)
    assert sum(row["n"] for row in rows) == 10
    assert all(a["to"] < b["from"] for a, b in pairwise(rows))
    assert all(row["from"] <= row["middle"] <= row["to"] for row in rows)
    (holder,) = [row for row in rows if row["from"] <= 2 <= row["to"]]
    assert (holder["n"], holder["mean"]) == (5, 0.2), "2 2 2 2 3: of its own pairs"
    assert rows[-1]["mean"] == 1


def test_bins_are_about_equal_where_values_differ() -> None:
    values = np.random.default_rng(0).normal(size=100)
    assert {row["n"] for row in by_bins(np.ones(100), values, bins=6)} <= {16, 17}
    (only,) = by_bins(np.ones(5), np.full(5, 2.0))
    assert (only["from"], only["to"], only["n"]) == (2, 2, 5)
