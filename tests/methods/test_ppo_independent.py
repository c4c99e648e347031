"""PPO against `proofs/plain.py`, a second implementation that shares nothing with the library.

TRL, with which `test_parity` compares the other methods, has no PPO any more. Each test runs once
with the library as it is, and once for each mistake that is put into it: then it has to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_lib.course.twins import library_ppo
from rlhf_lib.methods import ppo
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.packing import length_mask
from rlhf_lib.objectives.advantages import gae, kl_shaped_rewards
from rlhf_lib.objectives.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lib.objectives.masked import masked_mean, masked_whiten
from rlhf_lib.proofs import plain
from tests.independent import (
    PROMPTS,
    RATE,
    RESPONSES,
    SCORES,
    assert_gradients,
    assert_weights,
    caught_gradients,
    caught_losses,
    double,
    learner_of,
    moved,
    rollout_of,
)
from tests.traps.test_traps import Mistake, holds_unless, kinds, put_back

SETTINGS = plain.Settings(
    kl_coef=0.15,
    gamma=0.9,
    gae_lambda=0.8,
    temperature=0.7,
    clip_range=0.2,
    value_clip_range=0.3,
    epochs=3,
    minibatch_size=6,
    max_grad_norm=math.inf,
)


@pytest.mark.parametrize("seed", range(3))
def test_the_functions_equal_their_plain_twins(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = length_mask([len(r) for r in RESPONSES])
    rewards, values, new, old = torch.randn(4, *mask.shape, generator=draw)
    new = old + 0.4 * new
    nan = torch.where(mask.bool(), 0.0, math.nan)  # what must never matter

    expected = plain.gae(rewards * mask, values * mask, mask, 0.9, 0.8)
    ours = gae(rewards + nan, values + nan, mask, 0.9, 0.8)
    for result, other in zip(ours, expected, strict=True):
        assert torch.allclose(result, other, atol=1e-5)

    loss, stats = ppo_policy_loss(new + nan, old + nan, rewards + nan, mask, 0.2)
    gain = plain.clipped_gain(new, old, rewards, 0.2)[mask.bool()]
    ratio = (new - old).exp()[mask.bool()]
    outside = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    assert 0.1 < outside < 0.9
    by_hand = [
        -gain.mean(),
        outside,
        (ratio - 1 - ratio.log()).mean(),
        ratio.mean(),
        ratio.var(correction=0),
    ]
    assert torch.allclose(torch.stack([loss, *stats]), torch.stack(by_hand), atol=1e-5)


# ------------------------------------------------------------------------------- a whole update


class Models(NamedTuple):
    policy: Any
    reference: Any
    value: Any

    def rollout(self) -> Rollout:
        return rollout_of(self.policy, self.reference, PROMPTS, SETTINGS.temperature, math.nan)


def models_of(make_model: Callable, kind: str) -> Models:
    policy = make_model(kind)
    return Models(policy, moved(policy, 0.05, 1), make_model(kind, head="score"))


class Plain(NamedTuple):
    """What `plain` made of one update."""

    policy: Any
    value: Any
    gradients: list[Tensor]
    value_gradients: list[Tensor]
    losses: list[float]  # policy and value loss together


def plain_update(models: Models, s: plain.Settings, patch: pytest.MonkeyPatch) -> Plain:
    policy, reference, value = map(double, models)
    optimizers = [plain.adamw(model, RATE) for model in (policy, value)]
    gradients, losses = [caught_gradients(o) for o in optimizers], caught_losses(patch)
    batch = plain.pad(PROMPTS, RESPONSES)
    earned = torch.tensor(SCORES)
    plain.ppo_update(policy, value, reference, lambda _: earned, batch, optimizers, s)
    return Plain(policy, value, *gradients, losses)


def scored_after_the_end(patch: pytest.MonkeyPatch) -> None:
    """The score goes to the place behind the last token."""

    def shaped(scores: Tensor, *rest: Any) -> Tensor:
        rewards = kl_shaped_rewards(0 * scores, *rest)
        ends = rest[2].sum(1).long().clamp(max=rewards.shape[1] - 1)
        return rewards.scatter_add(1, ends[:, None], scores[:, None])

    patch.setattr(ppo, "kl_shaped_rewards", shaped)


def gamma_and_lambda_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "gae", lambda r, v, mask, gamma, lam: gae(r, v, mask, lam, gamma))


def returns_of_whitened_advantages(patch: pytest.MonkeyPatch) -> None:
    def whitened_first(rewards: Tensor, values: Tensor, mask: Tensor, *rest: float) -> tuple:
        advantages, _ = gae(rewards, values, mask, *rest)
        return advantages, (masked_whiten(advantages, mask) + values) * mask

    patch.setattr(ppo, "gae", whitened_first)


def no_whitening(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "masked_whiten", lambda x, mask: x)


def a_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Tokens averaged within a response, then responses."""

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple:
        _, stats = ppo_policy_loss(logprobs, old, advantages, mask, clip)
        ratio = (logprobs - old.nan_to_num(0)).exp()
        worst = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
        return masked_mean(worst, mask, dim=1).mean(), stats

    patch.setattr(ppo, "ppo_policy_loss", loss)


def the_clip_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "ppo_policy_loss", lambda *a: ppo_policy_loss(*a[:4], 1e9))


def the_value_clip_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "ppo_value_loss", lambda *a: ppo_value_loss(*a[:4], 1e9))


def a_value_loss_without_its_half(patch: pytest.MonkeyPatch) -> None:
    def doubled(*tensors: Any) -> tuple:
        loss, stats = ppo_value_loss(*tensors)
        return 2 * loss, stats

    patch.setattr(ppo, "ppo_value_loss", doubled)


def scored_at_another_temperature(patch: pytest.MonkeyPatch) -> None:
    scored = ppo.response_logprobs
    patch.setattr(ppo, "response_logprobs", lambda *a: scored(*a[:3], 1.0))


@kinds
@put_back(
    scored_after_the_end,
    gamma_and_lambda_swapped,
    returns_of_whitened_advantages,
    no_whitening,
    a_mean_of_means,
    the_clip_left_out,
    the_value_clip_left_out,
    a_value_loss_without_its_half,
    scored_at_another_temperature,
)
def test_an_update_equals_the_plain_one(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_of(make_model, kind)
    expected = plain_update(models, SETTINGS, monkeypatch)
    with holds_unless(mistake, monkeypatch):
        policy, value = learner_of(models.policy), learner_of(models.value)
        gradients, value_gradients = (
            caught_gradients(x.optimizer.optimizer) for x in (policy, value)
        )
        metrics = library_ppo(policy, value, models.rollout(), SETTINGS, micro=2)

        assert_gradients(gradients, expected.gradients)
        assert_gradients(value_gradients, expected.value_gradients)
        assert_weights(policy.model, expected.policy, models.policy)
        assert_weights(value.model, expected.value, models.value)
        assert metrics["loss"] == pytest.approx(sum(expected.losses) / 3, rel=1e-3)
        assert metrics["policy/clipfrac_avg"] > 0.1, "the clip should bind somewhere"
        assert metrics["val/clipfrac_avg"] > 0


def test_minibatches_see_each_token_once_an_epoch(make_model: Callable) -> None:
    """At a learning rate of 0, the averages over minibatches are those of the whole batch."""
    models = models_of(make_model, "gpt2")
    found = []
    for epochs, size in ((1, 6), (2, 4)):
        policy, value = learner_of(moved(models.policy, 0.03, 2), 0), learner_of(models.value, 0)
        gradients = caught_gradients(policy.optimizer.optimizer)
        settings = SETTINGS._replace(epochs=epochs, minibatch_size=size)
        metrics = library_ppo(policy, value, models.rollout(), settings, seed=1, micro=2)
        found.append({k: x for k, x in metrics.items() if "norm" not in k})
        assert len(gradients) == epochs * math.ceil(6 / size)
    whole, in_parts = found
    assert whole["policy/clipfrac_avg"] > 0.1
    assert in_parts == pytest.approx(whole, abs=2e-5)


def test_a_long_gradient_is_cut(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    models, settings = models_of(make_model, "llama"), SETTINGS._replace(max_grad_norm=0.5)
    expected = plain_update(models, settings, monkeypatch)
    policy, value = (learner_of(m, max_grad_norm=0.5) for m in (models.policy, models.value))
    gradients = caught_gradients(policy.optimizer.optimizer)
    library_ppo(policy, value, models.rollout(), settings, micro=2)
    assert gradients[0].norm() == pytest.approx(0.5, rel=1e-4)
    assert_gradients(gradients, expected.gradients)
    assert_weights(policy.model, expected.policy, models.policy)
