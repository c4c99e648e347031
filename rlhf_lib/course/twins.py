"""One update by `proofs/plain.py` and one by the library, from the same models on the same rows.

    both = twins.ppo(policy, value, reference, batch, earned, settings)
    assert both.same

The notebooks assert it on the tiny model. The tests take the library's side from here, and hold it
against `plain` gradient by gradient, with mistakes put in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Demonstration, Pair
from rlhf_lib.methods import dpo as dpo_method
from rlhf_lib.methods import grpo as grpo_method
from rlhf_lib.methods import ppo as ppo_method
from rlhf_lib.methods import reward_model as reward_method
from rlhf_lib.methods import sft as sft_method
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.proofs import plain
from rlhf_lib.proofs.plain import Batch, Settings
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import DPOConfig

MICRO = 4  # rows that the library computes at once: fewer than a batch has


class Both(NamedTuple):
    """How far one update took the weights of all models that learn, and how far apart they end."""

    moved: float
    apart: float

    @property
    def same(self) -> bool:
        """But for rounding."""
        return self.apart < 1e-4 * self.moved


def sft(policy: PreTrainedModel, examples: Sequence[Demonstration], s: Settings) -> Both:
    ours, theirs = learner(policy, s), copy.deepcopy(policy)
    sft_method.update(ours, examples, MICRO)
    loss = plain.sft_loss(theirs, [(e.prompt, e.response) for e in examples])
    plain.descend(loss, [plain.adamw(theirs, s.learning_rate)], s.max_grad_norm)
    return _both([policy], [theirs], [ours])


def reward_model(model: PreTrainedModel, pairs: Sequence[Pair], s: Settings) -> Both:
    ours, theirs = learner(model, s), copy.deepcopy(model)
    reward_method.update(ours, pairs, MICRO)
    loss = plain.reward_loss(theirs, triples(pairs))
    plain.descend(loss, [plain.adamw(theirs, s.learning_rate)], s.max_grad_norm)
    return _both([model], [theirs], [ours])


def ppo(
    policy: PreTrainedModel,
    value: PreTrainedModel,
    reference: PreTrainedModel,
    batch: Batch,
    earned: Tensor,
    s: Settings,
) -> Both:
    """Replies that the policy sampled, and their scores. A minibatch holds all of them, whatever
    `s` says: the two sides draw their orders in ways of their own."""
    s = s._replace(minibatch_size=len(batch.ids))
    ours, critic = learner(policy, s), learner(value, s)
    theirs, other = copy.deepcopy(policy), copy.deepcopy(value)
    optimizers = [plain.adamw(model, s.learning_rate) for model in (theirs, other)]
    seen = plain.ppo_update(theirs, other, reference, lambda _: earned, batch, optimizers, s)
    library_ppo(ours, critic, rollout(batch, seen.old, seen.ref, earned), s)
    return _both([policy, value], [theirs, other], [ours, critic])


def grpo(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: Batch, earned: Tensor, s: Settings
) -> Both:
    """Replies that the policy sampled, group by group, and their scores."""
    ours, theirs = learner(policy, s), copy.deepcopy(policy)
    optimizer = plain.adamw(theirs, s.learning_rate)
    seen = plain.grpo_update(theirs, reference, lambda _: earned, batch, optimizer, s)
    library_grpo(ours, rollout(batch, seen.old, seen.ref, earned), s)
    return _both([policy], [theirs], [ours])


def dpo(
    policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[Pair], s: Settings
) -> Both:
    ours, theirs = learner(policy, s), copy.deepcopy(policy)
    library_dpo(ours, reference, pairs, s)
    plain.dpo_update(theirs, reference, triples(pairs), plain.adamw(theirs, s.learning_rate), s)
    return _both([policy], [theirs], [ours])


# ----------------------------------------------------------------- the library, told what plain is


def library_ppo(
    policy: Learner,
    value: Learner,
    replies: Rollout,
    s: Settings,
    micro: int = MICRO,
    seed: int = 0,
) -> dict[str, float]:
    experience = ppo_method.make_experience(
        replies,
        value,
        kl_coef=s.kl_coef,
        gamma=s.gamma,
        gae_lambda=s.gae_lambda,
        micro_batch_size=micro,
    )
    return ppo_method.update(
        policy,
        value,
        experience,
        epochs=s.epochs,
        minibatch_size=s.minibatch_size,
        micro_batch_size=micro,
        temperature=s.temperature,
        clip_range=s.clip_range,
        value_clip_range=s.value_clip_range,
        seed=seed,
    )


def library_grpo(
    policy: Learner, replies: Rollout, s: Settings, micro: int = MICRO
) -> dict[str, float]:
    _, advantages = grpo_method.make_advantages(
        replies, group_size=s.group_size, kl_reward_coef=s.kl_coef
    )
    return grpo_method.update(
        policy,
        replies,
        advantages,
        iterations=s.epochs,
        micro_batch_size=micro,
        constant=replies.response_mask.shape[1],
        temperature=s.temperature,
        kl_coef=s.k3_coef,
        clip_low=s.clip_range,
        clip_high=s.clip_range,
    )


def library_dpo(
    policy: Learner,
    reference: PreTrainedModel,
    pairs: Sequence[Pair],
    s: Settings,
    micro: int = MICRO,
) -> dict[str, float]:
    table = dpo_method.reference_logprobs(reference, pairs, micro)
    loss = dpo_method.preference_loss(DPOConfig(beta=s.beta))
    return dpo_method.update(policy, pairs, table, loss, micro_batch_size=micro)


def learner(model: PreTrainedModel, s: Settings) -> Learner:
    """The library's learner of a copy, with plain's optimizer, at one learning rate."""
    return Learner(
        make_accelerator("fp32"),
        copy.deepcopy(model),
        learning_rate=s.learning_rate,
        steps=10**9,
        max_grad_norm=s.max_grad_norm,
        eps=1e-5,
    )


def triples(pairs: Sequence[Pair]) -> list[tuple[list[int], list[int], list[int]]]:
    """Pairs as `plain` takes them."""
    return [(p.prompt, p.chosen, p.rejected) for p in pairs]


def rollout(batch: Batch, old: Tensor, ref: Tensor, scores: Tensor) -> Rollout:
    """Replies of `plain` as the library's sampler hands them on; tensors on the CPU."""
    place = batch.ids.shape[1] - batch.mask.shape[1]
    rows = list(zip(batch.ids.cpu(), batch.attention.cpu().bool(), strict=True))
    prompts = [ids[:place][real[:place]].tolist() for ids, real in rows]
    replies = [ids[place:][real[place:]].tolist() for ids, real in rows]
    mask, old, ref, scores = (x.detach().float().cpu() for x in (batch.mask, old, ref, scores))
    ended = torch.ones(len(rows)).bool()
    return Rollout(prompts, replies, mask, old, ref, ended, scores, scores, 0 * mask, None, None)


def _both(
    starts: Sequence[PreTrainedModel], theirs: Sequence[PreTrainedModel], ours: Sequence[Learner]
) -> Both:
    begin, plains, library = (
        torch.cat([p.detach().double().cpu().flatten() for m in models for p in m.parameters()])
        for models in (starts, theirs, [learner.model for learner in ours])
    )
    return Both(float((plains - begin).norm()), float((library - plains).norm()))
