"""PPO: sample, score, estimate advantages with a value model, and take clipped steps.

Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ouyang et al. 2022,
arXiv:2203.02155, with the details of Huang et al. 2024, arXiv:2403.17031.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rlhf_lib import processes
from rlhf_lib.data.batches import prompt_batches, shuffled_batches
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods.learner import Averages, Learner, Log, Steps, unlogged
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.logprobs import logprobs_and_entropies, response_logprobs, token_values
from rlhf_lib.objectives.advantages import explained_variance, gae, kl_shaped_rewards
from rlhf_lib.objectives.kl import AdaptiveKL
from rlhf_lib.objectives.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lib.objectives.masked import RunningScale, masked_mean, masked_whiten
from rlhf_lib.runtime import phase
from rlhf_lib.settings import PPOConfig, numbers


def train(
    policy: Learner,
    value: Learner,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: PPOConfig,
    *,
    seed: int = 0,
    steps: Steps = range,
    log: Log = unlogged,
) -> dict[str, int]:
    """`config.updates` rounds of sampling and learning; `policy` and `value` end up trained.

    Where `value` is `policy` itself, one model has two heads. `steps` yields the rounds still to
    do, `log` is told of each. Returns what was done in all. PPO's record in `catalogue` names this
    function, and `study.offer` makes what its parameters ask for.
    """
    leash = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    scale = RunningScale()
    policy.accelerator.register_for_checkpointing(leash, scale)  # before `steps` restores them
    batches = prompt_batches(len(prompts), config.batch_size, config.updates, seed)
    sampling, estimating, learning = (
        numbers(step, config) for step in (sampler.sample, make_experience, update)
    )
    step = -1
    for step in steps(config.updates):
        # 1. sample replies, score them, take log-probs under policy and reference
        rollout = sampler.sample(policy.model, [prompts[i] for i in batches[step]], **sampling)
        # 2. values, KL-shaped rewards, returns, and only then whitened advantages
        if config.reward_normalization == "running":
            scale.update(rollout.rewards)
        estimating |= {"kl_coef": leash.coef, "reward_scale": scale.std}
        experience = make_experience(rollout, value, **estimating)
        # 3. clipped steps on policy and value model
        metrics = update(policy, value, experience, seed=1000 * seed + step, **learning)
        log(step, rollout.num_tokens, metrics | rollout_metrics(experience, leash.coef))
        # 4. the coefficient follows the KL, where it has a target
        leash.update(float(rollout.kl.mean()), config.batch_size)
    return {"updates": step + 1, "samples": (step + 1) * config.batch_size}


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
    rollout: Rollout,
    value: Learner,
    *,
    kl_coef: float,
    micro_batch_size: int,
    kl_estimator: str = "k1",
    reward_scale: float = 1.0,
    reward_normalization: str = "none",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> Experience:
    """Values, KL-shaped rewards, returns, and only then whitened advantages.

    Rewards are divided by `reward_scale` before the KL is taken off; reward_normalization="batch"
    scales them to variance 1 after it, over the batch, and leaves their mean.
    """
    values = torch.zeros_like(rollout.logprobs)
    for micro in rollout.micro_batches(range(len(rollout.prompts)), micro_batch_size):
        with value.accelerator.autocast():
            part = token_values(value.model, micro.prompts, micro.responses)
        values[micro.rows, : micro.width] = part.cpu()
    processes.summed(values)
    mask = rollout.response_mask
    rewards = kl_shaped_rewards(
        rollout.rewards / reward_scale,
        rollout.logprobs,
        rollout.ref_logprobs,
        mask,
        kl_coef,
        kl_estimator,
    )
    if reward_normalization == "batch":
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    return Experience(rollout, values, masked_whiten(advantages, mask), returns)


def update(
    policy: Learner,
    value: Learner,
    experience: Experience,
    *,
    epochs: int,
    minibatch_size: int,
    micro_batch_size: int,
    temperature: float = 1.0,
    clip_range: float = 0.2,
    value_clip_range: float = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """Several epochs of minibatch steps on one batch of experience; metrics are means over them.

    `seed` fixes the order of the minibatches: a fresh permutation in each epoch. Where `value` is
    `policy` itself, one step descends the policy loss plus value_coef times the value loss. The
    losses of micro-batches add up to a minibatch's mean over tokens. `entropy_coef`: what a nat of
    entropy earns, as a mean over the states that were visited (arXiv:1707.06347, eq. 9).
    """
    averages = Averages()
    rollout, device = experience.rollout, policy.accelerator.device

    def policy_losses(rows: list[int], tokens: int) -> Iterator[Tensor]:
        for micro in rollout.micro_batches(rows, micro_batch_size):
            place = micro.rows, slice(micro.width)
            with policy.accelerator.autocast():
                rows_of = policy.model, micro.prompts, micro.responses, temperature
                if entropy_coef:
                    logprobs, entropies, mask = logprobs_and_entropies(*rows_of)
                    bonus = entropy_coef * masked_mean(entropies, mask)
                else:
                    (logprobs, mask), bonus = response_logprobs(*rows_of), 0.0
            old_logprobs = rollout.logprobs[place].to(device)
            advantages = experience.advantages[place].to(device)
            loss, stats = ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)
            # variances of parts do not add up, squares do
            square = float(stats.ratio_var) + float(stats.ratio_mean) ** 2
            measured = {"ratio_square": square, "policy_loss": loss.detach()}
            averages.add(stats._asdict() | measured, micro.tokens)
            yield (loss - bonus) * micro.tokens / tokens

    def value_losses(rows: list[int], tokens: int) -> Iterator[Tensor]:
        for micro in rollout.micro_batches(rows, micro_batch_size):
            place = micro.rows, slice(micro.width)
            with value.accelerator.autocast():
                values = token_values(value.model, micro.prompts, micro.responses)
            old_values, returns, mask = (
                x[place].to(device)
                for x in (experience.values, experience.returns, rollout.response_mask)
            )
            loss, stats = ppo_value_loss(values, old_values, returns, mask, value_clip_range)
            measured = {"value_clip_fraction": stats.clip_fraction, "value_loss": loss.detach()}
            averages.add(measured, micro.tokens)
            yield loss * micro.tokens / tokens

    for rows in shuffled_batches(len(rollout.prompts), minibatch_size, epochs, seed):
        tokens = int(rollout.lengths[rows].sum())
        if value is policy:
            of_values = (value_coef * loss for loss in value_losses(rows, tokens))
            norm = value_norm = policy.step(chain(policy_losses(rows, tokens), of_values))[1]
        else:
            norm = policy.step(policy_losses(rows, tokens))[1]
            value_norm = value.step(value_losses(rows, tokens))[1]
        averages.add({"policy_norm": norm, "value_norm": value_norm})
    averages.put_together()
    return {
        "loss": averages["policy_loss"] + averages["value_loss"],
        "grad_norm": averages["policy_norm"],
        "value_grad_norm": averages["value_norm"],
        **policy.logged(),
        "loss/policy_avg": averages["policy_loss"],
        "loss/value_avg": averages["value_loss"],
        "policy/approxkl_avg": averages["approx_kl"],
        "policy/clipfrac_avg": averages["clip_fraction"],
        "val/clipfrac_avg": averages["value_clip_fraction"],
        "val/ratio": averages["ratio_mean"],
        "val/ratio_var": averages["ratio_square"] - averages["ratio_mean"] ** 2,
    }


def rollout_metrics(experience: Experience, kl_coef: float) -> dict[str, float]:
    """What the sampled responses say of the policy, before its update."""
    rollout, shared = experience.rollout, experience.rollout.metrics()
    penalty = -kl_coef * shared["kl"]
    explained = explained_variance(experience.values, experience.returns, rollout.response_mask)
    return shared | {
        "kl_coef": kl_coef,
        "objective/kl": shared["kl"],
        "objective/entropy": shared["entropy"] * shared["completions/mean_length"],
        "objective/non_score_reward": penalty,
        "objective/scores": shared["reward"],
        "objective/rlhf_reward": float(rollout.rewards.mean()) + penalty,
        "policy/entropy_avg": shared["entropy"],
        "val/num_eos_tokens": float(rollout.finished.sum()),
        "val/explained_variance": float(explained),
    }
