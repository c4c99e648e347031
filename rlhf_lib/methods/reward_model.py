"""Reward model: a scalar head at the last real token, trained with the Bradley-Terry loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.batches import by_length, shuffled_batches
from rlhf_lib.data.encoding import Pair, paired_lengths, sides
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.rollout import raw_scores
from rlhf_lib.models.learner import Learner
from rlhf_lib.models.load import (
    fingerprint,
    load_reward_model,
    load_tokenizer,
    save_model,
    trainable,
)
from rlhf_lib.models.logprobs import paired_scores
from rlhf_lib.objectives.losses import reward_loss
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator, phase
from rlhf_lib.settings import as_dict

NORMALISATION_SAMPLE = 1024  # demonstrations that define reward 0 and 1
JUDGE_EPOCHS = 2  # for each of the reward model's


def update(
    learner: Learner,
    batch: Sequence[Pair],
    micro_batch_size: int,
    margin: float = 0.0,
    center_coef: float = 0.0,
) -> dict[str, float]:
    """One optimizer step on the mean loss of the batch; a pair's own margin beats `margin`."""
    chosen_parts, rejected_parts = [], []

    def losses() -> Iterator[Tensor]:
        for rows in by_length(paired_lengths(batch), micro_batch_size):
            pairs = [batch[i] for i in rows]
            with learner.accelerator.autocast():
                chosen, rejected = paired_scores(learner.model, *sides(pairs))
            margins = [margin if p.margin is None else p.margin for p in pairs]
            loss, _ = reward_loss(
                chosen, rejected, torch.tensor(margins, device=chosen.device), center_coef
            )
            chosen_parts.append(chosen.detach().cpu())
            rejected_parts.append(rejected.detach().cpu())
            yield loss * len(pairs) / len(batch)

    loss, grad_norm = learner.step(losses())
    chosen, rejected = torch.cat(chosen_parts), torch.cat(rejected_parts)
    both = torch.cat((chosen, rejected))
    _, stats = reward_loss(chosen, rejected)
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learner.learning_rate,
        "accuracy": float(stats.accuracy),
        "margin": float(stats.margin),
        "min_reward": float(both.min()),
        "mean_reward": float(both.mean()),
        "max_reward": float(both.max()),
    }


@phase("scoring")
@torch.no_grad()
def score_pairs(
    model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Raw scores of both sides of each pair: (chosen (N,), rejected (N,)) on the CPU."""
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for rows in by_length(paired_lengths(pairs), batch_size):
        both = paired_scores(model, *sides([pairs[i] for i in rows]))
        chosen[rows], rejected[rows] = (scores.cpu() for scores in both)
    return chosen, rejected


@torch.no_grad()
def measure_scale(
    model: PreTrainedModel, data: PreferenceData, batch_size: int = 32
) -> tuple[float, float]:
    """Mean and standard deviation of the raw score over demonstrations: reward 0 and reward 1."""
    sample = data.demonstrations[:NORMALISATION_SAMPLE]
    prompts, responses = [d.prompt for d in sample], [d.response for d in sample]
    scores = raw_scores(model, prompts, responses, batch_size)
    return float(scores.mean()), float(scores.std())


def train_judge(run: Run, data: PreferenceData) -> Stage:
    """The held-out judge: a reward model from pairs that no other stage reads, trained for longer.

    It judges what was optimised against the proxy, so it must not share the proxy's mistakes.
    """
    return train(
        run, data, "judge", split="judge", epochs=JUDGE_EPOCHS * run.profile.reward_model.epochs
    )


def train(
    run: Run, data: PreferenceData, stage_name: str = "reward_model", split: str = "train",
    epochs: int | None = None,
) -> Stage:  # fmt: skip
    """The reward-model stage: from the pretrained model to `model/` and scores of the test pairs.

    `samples.jsonl` holds one row per test pair: its index and the two raw scores.
    """
    config, name = run.profile.reward_model, run.profile.model.name
    config = replace(config, epochs=epochs or config.epochs)
    settings = {k: v for k, v in as_dict(config).items() if k != "curve_points"}  # changes nothing
    upstream = {"data": data.hash, "model": fingerprint(name)}
    stage = run.stage(stage_name, settings, upstream, __name__)

    def build(work: Work) -> dict:
        tokenizer = load_tokenizer(name)
        model, tokenizer = load_reward_model(name, tokenizer, run.seed)
        accelerator = make_accelerator(run.profile.model.precision)
        pairs = data.pairs[split]
        batches = shuffled_batches(len(pairs), config.batch_size, config.epochs, run.seed)
        learner = Learner(
            accelerator, trainable(model, run.profile.model), learning_rate=config.learning_rate,
            steps=len(batches), warmup_ratio=config.warmup_ratio,
            weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        for step in work.steps(len(batches), accelerator):
            batch = [pairs[i] for i in batches[step]]
            metrics = update(
                learner, batch, config.micro_batch_size, config.margin, config.center_coef
            )
            work.log(step, sum(paired_lengths(batch)), metrics)

        with accelerator.autocast():
            mean, std = measure_scale(model, data)
            chosen, rejected = score_pairs(model, data.pairs["test"])
            validation_scores = score_pairs(model, data.pairs["validation"])
        model.config.reward_mean, model.config.reward_std = mean, std
        save_model(model, tokenizer, work.model_path)
        work.write_samples([
            {"pair": i, "chosen_score": c, "rejected_score": r}
            for i, (c, r) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True))
        ])  # fmt: skip
        _, stats = reward_loss(chosen, rejected)
        _, validation = reward_loss(*validation_scores)
        return {
            "train_pairs": len(pairs),
            "test_pairs": len(chosen),
            "accuracy": float(stats.accuracy),
            "validation_accuracy": float(validation.accuracy),
            "margin": float(stats.margin),
            "reward_mean": mean,
            "reward_std": std,
        }

    return stage.ensure(build)
