"""GRPO: several replies to each prompt; a reply's advantage is how it compares with its group.

Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300. There is no value model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf_lib.data.batches import prompt_batches
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods.learner import Averages, Learner, Log, Steps, unlogged
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.objectives.advantages import group_advantages, leave_one_out_advantages
from rlhf_lib.objectives.kl import ESTIMATORS
from rlhf_lib.objectives.losses import grpo_loss
from rlhf_lib.objectives.masked import zero_padding
from rlhf_lib.settings import GRPOConfig, SettingsError, numbers


def train(
    policy: Learner,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    *,
    seed: int = 0,
    steps: Steps = range,
    log: Log = unlogged,
) -> dict[str, int]:
    """`config.updates` rounds of sampling and learning; `policy` ends up trained.

    `steps` yields the rounds still to do, `log` is told of each. Returns what was done in all.
    """
    if config.ratio == "sequence" and config.aggregation != "sequence":
        raise SettingsError(
            f"grpo.ratio=sequence gives a reply one weight, and grpo.aggregation="
            f"{config.aggregation} counts a long reply several times: set it to sequence"
        )
    candidates = config.prompts_per_update * config.dynamic_sampling
    batches = prompt_batches(len(prompts), candidates, config.updates, seed)
    sampling, comparing, learning = (
        numbers(step, config) for step in (sampler.sample, make_advantages, update)
    )
    step = -1
    for step in steps(config.updates):
        # 1. sample a group of replies to each prompt and score them
        asked = [prompts[i] for i in batches[step] for _ in range(config.group_size)]
        sampled = sampler.sample(policy.model, asked, **sampling)
        rollout = keep_groups_with_signal(sampled, config.group_size, config.prompts_per_update)
        # 2. compare each reply with its group
        rewards, advantages = make_advantages(rollout, **comparing)
        # 3. clipped steps on the policy
        metrics = update(policy, rollout, advantages, constant=sampler.max_new_tokens, **learning)
        metrics |= rollout_metrics(rollout, rewards, advantages, config.group_size)
        log(step, sampled.num_tokens, metrics)
    return {"updates": step + 1, "samples": (step + 1) * candidates * config.group_size}


def keep_groups_with_signal(rollout: Rollout, group_size: int, count: int) -> Rollout:
    """As many groups as an update takes; first to go are those whose rewards all agree.

    Source: dynamic sampling, DAPO, arXiv:2503.14476, sec. 3.2, where sampling goes on until enough
    are found; here the candidates are a fixed multiple, and the cost of an update is known.
    """
    groups = rollout.rewards.view(-1, group_size)
    silent = (groups == groups[:, :1]).all(1)
    kept = silent.sort(stable=True).indices[:count].sort().values
    places = torch.arange(len(rollout.prompts)).view(groups.shape)[kept]
    return rollout.select(places.flatten().tolist())


def make_advantages(
    rollout: Rollout,
    *,
    group_size: int,
    kl_reward_coef: float = 0.0,
    kl_reward_estimator: str = "k1",
    advantage: str = "group",
    scale: str = "group",
    mask_overlong: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rewards less kl_reward_coef * the reply's KL, advantages over its group), both (B,).

    `advantage`: "group" or "leave_one_out" (RLOO), which knows no scale. `mask_overlong`: a reply
    without its end gets none (overlong filtering, DAPO, sec. 3.4).
    """
    kl = ESTIMATORS[kl_reward_estimator](rollout.logprobs, rollout.ref_logprobs)
    kl = zero_padding(kl, rollout.response_mask).sum(1)
    rewards = rollout.rewards - kl_reward_coef * kl
    if advantage == "leave_one_out":
        advantages = leave_one_out_advantages(rewards, group_size)
    else:
        advantages = group_advantages(rewards, group_size, scale)
    if mask_overlong:
        advantages = torch.where(rollout.finished, advantages, 0.0)
    return rewards, advantages


def update(
    policy: Learner,
    rollout: Rollout,
    advantages: Tensor,
    *,
    constant: int,
    micro_batch_size: int,
    iterations: int = 1,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "sequence",
    ratio: str = "token",
    surrogate: str = "clip",
) -> dict[str, float]:
    """`iterations` optimizer steps on one batch of samples; metrics are means over them.

    `constant`: the reply length that aggregation="constant" divides by. The losses of micro-batches
    add up to the batch's: each weighs by its share of what its loss was averaged over.
    """
    averages = Averages()
    device, count = policy.accelerator.device, len(rollout.prompts)
    tokens = int(rollout.lengths.sum())

    def losses() -> Iterator[Tensor]:
        for micro in rollout.micro_batches(range(count), micro_batch_size):
            place = micro.rows, slice(micro.width)
            with policy.accelerator.autocast():
                logprobs, mask = response_logprobs(
                    policy.model, micro.prompts, micro.responses, temperature
                )
            loss, stats = grpo_loss(
                logprobs,
                rollout.logprobs[place].to(device),
                advantages[micro.rows].to(device),
                mask,
                rollout.ref_logprobs[place].to(device),
                kl_coef,
                clip_low,
                clip_high,
                aggregation,
                kl_estimator,
                ratio,
                surrogate,
            )
            averages.add(stats.policy._asdict(), micro.tokens)
            share = {
                "sequence": len(micro.rows) / count,
                "token": micro.tokens / tokens,
                "constant": len(micro.rows) * micro.width / (count * constant),
            }
            yield loss * share[aggregation]

    for _ in range(iterations):
        loss, norm = policy.step(losses())
        averages.add({"loss": loss, "grad_norm": norm})
    averages.put_together()
    return {
        "loss": averages["loss"],
        "grad_norm": averages["grad_norm"],
        **policy.logged(),
        "clip_ratio/region_mean": averages["clip_fraction"],
        "policy/approxkl_avg": averages["approx_kl"],
        "val/ratio": averages["ratio_mean"],
    }


def rollout_metrics(
    rollout: Rollout, rewards: Tensor, advantages: Tensor, group_size: int
) -> dict[str, float]:
    """What the sampled replies say of the policy, before its update."""
    groups = rewards.view(-1, group_size)
    silent = (advantages.view(groups.shape) == 0).all(1)
    return rollout.metrics() | {
        "reward_std": float(groups.std(1).mean()),
        "frac_reward_zero_std": float(silent.float().mean()),
    }
