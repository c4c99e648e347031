"""From rewards to advantages.

Shapes: B sequences, T response positions, N prompts, G responses to each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lib.objectives.kl import ESTIMATORS
from rlhf_lib.objectives.masked import masked_mean, zero_padding


def kl_shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    estimator: str = "k1",
) -> Tensor:
    """Per-token rewards (B, T): -kl_coef * k1 at each real token, plus the score at the last one.

    `scores` (B,): one per whole response. Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    The policy gradient of k1 in the reward is that of the KL. k3 has the same mean but its value
    depends on the policy too, so its policy gradient is another one; so is k2's.
    """
    rewards = -kl_coef * ESTIMATORS[estimator](logprobs, ref_logprobs)
    rewards = zero_padding(rewards, response_mask)
    last = response_mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def soft_overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """What long responses lose: (B,), from 0 where `buffer` tokens are left to -1 at `longest`.

    Source: DAPO, arXiv:2503.14476, eq. 13. A buffer of 0 takes nothing.
    """
    if not buffer:
        return torch.zeros_like(lengths)
    return -((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, both (B, T), 0 where masked out.

    The value after the last token is 0: a response is a whole episode. Returns are
    advantages + values, from advantages that are not whitened yet.
    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    mask = response_mask.to(rewards.dtype)
    rewards, values = zero_padding(torch.stack((rewards, values)), mask)
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """Rewards (N*G,), a group's G rows adjacent, minus their group's mean; then scaled.

    `scale`: "group" divides by the group's standard deviation + 1e-4 (GRPO, arXiv:2402.03300,
    sec. 4.1), "batch" by that of the batch, "none" by nothing (Dr. GRPO, arXiv:2503.20783).
    A group without spread gives zeros. Raises ValueError for a bad scale or group size.
    """
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale={scale!r}: choose 'group', 'batch' or 'none'")
    # equal rewards leave rounding error behind, which a tiny deviation would blow up
    spread = (groups != groups[:, :1]).any(1, keepdim=True)
    return torch.where(spread, centred, torch.zeros_like(centred)).view(-1)


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Each reward minus the mean of the *others* in its group: (N*G,) -> (N*G,).

    Source: RLOO, Ahmadian et al. 2024, arXiv:2402.14740, eq. 9.
    """
    groups = _groups(rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or rewards.numel() % group_size:
        count = rewards.numel()
        raise ValueError(f"{count} rewards do not form groups of {group_size} (at least 2)")
    return rewards.view(-1, group_size)


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 a constant."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, response_mask)) ** 2, response_mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)
