"""Sampling from a policy and scoring what it said: the data that PPO and GRPO learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib.batches import by_length, chunks
from rlhf_lib.data import Prompt
from rlhf_lib.kl import full_kl
from rlhf_lib.learner import freeze
from rlhf_lib.logprobs import (
    Tokens,
    length_mask,
    response_logits,
    sequence_scores,
    token_logprobs,
    unflatten,
)
from rlhf_lib.lora import adapters_off
from rlhf_lib.models import eos_id, load_reference, load_reward_model, load_tokenizer
from rlhf_lib.ops import entropy, masked_mean
from rlhf_lib.runs import Run
from rlhf_lib.world import gold_reward


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tokens,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[list[int]]:
    """One response to each prompt, sampled from the unfiltered softmax at `temperature`.

    A response ends with the end-of-sequence token unless `max_new_tokens` cut it off. No top-k,
    top-p or minimum length: a filtered sample is not one of the policy (KL goes negative).
    """
    responses: list[list[int]] = [[] for _ in prompts]
    eos = eos_id(tokenizer)
    for rows in by_length([len(p) for p in prompts], batch_size):
        longest = max(len(prompts[i]) for i in rows)
        padding = [longest - len(prompts[i]) for i in rows]
        ids = torch.tensor(
            [[eos] * n + list(prompts[i]) for n, i in zip(padding, rows, strict=True)]
        )
        real = torch.arange(longest) >= torch.tensor(padding)[:, None]
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=real.long().to(model.device),  # the mask carries the positions too
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
            use_cache=True,
        )
        for i, row in zip(rows, output[:, longest:].tolist(), strict=True):
            responses[i] = row[: row.index(eos) + 1] if eos in row else row
    return responses


@torch.no_grad()
def raw_scores(
    reward_model: PreTrainedModel, prompts: Tokens, responses: Tokens, batch_size: int = 64
) -> Tensor:
    """The reward model's own output for each response, (B,) on the CPU."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    scores = torch.zeros(len(prompts))
    for rows in by_length(lengths, batch_size):
        batch = [prompts[i] for i in rows], [responses[i] for i in rows]
        scores[rows] = sequence_scores(reward_model, *batch).cpu()
    return scores


def score(
    reward_model: PreTrainedModel, prompts: Tokens, responses: Tokens, batch_size: int = 64
) -> Tensor:
    """Normalised reward of each response, (B,): 0 and 1 are mean and deviation over demonstrations.

    The two numbers were measured after reward-model training and stand in the model's config.
    """
    config = reward_model.config
    scores = raw_scores(reward_model, prompts, responses, batch_size)
    return (scores - config.reward_mean) / config.reward_std


def is_finished(responses: Tokens, eos_token_id: int) -> Tensor:
    """(B,) bool: does the response end with the end-of-sequence token?"""
    return torch.tensor([row[-1] == eos_token_id for row in responses])


def gold_rewards(
    tokenizer: PreTrainedTokenizerBase, prompt_texts: Sequence[str], responses: Tokens
) -> list[float]:
    """Gold reward of each response; only the bundled world has one."""
    finished = is_finished(responses, eos_id(tokenizer)).tolist()
    texts = tokenizer.batch_decode([list(r) for r in responses], skip_special_tokens=True)
    return [
        gold_reward(prompt, text, end).total
        for prompt, text, end in zip(prompt_texts, texts, finished, strict=True)
    ]


class MicroBatch(NamedTuple):
    """Rows of a rollout; `width` is their longest response, `tokens` the sum of lengths."""

    rows: list[int]
    prompts: list[list[int]]
    responses: list[list[int]]
    width: int
    tokens: int


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled responses. B responses, T positions; tensors on the CPU."""

    prompts: list[list[int]]
    responses: list[list[int]]
    response_mask: Tensor  # (B, T)
    logprobs: Tensor  # (B, T) under the policy that sampled
    ref_logprobs: Tensor  # (B, T) under the reference
    finished: Tensor  # (B,) bool
    scores: Tensor  # (B,) normalised reward-model scores
    rewards: Tensor  # (B,) clipped scores, less the penalty where the end is missing
    entropies: Tensor  # (B, T) of the policy at each response token, nats; 0 outside the mask
    gold: list[float] | None  # gold rewards, where the world has them
    exact_kl: Tensor | None  # (B, T) full-vocabulary KL at each position, where it was asked for

    @property
    def kl(self) -> Tensor:
        """k1 estimate of each sequence's KL to the reference, nats, (B,)."""
        return ((self.logprobs - self.ref_logprobs) * self.response_mask).sum(1)

    @property
    def entropy(self) -> float:
        """Mean over all response tokens, nats."""
        return float(masked_mean(self.entropies, self.response_mask))

    @property
    def lengths(self) -> Tensor:
        return self.response_mask.sum(1)

    @property
    def num_tokens(self) -> int:
        return int(self.response_mask.sum()) + sum(map(len, self.prompts))

    def metrics(self) -> dict[str, float]:
        """What the responses say of the policy that gave them (means over sequences)."""
        lengths = self.lengths
        metrics = {
            "reward": float(self.scores.mean()),
            "kl": float(self.kl.mean()),
            "entropy": self.entropy,
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float((~self.finished).float().mean()),
        }
        if self.gold is not None:
            metrics["gold"] = sum(self.gold) / len(self.gold)
        return metrics

    def select(self, rows: Sequence[int]) -> Rollout:
        """The given rows alone."""
        taken = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                taken[field.name] = value[list(rows)]
            elif isinstance(value, list):
                taken[field.name] = [value[i] for i in rows]
        return replace(self, **taken)

    def micro_batches(self, rows: Sequence[int], size: int) -> Iterator[MicroBatch]:
        """The given rows, at most `size` at a time, similar lengths together: less padding."""
        totals = [len(self.prompts[i]) + len(self.responses[i]) for i in rows]
        for places in by_length(totals, size):
            part = [rows[i] for i in places]
            responses = [self.responses[i] for i in part]
            lengths = [len(r) for r in responses]
            prompts = [self.prompts[i] for i in part]
            yield MicroBatch(part, prompts, responses, max(lengths), sum(lengths))


class Sampler:
    """Turns prompts into scored rollouts: reference, reward model, tokenizer and settings.

    The reference is a frozen copy of the SFT model. Where `policy` is given and has adapters, it is
    that policy with its adapters off: no second copy.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        sft_path: str,
        reward_path: str,
        *,
        temperature: float = 1.0,
        batch_size: int = 64,
        reward_clip: float = math.inf,
        missing_eos_penalty: float = 0.0,
        policy: PreTrainedModel | None = None,
    ) -> None:
        self.accelerator, self.temperature, self.batch_size = accelerator, temperature, batch_size
        self.reward_clip, self.missing_eos_penalty = reward_clip, missing_eos_penalty
        self.tokenizer = load_tokenizer(sft_path)
        if policy is not None and run.profile.model.lora_rank:
            self.reference = policy.to(accelerator.device)  # type: ignore[arg-type]
        else:
            self.reference = freeze(accelerator, load_reference(sft_path))
        reward_model, _ = load_reward_model(reward_path, self.tokenizer, run.seed)
        self.reward_model = freeze(accelerator, reward_model)
        self.max_new_tokens = run.profile.data.max_response_tokens
        self.gold_known = run.profile.data.source.startswith("bundled")

    @torch.no_grad()
    def draw(
        self, policy: PreTrainedModel, prompts: Sequence[Prompt]
    ) -> tuple[list[list[int]], Tensor]:
        """One response to each prompt and its normalised reward (B,)."""
        ids = [p.ids for p in prompts]
        with self.accelerator.autocast():
            responses = generate(policy, self.tokenizer, ids, self.max_new_tokens, self.temperature)
            return responses, score(self.reward_model, ids, responses, self.batch_size)

    @torch.no_grad()
    def sample(
        self, policy: PreTrainedModel, prompts: Sequence[Prompt], exact_kl: bool = False
    ) -> Rollout:
        """Sample one response per prompt, score it, take log-probs under policy and reference."""
        ids = [p.ids for p in prompts]
        responses, scores = self.draw(policy, prompts)
        with self.accelerator.autocast():
            logprobs, ref_logprobs, entropies, kls = [], [], [], []
            for rows in chunks(range(len(ids)), self.batch_size):
                batch = [ids[i] for i in rows], [responses[i] for i in rows]
                logits, labels, _ = response_logits(policy, *batch, self.temperature)
                logprobs.append(token_logprobs(logits, labels).cpu())
                entropies.append(entropy(logits).cpu())
                with adapters_off(self.reference):
                    ref_logits, _, _ = response_logits(self.reference, *batch, self.temperature)
                ref_logprobs.append(token_logprobs(ref_logits, labels).cpu())
                if exact_kl:
                    kls.append(full_kl(logits, ref_logits).cpu())
        finished = is_finished(responses, eos_id(self.tokenizer))
        mask = length_mask([len(r) for r in responses])
        clipped = scores.clamp(-self.reward_clip, self.reward_clip)
        gold = None
        if self.gold_known:
            gold = gold_rewards(self.tokenizer, [p.text for p in prompts], responses)
        return Rollout(
            prompts=ids,
            responses=responses,
            response_mask=mask,
            logprobs=unflatten(torch.cat(logprobs), mask),
            ref_logprobs=unflatten(torch.cat(ref_logprobs), mask),
            finished=finished,
            scores=scores,
            rewards=clipped - self.missing_eos_penalty * (~finished).float(),
            entropies=unflatten(torch.cat(entropies), mask),
            gold=gold,
            exact_kl=unflatten(torch.cat(kls), mask) if exact_kl else None,
        )
