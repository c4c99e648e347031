"""SFT, reward model, PPO, GRPO and DPO on bare torch, to be read from top to bottom.

Plain padded batches, and nothing of the rest of this library: the notebooks print it and run it
live, the tests hold the library's methods against it, and the benchmark runs it as a peer.

Policy and reference are causal language models of transformers, reward and value model sequence
classifiers with one label, the reward any function of a batch, (B,): of a reward model it is
`lambda batch: scores(model, batch)`. All are in eval mode: dropout gives a token two log-probs.
Shapes: B replies, P tokens in the longest prompt, T in the longest reply. Each loop yields what it
did after each update, so that it can be looked at.
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


# ------------------------------------------------------------------------------------------- SFT


def sft_loss(policy, examples) -> Tensor:
    """Of pairs (prompt, reply): a mean over all tokens of the replies; prompts are only read."""
    rows = examples
    batch = pad([prompt for prompt, _ in rows], [reply for _, reply in rows], policy.device)
    return -logprobs(policy, batch, 1.0).sum() / batch.mask.sum()


def sft(policy, examples, s: Settings) -> Iterator[float]:
    """Train the policy to imitate; yields the loss of each step."""
    optimizer = adamw(policy, s.learning_rate)
    for _ in range(s.updates):
        loss = sft_loss(policy, random.sample(examples, s.batch_size))
        descend(loss, [optimizer], s.max_grad_norm)
        yield loss.item()


# ---------------------------------------------------------------------------------- reward model


def reward_margins(model, pairs) -> Tensor:
    """Of triples (prompt, chosen, rejected): by how much each chosen reply scores higher, (B,)."""
    prompts, *sides = (list(tokens) for tokens in zip(*pairs, strict=True))
    chosen, rejected = (scores(model, pad(prompts, side, model.device)) for side in sides)
    return chosen - rejected


def reward_loss(model, pairs) -> Tensor:
    """How unlikely Bradley and Terry's model finds the labels (arXiv:2203.02155, eq. 1)."""
    return -torch.nn.functional.logsigmoid(reward_margins(model, pairs)).mean()


def reward_model(model, pairs, s: Settings) -> Iterator[float]:
    """Train the classifier to rank pairs as labelled; yields the loss of each step."""
    optimizer = adamw(model, s.learning_rate)
    for _ in range(s.updates):
        loss = reward_loss(model, random.sample(pairs, s.batch_size))
        descend(loss, [optimizer], s.max_grad_norm)
        yield loss.item()


# ------------------------------------------------------------------------------------------- PPO


class Experience(NamedTuple):
    """What PPO knows of a batch before it learns from it; (B, T), `earned` (B,)."""

    old: Tensor  # log-probs of the policy that sampled
    ref: Tensor
    earned: Tensor  # the scores
    rewards: Tensor  # of each token
    values: Tensor
    advantages: Tensor  # whitened
    returns: Tensor


@torch.no_grad()
def ppo_experience(policy, value, reference, reward, batch: Batch, s: Settings) -> Experience:
    old, ref = (logprobs(model, batch, s.temperature) for model in (policy, reference))
    old_values, earned = values(value, batch), reward(batch)
    # KL is paid at each token, the score comes with the last (arXiv:2203.02155, eq. 2)
    rewards, ends = -s.kl_coef * (old - ref), batch.mask.sum(1, keepdim=True) - 1
    rewards = rewards.scatter_add(1, ends, earned[:, None])
    # advantages, whitened after the returns, which stay in units of the reward
    advantages, returns = gae(rewards, old_values, batch.mask, s.gamma, s.gae_lambda)
    of_tokens = advantages[batch.mask.bool()]
    advantages = (advantages - of_tokens.mean()) / (of_tokens.var() + 1e-8).sqrt()
    return Experience(old, ref, earned, rewards, old_values, advantages, returns)


def ppo_loss(policy, value, batch: Batch, seen: Experience, s: Settings) -> Tensor:
    """Of policy and value model together: means over all tokens of the batch."""
    new, now = logprobs(policy, batch, s.temperature), values(value, batch)
    gain = clipped_gain(new, seen.old, seen.advantages, s.clip_range)
    near = seen.values + (now - seen.values).clamp(-s.value_clip_range, s.value_clip_range)
    error = torch.max((now - seen.returns) ** 2, (near - seen.returns) ** 2)
    return ((0.5 * error - gain) * batch.mask).sum() / batch.mask.sum()


def ppo_update(policy, value, reference, reward, batch: Batch, optimizers, s) -> Experience:
    """Small steps of both models, some passes over the same replies in minibatches."""
    seen = ppo_experience(policy, value, reference, reward, batch, s)
    for _ in range(s.epochs):
        for rows in torch.randperm(len(batch.ids)).split(s.minibatch_size):
            part, known = Batch(*(x[rows] for x in batch)), Experience(*(x[rows] for x in seen))
            descend(ppo_loss(policy, value, part, known, s), optimizers, s.max_grad_norm)
    return seen


def ppo(
    policy, value, reference, reward, prompts, eos: int, s: Settings
) -> Iterator[tuple[Batch, Experience]]:
    """Train policy and value model; yields each update's replies and what was known of them."""
    optimizers = [adamw(model, s.learning_rate) for model in (policy, value)]
    for _ in range(s.updates):
        batch = sample(policy, random.choices(prompts, k=s.batch_size), eos, s)
        yield batch, ppo_update(policy, value, reference, reward, batch, optimizers, s)


# ------------------------------------------------------------------------------------------ GRPO


class Judged(NamedTuple):
    """What GRPO knows of a batch before it learns from it; log-probs (B, T), the rest (B,)."""

    old: Tensor
    ref: Tensor
    earned: Tensor
    advantages: Tensor


@torch.no_grad()
def grpo_judge(policy, reference, reward, batch: Batch, s: Settings) -> Judged:
    """How each reply compares with the others of its group (arXiv:2402.03300, sec. 4.1)."""
    old, ref = (logprobs(model, batch, s.temperature) for model in (policy, reference))
    earned = reward(batch)
    group = (earned - s.kl_coef * (old - ref).sum(1)).view(-1, s.group_size)
    advantages = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    return Judged(old, ref, earned, advantages.flatten())


def grpo_loss(policy, batch: Batch, seen: Judged, s: Settings) -> Tensor:
    """A mean over a reply's tokens, then over replies (arXiv:2402.03300, eq. 3)."""
    new = logprobs(policy, batch, s.temperature)
    k3 = (seen.ref - new).exp() - 1 - (seen.ref - new)
    gain = clipped_gain(new, seen.old, seen.advantages[:, None], s.clip_range) - s.k3_coef * k3
    return -((gain * batch.mask).sum(1) / batch.mask.sum(1)).mean()


def grpo_update(policy, reference, reward, batch: Batch, optimizer, s: Settings) -> Judged:
    seen = grpo_judge(policy, reference, reward, batch, s)
    for _ in range(s.epochs):
        descend(grpo_loss(policy, batch, seen, s), [optimizer], s.max_grad_norm)
    return seen


def grpo(
    policy, reference, reward, prompts, eos: int, s: Settings
) -> Iterator[tuple[Batch, Judged]]:
    """Train the policy; yields each update's replies and what was known of them."""
    optimizer = adamw(policy, s.learning_rate)
    for _ in range(s.updates):
        asked = [p for p in random.choices(prompts, k=s.batch_size) for _ in range(s.group_size)]
        batch = sample(policy, asked, eos, s)
        yield batch, grpo_update(policy, reference, reward, batch, optimizer, s)


# ------------------------------------------------------------------------------------------- DPO


def rises(policy, reference, prompts, replies) -> Tensor:
    """By how much the policy has raised each reply's log-prob, a sum over its tokens, (B,)."""
    batch = pad(prompts, replies, policy.device)
    with torch.no_grad():
        before = logprobs(reference, batch, 1.0)
    return (logprobs(policy, batch, 1.0) - before).sum(1)


def dpo_update(policy, reference, pairs, optimizer, s: Settings) -> Tensor:
    """Of triples (prompt, chosen, rejected); returns both implicit rewards before, (2, B)."""
    prompts, *sides = (list(tokens) for tokens in zip(*pairs, strict=True))
    chosen, rejected = (s.beta * rises(policy, reference, prompts, side) for side in sides)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()  # arXiv:2305.18290, eq. 7
    descend(loss, [optimizer], s.max_grad_norm)
    return torch.stack((chosen, rejected)).detach()


def dpo(policy, reference, pairs, s: Settings) -> Iterator[tuple[list, Tensor]]:
    """Train the policy on pairs that somebody else wrote; yields each step's pairs and rewards."""
    optimizer = adamw(policy, s.learning_rate)
    for _ in range(s.updates):
        some = random.sample(pairs, s.batch_size)
        yield some, dpo_update(policy, reference, some, optimizer, s)
