"""Published figures: read, judged, and what the judgements claim simulated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlhf_lib.review import claims
from rlhf_lib.settings import UserError


def test_the_three_forms_are_read() -> None:
    wins, rate, mean = claims.read(
        "PPO wins 36 of 80; accuracy 47.5 % of ?; reward −0.5 (1.25) of 90"
    )
    assert (wins.name, wins.value, wins.sd, wins.n, wins.assumed) == (
        "PPO wins",
        0.45,
        None,
        80,
        False,
    )
    assert (rate.name, rate.value, rate.n, rate.assumed) == ("accuracy", 0.475, 100, True)
    assert (mean.name, mean.value, mean.sd, mean.n) == ("reward", -0.5, 1.25, 90)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy is good", "cannot read the claim 'accuracy is good': write"),
        ("wins 36", "cannot read the claim 'wins 36'"),
        ("", "no claim was given"),
        (" ; ", "no claim was given"),
        ("wins 120 of 100", "a share between 0 and 1"),
        ("wins 1 of 1", "n has to be 2 or more"),
        ("wins 0 of 0", "n has to be 2 or more"),
        ("reward 1.0 (0) of 100", "a standard deviation above 0"),
    ],
)
def test_what_is_no_claim_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        claims.read(text)


def test_an_accuracy_below_one_half_may_be_chance() -> None:
    (claim,) = claims.read("accuracy 95 of 200")
    verdict = claims.against_chance(claim)
    assert verdict.said == "not distinguishable"
    assert verdict.p == pytest.approx(stats.binomtest(95, 200).pvalue)
    assert claim.shown() == "48% [41, 54]"


def test_pairs_are_of_a_kind_and_corrected_together() -> None:
    read = claims.read(
        "PPO wins 30 of 100; DPO wins 55 of 100; accuracy 95 of 200; "
        "reward of PPO 1.0 (1) of 50; reward of DPO 1.1 (1) of 50; KL of PPO 2 (1) of 50"
    )
    found = claims.against_each_other(read)
    assert [v.what for v in found] == ["PPO wins − DPO wins", "reward of PPO − reward of DPO"]
    alone = stats.fisher_exact([[30, 70], [55, 45]]).pvalue
    assert found[0].p == pytest.approx(2 * alone)
    assert found[0].said == "lower"
    assert found[1].said == "not distinguishable"


def outcomes(a: float, b: float, n: int) -> list[tuple[float, claims.Verdict]]:
    """What two samples of n may show where the truth is a and b, each with its probability."""
    ways = [(k, stats.binom.pmf(k, n, a)) for k in range(n + 1)]
    others = [(k, stats.binom.pmf(k, n, b)) for k in range(n + 1)]
    found = []
    for one, p in ways:
        for other, q in others:
            if p * q > 1e-6:
                sides = [claims.Claim("x", k / n, None, n, False) for k in (one, other)]
                found.append((p * q, claims._difference(*sides)))
    return found


@pytest.mark.parametrize(("a", "b", "n"), [(0.5, 0.5, 40), (0.36, 0.5, 40), (0.9, 0.95, 80)])
def test_intervals_of_differences_hold_the_truth(a: float, b: float, n: int) -> None:
    found = outcomes(a, b, n)
    assert 0.93 <= sum(p for p, v in found if v.low <= a - b <= v.high) <= 0.99
    if a == b:
        assert 0.01 <= sum(p for p, v in found if v.said != "not distinguishable") <= 0.05


def test_the_sample_it_would_take_sees_the_difference_in_four_of_five() -> None:
    needed = claims._difference(*claims.read("a 30 of 100; a 70 of 100")).needed
    assert needed
    assert 0.75 <= sum(p for p, v in outcomes(0.3, 0.7, needed) if v.p < 0.05) <= 0.87
    (claim,) = claims.read("wins 36 of 100")
    n = claims.against_chance(claim).needed
    assert n
    seen = [
        stats.binom.pmf(k, n, 0.36) for k in range(n + 1) if stats.binomtest(k, n).pvalue < 0.05
    ]
    assert 0.75 <= sum(seen) <= 0.87


def test_means_are_compared_by_welch() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(0, 1, 30), draw.normal(0.4, 2.5, 50)
    sides = [claims.Claim("r", x.mean(), x.std(ddof=1), len(x), False) for x in (one, other)]
    (verdict,) = claims.against_each_other(sides)
    known = stats.ttest_ind(one, other, equal_var=False)
    interval = known.confidence_interval(0.95)
    assert (verdict.p, verdict.low, verdict.high) == pytest.approx(
        (known.pvalue, interval.low, interval.high)
    )


def test_the_earlier_reports_are_read_and_judged() -> None:
    for text in claims.EARLIER.values():
        read = claims.read(text)
        assert len(claims.table(read)) == len(read)
    accuracy, *_ = claims.read(claims.EARLIER["A"])
    assert claims.against_chance(accuracy).said == "not distinguishable"
    worst, _, _, *rest = claims.read(claims.EARLIER["D"])
    assert claims.against_chance(worst).said == "lower", "a win rate of 36 % of a hundred"
    assert {v.said for v in claims.against_each_other(rest)} == {"not distinguishable"}


def test_the_text_says_where_n_was_assumed() -> None:
    said = claims.as_text(claims.read("wins 36% of ?; more wins 50% of 80"))
    assert "100, not said" in said
    assert "-0" not in said.replace("-0.", "")
    assert claims.NOTE in said
