"""GRPO: several responses to each prompt; a response's advantage is how it compares with its group.

Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300. There is no value model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lib.data.batches import prompt_batches
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.rollout import MicroBatch, Rollout, Sampler
from rlhf_lib.models.learner import Averages, Learner
from rlhf_lib.models.load import load_policy, save_model, trainable
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.objectives.advantages import group_advantages, leave_one_out_advantages
from rlhf_lib.objectives.kl import ESTIMATORS
from rlhf_lib.objectives.losses import grpo_loss
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import GRPOConfig


def keep_groups_with_signal(rollout: Rollout, config: GRPOConfig) -> Rollout:
    """As many groups as an update takes; first to go are those whose rewards all agree.

    Source: dynamic sampling, DAPO, arXiv:2503.14476, sec. 3.2, where sampling goes on until enough
    are found; here the candidates are a fixed multiple, and the cost of an update is known.
    """
    groups = rollout.rewards.view(-1, config.group_size)
    silent = (groups == groups[:, :1]).all(1)
    kept = silent.sort(stable=True).indices[: config.prompts_per_update].sort().values
    places = torch.arange(len(rollout.prompts)).view(groups.shape)[kept]
    return rollout.select(places.flatten().tolist())


def make_advantages(rollout: Rollout, config: GRPOConfig) -> tuple[Tensor, Tensor]:
    """(rewards less kl_reward_coef * the response's KL, advantages over its group), both (B,)."""
    kl = ESTIMATORS[config.kl_reward_estimator](rollout.logprobs, rollout.ref_logprobs)
    rewards = rollout.rewards - config.kl_reward_coef * (kl * rollout.response_mask).sum(1)
    if config.advantage == "leave_one_out":
        advantages = leave_one_out_advantages(rewards, config.group_size)
    else:
        advantages = group_advantages(rewards, config.group_size, config.scale)
    if config.mask_overlong:  # overlong filtering, DAPO, sec. 3.4
        advantages = torch.where(rollout.finished, advantages, 0.0)
    return rewards, advantages


def update(
    policy: Learner, rollout: Rollout, advantages: Tensor, config: GRPOConfig, constant: int
) -> dict[str, float]:
    """`iterations` optimizer steps on one batch of samples; metrics are means over them.

    `constant`: the response length that aggregation="constant" divides by.
    """
    averages = Averages()
    for _ in range(config.iterations):
        loss, norm = policy.step(_losses(policy, rollout, advantages, config, constant, averages))
        averages.add({"loss": loss, "grad_norm": norm})
    return {
        "loss": averages["loss"],
        "grad_norm": averages["grad_norm"],
        "learning_rate": policy.learning_rate,
        "clip_ratio/region_mean": averages["clip_fraction"],
        "policy/approxkl_avg": averages["approx_kl"],
        "val/ratio": averages["ratio_mean"],
    }


def _losses(
    policy: Learner, rollout: Rollout, advantages: Tensor, config: GRPOConfig, constant: int,
    averages: Averages,
) -> Iterator[Tensor]:  # fmt: skip
    """The loss of the whole batch, in micro-batches that add up to its aggregation."""
    device, count = policy.accelerator.device, len(rollout.prompts)
    for micro in rollout.micro_batches(range(count), config.micro_batch_size):
        with policy.accelerator.autocast():
            logprobs, mask = response_logprobs(
                policy.model, micro.prompts, micro.responses, config.temperature
            )
        loss, stats = grpo_loss(
            logprobs,
            rollout.logprobs[micro.rows, : micro.width].to(device),
            advantages[micro.rows].to(device),
            mask,
            rollout.ref_logprobs[micro.rows, : micro.width].to(device),
            config.kl_coef,
            config.clip_low,
            config.clip_high,
            config.aggregation,
            config.kl_estimator,
        )
        averages.add(stats.policy._asdict(), micro.tokens)
        yield loss * _weight(micro, rollout, config.aggregation, constant)


def _weight(micro: MicroBatch, rollout: Rollout, aggregation: str, constant: int) -> float:
    """The share of a micro-batch in the batch, by what its loss was averaged over."""
    count = len(rollout.prompts)
    return {
        "sequence": len(micro.rows) / count,
        "token": micro.tokens / int(rollout.lengths.sum()),
        "constant": len(micro.rows) * micro.width / (count * constant),
    }[aggregation]


def train(
    run: Run, data: PreferenceData, sft: Stage, reward_model: Stage,
    stage_name: str = "grpo", changes: Mapping[str, object] | None = None,
) -> Stage:  # fmt: skip
    """The GRPO stage: from the SFT policy to `model/`.

    `stage_name` and `changes` of its settings make a second run beside the default.
    """
    config = replace(run.profile.grpo, **(changes or {}))
    upstream = {"data": data.hash, "sft": sft.hash, "reward_model": reward_model.hash}
    stage = run.stage(stage_name, config, upstream, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        sft_path, reward_path = str(sft.model_path), str(reward_model.model_path)
        model = trainable(load_policy(sft_path), run.profile.model)
        sampler = Sampler(
            run, accelerator, sft_path, reward_path, temperature=config.temperature,
            batch_size=config.micro_batch_size, reward_clip=config.reward_clip,
            missing_eos_penalty=config.missing_eos_penalty, policy=model,
        )  # fmt: skip
        policy = Learner(
            accelerator, model, learning_rate=config.learning_rate,
            steps=config.updates * config.iterations, max_grad_norm=config.max_grad_norm, eps=1e-5,
        )  # fmt: skip
        prompts = data.prompts["train"]
        candidates = config.prompts_per_update * config.dynamic_sampling
        batches = prompt_batches(len(prompts), candidates, config.updates, run.seed)

        for step in work.steps(config.updates, accelerator):
            # 1. sample a group of responses to each prompt and score them
            batch = [prompts[i] for i in batches[step] for _ in range(config.group_size)]
            sampled = sampler.sample(policy.model, batch)
            rollout = keep_groups_with_signal(sampled, config)
            # 2. compare each response with its group
            rewards, advantages = make_advantages(rollout, config)
            # 3. clipped steps on the policy
            metrics = update(policy, rollout, advantages, config, sampler.max_new_tokens)
            metrics |= rollout_metrics(rollout, rewards, advantages, config)
            work.log(step, sampled.num_tokens, metrics)

        save_model(policy.model, sampler.tokenizer, work.model_path)
        samples = config.updates * candidates * config.group_size
        return {"updates": config.updates, "samples": samples}

    return stage.ensure(build)


def rollout_metrics(
    rollout: Rollout, rewards: Tensor, advantages: Tensor, config: GRPOConfig
) -> dict[str, float]:
    """What the sampled responses say of the policy, before its update."""
    groups = rewards.view(-1, config.group_size)
    silent = (advantages.view(groups.shape) == 0).all(1)
    return rollout.metrics() | {
        "reward_std": float(groups.std(1).mean()),
        "frac_reward_zero_std": float(silent.float().mean()),
    }
