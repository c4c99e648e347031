"""KL proven by enumeration: what its estimators are, what they do as a loss and in the reward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rlhf_lib.measure import evaluate
from rlhf_lib.objectives import advantages, kl
from rlhf_lib.proofs.claims import EXACT, Proof, angle, equal, figure
from rlhf_lib.proofs.enumeration import example

KL_COEF = 0.3
SCHULMAN = "J. Schulman, Approximating KL divergence, 2020"
OUYANG = "Ouyang et al. 2022, arXiv:2203.02155, eq. 2"
BEST_OF_N = "Beirami et al. 2024, arXiv:2401.01879"
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
        figure("E[k2] is biased", mean(kl.k2).item(), exact.item(), SCHULMAN, "nats"),
    ]


def kl_gradients() -> list[Proof]:
    """What the estimators do as a loss: their mean gradient over the policy's own samples.

    A sample passes no gradient on, so its weight is a constant. Summed over tokens, an estimator
    sees what a token does to the KL at its own state, and not that it leads to other states:
    "at states visited" is the gradient of KL in which the way there is held fixed.
    """
    policy, reference, _, weights, ref_logprobs = example()
    log_p, log_q = policy.logits.log_softmax(-1), reference.logits.log_softmax(-1).detach()

    def mean(per_token: Tensor) -> Tensor:
        return policy.gradient((weights * (per_token * policy.mask).sum(1)).sum())

    def by_response(estimator: Estimator) -> Tensor:
        whole = estimator(policy.logprobs(), ref_logprobs.sum(1))
        return policy.gradient((weights * whole).sum())

    def at_visited(by_state: Tensor) -> Tensor:
        return mean(by_state.sum(-1)[policy.states])

    k1, k2, k3 = (mean(e(policy.token_logprobs(), ref_logprobs)) for e in (kl.k1, kl.k2, kl.k3))
    whole_k2, whole_k3 = by_response(kl.k2), by_response(kl.k3)
    at_k2 = at_visited(log_p.exp() * (log_p - log_q))
    at_k3 = at_visited(log_q.exp() * (log_q - log_p))
    ahead = policy.gradient(policy.kl(reference))
    back = policy.gradient(-reference.expectation(policy.logprobs()))
    to_ref, from_ref = "grad KL(policy || ref)", "grad KL(ref || policy)"
    return [
        equal("E[grad k1] = 0", k1, torch.zeros_like(k1), SCHULMAN),
        equal(f"E[grad k2 of the response] = {to_ref}", whole_k2, ahead, SCHULMAN),
        equal(f"E[grad k2 by token] = {to_ref} at states visited", k2, at_k2, SCHULMAN),
        angle(f"E[grad k2 by token] against {to_ref}", k2, ahead, SCHULMAN),
        equal(f"E[grad k3 of the response] = {from_ref}", whole_k3, back, SCHULMAN),
        equal(f"E[grad k3 by token] = {from_ref} at states visited", k3, at_k3, SCHULMAN),
        angle(f"E[grad k3 by token] against {to_ref}", k3, ahead, SCHULMAN),
    ]


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

    of_kl = policy.gradient(policy.kl(reference))
    exact = policy.gradient(policy.expectation(rewards)) - KL_COEF * of_kl
    k1, k3 = ascent(rewards, KL_COEF, "k1"), -ascent(torch.zeros_like(rewards), 1.0, "k3")
    as_loss = (weights * (kl.k3(logprobs, ref_logprobs) * policy.mask).sum(1)).sum()
    both, rule = k3 + policy.gradient(as_loss), "product rule"
    return [
        equal("k1 in the reward: policy gradient = grad (E[reward] - c KL)", k1, exact, OUYANG),
        equal("k3 in the reward plus E[grad k3] = grad KL(policy || ref)", both, of_kl, rule),
        angle("k3 in the reward alone against grad KL(policy || ref)", k3, of_kl, rule),
    ]


def best_of_n() -> list[Proof]:
    """KL(best of n samples || policy), from the distribution of the best, and its bound."""
    n, count = 8, 100_000
    bound = evaluate.best_of_n(np.zeros((1, n)), {})["kl"].tolist()[-1]
    given = example()
    few = kl_of_best(given.weights[given.rewards.argsort()], n)
    many = kl_of_best(torch.full((count,), 1 / count, dtype=torch.float64), n)
    below, formula = "best of 8: KL is at most log n - (n-1)/n", "KL = log n - (n-1)/n"
    above, off = max(few - bound, 0.0), abs(many - bound)
    return [
        Proof(below, few, bound, above, EXACT, BEST_OF_N, "nats above it"),
        Proof(
            f"best of 8, {count:,} responses: {formula}", many, bound, off, 1e-8, BEST_OF_N, "nats"
        ),
    ]


def kl_of_best(probabilities: Tensor, n: int) -> float:
    """Exact KL in nats; `probabilities` (N,) in rising order of reward, no two rewards equal."""
    at_most = probabilities.cumsum(0)
    # the best is this response: all n are at most this one, and not all are below it
    best = at_most**n - (at_most - probabilities) ** n
    return torch.xlogy(best, best / probabilities).sum().item()
