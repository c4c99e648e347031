"""Exercises in which the reader writes an update: it is run, and its weights are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import Module
from torch.optim import Optimizer

from rlhf_lib.course.answers import Claim, Claims, Unanswered, exercise
from rlhf_lib.course.small import Small
from rlhf_lib.course.twins import triples
from rlhf_lib.proofs import plain

RATE = 1e-3


def _updated(
    start: Module, theirs: Callable[..., object], ours: Callable[..., object], hint: str
) -> Claim:
    """Both step on copies of a model, with optimizers alike: how far apart the weights end."""
    ends = []
    for step in (theirs, ours):
        model = copy.deepcopy(start)
        result = step(model, plain.adamw(model, RATE))
        if result is ...:
            raise Unanswered
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    begin = torch.cat([p.detach().flatten() for p in start.parameters()])
    apart = (ends[0] - ends[1]).norm() / (ends[1] - begin).norm()
    if ends[0].equal(begin):
        hint = "The weights have not moved: is there a backward pass, and `optimizer.step()`?"
    return Claim(apart, 0.0, hint, 1e-3)


@exercise("02-5")
def _reward_step(step: Callable) -> Claims:
    small = Small()
    pairs = triples(small.pairs[:6])

    def ours(model: Module, optimizer: Optimizer) -> None:
        plain.descend(plain.reward_loss(model, pairs), [optimizer], math.inf)

    hint = "Chosen less rejected, −log σ, a mean over pairs; then backward and one step."
    yield _updated(small.scorer(), lambda *both: step(*both, pairs), ours, hint)


@exercise("03-4")
def _sft_step(step: Callable) -> Claims:
    small = Small()
    examples = [(d.prompt, d.response) for d in small.demonstrations[:6]]

    def ours(model: Module, optimizer: Optimizer) -> None:
        plain.descend(plain.sft_loss(model, examples), [optimizer], math.inf)

    hint = "A mean over all tokens of all replies, not over replies; and no minus sign forgotten?"
    yield _updated(small.policy(), lambda *both: step(*both, examples), ours, hint)


class _Replies(NamedTuple):
    """Replies of the tiny model that somebody has trained a little since they were sampled."""

    policy: Module
    batch: plain.Batch
    old: torch.Tensor
    earned: torch.Tensor


def _replies(group_size: int) -> _Replies:
    small, generator = Small(), torch.Generator().manual_seed(0)
    pairs = small.pairs[:8]
    asked = [pairs[i - i % group_size].prompt for i in range(8)]
    batch = plain.pad(asked, [pair.chosen for pair in pairs])
    policy = small.policy()
    with torch.no_grad():
        old = plain.logprobs(policy, batch, 1.0)
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return _Replies(policy, batch, old, torch.randn(8, generator=generator))


@exercise("04-5")
def _ppo_step(step: Callable) -> Claims:
    policy, batch, old, earned = _replies(1)
    whitened = earned[:, None] * batch.mask

    def ours(model: Module, optimizer: Optimizer) -> None:
        gain = plain.clipped_gain(plain.logprobs(model, batch, 1.0), old, whitened, 0.2)
        plain.descend(-(gain * batch.mask).sum() / batch.mask.sum(), [optimizer], math.inf)

    hint = "Ratio, clip, the smaller of both gains, a mean over all real tokens, and minus."
    yield _updated(policy, lambda *both: step(*both, batch, old, whitened, 0.2), ours, hint)


@exercise("05-4")
def _grpo_step(step: Callable) -> Claims:
    policy, batch, old, earned = _replies(4)
    s = plain.Settings(k3_coef=0.0, kl_coef=0.0)
    group = earned.view(-1, 4)
    advantages = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    seen = plain.Judged(old, old, earned, advantages.flatten())

    def ours(model: Module, optimizer: Optimizer) -> None:
        plain.descend(plain.grpo_loss(model, batch, seen, s), [optimizer], math.inf)

    hint = "Compare within groups of four; clip; a mean over a reply's tokens, then over replies."
    yield _updated(policy, lambda *both: step(*both, batch, old, earned, 4, 0.2), ours, hint)


@exercise("06-5")
def _dpo_step(step: Callable) -> Claims:
    small = Small()
    pairs = triples(small.pairs[:6])
    reference, s = _replies(1).policy, plain.Settings(beta=0.3, max_grad_norm=math.inf)

    def theirs(model: Module, optimizer: Optimizer) -> object:
        return step(model, optimizer, reference, pairs, s.beta)

    def ours(model: Module, optimizer: Optimizer) -> None:
        plain.dpo_update(model, reference, pairs, optimizer, s)

    hint = "Sums over tokens, not means; both sides less the reference; β inside the sigmoid."
    yield _updated(small.policy(), theirs, ours, hint)
