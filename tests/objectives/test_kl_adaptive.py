"""The KL coefficient that follows a target."""

from __future__ import annotations

import pytest

from rlhf_lib.objectives.kl import AdaptiveKL


def test_the_coefficient_follows_the_error() -> None:
    kl = AdaptiveKL(0.2, target=4.0, horizon=100)
    kl.update(4.4, samples=50)  # 10 % above target, half a horizon
    assert kl.coef == pytest.approx(0.2 * 1.05)
    kl.update(3.8, samples=100)
    assert kl.coef == pytest.approx(0.2 * 1.05 * 0.95)


@pytest.mark.parametrize(("seen", "factor"), [(400.0, 1.2), (0.0, 0.8), (-3.0, 0.8)])
def test_an_error_counts_at_most_a_fifth(seen: float, factor: float) -> None:
    kl = AdaptiveKL(0.2, target=4.0, horizon=100)
    kl.update(seen, samples=100)
    assert kl.coef == pytest.approx(0.2 * factor)


def test_it_finds_the_coefficient_that_holds_the_target() -> None:
    kl = AdaptiveKL(0.2, target=0.5, horizon=1000)
    for _ in range(300):
        kl.update(0.05 / kl.coef, samples=100)  # a policy whose KL falls as the coefficient rises
    assert kl.coef == pytest.approx(0.1, rel=1e-3)


def test_without_a_target_the_coefficient_stays() -> None:
    kl = AdaptiveKL(0.2, target=0.0, horizon=100)
    kl.update(9.0, samples=100)
    assert kl.coef == 0.2


def test_its_state_survives_a_checkpoint() -> None:
    kl, again = AdaptiveKL(0.2, 1.0, 10), AdaptiveKL(0.7, 1.0, 10)
    kl.update(2.0, 5)
    again.load_state_dict(kl.state_dict())
    assert again.coef == kl.coef
    assert kl.coef not in (0.2, 0.7)
