"""Advantages: definitions written as sums, values by hand, and rows that must not leak."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_lib.models.packing import length_mask
from rlhf_lib.objectives.advantages import (
    explained_variance,
    gae,
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_advantages,
)

LENGTHS = [5, 3, 1]
MASK = length_mask(LENGTHS)


def gae_by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Eq. 16 of arXiv:1506.02438 as its double sum; the value after the last token is 0."""
    advantages = torch.zeros(rewards.shape)
    for i, length in enumerate(LENGTHS):
        following = [*values[i, 1:length].tolist(), 0.0]
        for t in range(length):
            advantages[i, t] = sum(
                (gamma * lam) ** k
                * (float(rewards[i, t + k]) + gamma * following[t + k] - float(values[i, t + k]))
                for k in range(length - t)
            )
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_its_definition(gamma: float, lam: float) -> None:
    rewards, values = torch.randn(2, 3, 5)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    expected = gae_by_definition(rewards, values, gamma, lam)
    assert torch.allclose(advantages, expected, atol=1e-5)
    assert torch.allclose(returns, (expected + values) * MASK, atol=1e-5)


def test_with_lambda_one_the_return_is_the_sum_of_rewards_to_come() -> None:
    rewards, values = torch.randn(2, 3, 5)
    _, returns = gae(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            assert returns[i, t].item() == pytest.approx(
                rewards[i, t:length].sum().item(), abs=1e-5
            )


def test_defaults_are_those_of_ppo_for_language_models() -> None:
    rewards, values = torch.randn(2, 3, 5)
    for one, other in zip(
        gae(rewards, values, MASK), gae(rewards, values, MASK, 1.0, 0.95), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
def test_gae_does_not_read_padding(junk: float) -> None:
    rewards, values = torch.randn(2, 3, 5)
    clean = gae(rewards, values, MASK)
    spoilt = gae(rewards.where(MASK.bool(), junk), values.where(MASK.bool(), -junk), MASK)
    for one, other in zip(clean, spoilt, strict=True):
        assert torch.equal(one, other)
        assert (other[~MASK.bool()] == 0).all()


def test_the_score_stands_on_the_last_real_token() -> None:
    scores = torch.tensor([10.0, 20.0, 30.0])
    zero = torch.zeros(3, 5)
    rewards = kl_shaped_rewards(scores, zero, zero, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 0, 0, 10], [0, 0, 20, 0, 0], [30, 0, 0, 0, 0]]


def test_every_real_token_pays_for_its_log_ratio() -> None:
    logprobs, ref_logprobs = -torch.rand(2, 3, 5)
    rewards = kl_shaped_rewards(torch.zeros(3), logprobs, ref_logprobs, MASK, kl_coef=0.5)
    for i, length in enumerate(LENGTHS):
        for t in range(5):
            paid = -0.5 * float(logprobs[i, t] - ref_logprobs[i, t]) if t < length else 0.0
            assert rewards[i, t].item() == pytest.approx(paid, abs=1e-6)


@pytest.mark.parametrize("junk", [math.inf, math.nan])
def test_shaped_rewards_do_not_read_padding(junk: float) -> None:
    scores, logprobs, ref_logprobs = torch.randn(3), *-torch.rand(2, 3, 5)
    clean = kl_shaped_rewards(scores, logprobs, ref_logprobs, MASK, 0.1)
    spoilt = kl_shaped_rewards(scores, logprobs.where(MASK.bool(), junk), ref_logprobs, MASK, 0.1)
    assert torch.equal(clean, spoilt)


REWARDS = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 8.0])  # means 3 and 6


def test_group_advantages_by_hand() -> None:
    centred = [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]
    assert group_advantages(REWARDS, 3, "none").tolist() == centred
    std = [math.sqrt(7)] * 3 + [math.sqrt(3)] * 3  # unbiased
    expected = [c / (s + 1e-4) for c, s in zip(centred, std, strict=True)]
    assert group_advantages(REWARDS, 3).tolist() == pytest.approx(expected)
    whole = math.sqrt(sum((r - 4.5) ** 2 for r in REWARDS.tolist()) / 5)
    assert group_advantages(REWARDS, 3, "batch").tolist() == pytest.approx(
        [c / (whole + 1e-4) for c in centred]
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 + 0.1])
def test_a_group_without_spread_gives_zeros(scale: str, value: float) -> None:
    # three times 0.1 is not 0.3: without care, rounding error over 1e-4 becomes an advantage
    rewards = torch.cat([torch.full((3,), value), REWARDS[:3]])
    advantages = group_advantages(rewards, 3, scale)
    assert advantages[:3].tolist() == [0, 0, 0]
    assert (advantages[3:] != 0).all()


def test_leave_one_out_compares_with_the_others() -> None:
    advantages = leave_one_out_advantages(REWARDS, 3)
    assert advantages.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0])


@pytest.mark.parametrize("function", [group_advantages, leave_one_out_advantages])
@pytest.mark.parametrize("size", [0, 1, 4])
def test_rewards_that_do_not_form_groups_are_refused(function, size: int) -> None:
    with pytest.raises(ValueError, match=f"6 rewards do not form groups of {size}"):
        function(REWARDS, size)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale='std': choose 'group', 'batch' or 'none'"):
        group_advantages(REWARDS, 3, "std")


def test_explained_variance_of_a_perfect_a_constant_and_a_bad_critic() -> None:
    returns = torch.randn(3, 5)
    for values, expected in ((returns + 3, 1.0), (torch.ones(3, 5), 0.0), (-returns, -3.0)):
        values = values.where(MASK.bool(), math.nan)
        assert explained_variance(values, returns, MASK).item() == pytest.approx(expected, abs=1e-5)


def test_explained_variance_of_returns_without_variance_is_finite() -> None:
    assert explained_variance(torch.ones(3, 5), torch.ones(3, 5), MASK).isfinite()
