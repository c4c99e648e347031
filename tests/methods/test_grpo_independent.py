"""GRPO against `proofs/plain.py`: gradients and weights of an update, with mistakes put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lib.course.twins import library_grpo
from rlhf_lib.methods import grpo
from rlhf_lib.objectives.advantages import group_advantages
from rlhf_lib.objectives.losses import grpo_loss
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

ASKED = [prompt for prompt in PROMPTS[:2] for _ in range(3)]  # two groups
SETTINGS = plain.Settings(
    group_size=3,
    kl_coef=0.15,
    k3_coef=0.1,
    temperature=0.7,
    clip_range=0.2,
    epochs=3,
    max_grad_norm=math.inf,
)


def changed_loss(patch: pytest.MonkeyPatch, change: Callable[[dict], dict]) -> None:
    """Another loss for the policy: `change` gets the arguments by name."""
    names = (
        "logprobs",
        "old_logprobs",
        "advantages",
        "response_mask",
        "ref_logprobs",
        "kl_coef",
        "clip_low",
        "clip_high",
        "aggregation",
        "kl_estimator",
        "ratio",
        "surrogate",
    )

    def loss(*values: Any) -> tuple:
        given = dict(zip(names, values, strict=True))
        return grpo_loss(**given | change(given))

    patch.setattr(grpo, "grpo_loss", loss)


def the_clip_left_out(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda given: {"clip_low": 1e9, "clip_high": 1e9})


def a_mean_over_all_tokens(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda given: {"aggregation": "token"})


def no_kl_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda given: {"kl_coef": 0.0})


def k1_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda given: {"kl_estimator": "k1"})


def the_reference_for_the_old_policy(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda given: {"old_logprobs": given["ref_logprobs"]})


def kl_added_to_the_reward(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(grpo.ESTIMATORS, "k1", lambda logprobs, ref_logprobs: ref_logprobs - logprobs)


def a_deviation_over_n(patch: pytest.MonkeyPatch) -> None:
    def wrong(rewards: Tensor, size: int, scale: str) -> Tensor:
        groups = rewards.view(-1, size)
        deviation = groups.std(1, correction=0, keepdim=True)
        return ((groups - groups.mean(1, keepdim=True)) / (deviation + 1e-4)).view(-1)

    patch.setattr(grpo, "group_advantages", wrong)


def not_scaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grpo, "group_advantages", lambda r, size, _: group_advantages(r, size, "none"))


def compared_with_all_groups(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grpo, "group_advantages", lambda r, *_: (r - r.mean()) / (r.std() + 1e-4))


def scored_at_another_temperature(patch: pytest.MonkeyPatch) -> None:
    scored = grpo.response_logprobs
    patch.setattr(grpo, "response_logprobs", lambda *a: scored(*a[:3], 1.0))


@kinds
@put_back(
    the_clip_left_out,
    a_mean_over_all_tokens,
    no_kl_in_the_loss,
    k1_in_the_loss,
    the_reference_for_the_old_policy,
    kl_added_to_the_reward,
    a_deviation_over_n,
    not_scaled,
    compared_with_all_groups,
    scored_at_another_temperature,
)
def test_an_update_equals_the_plain_one(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = make_model(kind)
    reference = moved(start, 0.05, 1)
    plain_policy = double(start)
    optimizer = plain.adamw(plain_policy, RATE)
    expected, losses = caught_gradients(optimizer), caught_losses(monkeypatch)
    batch, scores = plain.pad(ASKED, RESPONSES), torch.tensor(SCORES)
    plain.grpo_update(plain_policy, double(reference), lambda _: scores, batch, optimizer, SETTINGS)

    with holds_unless(mistake, monkeypatch):
        policy = learner_of(start)
        gradients = caught_gradients(policy.optimizer.optimizer)
        rollout = rollout_of(start, reference, ASKED, SETTINGS.temperature, 7.0)
        metrics = library_grpo(policy, rollout, SETTINGS, micro=2)

        assert_gradients(gradients, expected)
        assert_weights(policy.model, plain_policy, start)
        assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-3)
        assert metrics["clip_ratio/region_mean"] > 0.1, "the clip should bind somewhere"
