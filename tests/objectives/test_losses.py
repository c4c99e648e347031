"""Losses: values by hand, plain loops as twins, gradients, and padding that may hold anything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_lib.objectives.kl import k3
from rlhf_lib.objectives.losses import (
    grpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reward_loss,
    sft_loss,
)

MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
LENGTHS = [4, 2, 1]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, old ones and advantages (3, 4); ratios on both sides of the clip range."""
    old = -2 * torch.rand(3, 4)
    return old + 0.4 * torch.randn(3, 4), old, torch.randn(3, 4)


# --------------------------------------------------------------------------------------- SFT


def test_sft_loss_is_the_mean_over_tokens_not_over_rows() -> None:
    logprobs = -torch.arange(1.0, 13).view(3, 4)
    assert sft_loss(logprobs, MASK).item() == pytest.approx((1 + 2 + 3 + 4 + 5 + 6 + 9) / 7)


# -------------------------------------------------------------------------------------- reward


def test_reward_loss_by_hand() -> None:
    loss, stats = reward_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(-(math.log(sigmoid(1)) + math.log(sigmoid(-3))) / 2)
    assert (stats.accuracy.item(), stats.margin.item()) == (0.5, -1.0)


def test_the_margin_is_subtracted_inside_the_log_sigmoid() -> None:
    loss, stats = reward_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.7]))
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.3)))
    assert stats.margin.item() == pytest.approx(1.0), "the logged margin is that of the rewards"


def test_centring_adds_the_squared_sum_of_both_rewards() -> None:
    pair = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5])
    plain, centred = reward_loss(*pair)[0], reward_loss(*pair, center_coef=0.01)[0]
    assert (centred - plain).item() == pytest.approx(0.01 * (3.0**2 + 0.5**2) / 2, rel=1e-4)


def test_a_tie_counts_as_half_right() -> None:
    assert reward_loss(torch.ones(2), torch.tensor([1.0, 0.0]))[1].accuracy.item() == 0.75


def test_reward_loss_stays_finite_for_large_differences() -> None:
    loss, _ = reward_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == pytest.approx(2e4)


# ----------------------------------------------------------------------------------------- PPO


def clipped_loop(
    logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float
) -> list[list[float]]:
    """-min(A ratio, A clip(ratio)) token by token, real tokens only."""
    rows = []
    for i, length in enumerate(LENGTHS):
        rows.append([])
        for t in range(length):
            ratio = math.exp(float(logprobs[i, t]) - float(old[i, t]))
            clipped = min(max(ratio, 1 - low), 1 + high)
            a = float(advantages[i, t])
            rows[-1].append(-min(a * ratio, a * clipped))
    return rows


def test_policy_loss_equals_the_loop() -> None:
    logprobs, old, advantages = sample()
    rows = clipped_loop(logprobs, old, advantages, 0.2, 0.2)
    tokens = [token for row in rows for token in row]
    loss, stats = ppo_policy_loss(logprobs, old, advantages, MASK)
    assert loss.item() == pytest.approx(sum(tokens) / 7, abs=1e-6)
    ratios = (logprobs - old).exp()[MASK.bool()]
    assert stats.clip_fraction.item() == pytest.approx(
        ((ratios - 1).abs() > 0.2).float().mean().item()
    )
    assert 0 < stats.clip_fraction.item() < 1
    assert stats.ratio_mean.item() == pytest.approx(ratios.mean().item())
    assert stats.ratio_var.item() == pytest.approx(ratios.var(unbiased=False).item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # already made more likely: no further pull
        (1.5, -1.0, 1.5, 1.5),  # made more likely by mistake: pushed back, unclipped
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
    ],
)
def test_clipping_stops_the_gradient_on_one_side_only(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    value, _ = ppo_policy_loss(logprobs, torch.zeros(1, 1), advantage * one, one)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope)


def test_approximate_kl_is_that_of_the_old_policy_to_the_new() -> None:
    # all tokens of a small vocabulary, each as often as the old policy samples it
    old, new = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    counts = [0, 0, 1, 2]
    logprobs, old_logprobs = new[counts].log()[None], old[counts].log()[None]
    ones = torch.ones(1, 4)
    _, stats = ppo_policy_loss(logprobs, old_logprobs, ones, ones)
    exact = (old * (old / new).log()).sum().item()
    assert stats.approx_kl.item() == pytest.approx(exact, abs=1e-6)


def test_without_a_change_of_policy_the_ratio_is_one() -> None:
    logprobs, _, advantages = sample()
    loss, stats = ppo_policy_loss(logprobs, logprobs.clone(), advantages, MASK)
    assert loss.item() == pytest.approx(-advantages[MASK.bool()].mean().item(), abs=1e-6)
    assert stats == (0, 0, 1, 0)


def test_value_loss_has_its_half_and_takes_the_larger_error() -> None:
    one = torch.ones(1, 3)
    values, old = torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[0.9, 0.0, 0.0]])
    returns = torch.tensor([[3.0, 2.0, 2.0]])
    # errors: 2 kept as it is; |1-2| = 1 against |0.2-2| = 1.8; 0 against |0.2-2| = 1.8
    loss, stats = ppo_value_loss(values, old, returns, one, clip_range=0.2)
    assert loss.item() == pytest.approx(0.5 * (2**2 + 1.8**2 + 1.8**2) / 3)
    assert stats.clip_fraction.item() == pytest.approx(2 / 3)
    unclipped, _ = ppo_value_loss(values, old, returns, one, clip_range=math.inf)
    assert unclipped.item() == pytest.approx(0.5 * (2**2 + 1**2 + 0) / 3)


def test_rounding_is_not_counted_as_clipping() -> None:
    # 0.15 + (1e-9 - 0.15) is 0 in fp32: an error where there was none, though nothing was clipped
    value = torch.tensor([[1e-9]])
    _, stats = ppo_value_loss(value, torch.tensor([[0.15]]), value, torch.ones(1, 1))
    assert stats.clip_fraction.item() == 0


def test_value_loss_is_the_mean_over_tokens() -> None:
    values = torch.ones(3, 4)
    loss, _ = ppo_value_loss(values, values, torch.arange(12.0).view(3, 4), MASK)
    assert loss.item() == pytest.approx(0.5 * (1 + 0 + 1 + 4 + 9 + 16 + 49) / 7)


# ---------------------------------------------------------------------------------------- GRPO


def test_aggregations_equal_their_loops() -> None:
    logprobs, old, _ = sample()
    advantages = torch.tensor([0.7, -1.3, 0.4])
    rows = clipped_loop(logprobs, old, advantages[:, None].expand(3, 4), 0.2, 0.3)
    expected = {
        "sequence": sum(sum(row) / len(row) for row in rows) / 3,
        "token": sum(map(sum, rows)) / 7,
        "constant": sum(map(sum, rows)) / (3 * 4),
    }
    assert len({round(value, 4) for value in expected.values()}) == 3
    for name, value in expected.items():
        loss, _ = grpo_loss(
            logprobs, old, advantages, MASK, clip_low=0.2, clip_high=0.3, aggregation=name
        )
        assert loss.item() == pytest.approx(value, abs=1e-6), name


def test_advantages_may_be_given_per_token() -> None:
    logprobs, old, _ = sample()
    advantages = torch.tensor([0.7, -1.3, 0.4])
    one, other = (
        grpo_loss(logprobs, old, a, MASK)[0] for a in (advantages, advantages[:, None].expand(3, 4))
    )
    assert torch.equal(one, other)


def test_the_clip_range_may_be_wider_above() -> None:
    ratio, one = torch.tensor([[1.25]]), torch.ones(1, 1)
    narrow, _ = grpo_loss(ratio.log(), 0 * one, one[0], one, clip_high=0.2)
    wide, _ = grpo_loss(ratio.log(), 0 * one, one[0], one, clip_high=0.28)
    assert (narrow.item(), wide.item()) == (pytest.approx(-1.2), pytest.approx(-1.25))
    low, _ = grpo_loss((2 - ratio).log(), 0 * one, -one[0], one, clip_low=0.1)
    assert low.item() == pytest.approx(0.9)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_the_kl_term_is_k3_to_the_reference(aggregation: str) -> None:
    logprobs, old, _ = sample()
    reference = old - 0.3
    nothing = torch.zeros(3)
    loss, stats = grpo_loss(
        logprobs, old, nothing, MASK, reference, kl_coef=0.5, aggregation=aggregation
    )
    per_token = k3(logprobs, reference) * MASK
    expected = {
        "sequence": (per_token.sum(1) / MASK.sum(1)).mean(),
        "token": per_token.sum() / 7,
        "constant": per_token.sum() / 12,
    }
    assert loss.item() == pytest.approx(0.5 * expected[aggregation].item(), abs=1e-6)
    assert stats.kl.item() == pytest.approx(expected["token"].item(), abs=1e-6)


def test_without_kl_coef_the_kl_is_measured_but_not_added() -> None:
    logprobs, old, _ = sample()
    loss, stats = grpo_loss(logprobs, old, torch.zeros(3), MASK, old - 0.3)
    assert loss.item() == 0
    assert stats.kl.item() > 0


def test_grpo_refuses_what_it_cannot_do() -> None:
    logprobs, old, _ = sample()
    with pytest.raises(ValueError, match="kl_coef is set but ref_logprobs is missing"):
        grpo_loss(logprobs, old, torch.zeros(3), MASK, kl_coef=0.1)
    with pytest.raises(ValueError, match="aggregation='mean': choose 'sequence', 'token'"):
        grpo_loss(logprobs, old, torch.zeros(3), MASK, aggregation="mean")
