"""GRPO by its settings: the baseline, where the KL enters, and which responses teach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lib.methods import grpo
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.load import load_policy
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.objectives.advantages import group_advantages, leave_one_out_advantages
from rlhf_lib.objectives.kl import ESTIMATORS
from rlhf_lib.objectives.losses import grpo_loss
from rlhf_lib.settings import GRPOConfig, numbers
from tests.conftest import learner_of, train_stage

CONFIG = GRPOConfig(prompts_per_update=2, group_size=4, micro_batch_size=3, iterations=1)


def make_advantages(rollout: Rollout, config: GRPOConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return grpo.make_advantages(rollout, **numbers(grpo.make_advantages, config))


@pytest.fixture
def rollout(make_sampler: Callable, tiny_data: Any, tiny_base: Path) -> Rollout:
    """Three groups of four; the policy is not the reference."""
    policy, prompts = load_policy(tiny_base), tiny_data.prompts["train"][:3]
    groups = [p for p in prompts for _ in range(4)]
    return make_sampler().sample(policy, groups, micro_batch_size=3, missing_eos_penalty=1.0)


def test_leave_one_out_is_the_group_baseline_without_the_response_itself(rollout: Rollout) -> None:
    config = replace(CONFIG, advantage="leave_one_out")
    rewards, advantages = make_advantages(rollout, config)
    assert torch.allclose(advantages, leave_one_out_advantages(rewards, 4))
    centred = group_advantages(rewards, 4, "none")  # the own reward in the mean shrinks it by 3/4
    assert torch.allclose(0.75 * advantages, centred, atol=1e-6)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_estimator_in_the_reward_is_the_one_asked_for(name: str, rollout: Rollout) -> None:
    config = replace(CONFIG, kl_reward_coef=0.3, kl_reward_estimator=name)
    rewards, _ = make_advantages(rollout, config)
    kl = ESTIMATORS[name](rollout.logprobs, rollout.ref_logprobs) * rollout.response_mask
    assert torch.allclose(rewards, rollout.rewards - 0.3 * kl.sum(1), atol=1e-6)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_estimator_in_the_loss_is_the_one_asked_for(
    name: str, rollout: Rollout, tiny_base: Path
) -> None:
    config = replace(CONFIG, kl_coef=0.5, kl_estimator=name, aggregation="token")
    learner, zero = learner_of(load_policy(tiny_base)), torch.zeros(12)
    metrics = grpo.update(learner, rollout, zero, **numbers(grpo.update, config), constant=8)
    logprobs, mask = response_logprobs(learner.model, rollout.prompts, rollout.responses)
    estimate = ESTIMATORS[name](logprobs, rollout.ref_logprobs)
    mean = (estimate * mask).sum() / mask.sum()
    assert metrics["loss"] == pytest.approx(0.5 * mean.item(), abs=1e-5)
    loss, stats = grpo_loss(
        logprobs,
        rollout.logprobs,
        zero,
        mask,
        rollout.ref_logprobs,
        0.5,
        aggregation="token",
        kl_estimator=name,
    )
    assert loss.item() == pytest.approx(metrics["loss"], abs=1e-5)
    assert stats.kl.item() == pytest.approx(mean.item(), abs=1e-5)


def test_overlong_responses_give_no_gradient_but_stay_in_their_group(rollout: Rollout) -> None:
    assert 0 < int(rollout.finished.sum()) < 12, "the test needs both kinds"
    rewards, advantages = make_advantages(rollout, replace(CONFIG, mask_overlong=True))
    _, unmasked = make_advantages(rollout, CONFIG)
    assert (advantages[~rollout.finished] == 0).all()
    assert torch.equal(advantages[rollout.finished], unmasked[rollout.finished])
    assert torch.equal(unmasked, group_advantages(rewards, 4))


def silenced(rollout: Rollout, *groups: int) -> Rollout:
    rewards = rollout.rewards.clone().view(-1, 4)
    rewards[list(groups)] = 0.5
    return replace(rollout, rewards=rewards.view(-1))


def test_groups_with_signal_come_first_and_keep_their_order(rollout: Rollout) -> None:
    kept = grpo.keep_groups_with_signal(silenced(rollout, 1), group_size=4, count=2)
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept.responses == [rollout.responses[i] for i in rows]
    assert kept.prompts == [rollout.prompts[i] for i in rows]
    for name in ("response_mask", "logprobs", "ref_logprobs", "finished", "scores", "rewards"):
        assert torch.equal(getattr(kept, name), getattr(rollout, name)[rows]), name


def test_too_few_groups_with_signal_are_filled_up(rollout: Rollout) -> None:
    kept = grpo.keep_groups_with_signal(silenced(rollout, 0, 2), group_size=4, count=2)
    assert kept.responses == rollout.responses[:8]


def test_a_select_takes_gold_exact_kl_and_parts_along(rollout: Rollout) -> None:
    parts = {"gold": torch.arange(12.0)}
    full = replace(rollout, gold=list(range(12)), exact_kl=rollout.logprobs + 1, parts=parts)
    part = full.select([3, 1])
    assert part.gold == part.parts["gold"].tolist() == [3, 1]
    assert torch.equal(part.exact_kl, full.exact_kl[[3, 1]])
    assert torch.equal(part.entropies, full.entropies[[3, 1]])


def test_the_whole_family_trains(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path,
        "grpo.advantage=leave_one_out",
        "grpo.aggregation=constant",
        "grpo.dynamic_sampling=2",
        "grpo.mask_overlong=true",
        "grpo.clip_high=0.28",
        "grpo.kl_coef=0.1",
        "grpo.kl_estimator=k2",
    )
    stage = train_stage(run, "grpo", tiny_data, finished)
    assert len(stage.metrics()) == 4
    assert stage.result()["samples"] == 4 * 2 * 2 * 4  # updates, prompts, candidates, group
