"""KL proven by enumeration: what the estimators are, what they do as a loss, and in the reward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lib.objectives import advantages, kl
from rlhf_lib.proofs.tools import Proof, angle, equal, example, figure

KL_COEF = 0.3
SCHULMAN = "J. Schulman, Approximating KL divergence, 2020"
OUYANG = "Ouyang et al. 2022, arXiv:2203.02155, eq. 2"
Estimator = Callable[[Tensor, Tensor], Tensor]


def kl_values() -> list[Proof]:
    """What the estimators are on average, each summed over the tokens of a response."""
    policy, reference, _, _, ref_logprobs = example()
    exact = policy.kl(reference)

    def mean(estimator: Estimator) -> Tensor:
        per_token = estimator(policy.token_logprobs(), ref_logprobs) * policy.mask
        return policy.expectation(per_token.sum(1))

    by_state = kl.full_kl(policy.logits, reference.logits)
    visited = policy.expectation((by_state[policy.states] * policy.mask).sum(1))
    return [
        equal("E[k1] = KL(policy || ref)", mean(kl.k1), exact, SCHULMAN),
        equal("E[k3] = KL(policy || ref)", mean(kl.k3), exact, SCHULMAN),
        # full_kl computes in float32
        equal("E[full_kl] = KL(policy || ref)", visited, exact, "chain rule", 1e-6),
        figure("E[k2] is biased", mean(kl.k2).item(), exact.item(), "nats", SCHULMAN),
    ]


def kl_gradients() -> list[Proof]:
    """What the estimators do as a loss: their mean gradient over the policy's own samples.

    A sample passes no gradient on, so its weight is a constant. Summed over tokens, an estimator
    sees what a token does to the KL at its own state, and not that it leads to other states:
    "at the states visited" is the gradient of KL in which the way there is held fixed.
    """
    policy, reference, _, weights, ref_logprobs = example()
    log_p, log_q = policy.logits.log_softmax(-1), reference.logits.log_softmax(-1).detach()
    to_reference = policy.gradient(policy.kl(reference))
    from_reference = policy.gradient(-reference.expectation(policy.logprobs()))

    def mean(per_token: Tensor) -> Tensor:
        return policy.gradient((weights * (per_token * policy.mask).sum(1)).sum())

    def by_token(estimator: Estimator) -> Tensor:
        return mean(estimator(policy.token_logprobs(), ref_logprobs))

    def by_response(estimator: Estimator) -> Tensor:
        whole = estimator(policy.logprobs(), ref_logprobs.sum(1))
        return policy.gradient((weights * whole).sum())

    def at_visited(by_state: Tensor) -> Tensor:
        return mean(by_state.sum(-1)[policy.states])

    k1, k2, k3 = by_token(kl.k1), by_token(kl.k2), by_token(kl.k3)
    return [
        equal("E[grad k1] = 0", k1, torch.zeros_like(k1), SCHULMAN),
        equal("E[grad k2 of the response] = grad KL(policy || ref)",
              by_response(kl.k2), to_reference, SCHULMAN),
        equal("E[grad k2 by token] = grad KL(policy || ref) at states visited",
              k2, at_visited(log_p.exp() * (log_p - log_q)), SCHULMAN),
        angle("E[grad k2 by token] against grad KL(policy || ref)", k2, to_reference, SCHULMAN),
        equal("E[grad k3 of the response] = grad KL(ref || policy)",
              by_response(kl.k3), from_reference, SCHULMAN),
        equal("E[grad k3 by token] = grad KL(ref || policy) at states visited",
              k3, at_visited(log_q.exp() * (log_q - log_p)), SCHULMAN),
        angle("E[grad k3 by token] against grad KL(policy || ref)", k3, to_reference, SCHULMAN),
    ]  # fmt: skip


def single_token() -> list[Proof]:
    """With responses of one token there are no later states: k2 by token is exact."""
    policy, reference, _, weights, ref_logprobs = example(max_length=1)
    k2 = (weights * kl.k2(policy.token_logprobs(), ref_logprobs).sum(1)).sum()
    exact = policy.gradient(policy.kl(reference))
    claim = "E[grad k2] = grad KL(policy || ref), one token"
    return [equal(claim, policy.gradient(k2), exact, SCHULMAN)]


def kl_in_reward() -> list[Proof]:
    """KL in the reward: k1 gives the gradient of reward minus KL, later states included.

    k3's own value moves with the policy, so in the reward it is only part of the gradient of KL:
    what it gives as a loss is the rest. For k1 that rest is 0.
    """
    policy, reference, rewards, weights, ref_logprobs = example()
    logprobs = policy.token_logprobs()

    def ascent(scores: Tensor, kl_coef: float, estimator: str) -> Tensor:
        shaped = advantages.kl_shaped_rewards(
            scores, logprobs.detach(), ref_logprobs, policy.mask, kl_coef, estimator
        )
        to_come = shaped.flip(1).cumsum(1).flip(1)  # the reward from this token on
        return policy.gradient((weights[:, None] * to_come * logprobs).sum())

    kl_gradient = policy.gradient(policy.kl(reference))
    exact = policy.gradient(policy.expectation(rewards)) - KL_COEF * kl_gradient
    in_reward = -ascent(torch.zeros_like(rewards), 1.0, "k3")
    as_loss = (weights * (kl.k3(logprobs, ref_logprobs) * policy.mask).sum(1)).sum()
    return [
        equal("k1 in the reward: policy gradient = grad (E[reward] - c KL)",
              ascent(rewards, KL_COEF, "k1"), exact, OUYANG),
        equal("k3 in the reward plus E[grad k3] = grad KL(policy || ref)",
              in_reward + policy.gradient(as_loss), kl_gradient, "product rule"),
        angle("k3 in the reward alone against grad KL(policy || ref)",
              in_reward, kl_gradient, "product rule"),
    ]  # fmt: skip
