"""PPO: sample, score, estimate advantages with a value model, and take clipped steps.

Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ouyang et al. 2022,
arXiv:2203.02155, with the details of Huang et al. 2024, arXiv:2403.17031.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.batches import prompt_batches, shuffled_batches
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.learner import Averages, Learner
from rlhf_lib.models.load import load_policy, load_value_model, save_model, trainable
from rlhf_lib.models.logprobs import response_logprobs, token_values
from rlhf_lib.objectives.advantages import explained_variance, gae, kl_shaped_rewards
from rlhf_lib.objectives.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lib.objectives.masked import masked_whiten
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator, phase
from rlhf_lib.settings import PPOConfig


@dataclass(frozen=True)
class Experience:
    """A rollout with what PPO adds to it; all (B, T)."""

    rollout: Rollout
    values: Tensor
    advantages: Tensor  # whitened over the batch's real tokens
    returns: Tensor


@phase("values")
@torch.no_grad()
def make_experience(
    rollout: Rollout, value: Learner, config: PPOConfig, reward_scale: float = 1.0
) -> Experience:
    """Values, KL-shaped rewards, returns, and only then whitened advantages.

    Rewards are divided by `reward_scale` before the KL is taken off.
    """
    values = torch.zeros_like(rollout.logprobs)
    for micro in rollout.micro_batches(range(len(rollout.prompts)), config.micro_batch_size):
        with value.accelerator.autocast():
            part = token_values(value.model, micro.prompts, micro.responses)
        values[micro.rows, : micro.width] = part.cpu()
    mask = rollout.response_mask
    rewards = kl_shaped_rewards(
        rollout.rewards / reward_scale, rollout.logprobs, rollout.ref_logprobs, mask,
        config.kl_coef, config.kl_estimator,
    )  # fmt: skip
    if config.reward_normalization == "batch":
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    return Experience(rollout, values, masked_whiten(advantages, mask), returns)


def update(
    policy: Learner, value: Learner, experience: Experience, config: PPOConfig, seed: int
) -> dict[str, float]:
    """Several epochs of minibatch steps on one batch of experience; metrics are means over them.

    `seed` fixes the order of the minibatches: a fresh permutation in each epoch. Where `value` is
    `policy` itself, one step descends the policy loss plus value_coef times the value loss.
    """
    averages = Averages()
    count = len(experience.rollout.prompts)
    for rows in shuffled_batches(count, config.minibatch_size, config.epochs, seed):
        policy_losses = _policy_losses(policy, experience, rows, config, averages)
        value_losses = _value_losses(value, experience, rows, config, averages)
        if value is policy:
            both = chain(policy_losses, (config.value_coef * loss for loss in value_losses))
            norm = value_norm = policy.step(both)[1]
        else:
            norm, value_norm = policy.step(policy_losses)[1], value.step(value_losses)[1]
        averages.add({"policy_norm": norm, "value_norm": value_norm})
    return {
        "loss": averages["policy_loss"] + averages["value_loss"],
        "grad_norm": averages["policy_norm"],
        "value_grad_norm": averages["value_norm"],
        "learning_rate": policy.learning_rate,
        "loss/policy_avg": averages["policy_loss"],
        "loss/value_avg": averages["value_loss"],
        "policy/approxkl_avg": averages["approx_kl"],
        "policy/clipfrac_avg": averages["clip_fraction"],
        "val/clipfrac_avg": averages["value_clip_fraction"],
        "val/ratio": averages["ratio_mean"],
        "val/ratio_var": averages["ratio_square"] - averages["ratio_mean"] ** 2,
    }


def _policy_losses(
    policy: Learner, experience: Experience, rows: list[int], config: PPOConfig, averages: Averages
) -> Iterator[Tensor]:
    """The clipped policy loss of a minibatch, in micro-batches that add up to its token mean."""
    rollout, device = experience.rollout, policy.accelerator.device
    tokens = int(rollout.lengths[rows].sum())
    for micro in rollout.micro_batches(rows, config.micro_batch_size):
        with policy.accelerator.autocast():
            logprobs, mask = response_logprobs(
                policy.model, micro.prompts, micro.responses, config.temperature
            )
        loss, stats = ppo_policy_loss(
            logprobs,
            rollout.logprobs[micro.rows, : micro.width].to(device),
            experience.advantages[micro.rows, : micro.width].to(device),
            mask,
            config.clip_range,
        )
        # variances of parts do not add up, squares do
        square = float(stats.ratio_var) + float(stats.ratio_mean) ** 2
        averages.add(
            stats._asdict() | {"ratio_square": square, "policy_loss": loss.detach()}, micro.tokens
        )
        yield loss * micro.tokens / tokens


def _value_losses(
    value: Learner, experience: Experience, rows: list[int], config: PPOConfig, averages: Averages
) -> Iterator[Tensor]:
    """The clipped value loss of a minibatch, in micro-batches that add up to its token mean."""
    rollout, device = experience.rollout, value.accelerator.device
    tokens = int(rollout.lengths[rows].sum())
    for micro in rollout.micro_batches(rows, config.micro_batch_size):
        with value.accelerator.autocast():
            values = token_values(value.model, micro.prompts, micro.responses)
        loss, stats = ppo_value_loss(
            values,
            experience.values[micro.rows, : micro.width].to(device),
            experience.returns[micro.rows, : micro.width].to(device),
            rollout.response_mask[micro.rows, : micro.width].to(device),
            config.value_clip_range,
        )
        measured = {"value_clip_fraction": stats.clip_fraction, "value_loss": loss.detach()}
        averages.add(measured, micro.tokens)
        yield loss * micro.tokens / tokens


def train(
    run: Run, data: PreferenceData, sft: Stage, reward_model: Stage,
    stage_name: str = "ppo", changes: Mapping[str, object] | None = None,
) -> Stage:  # fmt: skip
    """The PPO stage: from the SFT policy to `model/`.

    `stage_name` and `changes` of its settings make a second run beside the default.
    """
    config = replace(run.profile.ppo, **(changes or {}))
    upstream = {"data": data.hash, "sft": sft.hash, "reward_model": reward_model.hash}
    stage = run.stage(stage_name, config, upstream, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        sft_path, reward_path = str(sft.model_path), str(reward_model.model_path)
        model = trainable(load_policy(sft_path), run.profile.model)
        shared = config.value_model == "shared"
        if shared:
            add_value_head(model)
        sampler = Sampler(
            run, accelerator, sft_path, reward_path, temperature=config.temperature,
            batch_size=config.micro_batch_size, reward_clip=config.reward_clip,
            missing_eos_penalty=config.missing_eos_penalty, policy=model,
        )  # fmt: skip
        steps = config.updates * config.epochs * -(-config.batch_size // config.minibatch_size)
        policy = Learner(
            accelerator, model, learning_rate=config.learning_rate, steps=steps,
            max_grad_norm=config.max_grad_norm, eps=1e-5,
        )  # fmt: skip
        value = policy if shared else Learner(
            accelerator, trainable(load_value_model(reward_path), run.profile.model),
            learning_rate=config.value_learning_rate, steps=steps,
            max_grad_norm=config.max_grad_norm, eps=1e-5,
        )  # fmt: skip
        kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        scale = RunningScale()
        accelerator.register_for_checkpointing(kl, scale)
        prompts = data.prompts["train"]
        batches = prompt_batches(len(prompts), config.batch_size, config.updates, run.seed)

        for step in work.steps(config.updates, accelerator):
            # 1. sample responses, score them, take log-probs under policy and reference
            rollout = sampler.sample(policy.model, [prompts[i] for i in batches[step]])
            # 2. values, KL-shaped rewards, returns and advantages
            if config.reward_normalization == "running":
                scale.update(rollout.rewards)
            now = replace(config, kl_coef=kl.coef)
            experience = make_experience(rollout, value, now, scale.std)
            # 3. clipped steps on policy and value model
            metrics = update(policy, value, experience, now, seed=1000 * run.seed + step)
            work.log(step, rollout.num_tokens, metrics | rollout_metrics(experience, now))
            kl.update(float(rollout.kl.mean()), config.batch_size)

        if shared:
            del policy.model.score  # `model/` is an ordinary language model
        save_model(policy.model, sampler.tokenizer, work.model_path)
        return {"updates": config.updates, "samples": config.updates * config.batch_size}

    return stage.ensure(build)


def add_value_head(model: PreTrainedModel) -> None:
    """A head `score` that reads values off the policy's own trunk; it starts at 0 everywhere."""
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    model.score = head


def rollout_metrics(experience: Experience, config: PPOConfig) -> dict[str, float]:
    """What the sampled responses say of the policy, before its update."""
    rollout, shared = experience.rollout, experience.rollout.metrics()
    penalty = -config.kl_coef * shared["kl"]
    return shared | {
        "kl_coef": config.kl_coef,
        "objective/kl": shared["kl"],
        "objective/entropy": shared["entropy"] * shared["completions/mean_length"],
        "objective/non_score_reward": penalty,
        "objective/scores": shared["reward"],
        "objective/rlhf_reward": float(rollout.rewards.mean()) + penalty,
        "policy/entropy_avg": shared["entropy"],
        "val/num_eos_tokens": float(rollout.finished.sum()),
        "val/explained_variance": float(
            explained_variance(experience.values, experience.returns, rollout.response_mask)
        ),
    }


class AdaptiveKL:
    """A KL coefficient that rises while the KL is above `target`, and falls while it is below.

    `target` in nats a response, `horizon` in responses; a target of 0 leaves the coefficient alone.
    Source: Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Follow the mean `kl` of `samples` responses; an error counts at most 20 %."""
        if self.target > 0:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class RunningScale:
    """Standard deviation of all rewards seen so far, to divide the next ones by.

    The mean is left alone, so that 0 stays what it was: the reward of a demonstration.
    Source: reward scaling in Zheng et al. 2023, arXiv:2307.04964.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, rewards: Tensor) -> None:
        """Take in a batch of rewards, of any shape."""
        count, mean = rewards.numel(), float(rewards.mean())
        total, shift = self.count + count, mean - self.mean
        self.squares += float(((rewards - mean) ** 2).sum())
        self.squares += shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """1 until two rewards that differ have been seen."""
        variance = self.squares / max(self.count - 1, 1)
        return math.sqrt(variance) if variance > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean = int(state["count"]), state["mean"]
        self.squares = state["squares"]
