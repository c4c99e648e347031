"""Policy gradients proven: PPO, GRPO and leave-one-out against the gradient of E[reward].

A loss is a mean over its batch. All responses, or all groups of G responses, make up one batch
whose rows have unequal probability; as every loss is linear in the advantages, these carry it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lib.objectives import advantages, losses
from rlhf_lib.proofs.tools import Example, Proof, angle, equal, example

GROUP = 3  # 31**3 = 29,791 groups
PPO = "PPO, arXiv:1707.06347, eq. 7"
GAE = "GAE, arXiv:1506.02438, eq. 16"
GRPO = "GRPO, arXiv:2402.03300, eq. 3"
DR_GRPO = "Dr. GRPO, arXiv:2503.20783"
RLOO = "RLOO, arXiv:2402.14740, eq. 9"
Advantages = Callable[[Tensor, int], Tensor]  # of rewards (N*G,) and the group size
Loss = Callable[[Tensor, Tensor], Tensor]  # of response numbers (B,) and their log-probs (B, T)


def gae_by_definition() -> list[Proof]:
    """GAE against the sum it stands for, each token's residuals discounted one by one."""
    policy = example().policy
    rewards, values = _random(3, 2, *policy.mask.shape)
    gamma, gae_lambda = 0.97, 0.9
    measured, returns = advantages.gae(rewards, values, policy.mask, gamma, gae_lambda)
    expected = torch.zeros_like(rewards)
    for i, response in enumerate(policy.responses):
        value = [*values[i, : len(response)].tolist(), 0.0]
        for t in range(len(response)):
            for k in range(t, len(response)):
                residual = rewards[i, k] + gamma * value[k + 1] - value[k]
                expected[i, t] += (gamma * gae_lambda) ** (k - t) * residual
    kept = policy.mask.bool()
    return [
        equal("GAE = its definition, token by token", measured, expected, GAE),
        equal("GAE's return = advantage + value", returns[kept], (expected + values)[kept], GAE),
    ]


def ppo() -> list[Proof]:
    """PPO's gradient at ratio 1, with a value function that knows nothing."""
    given = example()
    policy, exact = given.policy, _exact(given)

    def update(gae_lambda: float) -> Tensor:
        weighted = _ppo_advantages(given, gae_lambda) * given.weights[:, None]
        logprobs = policy.token_logprobs()
        loss, _ = losses.ppo_policy_loss(logprobs, logprobs.detach(), weighted, policy.mask)
        return policy.gradient(-loss * policy.mask.sum())  # the loss is a mean over tokens

    return [
        equal("PPO, lambda 1, any values: grad E[reward]", update(1.0), exact, PPO),
        angle("PPO, lambda 0.95, random values: bias", update(0.95), exact, GAE),
    ]


def groups() -> list[Proof]:
    """GRPO and leave-one-out, averaged over every group of G responses there is."""
    given = example()
    exact, of_group = _exact(given), f"groups of {GROUP}"

    def centred(rewards: Tensor, group_size: int) -> Tensor:
        return advantages.group_advantages(rewards, group_size, "none")

    loo, kept = advantages.leave_one_out_advantages, (GROUP - 1) / GROUP
    return [
        equal(f"leave-one-out, {of_group}: grad E[reward]",
              _group_update(given, loo, "constant"), exact, RLOO),
        equal(f"GRPO without scale, {of_group}: (G-1)/G grad E[reward]",
              _group_update(given, centred, "constant"), kept * exact, DR_GRPO),
        angle(f"GRPO, scale by group, {of_group}: bias",
              _group_update(given, advantages.group_advantages, "constant"), exact, DR_GRPO),
        angle("leave-one-out, mean over a response's tokens: bias",
              _group_update(given, loo, "sequence"), exact, DR_GRPO),
    ]  # fmt: skip


def sampled() -> list[Proof]:
    """The same three as in training: with samples, here 64 batches of 128 groups of 8.

    Compared is the slope along the exact gradient, its standard error taken over the batches.
    """
    given, batches, size, group_size = example(), 64, 1024, 8
    policy, mask, exact = given.policy, given.policy.mask, _exact(given)
    draws = policy.sample(batches * size, torch.Generator().manual_seed(4)).view(batches, size)
    ppo_advantages = _ppo_advantages(given, gae_lambda=1.0)

    def ppo_loss(rows: Tensor, logprobs: Tensor) -> Tensor:
        old, kept = logprobs.detach(), mask[rows]
        loss, _ = losses.ppo_policy_loss(logprobs, old, ppo_advantages[rows], kept)
        return loss * kept.sum() / size  # from a mean over tokens to one over responses

    def grpo_loss(rows: Tensor, logprobs: Tensor, advantage: Tensor) -> Tensor:
        old, kept = logprobs.detach(), mask[rows]
        loss, _ = losses.grpo_loss(logprobs, old, advantage, kept, aggregation="constant")
        return loss * mask.shape[1]

    def centred_loss(rows: Tensor, logprobs: Tensor) -> Tensor:
        centred = advantages.group_advantages(given.rewards[rows], group_size, "none")
        return grpo_loss(rows, logprobs, centred)

    def left_out_loss(rows: Tensor, logprobs: Tensor) -> Tensor:
        left_out = advantages.leave_one_out_advantages(given.rewards[rows], group_size)
        return grpo_loss(rows, logprobs, left_out)

    def against(claim: str, loss: Loss, expected: Tensor, source: str) -> Proof:
        length = expected.norm()
        slopes = torch.stack([
            -(policy.gradient(loss(rows, policy.token_logprobs()[rows])) * expected).sum() / length
            for rows in draws
        ])  # fmt: skip
        error = (slopes.mean() - length).abs() / (slopes.std() / math.sqrt(batches))
        pair = slopes.mean().item(), length.item()
        return Proof("enumeration", claim, *pair, error.item(), 4.0, "standard errors", source)

    kept = (group_size - 1) / group_size
    return [
        against("PPO, 65,536 samples: grad E[reward]", ppo_loss, exact, PPO),
        against("GRPO without scale, 65,536 samples: (G-1)/G grad E[reward]",
                centred_loss, kept * exact, DR_GRPO),
        against("leave-one-out, 65,536 samples: grad E[reward]",
                left_out_loss, exact, RLOO),
    ]  # fmt: skip


def identities() -> list[Proof]:
    """Where two methods are one."""
    given = example()
    policy = given.policy
    (advantage,) = _random(5, 1, *policy.mask.shape)
    scores = given.rewards[_all_groups(given)].view(-1)
    centred = advantages.group_advantages(scores, GROUP, "none")
    left_out = advantages.leave_one_out_advantages(scores, GROUP)

    def ppo_gradient(clip_range: float) -> Tensor:
        logprobs = policy.token_logprobs()
        loss, _ = losses.ppo_policy_loss(
            logprobs, logprobs.detach(), advantage, policy.mask, clip_range
        )
        return policy.gradient(loss)

    weighted = (policy.token_logprobs() * advantage).sum() / policy.mask.sum()
    reinforce = policy.gradient(-weighted)
    return [
        equal("advantages: GRPO without scale = (G-1)/G leave-one-out",
              centred, left_out * (GROUP - 1) / GROUP, DR_GRPO),
        equal("PPO at ratio 1 = REINFORCE", ppo_gradient(0.2), reinforce, PPO),
        equal("PPO at ratio 1: no clip range changes the gradient",
              ppo_gradient(1e-6), ppo_gradient(1e6), PPO),
    ]  # fmt: skip


def _random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _exact(given: Example) -> Tensor:
    return given.policy.gradient(given.policy.expectation(given.rewards))


def _ppo_advantages(given: Example, gae_lambda: float) -> Tensor:
    """GAE of the rewards, with a value drawn at random for every state."""
    mask, nothing = given.policy.mask, torch.zeros_like(given.ref_logprobs)
    rewards = advantages.kl_shaped_rewards(given.rewards, nothing, nothing, mask, kl_coef=0.0)
    values = _random(6, len(given.policy.logits))[given.policy.states]
    return advantages.gae(rewards, values, mask, 1.0, gae_lambda)[0]


def _all_groups(given: Example) -> Tensor:
    """Every way to draw a group: response numbers (N**G, G)."""
    return torch.cartesian_prod(*[torch.arange(len(given.weights))] * GROUP)


def _group_update(given: Example, of_group: Advantages, aggregation: str) -> Tensor:
    """GRPO's expected step (minus its gradient) at ratio 1, in units of one token."""
    policy, groups = given.policy, _all_groups(given)
    rows = groups.view(-1)
    # in place of equal weights in a mean over groups, each group's probability
    weights = given.weights[groups].prod(1) * len(groups)
    advantage = of_group(given.rewards[rows], GROUP) * weights.repeat_interleave(GROUP)
    logprobs = policy.token_logprobs()[rows]
    loss, _ = losses.grpo_loss(
        logprobs, logprobs.detach(), advantage, policy.mask[rows], aggregation=aggregation
    )
    return policy.gradient(-loss * policy.mask.shape[1])  # "constant" divides by the length T
