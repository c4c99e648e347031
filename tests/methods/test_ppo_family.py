"""PPO by its settings: where the KL enters, how rewards are scaled, one trunk or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lib.methods import ppo
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.load import add_value_head, load_policy, load_value_model
from rlhf_lib.models.logprobs import response_logprobs, token_values
from rlhf_lib.objectives.kl import ESTIMATORS
from rlhf_lib.objectives.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lib.settings import PPOConfig, numbers
from tests.conftest import learner_of, train_stage

CONFIG = PPOConfig(batch_size=8, minibatch_size=8, micro_batch_size=3, epochs=1, kl_coef=0.1)


def make_experience(
    rollout: Rollout, value: Learner, config: PPOConfig, **more: float
) -> ppo.Experience:
    given = numbers(ppo.make_experience, config)
    return ppo.make_experience(rollout, value, **given, **more)


@pytest.fixture
def rollout(make_sampler: Callable, tiny_data: Any, tiny_base: Path) -> Rollout:
    policy, prompts = load_policy(tiny_base), tiny_data.prompts["train"][:8]
    return make_sampler().sample(policy, prompts, micro_batch_size=3)


@pytest.fixture
def value(finished: Any) -> Learner:
    return learner_of(load_value_model(str(finished.reward_model.model_path)))


def returns_of_first_token(rollout: Rollout, value: Learner, config: PPOConfig) -> torch.Tensor:
    # with lambda 1 and gamma 1 the first return is the sum of all rewards
    whole = replace(config, gae_lambda=1.0)
    return make_experience(rollout, value, whole).returns[:, 0]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_estimator_in_the_reward_is_the_one_asked_for(
    name: str, rollout: Rollout, value: Learner
) -> None:
    kl = ESTIMATORS[name](rollout.logprobs, rollout.ref_logprobs) * rollout.response_mask
    got = returns_of_first_token(rollout, value, replace(CONFIG, kl_estimator=name))
    assert torch.allclose(got, rollout.rewards - 0.1 * kl.sum(1), atol=1e-5)


def test_rewards_are_scaled_before_the_kl_is_taken_off(rollout: Rollout, value: Learner) -> None:
    config = replace(CONFIG, gae_lambda=1.0)
    got = make_experience(rollout, value, config, reward_scale=4.0).returns[:, 0]
    assert torch.allclose(got, rollout.rewards / 4 - 0.1 * rollout.kl, atol=1e-5)


@pytest.fixture
def shared(tiny_base: Path) -> Learner:
    model = load_policy(tiny_base)
    add_value_head(model)
    return learner_of(model)


def test_a_fresh_value_head_knows_nothing(rollout: Rollout, shared: Learner) -> None:
    values = token_values(shared.model, rollout.prompts, rollout.responses)
    assert (values == 0).all()
    assert shared.model.score.bias.requires_grad


def test_one_trunk_descends_both_losses_at_once(rollout: Rollout, shared: Learner) -> None:
    torch.nn.init.normal_(shared.model.score.weight, std=0.1)
    experience = make_experience(rollout, shared, CONFIG)
    logprobs, mask = response_logprobs(shared.model, rollout.prompts, rollout.responses)
    values = token_values(shared.model, rollout.prompts, rollout.responses)
    policy_loss, _ = ppo_policy_loss(logprobs, rollout.logprobs, experience.advantages, mask)
    value_loss, _ = ppo_value_loss(values, experience.values, experience.returns, mask)
    parameters = list(shared.model.parameters())
    gradients = torch.autograd.grad(policy_loss + 0.1 * value_loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm().item()

    metrics = ppo.update(shared, shared, experience, **numbers(ppo.update, CONFIG), seed=0)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["value_grad_norm"] == metrics["grad_norm"]
    assert metrics["loss/policy_avg"] == pytest.approx(policy_loss.item(), abs=1e-5)
    assert metrics["loss/value_avg"] == pytest.approx(value_loss.item(), rel=1e-4)
    assert shared.schedule.get_last_lr() == [0.0]
    assert shared.optimizer.state[parameters[0]]["step"] == 1  # one step, not two


FAMILY = (
    "ppo.value_model=shared",
    "ppo.kl_target=0.05",
    "ppo.kl_horizon=40",
    "ppo.reward_normalization=running",
)


def test_the_whole_family_trains_and_leaves_a_language_model(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, *FAMILY, "ppo.learning_rate=1e-2")
    stage = train_stage(run, "ppo", tiny_data, finished)
    rows = stage.metrics()
    for before, after in pairwise(rows):
        error = min(max(before["kl"] / 0.05 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 8 / 40))
    assert rows[0]["kl_coef"] == 0.2
    assert rows[-1]["kl_coef"] != pytest.approx(0.2)
    assert not hasattr(load_policy(str(stage.model_path)), "score")  # load_policy checks the rest


def test_adapted_and_running_states_survive_a_kill(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    def train(run: Any) -> Any:
        run = replace(run, profile=with_family(run.profile))
        return train_stage(run, "ppo", tiny_data, finished)

    check_resume(train)


def with_family(profile: Any) -> Any:
    config = replace(
        profile.ppo,
        value_model="shared",
        kl_target=0.05,
        kl_horizon=40,
        reward_normalization="running",
        learning_rate=1e-2,
    )
    return replace(profile, ppo=config)
