"""GRPO: groups, silent groups, exact accumulation in every aggregation, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lib.methods import grpo
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.load import load_policy
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.objectives.losses import grpo_loss
from rlhf_lib.settings import GRPOConfig, numbers
from tests.conftest import learner_of, train_stage

CONFIG = GRPOConfig(prompts_per_update=2, group_size=4, micro_batch_size=3, iterations=1)
CONSTANT = 8


def make_advantages(rollout: Rollout, config: GRPOConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return grpo.make_advantages(rollout, **numbers(grpo.make_advantages, config))


def update(
    policy: Learner, rollout: Rollout, advantages: torch.Tensor, config: GRPOConfig, constant: int
) -> dict[str, float]:
    given = numbers(grpo.update, config)
    return grpo.update(policy, rollout, advantages, **given, constant=constant)


@pytest.fixture
def rollout_at(make_sampler: Callable, tiny_data: Any, tiny_base: Path) -> Callable:
    """`rollout_at(temperature)`: four responses to each of two prompts, some cut and some ended."""

    def sample(temperature: float = 1.0) -> Rollout:
        policy = load_policy(tiny_base)
        prompts = [p for p in tiny_data.prompts["train"][:2] for _ in range(4)]
        rollout = make_sampler().sample(
            policy, prompts, temperature=temperature, micro_batch_size=3
        )
        # cut some shorter, so that the aggregations differ
        return cut(rollout, [8, 3, 5, 1, 2, 8, 4, 6])

    return sample


def cut(rollout: Rollout, lengths: list[int]) -> Rollout:
    width = rollout.response_mask.shape[1]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask = mask.float() * rollout.response_mask
    return replace(
        rollout,
        responses=[r[:n] for r, n in zip(rollout.responses, lengths, strict=True)],
        response_mask=mask,
        logprobs=rollout.logprobs * mask,
        ref_logprobs=rollout.ref_logprobs * mask,
    )


def test_rewards_pay_for_the_divergence_of_the_whole_response(rollout_at: Callable) -> None:
    rollout = rollout_at()
    config = replace(CONFIG, kl_reward_coef=0.3, scale="none")
    rewards, advantages = make_advantages(rollout, config)
    for i, length in enumerate(map(len, rollout.responses)):
        kl = (rollout.logprobs[i, :length] - rollout.ref_logprobs[i, :length]).sum()
        assert rewards[i].item() == pytest.approx((rollout.rewards[i] - 0.3 * kl).item(), abs=1e-5)
    for group in (slice(0, 4), slice(4, 8)):
        expected = rewards[group] - rewards[group].mean()
        assert torch.allclose(advantages[group], expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(temperature: float, rollout_at: Callable, tiny_base: Path) -> None:
    rollout = rollout_at(temperature)
    config = replace(CONFIG, temperature=temperature)
    _, advantages = make_advantages(rollout, config)
    policy = learner_of(load_policy(tiny_base))
    metrics = update(policy, rollout, advantages, config, CONSTANT)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["loss"] == pytest.approx(-advantages.mean().item(), abs=1e-5)
    assert metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_accumulated_equals_one_big_batch(
    aggregation: str, rollout_at: Callable, tiny_base: Path
) -> None:
    rollout, results = rollout_at(), []
    for micro_batch_size in (8, 3, 1):
        config = replace(
            CONFIG,
            micro_batch_size=micro_batch_size,
            aggregation=aggregation,
            iterations=2,
            kl_coef=0.1,
        )
        _, advantages = make_advantages(rollout, config)
        policy = learner_of(load_policy(tiny_base), rate=1.0)
        metrics = update(policy, rollout, advantages, config, CONSTANT)
        results.append((metrics, [w.detach() for w in policy.model.parameters()]))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
        assert max((a - b).abs().max().item() for a, b in zip(weights, other, strict=True)) < 1e-6


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_the_loss_is_that_of_the_pure_function(
    aggregation: str, rollout_at: Callable, tiny_base: Path, finished: Any
) -> None:
    rollout = rollout_at()
    config = replace(CONFIG, aggregation=aggregation, kl_coef=0.1, clip_low=0.1, clip_high=0.3)
    _, advantages = make_advantages(rollout, config)
    model = load_policy(finished.sft.model_path)  # not the policy that sampled
    logprobs, mask = response_logprobs(model, rollout.prompts, rollout.responses)
    loss, _ = grpo_loss(
        logprobs,
        rollout.logprobs,
        advantages,
        mask,
        rollout.ref_logprobs,
        0.1,
        0.1,
        0.3,
        aggregation,
    )
    # the pure function divides by its own width, here 8 as well
    assert mask.shape == (8, CONSTANT)
    metrics = update(learner_of(model), rollout, advantages, config, CONSTANT)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_the_constant_does_not_hang_on_the_longest_response(
    rollout_at: Callable, tiny_base: Path
) -> None:
    config = replace(CONFIG, aggregation="constant")
    rollout, losses = rollout_at(), []
    for constant in (8, 16):
        _, advantages = make_advantages(rollout, config)
        policy = learner_of(load_policy(tiny_base))
        losses.append(update(policy, rollout, advantages, config, constant)["loss"])
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)


def test_a_silent_group_gives_no_gradient_and_is_counted(
    rollout_at: Callable, tiny_base: Path
) -> None:
    rollout = rollout_at()
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 1.0, 2.0, 0.0, 5.0])
    config = replace(CONFIG, kl_reward_coef=0.0)
    half = replace(rollout, rewards=rewards)
    shaped, advantages = make_advantages(half, config)
    assert advantages[:4].tolist() == [0, 0, 0, 0]
    metrics = grpo.rollout_metrics(half, shaped, advantages, 4)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward_std"] == pytest.approx(rewards[4:].std().item() / 2)

    silent = replace(rollout, rewards=torch.full((8,), 0.1))
    shaped, advantages = make_advantages(silent, config)
    assert grpo.rollout_metrics(silent, shaped, advantages, 4)["frac_reward_zero_std"] == 1
    metrics = update(learner_of(load_policy(tiny_base)), silent, advantages, config, CONSTANT)
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)


def test_the_stage_logs_and_trains(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    stage = train_stage(make_run(tmp_path), "grpo", tiny_data, finished)
    rows = stage.metrics()
    assert len(rows) == 4
    assert rows[0].keys() >= {
        "loss",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "kl",
        "entropy",
        "grad_norm",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/region_mean",
    }
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5), "the policy starts as the reference"
    rates = [row["learning_rate"] / 5e-5 for row in rows]  # of an update's second step
    assert rates == pytest.approx([7 / 8, 5 / 8, 3 / 8, 1 / 8])
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert stage.result()["samples"] == 4 * 2 * 4
    lengths = [8 * row["completions/mean_length"] for row in rows]
    assert [row["reply_tokens"] for row in rows] == pytest.approx(lengths)
    trained = load_policy(stage.model_path).state_dict()
    start = load_policy(finished.sft.model_path).state_dict()
    assert any(not torch.equal(trained[name], weight) for name, weight in start.items())


def test_a_group_answers_one_prompt(
    make_run: Callable,
    finished: Any,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *a, **k: (asked.append(a[2]), sample(*a, **k))[1])
    train_stage(make_run(tmp_path, "grpo.updates=2"), "grpo", tiny_data, finished)
    for prompts in asked:
        first, second = prompts[:4], prompts[4:]
        assert first == [first[0]] * 4
        assert second == [second[0]] * 4
        assert first[0] != second[0]
    assert asked[0][0] not in asked[1]


def test_it_learns_to_please_the_reward_model(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path,
        "grpo.updates=12",
        "grpo.micro_batch_size=16",
        "grpo.prompts_per_update=8",
        "grpo.learning_rate=1e-2",
        "grpo.kl_reward_coef=0",
        "grpo.missing_eos_penalty=0",
    )
    stage = train_stage(run, "grpo", tiny_data, finished)
    scores = [row["reward"] for row in stage.metrics()]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


def test_killed_and_resumed_ends_like_never_killed(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    check_resume(lambda run: train_stage(run, "grpo", tiny_data, finished))
