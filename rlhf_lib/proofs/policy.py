"""Methods proven: PPO, GRPO, leave-one-out and DPO against the gradients that they stand for.

A loss is a mean over its batch. All responses, or all groups of G responses, make up one batch
whose rows have unequal probability; as every loss is linear in the advantages, these carry it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlhf_lib.objectives import advantages, losses, preference
from rlhf_lib.objectives.masked import entropy
from rlhf_lib.proofs import plain
from rlhf_lib.proofs.claims import Proof, angle, equal
from rlhf_lib.proofs.enumeration import Example, example

GROUP = 3  # 31**3 = 29,791 groups
BETA = 0.5
PPO = "PPO, arXiv:1707.06347, eq. 7"
GAE = "GAE, arXiv:1506.02438, eq. 16"
GRPO = "GRPO, arXiv:2402.03300, eq. 3"
DR_GRPO = "Dr. GRPO, arXiv:2503.20783"
RLOO = "RLOO, arXiv:2402.14740, eq. 9"
DPO = "DPO, arXiv:2305.18290"
GSPO = "GSPO, arXiv:2507.18071, eqs. 5, 7"
CISPO = "CISPO, arXiv:2506.13585, eqs. 4, 5"
ONLINE = "online DPO, arXiv:2402.04792"
Advantages = Callable[[Tensor, int], Tensor]  # of rewards (N*G,) and the group size


def gae_by_definition() -> list[Proof]:
    """GAE against the sum it stands for, each token's residuals discounted one by one."""
    policy = example().policy
    rewards, values = _random(3, 2, *policy.mask.shape)
    gamma, gae_lambda = 0.97, 0.9
    measured, returns = advantages.gae(rewards, values, policy.mask, gamma, gae_lambda)
    values = values * policy.mask
    # a matrix times the residuals: no recursion
    expected, _ = plain.gae(rewards, values, policy.mask, gamma, gae_lambda)
    return [
        equal("GAE = its definition, token by token", measured, expected, GAE),
        equal("GAE's return = advantage + value", returns, expected + values, GAE),
    ]


def ppo() -> list[Proof]:
    """PPO's gradient at ratio 1, with a value function that knows nothing."""
    given = example()
    tokens, exact = given.policy.mask.sum(), _exact(given)

    def update(gae_lambda: float) -> Tensor:
        weighted = _ppo_advantages(given, gae_lambda) * given.weights[:, None]
        return -_ppo_gradient(given, weighted) * tokens  # the loss is a mean over tokens

    return [
        equal("PPO, lambda 1, any values: grad E[reward]", update(1.0), exact, PPO),
        angle("PPO, lambda 0.95, random values: bias", update(0.95), exact, GAE),
    ]


def groups() -> list[Proof]:
    """GRPO and leave-one-out, averaged over every group of G responses there is."""
    given, of = example(), f"groups of {GROUP}"
    loo, kept, exact = advantages.leave_one_out_advantages, (GROUP - 1) / GROUP, _exact(given)
    groups = _all_groups(given)
    rows, length = groups.view(-1), given.policy.mask.shape[1]
    # in place of equal weights in a mean over groups, each group's probability
    weights = given.weights[groups].prod(1) * len(groups)

    def update(of_group: Advantages, aggregation: str) -> Tensor:
        """GRPO's expected step (minus its gradient) at ratio 1, in units of one token."""
        advantage = of_group(given.rewards[rows], GROUP) * weights.repeat_interleave(GROUP)
        logprobs, mask = given.policy.token_logprobs()[rows], given.policy.mask[rows]
        loss = _grpo_loss(logprobs, advantage, mask, aggregation)
        return given.policy.gradient(-loss * length)  # "constant" divides by the length T

    left_out, centred = update(loo, "constant"), update(_centred, "constant")
    scaled, averaged = update(advantages.group_advantages, "constant"), update(loo, "sequence")
    smaller = f"GRPO without scale, {of}: (G-1)/G grad E[reward]"
    return [
        equal(f"leave-one-out, {of}: grad E[reward]", left_out, exact, RLOO),
        equal(smaller, centred, kept * exact, DR_GRPO),
        angle(f"GRPO, scale by group, {of}: bias", scaled, exact, DR_GRPO),
        angle("leave-one-out, mean over a response's tokens: bias", averaged, exact, DR_GRPO),
    ]


def sampled() -> list[Proof]:
    """The same three as in training: with samples, here 64 batches of 128 groups of 8.

    Compared is the slope along the exact gradient, its standard error taken over the batches.
    """
    given, batches, size, group_size = example(), 64, 1024, 8
    policy, mask, exact = given.policy, given.policy.mask, _exact(given)
    draw = torch.Generator().manual_seed(4)
    draws = torch.multinomial(given.weights, batches * size, replacement=True, generator=draw)
    ppo_advantages = _ppo_advantages(given, gae_lambda=1.0)

    def ppo_loss(rows: Tensor) -> Tensor:
        logprobs, kept = policy.token_logprobs()[rows], mask[rows]
        loss, _ = losses.ppo_policy_loss(logprobs, logprobs.detach(), ppo_advantages[rows], kept)
        return loss * kept.sum() / size  # from a mean over tokens to one over responses

    def grpo_loss(of_group: Advantages, rows: Tensor) -> Tensor:
        advantage, logprobs = of_group(given.rewards[rows], group_size), policy.token_logprobs()
        return _grpo_loss(logprobs[rows], advantage, mask[rows], "constant") * mask.shape[1]

    kept, smaller = (group_size - 1) / group_size, "(G-1)/G grad E[reward]"
    centred = partial(grpo_loss, _centred)
    left_out = partial(grpo_loss, advantages.leave_one_out_advantages)
    proofs = []
    for claim, loss, expected, source in (
        ("PPO, 65,536 samples: grad E[reward]", ppo_loss, exact, PPO),
        (f"GRPO without scale, 65,536 samples: {smaller}", centred, kept * exact, DR_GRPO),
        ("leave-one-out, 65,536 samples: grad E[reward]", left_out, exact, RLOO),
    ):
        length = expected.norm()
        steps = [-policy.gradient(loss(rows)) for rows in draws.view(batches, size)]
        slopes = torch.stack([(step * expected).sum() / length for step in steps])
        error = (slopes.mean() - length).abs() / (slopes.std() / math.sqrt(batches))
        shown = slopes.mean().item(), length.item(), error.item()
        proofs.append(Proof(claim, *shown, 4.0, source, "standard errors"))
    return proofs


def ratios() -> list[Proof]:
    """What becomes of samples of an older policy: token ratios, a sequence's, limited weights.

    The reference stands for the older policy: its responses, as often as it gives them.
    """
    given = example()
    policy, mask, old = given.policy, given.policy.mask, given.ref_logprobs
    often, clips = old.sum(1).exp(), (0.2, 0.28)
    logprobs, lengths = policy.token_logprobs(), mask.sum(1)
    sequence = ((logprobs - old).sum(1) / lengths).exp()
    token = (logprobs - old).exp() * mask
    limited = token.detach().clamp(max=1.28)

    def step(aggregation: str, low: float = 1e9, high: float = 1e9, **how: str) -> Tensor:
        """The expected step (minus the gradient), "constant" in units of one token."""
        advantage = given.rewards * often * len(often)
        loss, _ = losses.grpo_loss(
            logprobs, old, advantage, mask, None, 0.0, low, high, aggregation, **how
        )
        return policy.gradient(-loss * (mask.shape[1] if aggregation == "constant" else 1))

    unlimited = step("constant")
    weighed = policy.gradient((often * given.rewards * sequence).sum())
    by_hand = policy.gradient((often * given.rewards * (limited * logprobs).sum(1)).sum())
    cispo = step("constant", *clips, surrogate="cispo")
    (advantage,) = _random(7, 1, len(often))

    def at_once(ratio: str) -> Tensor:
        loss, _ = losses.grpo_loss(logprobs, logprobs.detach(), advantage, mask, ratio=ratio)
        return policy.gradient(loss)

    return [
        equal("GSPO at ratio 1 = GRPO, mean over a reply's tokens",
              at_once("sequence"), at_once("token"), GSPO),
        equal("GSPO off-policy: grad of E_old[s A], s a geometric mean",
              step("sequence", ratio="sequence"), weighed, GSPO),
        equal("CISPO without a limit = the surrogate without a clip",
              step("constant", surrogate="cispo"), unlimited, CISPO),
        equal("CISPO: sum of min(ratio, 1.28) A grad log p", cispo, by_hand, CISPO),
        angle("CISPO, weights limited at 1.28: from the surrogate's", cispo, unlimited, CISPO),
        angle("clip at 0.8, 1.28: from the surrogate's", step("constant", *clips), unlimited, PPO),
    ]  # fmt: skip


def entropy_bonus() -> list[Proof]:
    """The gradient of a state's entropy, and what a bonus on it leaves out."""
    given = example()
    policy = given.policy
    logp = policy.logits.log_softmax(-1)
    each = entropy(policy.logits)
    formula = -(logp.exp() * (logp + each[:, None])).detach()
    often = given.weights[:, None] * policy.mask  # how often a state is visited: constants
    bonus = policy.gradient((often * each[policy.states]).sum())
    whole = policy.gradient(-policy.expectation(policy.logprobs()))
    return [
        equal("entropy of a state: gradient -p (log p + H)",
              policy.gradient(each.sum()), formula, "definition"),
        angle("entropy bonus on visited states: from that of whole replies", bonus, whole,
              "PPO, arXiv:1707.06347, eq. 9"),
    ]  # fmt: skip


def online_dpo() -> list[Proof]:
    """The first step on the policy's own pairs, over all pairs that there are."""
    given = example()
    policy, logprobs = given.policy, given.policy.logprobs()
    numbers = torch.arange(len(policy.responses))
    first, second = torch.cartesian_prod(numbers, numbers).T
    won = given.rewards[first] > given.rewards[second]
    chosen, rejected = torch.where(won, first, second), torch.where(won, second, first)
    drawn = given.weights[first] * given.weights[second]

    def of_pair(*logs: Tensor) -> Tensor:
        return preference.dpo_loss(*logs, beta=BETA)[0]

    own = logprobs.detach()  # the reference is the policy as it is
    sides = logprobs[chosen], logprobs[rejected], own[chosen], own[rejected]
    step = policy.gradient(-(drawn * torch.vmap(of_pair)(*sides)).sum())
    signs = torch.sign(given.rewards[first] - given.rewards[second])
    told_apart = policy.gradient((drawn * signs * (logprobs[first] - logprobs[second])).sum())
    claim = "online DPO's first step: beta/2 sign(r - r') (grad log p - grad log p')"
    exact = _exact(given)
    return [
        equal(claim, step, BETA / 2 * told_apart, ONLINE),
        angle("online DPO's first step: from grad E[reward]", step, exact, ONLINE),
    ]


def identities() -> list[Proof]:
    """Where two methods are one."""
    given = example()
    policy, kept = given.policy, (GROUP - 1) / GROUP
    (advantage,) = _random(5, 1, *policy.mask.shape)
    scores = given.rewards[_all_groups(given)].view(-1)
    centred, left_out = _centred(scores, GROUP), advantages.leave_one_out_advantages(scores, GROUP)
    weighted = (policy.token_logprobs() * advantage).sum() / policy.mask.sum()
    reinforce, clipped = policy.gradient(-weighted), _ppo_gradient(given, advantage)
    tight, wide = (_ppo_gradient(given, advantage, clip) for clip in (1e-6, 1e6))
    same = "advantages: GRPO without scale = (G-1)/G leave-one-out"
    return [
        equal(same, centred, left_out * kept, DR_GRPO),
        equal("PPO at ratio 1 = REINFORCE", clipped, reinforce, PPO),
        equal("PPO at ratio 1: no clip range changes the gradient", tight, wide, PPO),
    ]


def dpo() -> list[Proof]:
    """DPO's gradient on all pairs, and its optimum, found by an optimizer that knows no formula."""
    given = example()
    policy, ref = given.policy, given.ref_logprobs.sum(1)
    numbers = torch.arange(len(policy.responses))
    first, second = torch.cartesian_prod(numbers, numbers).T
    # both drawn from the reference; Bradley-Terry says how often `first` is the chosen one
    drawn = ref[first].exp() * ref[second].exp()
    weights = drawn * torch.sigmoid(given.rewards[first] - given.rewards[second])

    def loss_of_pair(*logprobs: Tensor) -> Tensor:
        return preference.dpo_loss(*logprobs, beta=BETA)[0]

    def gradient() -> tuple[float, Tensor]:
        """dpo_loss of each pair by itself, `first` being the chosen one; their weighted sum."""
        logprobs = policy.logprobs()
        of_pairs = logprobs[first], logprobs[second], ref[first], ref[second]
        loss = (weights * torch.vmap(loss_of_pair)(*of_pairs)).sum()
        return loss.item(), policy.gradient(loss)

    # -beta sigmoid(rejected - chosen) (grad log p(chosen) - grad log p(rejected))
    logprobs = policy.logprobs()
    implicit = BETA * (logprobs - ref).detach()
    wrong = torch.sigmoid(implicit[second] - implicit[first])
    formula = policy.gradient(
        (weights * -BETA * wrong * (logprobs[first] - logprobs[second])).sum()
    )
    claim = "DPO's gradient: pairs weighted by how wrong they are"
    proofs = [equal(claim, gradient()[1], formula, f"{DPO}, sec. 4")]

    exactly = {"tolerance_grad": 1e-12, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([policy.logits], max_iter=1000, history_size=50, **exactly)

    def closure() -> float:
        loss, policy.logits.grad = gradient()
        return loss

    optimizer.step(closure)
    optimum = (ref + given.rewards / BETA).softmax(0)
    claim = "DPO's optimum = ref exp(reward / beta) / Z"
    return [*proofs, equal(claim, policy.probabilities(), optimum, f"{DPO}, eq. 4", 1e-6)]


def _random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _exact(given: Example) -> Tensor:
    return given.policy.gradient(given.policy.expectation(given.rewards))


def _centred(rewards: Tensor, group_size: int) -> Tensor:
    return advantages.group_advantages(rewards, group_size, "none")


def _ppo_gradient(given: Example, advantage: Tensor, clip_range: float = 0.2) -> Tensor:
    """Of the policy loss at ratio 1."""
    logprobs, mask = given.policy.token_logprobs(), given.policy.mask
    loss, _ = losses.ppo_policy_loss(logprobs, logprobs.detach(), advantage, mask, clip_range)
    return given.policy.gradient(loss)


def _ppo_advantages(given: Example, gae_lambda: float) -> Tensor:
    """GAE of the rewards, with a value drawn at random for every state."""
    mask, nothing = given.policy.mask, torch.zeros_like(given.ref_logprobs)
    rewards = advantages.kl_shaped_rewards(given.rewards, nothing, nothing, mask, kl_coef=0.0)
    values = _random(6, len(given.policy.logits))[given.policy.states]
    return advantages.gae(rewards, values, mask, 1.0, gae_lambda)[0]


def _all_groups(given: Example) -> Tensor:
    """Every way to draw a group: response numbers (N**G, G)."""
    return torch.cartesian_prod(*[torch.arange(len(given.weights))] * GROUP)


def _grpo_loss(logprobs: Tensor, advantage: Tensor, mask: Tensor, aggregation: str) -> Tensor:
    """At ratio 1."""
    old = logprobs.detach()
    return losses.grpo_loss(logprobs, old, advantage, mask, aggregation=aggregation)[0]
