"""Supervised fine-tuning: maximise the likelihood of demonstrated responses, prompts excluded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.batches import by_length, shuffled_batches
from rlhf_lib.config import SFTConfig
from rlhf_lib.data import Demonstration, PreferenceData
from rlhf_lib.learner import Learner
from rlhf_lib.logprobs import response_logits, token_logprobs, unflatten
from rlhf_lib.losses import sft_loss
from rlhf_lib.models import fingerprint, load_policy, load_tokenizer, save_model
from rlhf_lib.ops import entropy
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator, seed_everything


def update(
    learner: Learner, batch: Sequence[Demonstration], micro_batch_size: int
) -> dict[str, float]:
    """One optimizer step on the mean loss over all response tokens of the batch."""
    tokens = sum(len(example.response) for example in batch)
    entropies = []

    def losses() -> Iterator[Tensor]:
        lengths = [len(e.prompt) + len(e.response) for e in batch]
        for rows in by_length(lengths, micro_batch_size):
            examples = [batch[i] for i in rows]
            with learner.accelerator.autocast():
                logits, labels, mask = response_logits(
                    learner.model, [e.prompt for e in examples], [e.response for e in examples]
                )
                logprobs = unflatten(token_logprobs(logits, labels), mask)
            entropies.append(entropy(logits.detach()).sum())
            # a micro-batch counts by its tokens: the sum equals the loss of one big batch
            yield sft_loss(logprobs, mask) * (mask.sum() / tokens)

    loss, grad_norm = learner.step(losses())
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learner.learning_rate,
        "entropy": float(torch.stack(entropies).sum()) / tokens,
        "mean_length": tokens / len(batch),
    }


def fit(
    model: PreTrainedModel,
    demonstrations: Sequence[Demonstration],
    config: SFTConfig,
    *,
    seed: int,
    precision: str = "fp32",
    work: Work | None = None,
) -> None:
    """Train `model` in place; with `work`, log every step and save the state for resuming."""
    seed_everything(seed)
    accelerator = make_accelerator(precision)
    batches = shuffled_batches(len(demonstrations), config.batch_size, config.epochs, seed)
    learner = Learner(
        accelerator, model, learning_rate=config.learning_rate, steps=len(batches),
        warmup_ratio=config.warmup_ratio, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    for step in work.steps(len(batches), accelerator) if work else range(len(batches)):
        batch = [demonstrations[i] for i in batches[step]]
        metrics = update(learner, batch, config.micro_batch_size)
        if work:
            tokens = sum(len(e.prompt) + len(e.response) for e in batch)
            work.log(step, tokens, metrics)


def train(run: Run, data: PreferenceData) -> Stage:
    """The SFT stage of a run: from the pretrained model to `model/`."""
    config, name = run.profile.sft, run.profile.model.name
    stage = run.stage("sft", config, {"data": data.hash, "model": fingerprint(name)}, "sft")

    def build(work: Work) -> dict:
        tokenizer = load_tokenizer(name)
        model = load_policy(name, gradient_checkpointing=run.profile.model.gradient_checkpointing)
        fit(
            model, data.demonstrations, config, seed=run.seed,
            precision=run.profile.model.precision, work=work,
        )  # fmt: skip
        save_model(model, tokenizer, work.model_path)
        return {"examples": len(data.demonstrations)}

    return stage.ensure(build)
