"""Traps 24 to 29: ratios, bonuses, penalties and rewards that later methods added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods import dpo, ppo, rewards, rollout
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.logprobs import paired_logprobs, response_logprobs
from rlhf_lib.objectives import losses
from rlhf_lib.objectives.losses import grpo_loss
from rlhf_lib.objectives.masked import masked_mean
from rlhf_lib.settings import DPOConfig
from tests.traps.test_traps import (
    PROMPTS,
    RESPONSES,
    Mistake,
    holds_unless,
    kinds,
    learner_of,
    other_model,
    pairs_of,
    plain_logprobs,
    put_back,
    rollout_of,
    sampler_of,
    write_models,
)

ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.7, -0.3, 1.1])


def gradient_of(loss: Tensor, model: torch.nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def off_policy(kind: str, make_model: Callable) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A policy that has moved, its log-probs, those before, and the mask."""
    policy = other_model(make_model, kind)
    logprobs, mask = response_logprobs(policy, PROMPTS, RESPONSES)
    before = make_model(kind)
    with torch.no_grad():
        old, _ = response_logprobs(before, PROMPTS, RESPONSES)
    return policy, logprobs, old, mask


# ------------------------------------------------------------------ 24: the ratio of a whole reply


def the_ratio_of_the_whole_reply(patch: pytest.MonkeyPatch) -> None:
    """A product over the tokens: the longer the reply, the further from 1, and always clipped."""
    patch.setattr(
        losses, "masked_mean",
        lambda x, mask, dim=None: (x * mask).sum(1) if dim == 1 else masked_mean(x, mask),
    )  # fmt: skip


def the_mean_over_padding(patch: pytest.MonkeyPatch) -> None:
    """Divided by the width of the batch: a short reply's ratio is nearer to 1 than it is."""
    patch.setattr(
        losses, "masked_mean",
        lambda x, mask, dim=None: (x * mask).mean(1) if dim == 1 else masked_mean(x, mask),
    )  # fmt: skip


@kinds
@put_back(the_ratio_of_the_whole_reply, the_mean_over_padding)
def test_trap_24_a_sequence_s_ratio_is_a_mean_over_its_own_tokens(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, logprobs, old, mask = off_policy(kind, make_model)
    before, expected = make_model(kind), []
    for prompt, reply in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            change = plain_logprobs(policy, prompt, reply) - plain_logprobs(before, prompt, reply)
        expected.append(math.exp(change.mean()))
    with holds_unless(mistake, monkeypatch):
        # at advantages of -1 and no clipping the loss of a token is the ratio
        _, stats = grpo_loss(
            logprobs, old, -torch.ones(7), mask, None, 0.0, 1e9, 1e9, "token", ratio="sequence"
        )
        weights = mask.sum(1) / mask.sum()
        mean = sum(w * r for w, r in zip(weights.tolist(), expected, strict=True))
        assert stats.policy.ratio_mean.item() == pytest.approx(mean, rel=1e-4)


# ---------------------------------------------------------------- 25: a weight that is no constant


def the_weight_is_learnt(patch: pytest.MonkeyPatch) -> None:
    """The gradient goes through the limited ratio as well, and where it is limited, nowhere."""
    inside = losses._clipped_policy

    def attached(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Tensor, "detach", lambda x: x)
            return inside(*args)

    patch.setattr(losses, "_clipped_policy", attached)


def the_limit_takes_the_gradient(patch: pytest.MonkeyPatch) -> None:
    """As in PPO: what has gone too far says nothing."""
    inside = losses._clipped_policy
    patch.setattr(losses, "_clipped_policy", lambda *args: inside(*args[:-1], "clip"))


@kinds
@put_back(the_weight_is_learnt, the_limit_takes_the_gradient)
def test_trap_25_cispo_limits_the_weight_and_keeps_the_gradient(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, logprobs, old, mask = off_policy(kind, make_model)
    weight = (logprobs.detach() - old).exp().clamp(max=1.2)
    assert ((weight == 1.2) & mask.bool()).any(), "something is limited"
    by_hand = -masked_mean(weight * ADVANTAGES[:, None] * logprobs, mask)
    expected = gradient_of(by_hand, policy)
    with holds_unless(mistake, monkeypatch):
        logprobs, _ = response_logprobs(policy, PROMPTS, RESPONSES)
        loss, _ = grpo_loss(
            logprobs, old, ADVANTAGES, mask, None, 0.0, 0.2, 0.2, "token", surrogate="cispo"
        )
        assert torch.allclose(gradient_of(loss, policy), expected, atol=1e-5)


# -------------------------------------------------------------------- 26: a bonus that does nothing


def entropies_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """They are logged, added to the loss, and change nothing."""
    both = ppo.logprobs_and_entropies
    patch.setattr(ppo, "logprobs_and_entropies", lambda *args: both(*args, learn=False))


def the_bonus_with_its_sign_reversed(patch: pytest.MonkeyPatch) -> None:
    mean = ppo.masked_mean
    patch.setattr(ppo, "masked_mean", lambda *args: -mean(*args))


def entropy_over_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "masked_mean", lambda x, mask: x.mean())


@kinds
@put_back(entropies_without_a_gradient, the_bonus_with_its_sign_reversed, entropy_over_padding)
def test_trap_26_the_entropy_bonus_is_a_gradient_of_the_entropy(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, value = learner_of(make_model(kind)), learner_of(make_model(kind, head="score"))
    by_hand = []
    for prompt, reply in zip(PROMPTS, RESPONSES, strict=True):
        logits = policy.model(torch.tensor([[*prompt, *reply]])).logits[0]
        logp = logits[len(prompt) - 1 : len(prompt) + len(reply) - 1].log_softmax(-1)
        by_hand.append(-(logp.exp() * logp).sum(-1))
    expected = gradient_of(-0.5 * torch.cat(by_hand).mean(), policy.model)
    sample = rollout_of(policy.model)
    nothing = torch.zeros_like(sample.logprobs)
    experience = ppo.Experience(sample, nothing, nothing, nothing)
    seen: list[Tensor] = []

    def keep(parameters: Any, norm: float) -> Tensor:
        seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return torch.tensor(0.0)

    monkeypatch.setattr(policy.accelerator, "clip_grad_norm_", keep)
    with holds_unless(mistake, monkeypatch):
        ppo.update(
            policy, value, experience, epochs=1, minibatch_size=7, micro_batch_size=3,
            entropy_coef=0.5,
        )  # fmt: skip
        assert torch.allclose(seen[0], expected, atol=1e-5)


# ------------------------------------------------------------- 27: a length that counts the padding


def the_width_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    """Every reply is as long as the longest of its batch."""
    right = rollout.soft_overlong_penalty
    patch.setattr(
        rollout, "soft_overlong_penalty",
        lambda lengths, *rest: right(torch.full_like(lengths, float(lengths.max())), *rest),
    )  # fmt: skip


def a_reward_for_being_short(patch: pytest.MonkeyPatch) -> None:
    """Not limited at 0: the shorter a reply, the more it earns."""
    patch.setattr(
        rollout, "soft_overlong_penalty",
        lambda lengths, longest, buffer: -(lengths - (longest - buffer)) / buffer,
    )  # fmt: skip


@kinds
@put_back(the_width_of_the_batch, a_reward_for_being_short)
def test_trap_27_only_a_long_reply_loses_and_no_more_than_a_point(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = sampler_of(write_models(tmp_path, kind, make_model, tiny_tokenizer))
    monkeypatch.setattr(rollout, "generate", lambda *a, **k: RESPONSES)
    prompts = [Prompt("", ids) for ids in PROMPTS]
    plain = sampler.sample(sampler.reference, prompts)
    with holds_unless(mistake, monkeypatch):
        found = sampler.sample(sampler.reference, prompts, overlong_buffer=5)
        taken = (found.rewards - plain.rewards).tolist()
        # eight tokens are the longest, the last five of them cost
        expected = [-max(0, len(reply) - 3) / 5 for reply in RESPONSES]
        assert taken == pytest.approx(expected, abs=1e-5)
        assert min(taken) == pytest.approx(-1, abs=1e-5)


# ------------------------------------------------------------ 28: replies that are not those judged


def the_reference_of_the_dataset_s_replies(patch: pytest.MonkeyPatch) -> None:
    """Log-probs that were taken once, of the pair's own replies, for the replies drawn now."""
    own = dpo.own_pairs

    def stale(sampler: Sampler, policy: Any, pairs: Sequence, config: DPOConfig) -> tuple:
        drawn, _ = own(sampler, policy, pairs, config)
        return drawn, dpo.reference_logprobs(sampler.reference, pairs, 4)

    patch.setattr(dpo, "own_pairs", stale)


def the_worse_is_chosen(patch: pytest.MonkeyPatch) -> None:
    own = dpo.own_pairs

    def swapped(*args: Any) -> tuple:
        drawn, table = own(*args)
        turned = [type(p)(**vars(p) | {"chosen": p.rejected, "rejected": p.chosen}) for p in drawn]
        return turned, table.flip(1)

    patch.setattr(dpo, "own_pairs", swapped)


@kinds
@put_back(the_reference_of_the_dataset_s_replies, the_worse_is_chosen)
def test_trap_28_online_dpo_compares_what_was_drawn(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path, kind, make_model, tiny_tokenizer)
    sampler, policy = sampler_of(made), other_model(make_model, kind)
    torch.manual_seed(3)
    config = DPOConfig(online=True, missing_eos_penalty=0.0)
    with holds_unless(mistake, monkeypatch):
        drawn, table = dpo.own_pairs(sampler, policy, pairs_of(), config)
        with torch.no_grad():
            sides = [p.prompt for p in drawn], [p.chosen for p in drawn]
            others = [p.rejected for p in drawn]
            expected = torch.stack(paired_logprobs(sampler.reference, *sides, others), 1)
        assert torch.allclose(table, expected, atol=1e-4)
        asked = [Prompt("", p.prompt) for p in drawn]
        good, bad = (
            sampler.score(asked, rewards.read_replies(sampler.tokenizer, replies))[0]
            for replies in (sides[1], others)
        )
        assert bool((good >= bad).all())
        assert bool((good > bad).any())


# ------------------------------------------------------------------ 29: rewards on different scales


def raw_scores_put_together(patch: pytest.MonkeyPatch) -> None:
    """Each model has a zero and a unit of its own: the lowest is always the same model's."""
    of_ensemble = rewards.of_ensemble

    def raw(members: Sequence, minimum: bool = False) -> rewards.Reward:
        shifted = [
            lambda prompts, replies, k=k, m=m: (
                torch.as_tensor(m(prompts, replies)) * (k + 1) + 9 * k
            )
            for k, m in enumerate(members)
        ]
        return of_ensemble(shifted, minimum)

    patch.setattr(rewards, "of_ensemble", raw)


def the_highest_for_the_lowest(patch: pytest.MonkeyPatch) -> None:
    """Whoever is liked by one model is liked: what it was to prevent."""
    patch.setattr(
        rewards, "of_ensemble",
        lambda members, minimum=False: lambda p, r: torch.stack(
            [torch.as_tensor(member(p, r)) for member in members]
        ).amax(0),
    )  # fmt: skip


@kinds
@put_back(raw_scores_put_together, the_highest_for_the_lowest)
def test_trap_29_an_ensemble_s_members_are_each_normalised(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path, kind, make_model, tiny_tokenizer)
    one = sampler_of(made)
    asked = [Prompt("", ids) for ids in PROMPTS]
    replies = rewards.read_replies(one.tokenizer, RESPONSES)
    first = torch.as_tensor(one.reward(asked, replies))
    members = [one.reward, lambda p, r: -first, lambda p, r: 0.5 * first]
    with holds_unless(mistake, monkeypatch):
        lowest = rewards.named("minimum", lambda: members, None)(asked, replies)
        assert torch.allclose(lowest, -first.abs(), atol=1e-5)
        mean = rewards.named("mean", lambda: members, None)(asked, replies)
        assert torch.allclose(mean, first / 6, atol=1e-5)
