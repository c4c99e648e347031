"""Each proof fails once the function it is about is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_lib.measure import evaluate
from rlhf_lib.objectives import advantages, kl, losses, preference
from rlhf_lib.objectives.masked import masked_mean
from rlhf_lib.proofs import policy as policy_proofs
from rlhf_lib.proofs.claims import Proof
from rlhf_lib.proofs.kl import best_of_n, kl_gradients, kl_in_reward, kl_values, single_token
from rlhf_lib.proofs.parity import all_proofs
from rlhf_lib.proofs.policy import (
    dpo,
    entropy_bonus,
    gae_by_definition,
    groups,
    identities,
    online_dpo,
    ppo,
    ratios,
    sampled,
)


def turned(estimator: Callable) -> Callable:
    return lambda logprobs, ref_logprobs: estimator(ref_logprobs, logprobs)


def gae_with(gae_lambda: float) -> Callable:
    def wrong(gae: Callable) -> Callable:
        return lambda rewards, values, mask, gamma, _: gae(rewards, values, mask, gamma, gae_lambda)

    return wrong


def returns_of_scaled_advantages(gae: Callable) -> Callable:
    def wrong(rewards: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        scaled = gae(rewards, values, *rest)[0] / 2
        return gae(rewards, values, *rest)[0], scaled + values

    return wrong


def one_too_few(group_advantages: Callable) -> Callable:
    def wrong(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
        if scale != "none":
            return group_advantages(rewards, group_size, scale)
        members = rewards.view(-1, group_size)
        return (members - members.sum(1, keepdim=True) / (group_size - 1)).view(-1)

    return wrong


def mean_of_means(_: Callable) -> Callable:
    def wrong(
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        clip_range: float = 0.2,
    ) -> tuple[Tensor, None]:
        ratio = (logprobs - old_logprobs).exp()
        return masked_mean(-advantages * ratio, mask, dim=1).mean(), None

    return wrong


def clipped_around_zero(_: Callable) -> Callable:
    def wrong(
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        clip_range: float = 0.2,
    ) -> tuple[Tensor, None]:
        ratio = (logprobs - old_logprobs).exp()
        clipped = ratio.clamp(-clip_range, clip_range)
        return masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask), None

    return wrong


def term_taken_twice(best_of_n: Callable) -> Callable:
    def wrong(*scores: Any) -> list[dict]:
        rows = best_of_n(*scores)
        return rows.assign(kl=rows["kl"] - (1 - 1 / rows["n"]))

    return wrong


class Mutation(NamedTuple):
    module: ModuleType
    function: str
    wrong: Callable[[Callable], Callable]  # the right function to the wrong one
    proofs: tuple[Callable[[], list[Proof]], ...]
    broken: tuple[str, ...]  # claims that must not hold any more, named by what they contain


MUTATIONS = {
    "k1 with its sign reversed": Mutation(kl, "k1", turned, (kl_values,), ("E[k1] = KL",)),
    "k2 in the place of k1": Mutation(
        kl, "k1", lambda _: kl.k2, (kl_gradients,), ("E[grad k1] = 0",)
    ),
    "k2 without its half": Mutation(
        kl,
        "k2",
        lambda k2: lambda *pair: 2 * k2(*pair),
        (kl_gradients, single_token),
        ("k2 of the response] =", "k2 by token] =", "E[grad k2] = grad KL(policy || ref), one"),
    ),
    "k3 of the reversed ratio": Mutation(
        kl,
        "k3",
        turned,
        (kl_values, kl_gradients, kl_in_reward),
        ("E[k3] = KL", "k3 of the response] =", "k3 by token] =", "k3 in the reward plus"),
    ),
    "full_kl from the reference": Mutation(kl, "full_kl", turned, (kl_values,), ("E[full_kl",)),
    "KL added to the reward": Mutation(
        advantages,
        "kl_shaped_rewards",
        lambda shape: lambda s, p, q, mask, c, *rest: shape(s, p, q, mask, -c, *rest),
        (kl_in_reward,),
        ("k1 in the reward:", "k3 in the reward plus"),
    ),
    "GAE that forgets lambda": Mutation(
        advantages, "gae", gae_with(1.0), (gae_by_definition,), ("GAE = its definition",)
    ),
    "GAE of one residual": Mutation(
        advantages,
        "gae",
        gae_with(0.0),
        (gae_by_definition, ppo, sampled),
        ("GAE = its definition", "PPO, lambda 1,", "PPO, 65,536 samples"),
    ),
    "returns computed after the advantages were scaled": Mutation(
        advantages, "gae", returns_of_scaled_advantages, (gae_by_definition,), ("GAE's return",)
    ),
    "a group's mean with the wrong divisor": Mutation(
        advantages,
        "group_advantages",
        one_too_few,
        (groups, identities),
        ("GRPO without scale, groups", "advantages: GRPO"),
    ),
    "a group's mean without the sample itself": Mutation(
        advantages,
        "group_advantages",
        lambda _: lambda rewards, size, _: advantages.leave_one_out_advantages(rewards, size),
        (sampled, identities),
        ("GRPO without scale, 65,536", "advantages: GRPO"),
    ),
    "leave-one-out that leaves nobody out": Mutation(
        advantages,
        "leave_one_out_advantages",
        lambda _: lambda rewards, size: advantages.group_advantages(rewards, size, "none"),
        (groups, sampled, identities),
        ("leave-one-out, groups", "leave-one-out, 65,536", "advantages: GRPO"),
    ),
    "a constant divisor that follows the length": Mutation(
        losses,
        "grpo_loss",
        lambda loss: lambda *tensors, aggregation: loss(*tensors, aggregation="sequence"),
        (groups,),
        ("GRPO without scale, groups", "leave-one-out, groups"),
    ),
    "PPO's loss as a mean of means": Mutation(
        losses,
        "ppo_policy_loss",
        mean_of_means,
        (ppo, identities),
        ("PPO, lambda 1,", "PPO at ratio 1 = REINFORCE"),
    ),
    "a clip range around 0": Mutation(
        losses,
        "ppo_policy_loss",
        clipped_around_zero,
        (identities,),
        ("PPO at ratio 1: no clip range",),
    ),
    "DPO with the sign of beta flipped": Mutation(
        preference,
        "dpo_loss",
        lambda loss: lambda *pair, beta: loss(*pair, beta=-beta),
        (dpo,),
        ("DPO's gradient", "DPO's optimum"),
    ),
    "best-of-n's KL with a term taken twice": Mutation(
        evaluate,
        "best_of_n",
        term_taken_twice,
        (best_of_n,),
        ("best of 8: KL is at most", "best of 8, 100,000"),
    ),
    "a sequence's ratio that is a product": Mutation(
        losses,
        "masked_mean",
        lambda mean: (
            lambda x, mask, dim=None: (
                (x * mask).sum(1) if dim == 1 and x.grad_fn is not None else mean(x, mask, dim)
            )
        ),
        (ratios,),
        ("GSPO at ratio 1", "GSPO off-policy"),
    ),
    "CISPO's weight limited at 1": Mutation(
        losses,
        "_clipped_policy",
        lambda right: lambda *args: right(*args[:5], min(args[5], 0.0), *args[6:]),
        (ratios,),
        ("CISPO without a limit", "CISPO: sum of min"),
    ),
    "entropy without its logarithm": Mutation(
        policy_proofs,
        "entropy",
        lambda entropy: lambda logits: -(logits.softmax(-1) ** 2).sum(-1),
        (entropy_bonus,),
        ("entropy of a state",),
    ),
    "DPO's loss of the other reply": Mutation(
        preference,
        "dpo_loss",
        lambda loss: lambda c, r, *rest, **named: loss(r, c, *rest, **named),
        (online_dpo,),
        ("online DPO's first step: beta/2",),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_function_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mutation = MUTATIONS[name]
    right = getattr(mutation.module, mutation.function)
    monkeypatch.setattr(mutation.module, mutation.function, mutation.wrong(right))
    fallen = [proof.claim for prove in mutation.proofs for proof in prove() if not proof.holds]
    assert [part for part in mutation.broken if not any(part in claim for claim in fallen)] == []


def test_every_claim_falls_to_some_mutation() -> None:
    judged = [proof.claim for proof in all_proofs() if proof.tolerance < math.inf]
    parts = [part for mutation in MUTATIONS.values() for part in mutation.broken]
    assert [claim for claim in judged if not any(part in claim for part in parts)] == []
    assert [part for part in parts if not any(part in claim for claim in judged)] == []
