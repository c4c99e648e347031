"""The peer of PPO: TRL 1.16 has no PPO trainer any more, so here is one as it is commonly written.

Padded batches, `model.generate`, whole-sequence logits, separate forwards for policy, reference,
reward and value model (the recipe of Huang et al. 2024, arXiv:2403.17031). It uses torch and
transformers alone and shares no code with the library.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.job import Job
from benchmarks.protocol import Round
from benchmarks.roof import DTYPES
from benchmarks.work import Work

CLIP, VALUE_CLIP, GAE_LAMBDA, MAX_NORM = 0.2, 0.2, 0.95, 1.0


class Batch(NamedTuple):
    """Prompts padded on the left and replies on the right, B rows of P + T places."""

    ids: Tensor  # (B, P + T)
    attention: Tensor  # (B, P + T), 1 at real tokens
    mask: Tensor  # (B, T), 1 at reply tokens up to the end-of-sequence token


def sample(policy: Any, tokenizer: Any, prompts: list[list[int]], job: Job) -> Batch:
    """Replies from `model.generate`, unfiltered; what follows the first end is padding."""
    from benchmarks.peer_worker import sample as generate

    replies = generate(policy, tokenizer, prompts, job.max_new_tokens)
    width, height = max(map(len, prompts)), max(map(len, replies))
    pad, rows, seen = tokenizer.pad_token_id, [], []
    for prompt, reply in zip(prompts, replies, strict=True):
        left, right = width - len(prompt), height - len(reply)
        rows.append([pad] * left + prompt + reply + [pad] * right)
        seen.append([0] * left + [1] * (len(prompt) + len(reply)) + [0] * right)
    attention = torch.tensor(seen, device=policy.device)
    return Batch(torch.tensor(rows, device=policy.device), attention, attention[:, width:].float())


def places(batch: Batch) -> dict[str, Tensor]:
    """What a forward pass takes: padding on the left needs its positions said."""
    positions = (batch.attention.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": batch.ids, "attention_mask": batch.attention, "position_ids": positions,
    }  # fmt: skip


def logprobs(model: Any, batch: Batch) -> Tensor:
    """Log-probability of each reply token, (B, T)."""
    height = batch.mask.shape[1]
    logits = model(**places(batch), use_cache=False).logits[:, -height - 1 : -1].float()
    labels = batch.ids[:, -height:]
    return logits.log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]


def values(model: Any, batch: Batch) -> Tensor:
    """The value before each reply token, (B, T)."""
    hidden = model.base_model(**places(batch), use_cache=False).last_hidden_state
    height = batch.mask.shape[1]
    return model.score(hidden[:, -height - 1 : -1])[:, :, 0].float()


def scores(model: Any, batch: Batch) -> Tensor:
    """The reward model's output at the last token of each row, (B,)."""
    hidden = model.base_model(**places(batch), use_cache=False).last_hidden_state
    height = batch.mask.shape[1]
    last = hidden.shape[1] - height + batch.mask.sum(1).long() - 1
    rows = torch.arange(len(last), device=last.device)
    return model.score(hidden[rows, last])[:, 0].float()


def advantages_of(rewards: Tensor, old_values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(whitened advantages, returns), both (B, T); no discount."""
    total = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        ahead = old_values[:, t + 1] * mask[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        following = (rewards[:, t] + ahead - old_values[:, t]) + GAE_LAMBDA * following
        following = following * mask[:, t]
        total[:, t] = following
    returns = total + old_values
    mean = (total * mask).sum() / mask.sum()
    spread = (((total - mean) ** 2 * mask).sum() / mask.sum()).sqrt()
    return (total - mean) / (spread + 1e-8), returns


def load(job: Job) -> Round:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    policy: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(
        job.reward_model, dtype=torch.float32
    )
    policy, reward = policy.to(device).eval(), reward.to(device).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    value = copy.deepcopy(reward)
    reward.requires_grad_(False)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=job.learning_rate) for model in (policy, value)
    ]
    low = DTYPES[job.precision]

    def step(prompts: list[list[int]]) -> list[int]:
        """One PPO step on one batch of prompts; returns the lengths of the replies."""
        with torch.no_grad(), torch.autocast(device, low, enabled=low != torch.float32):
            batch = sample(policy, tokenizer, prompts, job)
            old_logprobs, old_values = logprobs(policy, batch), values(value, batch)
            mask = batch.mask
            rewards = -job.kl_coef * (old_logprobs - logprobs(reference, batch)) * mask
            ends = mask.sum(1).long() - 1
            rewards[torch.arange(len(ends), device=device), ends] += scores(reward, batch)
            advantages, returns = advantages_of(rewards, old_values, mask)
        for _ in range(job.ppo_epochs):
            for rows in torch.randperm(len(prompts), device=device).split(job.ppo_minibatch):
                part, m = Batch(*(tensor[rows] for tensor in batch)), mask[rows]
                with torch.autocast(device, low, enabled=low != torch.float32):
                    ratio = (logprobs(policy, part) - old_logprobs[rows]).exp()
                    now = values(value, part)
                kept = ratio.clamp(1 - CLIP, 1 + CLIP)
                losses = torch.max(-advantages[rows] * ratio, -advantages[rows] * kept)
                near = old_values[rows] + (now - old_values[rows]).clamp(-VALUE_CLIP, VALUE_CLIP)
                errors = torch.max((now - returns[rows]) ** 2, (near - returns[rows]) ** 2)
                ((losses + 0.5 * errors) * m).sum().div(m.sum()).backward()
                for model, optimizer in zip((policy, value), optimizers, strict=True):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                    optimizer.step()
                    optimizer.zero_grad()
        return [int(n) for n in mask.sum(1)]

    def run(number: int) -> Work:
        prompts = [job.rows[i].prompt for i in job.prompts_of_round(number, job.samples)]
        lengths: list[int] = []
        for start in range(0, len(prompts), job.samples_per_step):
            lengths += step(prompts[start : start + job.samples_per_step])
        return job.sample_work("ppo", sum(map(len, prompts)), lengths)

    return run
