"""PPO, GRPO and DPO on bare torch, to be read from top to bottom.

Plain padded batches, and nothing of the rest of this library: the tests hold the library's methods
against it, and the benchmark runs it as the peer of PPO.

Policy and reference are causal language models of transformers, the value model is a sequence
classifier with one label, the reward any function of a batch, (B,): of a reward model it is
`lambda batch: scores(model, batch)`. All are in eval mode: dropout gives a token two log-probs.
Shapes: B replies, P tokens in the longest prompt, T in the longest reply.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    updates: int = 3
    batch_size: int = 8  # prompts, or pairs
    group_size: int = 4  # GRPO: replies to each prompt
    max_new_tokens: int = 16
    temperature: float = 1.0
    epochs: int = 2  # passes over the replies of an update
    minibatch_size: int = 4  # PPO
    kl_coef: float = 0.05  # of the KL that is taken off the reward
    k3_coef: float = 0.0  # GRPO: of the KL in the loss
    beta: float = 0.1  # DPO
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0


class Batch(NamedTuple):
    """Prompts padded on the left and replies on the right: all replies begin at place P."""

    ids: Tensor  # (B, P + T)
    attention: Tensor  # (B, P + T), 1 at real tokens
    mask: Tensor  # (B, T), 1 at tokens of the reply, its end-of-sequence token included


def pad(prompts: list[list[int]], replies: list[list[int]], device="cpu") -> Batch:
    left, right = max(map(len, prompts)), max(map(len, replies))
    rows = list(zip(prompts, replies, strict=True))
    ids = [[0] * (left - len(p)) + p + r + [0] * (right - len(r)) for p, r in rows]
    seen = [[0] * (left - len(p)) + [1] * len(p + r) + [0] * (right - len(r)) for p, r in rows]
    attention = torch.tensor(seen, device=device)
    return Batch(torch.tensor(ids, device=device), attention, attention[:, left:])


def inputs(batch: Batch) -> dict[str, Tensor]:
    positions = (batch.attention.cumsum(1) - 1).clamp(min=0)  # padding on the left has none
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "position_ids": positions}


def logprobs(model, batch: Batch, temperature: float) -> Tensor:
    """log p of each reply token, (B, T): each is predicted one place before it stands."""
    length = batch.mask.shape[1]
    logits = model(**inputs(batch)).logits[:, -length - 1 : -1].float()
    logits = logits if temperature == 1 else logits / temperature
    return logits.log_softmax(-1).gather(2, batch.ids[:, -length:, None])[:, :, 0] * batch.mask


def values(model, batch: Batch) -> Tensor:
    """The value before each reply token, (B, T): of the prompt and the reply so far."""
    hidden = model.base_model(**inputs(batch)).last_hidden_state[:, -batch.mask.shape[1] - 1 : -1]
    return model.score(hidden)[:, :, 0].float() * batch.mask


def scores(model, batch: Batch) -> Tensor:
    """A reward model's output at the last token of each reply, (B,)."""
    hidden = model.base_model(**inputs(batch)).last_hidden_state
    last = batch.mask.sum(1) - batch.mask.shape[1] - 1
    return model.score(hidden[torch.arange(len(last)), last])[:, 0].float()


@torch.no_grad()
def sample(policy, prompts: list[list[int]], eos: int, s: Settings) -> Batch:
    """A reply to each prompt, token by token from the whole softmax; without a cache, so slow."""
    batch = pad(prompts, [[] for _ in prompts], policy.device)
    running = torch.ones_like(batch.ids[:, :1])
    while batch.mask.shape[1] < s.max_new_tokens and running.any():
        logits = policy(**inputs(batch)).logits[:, -1] / s.temperature
        token = torch.multinomial(logits.softmax(-1), 1)
        added = (token, running, running)
        batch = Batch(*(torch.cat(x, 1) for x in zip(batch, added, strict=True)))
        running = running * (token != eos)
    return batch


def clipped_gain(new: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """(B, T): a token gains no more once its ratio is out of range (arXiv:1707.06347, eq. 7)."""
    ratio = (new - old).exp()
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def adamw(model, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), eps=1e-5, weight_decay=0.0)


def descend(loss: Tensor, optimizers, max_grad_norm: float) -> None:
    loss.backward()
    for optimizer in optimizers:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def gae(rewards, values, mask, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns): a token is credited with all surprises from it on, discounted."""
    after = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)  # 0 behind the end
    surprise = (rewards + gamma * after - values) * mask
    place = torch.arange(mask.shape[1], device=mask.device)
    discount = (gamma * gae_lambda) ** (place[:, None] - place).clamp(min=0).to(rewards)
    advantages = surprise @ discount.tril() * mask  # arXiv:1506.02438, eq. 16
    return advantages, advantages + values


def ppo_update(policy, value, reference, reward, batch: Batch, optimizers, s: Settings) -> float:
    with torch.no_grad():
        old, ref = (logprobs(model, batch, s.temperature) for model in (policy, reference))
        old_values, earned = values(value, batch), reward(batch)
        # 1. KL is paid at each token, the score comes with the last (arXiv:2203.02155, eq. 2)
        rewards, ends = -s.kl_coef * (old - ref), batch.mask.sum(1, keepdim=True) - 1
        rewards = rewards.scatter_add(1, ends, earned[:, None])
        # 2. advantages, whitened after the returns, which stay in units of the reward
        advantages, returns = gae(rewards, old_values, batch.mask, s.gamma, s.gae_lambda)
        of_tokens = advantages[batch.mask.bool()]
        advantages = (advantages - of_tokens.mean()) / (of_tokens.var() + 1e-8).sqrt()
    # 3. small steps of both models; losses are means over all tokens of a minibatch
    for _ in range(s.epochs):
        for rows in torch.randperm(len(earned)).split(s.minibatch_size):
            part, was = Batch(*(x[rows] for x in batch)), old_values[rows]
            new, now = logprobs(policy, part, s.temperature), values(value, part)
            gain = clipped_gain(new, old[rows], advantages[rows], s.clip_range)
            near = was + (now - was).clamp(-s.value_clip_range, s.value_clip_range)
            error = torch.max((now - returns[rows]) ** 2, (near - returns[rows]) ** 2)
            loss = ((0.5 * error - gain) * part.mask).sum() / part.mask.sum()
            descend(loss, optimizers, s.max_grad_norm)
    return float(earned.mean())


def ppo(policy, value, reference, reward, prompts, eos: int, s: Settings) -> Iterator[float]:
    """Train policy and value model; yields the mean score at each update."""
    optimizers = [adamw(model, s.learning_rate) for model in (policy, value)]
    for _ in range(s.updates):
        batch = sample(policy, random.choices(prompts, k=s.batch_size), eos, s)
        yield ppo_update(policy, value, reference, reward, batch, optimizers, s)


def grpo_update(policy, reference, reward, batch: Batch, optimizer, s: Settings) -> float:
    with torch.no_grad():
        old, ref = (logprobs(model, batch, s.temperature) for model in (policy, reference))
        # 1. how a reply compares with its group (arXiv:2402.03300, sec. 4.1)
        earned = reward(batch)
        group = (earned - s.kl_coef * (old - ref).sum(1)).view(-1, s.group_size)
        advantages = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    # 2. small steps; the loss is a mean over a reply's tokens, then over replies (eq. 3)
    for _ in range(s.epochs):
        new = logprobs(policy, batch, s.temperature)
        k3 = (ref - new).exp() - 1 - (ref - new)
        gain = clipped_gain(new, old, advantages.view(-1, 1), s.clip_range) - s.k3_coef * k3
        loss = -((gain * batch.mask).sum(1) / batch.mask.sum(1)).mean()
        descend(loss, [optimizer], s.max_grad_norm)
    return float(earned.mean())


def grpo(policy, reference, reward, prompts, eos: int, s: Settings) -> Iterator[float]:
    """Train the policy; yields the mean score at each update."""
    optimizer = adamw(policy, s.learning_rate)
    for _ in range(s.updates):
        asked = [p for p in random.choices(prompts, k=s.batch_size) for _ in range(s.group_size)]
        yield grpo_update(policy, reference, reward, sample(policy, asked, eos, s), optimizer, s)


def dpo_update(policy, reference, pairs, optimizer, s: Settings) -> float:
    """A pair is (prompt, chosen, rejected); the loss is eq. 7 of arXiv:2305.18290."""
    prompts, *sides = (list(tokens) for tokens in zip(*pairs, strict=True))
    rises = []  # by how much the policy has raised each reply's log-prob, a sum over its tokens
    for batch in (pad(prompts, replies, policy.device) for replies in sides):
        with torch.no_grad():
            before = logprobs(reference, batch, 1.0).sum(1)
        rises.append(logprobs(policy, batch, 1.0).sum(1) - before)
    loss = -torch.nn.functional.logsigmoid(s.beta * (rises[0] - rises[1])).mean()
    descend(loss, [optimizer], s.max_grad_norm)
    return loss.item()


def dpo(policy, reference, pairs, s: Settings) -> Iterator[float]:
    """Train the policy on pairs that somebody else wrote; yields the loss of each step."""
    optimizer = adamw(policy, s.learning_rate)
    for _ in range(s.updates):
        yield dpo_update(policy, reference, random.sample(pairs, s.batch_size), optimizer, s)
