"""Supervised fine-tuning: maximise the likelihood of demonstrated responses, prompts excluded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.batches import by_length, chunks, shuffled_batches
from rlhf_lib.data.encoding import Demonstration, Prompt
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.rollout import Sampler, is_finished
from rlhf_lib.models.learner import Learner
from rlhf_lib.models.load import (
    eos_id,
    fingerprint,
    load_policy,
    load_tokenizer,
    save_model,
    trainable,
)
from rlhf_lib.models.logprobs import output_logprobs, response_hidden, unflatten
from rlhf_lib.objectives.losses import sft_loss
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator, progress, seed_everything
from rlhf_lib.settings import SFTConfig, as_dict


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
                hidden, labels, mask = response_hidden(
                    learner.model, [e.prompt for e in examples], [e.response for e in examples]
                )
                flat, entropy = output_logprobs(learner.model, hidden, labels, with_entropy=True)
            logprobs = unflatten(flat, mask)
            entropies.append(entropy.sum())  # type: ignore[union-attr]
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
    stage = run.stage("sft", config, {"data": data.hash, "model": fingerprint(name)}, __name__)

    def build(work: Work) -> dict:
        tokenizer = load_tokenizer(name)
        model = trainable(load_policy(name), run.profile.model)
        fit(
            model, data.demonstrations, config, seed=run.seed,
            precision=run.profile.model.precision, work=work,
        )  # fmt: skip
        save_model(model, tokenizer, work.model_path)
        return {"examples": len(data.demonstrations)}

    return stage.ensure(build)


def best_of_n(
    sampler: Sampler, prompts: Sequence[Prompt], n: int
) -> tuple[list[Demonstration], int]:
    """The reply to each prompt that the reward model likes best among `n` samples from SFT.

    A reply that was cut off is taken only where none ended by itself. The second value is the
    number of tokens in all samples.
    """
    best, tokens = [], 0
    for part in progress(list(chunks(prompts, 64)), f"best of {n}"):
        responses, scores = sampler.draw(sampler.reference, [p for p in part for _ in range(n)])
        tokens += n * sum(len(p.ids) for p in part) + sum(map(len, responses))
        finished = is_finished(responses, eos_id(sampler.tokenizer)).float()
        last = scores.min() - scores.max() - 1  # below every reply that ended
        ranked = (scores + last * (1 - finished)).view(-1, n)
        winners = ranked.argmax(1) + n * torch.arange(len(part))
        picked = [responses[i] for i in winners.tolist()]
        texts = sampler.tokenizer.batch_decode(picked, skip_special_tokens=True)
        for prompt, text, response in zip(part, texts, picked, strict=True):
            best.append(Demonstration(prompt.text, text, prompt.ids, response))
    return best, tokens


def train_on_best(run: Run, data: PreferenceData, sft: Stage, reward_model: Stage) -> Stage:
    """Rejection-sampling SFT: the SFT policy, trained on the best of its own replies.

    The baseline that RL has to beat: it uses the same reward model and the same samples, and no
    policy gradient (Llama 2, arXiv:2307.09288, sec. 3.2.3; RAFT, arXiv:2304.06767).
    """
    config = run.profile.rejection
    training = replace(run.profile.sft, epochs=config.epochs, learning_rate=config.learning_rate)
    settings = {"rejection": as_dict(config), "sft": as_dict(training)}
    upstream = {"data": data.hash, "sft": sft.hash, "reward_model": reward_model.hash}
    stage = run.stage("rejection_sft", settings, upstream, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        path = str(sft.model_path)
        sampler = Sampler(
            run, accelerator, path, str(reward_model.model_path), temperature=config.temperature
        )  # fmt: skip
        prompts = data.prompts["train"][: config.prompts]
        best, work.num_tokens = best_of_n(sampler, prompts, config.samples)
        model = trainable(load_policy(path), run.profile.model)
        fit(
            model, best, training, seed=run.seed, precision=run.profile.model.precision, work=work
        )  # fmt: skip
        save_model(model, sampler.tokenizer, work.model_path)
        return {"examples": len(best), "samples": len(best) * config.samples}

    return stage.ensure(build)
