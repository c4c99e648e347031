"""What is said of numbers: intervals and lists as text, and whether training changed something."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf_lib.measure.statistics import contrast, interval, listed


@pytest.mark.parametrize(
    ("low", "high", "arguments", "text"),
    [
        (0.41, 0.63, {}, "0.52 [0.41, 0.63]"),
        (0.41, 0.63, {"digits": 0, "percent": True}, "52% [41, 63]"),
        (None, None, {}, "0.52"),
        (0.52, 0.52, {"digits": 1}, "0.5"),
    ],
)
def test_intervals_as_text(low: Any, high: Any, arguments: dict, text: str) -> None:
    assert interval({"mean": 0.52, "low": low, "high": high}, **arguments) == text


@pytest.mark.parametrize(
    ("words", "text"), [(["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")]
)
def test_words_are_listed(words: list[str], text: str) -> None:
    assert listed(words, "or") == text


def test_an_unknown_interval_is_a_dash() -> None:
    assert interval(None) == "–"


def test_a_contrast_of_equal_spreads_is_students_t() -> None:
    # means 1 and 3, deviations 1, so the error of the difference is sqrt(2/3) = 0.816;
    # t(0.975) with 4 degrees of freedom is 2.776: 2 is within 2.27, 3 is not
    clear = contrast([0, 1, 2], [3, 4, 5])
    assert clear == {"first": 1.0, "last": 4.0, "verdict": "higher", "word": "rose"}
    assert contrast([3, 4, 5], [0, 1, 2])["word"] == "fell"
    unclear = contrast([0, 1, 2], [2, 3, 4])
    assert (unclear["verdict"], unclear["word"]) == ("not distinguishable", "no clear change")


def test_a_single_step_a_side_distinguishes_nothing() -> None:
    assert contrast([0.0], [9.0])["verdict"] == "not distinguishable"
    assert contrast([1.0, 1.0], [1.0, 1.0])["verdict"] == "not distinguishable"


def test_a_contrast_is_welchs_t() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.5, 1.0, 2.0):
        before, after = rng.normal(0, 1, size=9), rng.normal(shift, 4, size=5)
        found = contrast(before.tolist(), after.tolist())["verdict"]
        test = stats.ttest_ind(after, before, equal_var=False)
        assert (found != "not distinguishable") == (test.pvalue < 0.05)


def test_two_wild_steps_are_no_evidence_however_many_calm_ones_stand_beside() -> None:
    # Their error is known from one difference alone: Welch gives 1.0 degrees of freedom, t needs
    # 12.6. With the twenty that both sides have together, t would need 2.1, and 9 would pass.
    before, after = [0.0, 0.01] * 10, [8.0, 10.0]
    test = stats.ttest_ind(after, before, equal_var=False)
    assert test.df == pytest.approx(1.0, abs=0.01)
    assert stats.ttest_ind_from_stats(9, 2**0.5, 2, 0.005, 0.005, 20, False).statistic > 2.1
    assert contrast(before, after)["verdict"] == "not distinguishable"


def test_a_metric_that_never_moves_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contrast([1.0, 1.0], [1.0, 1.0])["word"] == "no clear change"
        assert contrast([0.1] * 5, [0.3] * 5)["word"] == "rose"
        assert contrast([0.0, 0.0], [-2.0, -2.1])["word"] == "fell"
