"""Intervals: as wide as theory says, over seeds where there are several, and read with care."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlhf_lib.measure.statistics import (
    bootstrap,
    compare,
    detectable,
    differences,
    direction,
    estimate,
    holm,
    minus,
    over_seeds,
    p_value,
)


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
        "mean": 2.0,
        "low": pytest.approx(2 - half),
        "high": pytest.approx(2 + half),
        "n": 3,
        "over": "seeds",
        "per_seed": [1.0, 2.0, 3.0],
    }


def test_a_lone_number_has_no_interval() -> None:
    lone = {"mean": 0.7, "low": None, "high": None, "n": 1, "per_seed": [0.7]}
    assert over_seeds([0.7]) == lone


def test_one_seed_speaks_of_its_prompts_and_says_so() -> None:
    values = np.random.default_rng(4).normal(size=400)
    record = estimate([values])
    assert (record["over"], record["n"], record["units"]) == ("prompts", 400, 400)
    assert record["per_seed"] == [pytest.approx(values.mean())]
    assert record["se"] == pytest.approx(values.std(ddof=1) / 20, rel=0.05)
    half = stats.t.ppf(0.975, 399) * record["se"]
    assert record["high"] - record["mean"] == pytest.approx(half)


def test_several_seeds_count_as_one_value_each_however_many_items_they_have() -> None:
    record = estimate([np.zeros(100), np.ones(2), np.full(7, 2.0)])
    assert record["per_seed"] == [0.0, 1.0, 2.0]
    assert (record["mean"], record["n"], record["over"]) == (1.0, 3, "seeds and prompts")
    assert record["low"] < 0 < 2 < record["high"], "a hundred items do not narrow three seeds"


def test_without_luck_in_the_prompts_it_is_students_t_over_seeds() -> None:
    record = estimate([np.full(9, mean) for mean in (1.0, 2.0, 3.0)])
    known = over_seeds([1.0, 2.0, 3.0])
    assert (record["low"], record["high"]) == pytest.approx((known["low"], known["high"]))
    assert record["errors"] == [[pytest.approx(known["high"] / 4.302653 - 2 / 4.302653), 2], [0, 8]]


def test_replies_to_the_same_prompt_are_one_unit() -> None:
    luck = np.random.default_rng(5).normal(size=100)
    once = estimate([luck], units=[np.arange(100)])
    fourfold = estimate([np.tile(luck, 4)], units=[np.tile(np.arange(100), 4)])
    naive = estimate([np.tile(luck, 4)])
    assert fourfold["units"] == 100
    assert fourfold["se"] == pytest.approx(once["se"], rel=1e-9)
    assert naive["se"] == pytest.approx(once["se"] / 2, rel=0.1), "as if they were 400 prompts"


def test_prompts_are_the_same_in_every_seed() -> None:
    """Three seeds with the same luck of the prompts know no more about it than one."""
    luck = np.random.default_rng(6).normal(size=100)
    words = [f"prompt {i}" for i in range(100)]
    assert estimate([luck] * 3, units=[words] * 3)["se"] == pytest.approx(
        estimate([luck], units=[words])["se"], rel=1e-9
    )


def test_the_interval_of_a_share_stays_within_its_bounds() -> None:
    values = np.r_[np.ones(19), 0.0]
    assert estimate([values])["high"] > 1
    assert estimate([values], bounds=(0.0, 1.0))["high"] == 1


def test_one_value_alone_has_no_interval_and_distinguishes_nothing() -> None:
    record = estimate([[0.7]])
    assert (record["low"], record["high"], record["errors"]) == (0.7, 0.7, [])
    assert compare({"x": record})["x"] == record | {
        "p": 1.0,
        "p_adjusted": 1.0,
        "detectable": None,
        "verdict": "not distinguishable",
    }


# -------------------------------------------------------------------- comparisons in a family


def difference(mean: float, se: float = 1.0, df: float = 20.0) -> dict:
    half = float(stats.t.ppf(0.975, df)) * se
    errors = [[se, df]]
    return {"mean": mean, "low": mean - half, "high": mean + half, "se": se, "errors": errors}


def test_differences_are_taken_seed_by_seed_in_one_family() -> None:
    made = {"a": [[3.0, 4.0, 6.0], [5.0, 7.0, 6.0]], "b": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]}
    values = {name: [np.array(seed) for seed in seeds] for name, seeds in made.items()}
    found = differences(values, {"a": ("a", "b"), "turned": ("b", "a")}, estimate)
    assert found["a"]["per_seed"] == pytest.approx([10 / 3, 4.0])
    assert found["turned"]["mean"] == -found["a"]["mean"]
    assert found["a"]["p_adjusted"] == pytest.approx(min(1.0, 2 * found["a"]["p"]))


def test_holm_by_hand() -> None:
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the one before, 0.04 * 1 likewise
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_false_claims_rare_where_nothing_differs() -> None:
    p = np.random.default_rng(8).uniform(size=(2000, 6))
    assert np.mean((p < 0.05).any(1)) > 0.2
    assert np.mean([min(holm(row)) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.015)


def test_an_uncorrected_p_agrees_with_its_interval() -> None:
    for mean in (-3.0, -2.1, -2.0, 1.9, 2.05, 2.2):
        record = difference(mean)
        assert (p_value(record) < 0.05) == (record["low"] > 0 or record["high"] < 0), mean
    assert p_value(difference(2.0, df=10)) == pytest.approx(2 * (1 - stats.t.cdf(2.0, 10)))
    assert p_value(difference(0.5, se=0.0)) == 0.0
    assert p_value(difference(0.0, se=0.0)) == 1.0


def test_a_difference_that_the_correction_does_not_leave_is_not_called_one() -> None:
    family = {"clear": difference(5.0), "close": difference(2.2), "none": difference(0.1)}
    judged = compare(family)
    assert judged["close"]["low"] > 0
    assert judged["close"]["p"] < 0.05 < judged["close"]["p_adjusted"]
    words = {name: record["verdict"] for name, record in judged.items()}
    assert words == {
        "clear": "higher",
        "close": "not distinguishable",
        "none": "not distinguishable",
    }
    assert compare({"close": family["close"]})["close"]["verdict"] == "higher", "alone it stands"
    assert compare({"low": difference(-5.0)})["low"]["verdict"] == "lower"


@pytest.mark.parametrize("df", [2.0, 7.5, 200.0])
def test_the_detectable_effect_is_found_in_four_of_five_studies(df: float) -> None:
    effect = detectable(difference(0.0, se=0.3, df=df))
    assert effect is not None
    rng = np.random.default_rng(9)
    # a study: its mean is the effect and luck, its standard error is estimated with df
    means = effect + 0.3 * rng.normal(size=20000)
    errors = 0.3 * np.sqrt(rng.chisquare(df, size=20000) / df)
    found = means / errors > stats.t.ppf(0.975, df)
    assert found.mean() == pytest.approx(0.8, abs=0.015)


def test_the_detectable_effect_of_a_large_study_is_the_textbooks() -> None:
    assert detectable(difference(0.0, se=1.0, df=1e4)) == pytest.approx(1.96 + 0.8416, abs=0.002)


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
    assert direction({"low": low, "high": high}) == word


def test_equal_values_are_no_difference_however_they_round() -> None:
    """Four draws of 0.1 and eight have means that differ in the last bit."""
    one, other = (np.full((times, 5), 0.1).mean(0) for times in (4, 8))
    again = np.full((7, 5), 0.1).sum(0) / 7
    for values in (other, again):
        record = compare({"x": estimate(minus([one], [values]))})["x"]
        assert (record["mean"], record["p"], record["verdict"]) == (0.0, 1.0, "not distinguishable")
    assert minus([np.array([1.0, 1e-9])], [np.array([1.0 - 1e-9, 0.0])])[0].all(), "small is not 0"


def test_of_policies_that_reply_alike_nothing_is_detectable() -> None:
    """No difference is ever found between them, however large a true one would be."""
    record = compare({"x": estimate([np.zeros(5)] * 3)})["x"]
    assert (record["errors"], record["se"]) == ([[0.0, 2.0], [0.0, 4.0]], 0.0)
    assert (record["p"], record["detectable"]) == (1.0, None)


def test_differences_are_of_the_seeds_that_both_have() -> None:
    """By the seed's number, not by the place: seed 1 alone is not compared with seed 0."""
    sft = {seed: np.full(4, 10.0 * seed) for seed in range(3)}
    for seeds in ((1,), (0, 2), (0, 1, 2)):
        values = {"mine": {seed: sft[seed] + 1.0 for seed in seeds}, "sft": sft}
        found = differences(values, {"x": ("mine", "sft")}, estimate)["x"]
        assert found["per_seed"] == [1.0] * len(seeds)
    first = differences({"a": [sft[1]], "b": [sft[0]] * 2}, {"x": ("a", "b")}, estimate)["x"]
    assert first["per_seed"] == [10.0], "a list is of the first seeds"
    with pytest.raises(ValueError, match="longer than argument 1"):
        minus([sft[0]], [sft[0], sft[1]])


@pytest.mark.parametrize("draw", range(20))
def test_what_the_smallest_study_detects_is_known(draw: int) -> None:
    values = np.random.default_rng(draw).normal(size=(2, 2))
    assert 0 < detectable(estimate(values)) < np.inf  # type: ignore[operator]
