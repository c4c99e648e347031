"""Supervised fine-tuning: maximise the likelihood of demonstrated responses, prompts excluded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf_lib import processes
from rlhf_lib.data.batches import by_length, chunks, shuffled_batches
from rlhf_lib.data.encoding import Demonstration, Prompt
from rlhf_lib.methods.learner import Learner, Log, Steps, unlogged
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.logprobs import logprobs_and_entropies
from rlhf_lib.objectives.losses import sft_loss
from rlhf_lib.runtime import progress
from rlhf_lib.settings import SFTConfig


def train(
    policy: Learner,
    demonstrations: Sequence[Demonstration],
    config: SFTConfig,
    *,
    seed: int = 0,
    steps: Steps = range,
    log: Log = unlogged,
) -> dict[str, int]:
    """`config.epochs` passes over the demonstrations; `policy` ends up trained."""
    batches = shuffled_batches(len(demonstrations), config.batch_size, config.epochs, seed)
    for step in steps(len(batches)):
        batch = [demonstrations[i] for i in batches[step]]
        metrics = update(policy, batch, config.micro_batch_size)
        log(step, sum(len(e.prompt) + len(e.response) for e in batch), metrics)
    return {"examples": len(demonstrations)}


def update(
    policy: Learner, batch: Sequence[Demonstration], micro_batch_size: int
) -> dict[str, float]:
    """One optimizer step on the mean loss over all response tokens of the batch."""
    tokens = sum(len(example.response) for example in batch)
    entropies = [torch.tensor(0.0)]

    def losses() -> Iterator[Tensor]:
        lengths = [len(e.prompt) + len(e.response) for e in batch]
        for rows in processes.dealt(by_length, lengths, size=micro_batch_size):
            examples = [batch[i] for i in rows]
            with policy.accelerator.autocast():
                logprobs, entropy, mask = logprobs_and_entropies(
                    policy.model,
                    [e.prompt for e in examples],
                    [e.response for e in examples],
                    learn=False,
                )
            entropies.append(entropy.sum().cpu())
            # a micro-batch counts by its tokens: the sum equals the loss of one big batch
            yield sft_loss(logprobs, mask) * (mask.sum() / tokens)

    loss, grad_norm = policy.step(losses())
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        **policy.logged(),
        "entropy": float(processes.summed(torch.stack(entropies).sum())) / tokens,
        "mean_length": tokens / len(batch),
    }


def best_of_n(
    sampler: Sampler, prompts: Sequence[Prompt], n: int, temperature: float = 1.0
) -> tuple[list[Demonstration], int]:
    """The reply to each prompt that the reward likes best among `n` samples from the reference.

    A reply that was cut off is taken only where none ended by itself. The second value is the
    number of tokens in all samples.
    """
    best, tokens = [], 0
    for part in progress(list(chunks(prompts, 64)), f"best of {n}"):
        asked = [p for p in part for _ in range(n)]
        replies = sampler.draw(sampler.reference, asked, temperature)
        scores, _ = sampler.score(asked, replies)
        tokens += sum(len(p.ids) + len(r.ids) for p, r in zip(asked, replies, strict=True))
        finished = torch.tensor([float(reply.finished) for reply in replies])
        last = scores.min() - scores.max() - 1  # below every reply that ended
        ranked = (scores + last * (1 - finished)).view(-1, n)
        winners = ranked.argmax(1) + n * torch.arange(len(part))
        for prompt, winner in zip(part, winners.tolist(), strict=True):
            reply = replies[winner]
            best.append(Demonstration(prompt.text, reply.text, prompt.ids, reply.ids))
    return best, tokens
