"""The losses: pure functions of tensors. Each is a scalar, or a scalar and typed statistics.

`response_mask` (B, T) is 1 at each generated token including the end-of-sequence token, 0 after it.
Padding positions may hold any value and never change a result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lib.objectives.kl import ESTIMATORS, k3
from rlhf_lib.objectives.masked import masked_mean, zero_padding


def sft_loss(logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of a response token, in nats."""
    return -masked_mean(logprobs, response_mask)


class RewardStats(NamedTuple):
    accuracy: Tensor  # share of pairs in which the chosen reply scores higher; a tie counts half
    margin: Tensor  # mean of chosen - rejected


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
) -> tuple[Tensor, RewardStats]:
    """Bradley-Terry loss over pairs; all inputs (B,).

    -log sigmoid(r_chosen - r_rejected - margin) (arXiv:2203.02155, eq. 1; margin as in Llama 2,
    arXiv:2307.09288, eq. 2), plus center_coef * mean((r_chosen + r_rejected)^2), which fixes the
    zero that the first term leaves free (arXiv:2312.09244, sec. 2).
    """
    difference = chosen_rewards - rejected_rewards
    loss = -F.logsigmoid(difference if margin is None else difference - margin).mean()
    if center_coef:
        loss = loss + center_coef * ((chosen_rewards + rejected_rewards) ** 2).mean()
    wins = (difference > 0).float() + 0.5 * (difference == 0).float()
    return loss, RewardStats(wins.mean().detach(), difference.mean().detach())


class PolicyStats(NamedTuple):
    clip_fraction: Tensor  # share of tokens whose ratio is outside the clip range
    approx_kl: Tensor  # KL(old policy || policy) per token, k3 on the old policy's samples, nats
    ratio_mean: Tensor
    ratio_var: Tensor


def _clipped_policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    level: str = "token",
    surrogate: str = "clip",
) -> tuple[Tensor, PolicyStats]:
    """Per-token surrogate loss (B, T) and its statistics; `grpo_loss` says which there are."""
    # exp() of what stands at padding must not reach gradients
    logprobs, old_logprobs, advantages = (
        zero_padding(x, mask) for x in (logprobs, old_logprobs, advantages)
    )
    log_ratio = logprobs - old_logprobs
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    if surrogate == "clip":
        clipped = ratio.clamp(1 - low, 1 + high)
        per_token = torch.max(-advantages * ratio, -advantages * clipped)
    else:
        clipped = ratio.clamp(max=1 + high)
        per_token = -advantages * clipped.detach() * logprobs
    with torch.no_grad():
        mean = masked_mean(ratio, mask)
        stats = PolicyStats(
            clip_fraction=masked_mean((ratio != clipped).float(), mask),
            approx_kl=masked_mean(k3(old_logprobs, logprobs), mask),
            ratio_mean=mean,
            ratio_var=masked_mean((ratio - mean) ** 2, mask),
        )
    return per_token, stats


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float = 0.2,
) -> tuple[Tensor, PolicyStats]:
    """Clipped policy loss (arXiv:1707.06347, eq. 7), mean over response tokens; inputs (B, T)."""
    per_token, stats = _clipped_policy(
        logprobs, old_logprobs, advantages, response_mask, clip_range, clip_range
    )
    return masked_mean(per_token, response_mask), stats


class ValueStats(NamedTuple):
    clip_fraction: Tensor  # share of tokens whose clipped error is the larger one


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip_range: float = 0.2,
) -> tuple[Tensor, ValueStats]:
    """Half the squared error of values kept near the old ones, the larger of both; inputs (B, T).

    Mean over all response tokens. Source: the "value function loss clipping" detail of PPO.
    """
    values, old_values, returns = (
        zero_padding(x, response_mask) for x in (values, old_values, returns)
    )
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), response_mask)
    # within the range only rounding tells the two errors apart
    moved = (values - old_values).abs() > clip_range
    fraction = masked_mean((moved & (clipped_error > error)).float(), response_mask)
    return loss, ValueStats(fraction.detach())


class GRPOStats(NamedTuple):
    policy: PolicyStats
    kl: Tensor  # mean estimate of KL to the reference per token, nats; 0 without a reference


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "sequence",
    kl_estimator: str = "k3",
    ratio: str = "token",
    surrogate: str = "clip",
) -> tuple[Tensor, GRPOStats]:
    """Clipped loss plus kl_coef * KL to the reference; log-probs (B, T), advantages (B,) or (B, T).

    On the policy's own samples, at each state visited, the expected gradient of k3 is that of
    KL(reference || policy) there, k2's that of KL(policy || reference), and k1's is 0. None of them
    sees that a token also decides which states come next.

    `aggregation`: "sequence" averages tokens within a response, then responses (GRPO,
    arXiv:2402.03300, eq. 3); "token" averages all tokens (DAPO, arXiv:2503.14476, eq. 8);
    "constant" divides the sum by B*T, a constant for every response (Dr. GRPO, arXiv:2503.20783).

    `ratio`: "token" weighs each token by its own probability ratio; "sequence" all of a response by
    the geometric mean of theirs, so that a response is clipped as a whole (GSPO, arXiv:2507.18071,
    eqs. 5 and 7; its clip ranges are some hundred times narrower). `surrogate`: "clip" takes the
    gradient off a token that has gone too far (PPO, arXiv:1707.06347, eq. 7); "cispo" leaves it and
    limits its weight to 1 + clip_high (CISPO, arXiv:2506.13585, eqs. 4 and 5).
    """
    if ratio not in ("token", "sequence") or surrogate not in ("clip", "cispo"):
        raise ValueError(f"ratio={ratio!r}, surrogate={surrogate!r}: token|sequence, clip|cispo")
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(logprobs)
    per_token, stats = _clipped_policy(
        logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high, ratio, surrogate
    )
    kl = torch.zeros_like(per_token)
    if ref_logprobs is not None:
        both = (zero_padding(x, response_mask) for x in (logprobs, ref_logprobs))
        kl = ESTIMATORS[kl_estimator](*both)
        per_token = per_token + kl_coef * kl
    elif kl_coef:
        raise ValueError("kl_coef is set but ref_logprobs is missing")
    if aggregation == "sequence":
        loss = masked_mean(per_token, response_mask, dim=1).mean()
    elif aggregation == "token":
        loss = masked_mean(per_token, response_mask)
    elif aggregation == "constant":
        loss = (per_token * response_mask).sum() / response_mask.numel()
    else:
        raise ValueError(f"aggregation={aggregation!r}: choose 'sequence', 'token' or 'constant'")
    return loss, GRPOStats(stats, masked_mean(kl, response_mask).detach())
