"""Reward model: a scalar head at the last real token, trained with the Bradley-Terry loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib import processes
from rlhf_lib.data.batches import by_length, shuffled_batches
from rlhf_lib.data.encoding import Demonstration, Pair, paired_lengths, sides
from rlhf_lib.methods.learner import Learner, Log, Steps, unlogged
from rlhf_lib.methods.rewards import raw_scores
from rlhf_lib.models.logprobs import paired_scores
from rlhf_lib.objectives.losses import reward_loss
from rlhf_lib.runtime import phase
from rlhf_lib.settings import RewardModelConfig

NORMALISATION_SAMPLE = 1024  # demonstrations that define reward 0 and 1


def train(
    reward_model: Learner,
    pairs: Sequence[Pair],
    config: RewardModelConfig,
    *,
    seed: int = 0,
    steps: Steps = range,
    log: Log = unlogged,
) -> dict[str, int]:
    """`config.epochs` passes over the pairs; `reward_model` ends up trained."""
    batches = shuffled_batches(len(pairs), config.batch_size, config.epochs, seed)
    for step in steps(len(batches)):
        batch = [pairs[i] for i in batches[step]]
        metrics = update(
            reward_model, batch, config.micro_batch_size, config.margin, config.center_coef
        )
        log(step, sum(paired_lengths(batch)), metrics)
    return {"train_pairs": len(pairs)}


def update(
    reward_model: Learner,
    batch: Sequence[Pair],
    micro_batch_size: int,
    margin: float = 0.0,
    center_coef: float = 0.0,
) -> dict[str, float]:
    """One optimizer step on the mean loss of the batch; a pair's own margin beats `margin`."""
    scores = torch.zeros(2, len(batch), dtype=torch.float64)

    def losses() -> Iterator[Tensor]:
        for rows in processes.dealt(by_length, paired_lengths(batch), size=micro_batch_size):
            pairs = [batch[i] for i in rows]
            with reward_model.accelerator.autocast():
                chosen, rejected = paired_scores(reward_model.model, *sides(pairs))
            margins = [margin if p.margin is None else p.margin for p in pairs]
            loss, _ = reward_loss(
                chosen, rejected, torch.tensor(margins, device=chosen.device), center_coef
            )
            scores[:, rows] = torch.stack((chosen, rejected)).detach().cpu().double()
            yield loss * len(pairs) / len(batch)

    loss, grad_norm = reward_model.step(losses())
    chosen, rejected = processes.summed(scores)
    _, stats = reward_loss(chosen, rejected)
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        **reward_model.logged(),
        "accuracy": float(stats.accuracy),
        "margin": float(stats.margin),
        "min_reward": float(scores.min()),
        "mean_reward": float(scores.mean()),
        "max_reward": float(scores.max()),
    }


@phase("scoring")
@torch.no_grad()
def score_pairs(
    model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Raw scores of both sides of each pair: (chosen (N,), rejected (N,)) on the CPU."""
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for rows in processes.dealt(by_length, paired_lengths(pairs), size=batch_size):
        both = paired_scores(model, *sides([pairs[i] for i in rows]))
        chosen[rows], rejected[rows] = (scores.cpu() for scores in both)
    return processes.summed(chosen), processes.summed(rejected)


@torch.no_grad()
def measure_scale(
    model: PreTrainedModel, demonstrations: Sequence[Demonstration], batch_size: int = 32
) -> tuple[float, float]:
    """Mean and standard deviation of the raw score over demonstrations: reward 0 and reward 1."""
    sample = demonstrations[:NORMALISATION_SAMPLE]
    prompts, responses = [d.prompt for d in sample], [d.response for d in sample]
    scores = raw_scores(model, prompts, responses, batch_size)
    return float(scores.mean()), float(scores.std())
