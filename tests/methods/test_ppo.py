"""PPO: the order of its steps, ratios of one at the start, exact accumulation, and resuming."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lib.methods import ppo
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.load import load_policy, load_value_model
from rlhf_lib.models.logprobs import token_values
from rlhf_lib.objectives.advantages import explained_variance, gae, kl_shaped_rewards
from rlhf_lib.objectives.masked import masked_whiten
from rlhf_lib.runs import Run
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import PPOConfig, numbers
from tests.conftest import train_stage

CONFIG = PPOConfig(batch_size=8, minibatch_size=8, micro_batch_size=3, epochs=1, kl_coef=0.1)


def learner_of(model: Any, rate: float = 0.0) -> Learner:
    # with a large eps, Adam's update is proportional to the gradient: rounding is not blown up
    return Learner(make_accelerator("fp32"), model, learning_rate=rate, steps=100, eps=100.0)


@pytest.fixture
def rollout_at(make_sampler: Callable, tiny_data: Any, tiny_base: Path) -> Callable:
    """`rollout_at(temperature)`: eight responses of the base model, the SFT model as reference."""

    def sample(temperature: float = 1.0) -> Rollout:
        policy, prompts = load_policy(tiny_base), tiny_data.prompts["train"][:8]
        return make_sampler().sample(policy, prompts, temperature=temperature, micro_batch_size=3)

    return sample


def experience_of(rollout: Rollout, value: Learner, config: PPOConfig) -> ppo.Experience:
    given = numbers(ppo.make_experience, config)
    return ppo.make_experience(rollout, value, **given)


def update(
    policy: Learner, value: Learner, experience: ppo.Experience, config: PPOConfig, seed: int
) -> dict[str, float]:
    return ppo.update(policy, value, experience, **numbers(ppo.update, config), seed=seed)


@pytest.fixture
def value_model(finished: Any) -> Any:
    return load_value_model(str(finished.reward_model.model_path))


def test_returns_come_before_whitening(rollout_at: Callable, value_model: Any) -> None:
    rollout = rollout_at()
    mask = rollout.response_mask
    experience = experience_of(rollout, learner_of(value_model), CONFIG)
    values = token_values(value_model, rollout.prompts, rollout.responses).detach()
    assert torch.allclose(experience.values, values, atol=1e-5)
    rewards = kl_shaped_rewards(rollout.rewards, rollout.logprobs, rollout.ref_logprobs, mask, 0.1)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert torch.allclose(experience.returns, returns, atol=1e-5)
    assert torch.allclose(experience.advantages, masked_whiten(advantages, mask), atol=1e-4)
    real = experience.advantages[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.std().item() == pytest.approx(1, abs=1e-3)
    # whitened first, the returns would be these
    wrong = masked_whiten(advantages, mask) + values
    assert (experience.returns - wrong)[mask.bool()].abs().max() > 0.1


def test_whitening_rewards_keeps_their_mean(rollout_at: Callable, value_model: Any) -> None:
    rollout, config = rollout_at(), replace(CONFIG, reward_normalization="batch", gae_lambda=1.0)
    mask = rollout.response_mask
    experience = experience_of(rollout, learner_of(value_model), config)
    rewards = kl_shaped_rewards(rollout.rewards, rollout.logprobs, rollout.ref_logprobs, mask, 0.1)
    mean, std = rewards[mask.bool()].mean(), rewards[mask.bool()].std()
    whitened = ((rewards - mean) / std + mean) * mask
    assert torch.allclose(experience.returns[:, 0], whitened.sum(1), atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(
    temperature: float, rollout_at: Callable, tiny_base: Path, value_model: Any
) -> None:
    rollout, value = rollout_at(temperature), learner_of(value_model)
    config = replace(CONFIG, temperature=temperature)
    experience = experience_of(rollout, value, config)
    metrics = update(learner_of(load_policy(tiny_base)), value, experience, config, seed=0)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["val/ratio_var"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/clipfrac_avg"] == 0
    # ratio 1: minus the mean advantage, which whitening made 0
    assert metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-5)
    # values are the old ones: half the squared error to the returns
    error = (experience.values - experience.returns)[rollout.response_mask.bool()]
    assert metrics["loss/value_avg"] == pytest.approx(0.5 * (error**2).mean().item(), rel=1e-4)
    assert metrics["val/clipfrac_avg"] == 0


def test_accumulated_equals_one_big_batch(
    rollout_at: Callable, tiny_base: Path, finished: Any
) -> None:
    rollout, results = rollout_at(), []
    assert len(set(rollout.lengths.tolist())) > 1
    for micro_batch_size in (8, 3, 1):
        config = replace(CONFIG, micro_batch_size=micro_batch_size, epochs=2, minibatch_size=5)
        policy = learner_of(load_policy(tiny_base), rate=1.0)
        value_model = load_value_model(str(finished.reward_model.model_path))
        value = learner_of(value_model, rate=1.0)
        experience = experience_of(rollout, value, config)
        metrics = update(policy, value, experience, config, seed=1)
        weights = [*policy.model.parameters(), *value.model.parameters()]
        results.append((metrics, [w.detach() for w in weights]))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
        assert max((a - b).abs().max().item() for a, b in zip(weights, other, strict=True)) < 1e-6


def test_every_row_is_seen_once_an_epoch_in_a_fresh_order(
    rollout_at: Callable, tiny_base: Path, value_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, value, rows = rollout_at(), learner_of(value_model), []
    config = replace(CONFIG, epochs=3, minibatch_size=4, micro_batch_size=4)
    experience = experience_of(rollout, value, config)
    cut = Rollout.micro_batches
    monkeypatch.setattr(Rollout, "micro_batches", lambda *a: (rows.append(a[1]), cut(*a))[1])
    update(learner_of(load_policy(tiny_base)), value, experience, config, seed=5)
    seen = rows[0::2]  # each minibatch is cut for the policy and for the value model
    assert seen == rows[1::2]
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_metrics_by_the_names_of_the_ecosystem(rollout_at: Callable, value_model: Any) -> None:
    rollout = rollout_at()
    experience = experience_of(rollout, learner_of(value_model), CONFIG)
    metrics = ppo.rollout_metrics(experience, CONFIG.kl_coef)
    kl, scores = rollout.kl.mean().item(), rollout.scores.mean().item()
    assert abs(kl) > 1e-4
    expected = {
        "objective/kl": kl,
        "objective/scores": scores,
        "objective/non_score_reward": -0.1 * kl,
        "objective/rlhf_reward": rollout.rewards.mean().item() - 0.1 * kl,
        "objective/entropy": rollout.metrics()["entropy"] * rollout.lengths.mean().item(),
        "policy/entropy_avg": rollout.metrics()["entropy"],
        "val/num_eos_tokens": sum(r[-1] == 1 for r in rollout.responses),
        "val/explained_variance": explained_variance(
            experience.values, experience.returns, rollout.response_mask
        ).item(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name


def test_the_value_model_starts_as_the_reward_model_and_apart_from_the_policy(
    make_run: Callable,
    finished: Any,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    make = ppo.make_experience

    @wraps(make)
    def look(rollout: Rollout, value: Learner, **rest: Any) -> ppo.Experience:
        if not seen:
            seen.append({k: w.clone() for k, w in value.model.state_dict().items()})
        return make(rollout, value, **rest)

    monkeypatch.setattr(ppo, "make_experience", look)
    stage = train_stage(make_run(tmp_path), "ppo", tiny_data, finished)
    start = load_value_model(str(finished.reward_model.model_path)).state_dict()
    assert all(torch.equal(seen[0][name], weight) for name, weight in start.items())
    policy = load_policy(str(finished.sft.model_path)).state_dict()
    assert any(not torch.equal(seen[0][name], policy[name]) for name in start if name in policy)

    rows = stage.metrics()
    assert len(rows) == 4
    assert {"loss", "grad_norm", "gold"} - rows[0].keys() == {"gold"}
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5), (
        "the policy starts as the reference"
    )
    assert abs(rows[-1]["objective/kl"]) > 1e-5
    rates = [row["learning_rate"] / 4e-5 for row in rows]  # of an update's last step out of four
    assert rates == pytest.approx([13 / 16, 9 / 16, 5 / 16, 1 / 16])
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert stage.result()["samples"] == 32
    lengths = [8 * row["completions/mean_length"] for row in rows]
    assert [row["reply_tokens"] for row in rows] == pytest.approx(lengths)


def test_a_run_with_less_kl_is_a_stage_of_its_own(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, "ppo.updates=1")
    stage = train_stage(run, "ppo", tiny_data, finished)
    low = train_stage(run, "ppo", tiny_data, finished, "ppo_low_kl", kl_coef=0.01)
    assert low.hash != stage.hash
    assert (low.config["settings"]["kl_coef"], stage.config["settings"]["kl_coef"]) == (0.01, 0.2)
    one, other = low.metrics()[0], stage.metrics()[0]
    assert one["objective/scores"] == other["objective/scores"], "the same first samples"
    other_start = SimpleNamespace(sft=stage, reward_model=finished.reward_model)
    again = train_stage(run, "ppo", tiny_data, other_start)
    assert again.hash != stage.hash, "what it starts from is in the hash"


def test_it_learns_to_please_the_reward_model(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path,
        "ppo.updates=12",
        "ppo.batch_size=16",
        "ppo.minibatch_size=8",
        "ppo.micro_batch_size=16",
        "ppo.learning_rate=1e-2",
        "ppo.value_learning_rate=1e-2",
        "ppo.kl_coef=0",
        "ppo.missing_eos_penalty=0",
    )
    stage = train_stage(run, "ppo", tiny_data, finished)
    scores = [row["objective/scores"] for row in stage.metrics()]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


def test_killed_and_resumed_ends_like_never_killed(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    check_resume(lambda run: train_stage(run, "ppo", tiny_data, finished))


KILLED_PROCESS = """
import os, pickle, signal, sys
import torch
torch.set_num_threads(1)
from tests.conftest import train_stage
from rlhf_lib.runs import Work

log = Work.log
def log_and_die(work, step, *rest):
    log(work, step, *rest)
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Work.log = log_and_die
with open(sys.argv[1], "rb") as file:
    run, data, needed = pickle.load(file)
    train_stage(run, "ppo", data, needed)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_process_killed_outright_is_resumed_by_another(
    check_resume: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    def kill(run: Run) -> None:
        (tmp_path / "arguments").write_bytes(pickle.dumps((run, tiny_data, finished)))
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", KILLED_PROCESS, str(tmp_path / "arguments")]
        ended = subprocess.run(command, cwd=root, env=os.environ, timeout=300, check=False)
        assert ended.returncode == -signal.SIGKILL

    check_resume(lambda run: train_stage(run, "ppo", tiny_data, finished), kill=kill)
