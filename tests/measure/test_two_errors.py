"""Two errors of one mean: their sizes by analysis of variance, and how their sum is spread."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlhf_lib.measure.two_errors import error_variances, quantile, tail, total


def test_one_error_is_students_t() -> None:
    for errors in ([[2.0, 4]], [[2.0, 4], [0.0, 30]], [[0.0, 30], [2.0, 4]]):
        assert quantile(0.975, errors) == pytest.approx(2 * stats.t.ppf(0.975, 4))
        assert tail(3.0, errors) == pytest.approx(stats.t.sf(1.5, 4))
        assert total(errors) == 2
    assert quantile(0.975, [[0.0, 4]]) == quantile(0.975, []) == 0


@pytest.mark.parametrize(
    "errors", [[[1.0, 2], [1.0, 15]], [[1.0, 4], [0.2, 500]], [[0.1, 2], [1.0, 9]]]
)
def test_two_errors_are_the_sum_of_two_ts(errors: list) -> None:
    rng = np.random.default_rng(1)
    drawn = sum(se * rng.standard_t(df, size=1_000_000) for se, df in errors)
    for p in (0.8, 0.975, 0.995):
        place = quantile(p, errors)
        assert np.mean(drawn <= place) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 1e6))
        assert tail(place, errors) == pytest.approx(1 - p)


def test_fisher_and_behrens_by_their_table() -> None:
    """Fisher and Yates, Statistical Tables, table VI: 5 %, 6 degrees of freedom, 45 degrees."""
    equal = [[np.sqrt(0.5), 6], [np.sqrt(0.5), 6]]
    assert quantile(0.975, equal) == pytest.approx(2.435, abs=0.001)
    assert quantile(0.975, [[np.sqrt(0.5), 6], [np.sqrt(0.5), 12]]) == pytest.approx(
        2.301, abs=0.001
    )


def drawn(seeds: float, prompts: float, luck: float, draws: int = 4000) -> np.ndarray:
    """(draws, 4 seeds, 10 prompts) values with these standard deviations."""
    rng = np.random.default_rng(2)
    values = seeds * rng.normal(size=(draws, 4, 1)) + prompts * rng.normal(size=(draws, 1, 10))
    return values + luck * rng.normal(size=(draws, 4, 10))


@pytest.mark.parametrize("sizes", [(1.0, 0.0, 1.0), (0.5, 2.0, 1.0), (0.3, 1.0, 0.1)])
def test_each_variance_is_of_what_it_says(sizes: tuple[float, float, float]) -> None:
    seeds, prompts, luck = sizes
    values = drawn(*sizes)
    means = values.mean(-1)
    of_seeds, of_prompts = error_variances(means, (values - means[..., None]) / 10)
    assert of_seeds.mean() == pytest.approx(seeds**2 / 4 + luck**2 / 40, rel=0.05)
    # cut off at 0, so a little too large where there is nothing
    assert of_prompts.mean() == pytest.approx(prompts**2 / 10, rel=0.05, abs=0.012)
    whole = values.mean((1, 2)).var()
    assert (of_seeds + of_prompts).mean() == pytest.approx(whole, rel=0.08, abs=0.012)


def test_a_lone_seed_has_its_prompts_alone() -> None:
    values = drawn(0.0, 1.0, 1.0)[:, :1]
    means = values.mean(-1)
    of_seeds, of_prompts = error_variances(means, (values - means[..., None]) / 10)
    assert not of_seeds.any()
    assert of_prompts.mean() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("second", [1e-3, 0.2, 1.0])
def test_two_errors_of_one_degree_of_freedom_have_a_quantile(second: float) -> None:
    """Two Cauchys added are a Cauchy as wide as both: the quantile lies on its upper bound."""
    found = quantile(0.975, [[1.0, 1], [second, 1]])
    assert found == pytest.approx((1 + second) * stats.t.ppf(0.975, 1), rel=0.05)
