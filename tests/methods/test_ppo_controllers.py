"""The adaptive KL coefficient and the running spread of rewards."""

from __future__ import annotations

import pytest
import torch

from rlhf_lib.methods.ppo import AdaptiveKL, RunningScale


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


def test_the_running_spread_is_that_of_everything_seen() -> None:
    batches = [torch.randn(5) * 3 + 2, torch.randn(1), torch.randn(4, 8) * 0.1 - 7]
    scale = RunningScale()
    for batch in batches:
        scale.update(batch)
    everything = torch.cat([b.flatten() for b in batches])
    assert scale.std == pytest.approx(everything.std().item(), rel=1e-5)
    assert scale.mean == pytest.approx(everything.mean().item(), rel=1e-5)


def test_the_spread_is_one_until_two_rewards_differ() -> None:
    scale = RunningScale()
    assert scale.std == 1.0
    for _ in range(2):
        scale.update(torch.tensor([3.0]))
        assert scale.std == 1.0
    scale.update(torch.tensor([6.0]))
    assert scale.std == pytest.approx(3**0.5)


def test_both_states_survive_a_checkpoint() -> None:
    kl, scale = AdaptiveKL(0.2, 1.0, 10), RunningScale()
    kl.update(2.0, 5)
    scale.update(torch.tensor([1.0, 5.0]))
    again_kl, again = AdaptiveKL(0.7, 1.0, 10), RunningScale()
    again_kl.load_state_dict(kl.state_dict())
    again.load_state_dict(scale.state_dict())
    for one in (scale, again):
        one.update(torch.tensor([2.0]))
    assert again_kl.coef == kl.coef != 0.7
    assert (again.std, again.mean, again.count) == (scale.std, scale.mean, 3)
