"""Where methods end up, proven: DPO's gradient and optimum, and the KL of best-of-n."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlhf_lib.measure import evaluate
from rlhf_lib.objectives import losses
from rlhf_lib.proofs.tools import EXACT, Proof, equal, example

BETA = 0.5
DPO = "DPO, arXiv:2305.18290"
BEST_OF_N = "Beirami et al. 2024, arXiv:2401.01879"


def dpo() -> list[Proof]:
    """DPO's gradient on all pairs, and its optimum, found by an optimizer that knows no formula."""
    given = example()
    policy, ref_logprobs = given.policy, given.ref_logprobs.sum(1)
    count = len(policy.responses)
    first, second = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    # both drawn from the reference; Bradley-Terry says how often `first` is the chosen one
    drawn = ref_logprobs[first].exp() * ref_logprobs[second].exp()
    weights = drawn * torch.sigmoid(given.rewards[first] - given.rewards[second])

    def loss_of_pair(chosen: Tensor, rejected: Tensor, ref_c: Tensor, ref_r: Tensor) -> Tensor:
        return losses.dpo_loss(chosen, rejected, ref_c, ref_r, beta=BETA)[0]

    def loss_of_pairs() -> Tensor:
        """dpo_loss of each pair by itself, `first` being the chosen one: (N*N,)."""
        logprobs, ref = policy.logprobs(), ref_logprobs
        return torch.vmap(loss_of_pair)(logprobs[first], logprobs[second], ref[first], ref[second])

    def formula() -> Tensor:
        """-beta sigmoid(rejected - chosen) (grad log p(chosen) - grad log p(rejected))."""
        logprobs = policy.logprobs()
        implicit = BETA * (logprobs - ref_logprobs).detach()
        wrong = torch.sigmoid(implicit[second] - implicit[first])
        per_pair = -BETA * wrong * (logprobs[first] - logprobs[second])
        return policy.gradient((weights * per_pair).sum())

    gradient = policy.gradient((weights * loss_of_pairs()).sum())
    claim = "DPO's gradient: pairs weighted by how wrong they are"
    proofs = [equal(claim, gradient, formula(), f"{DPO}, sec. 4")]

    optimizer = torch.optim.LBFGS(
        [policy.logits], max_iter=1000, tolerance_grad=1e-12, tolerance_change=0,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        loss = (weights * loss_of_pairs()).sum()
        policy.logits.grad = policy.gradient(loss)
        return loss.item()

    optimizer.step(closure)
    optimum = (ref_logprobs + given.rewards / BETA).softmax(0)
    claim = "DPO's optimum = ref exp(reward / beta) / Z"
    return [*proofs, equal(claim, policy.probabilities(), optimum, f"{DPO}, eq. 4", 1e-6)]


def best_of_n() -> list[Proof]:
    """KL(best of n samples || policy), from the distribution of the best, and its bound."""
    n = 8
    bound = evaluate.best_of_n(np.zeros((1, n)), {})[-1]["kl"]
    given, count = example(), 100_000
    exact = _best_of_n_kl(given.weights[given.rewards.argsort()], n)
    many = _best_of_n_kl(torch.full((count,), 1 / count, dtype=torch.float64), n)
    return [
        Proof("enumeration", "best of 8: KL is at most log n - (n-1)/n", exact, bound,
              max(exact - bound, 0.0), EXACT, "nats above it", BEST_OF_N),
        Proof("enumeration", f"best of 8, {count:,} responses: KL = log n - (n-1)/n", many, bound,
              abs(many - bound), 1e-8, "nats", BEST_OF_N),
    ]  # fmt: skip


def _best_of_n_kl(probabilities: Tensor, n: int) -> float:
    """Exact KL in nats; `probabilities` (N,) in rising order of reward, no two rewards equal."""
    at_most = probabilities.cumsum(0)
    # the best is this response: all n are at most this one, and not all are below it
    best = at_most**n - (at_most - probabilities) ** n
    return torch.xlogy(best, best / probabilities).sum().item()
