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

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.models.generation import generate
from rlhf_lib.models.learner import freeze
from rlhf_lib.models.load import eos_id, load_reference, load_reward_model, load_tokenizer
from rlhf_lib.models.logprobs import (
    CHUNK,
    Tokens,
    length_mask,
    output_logits,
    response_hidden,
    sequence_scores,
    token_logprobs,
    unflatten,
)
from rlhf_lib.models.lora import adapters_off
from rlhf_lib.models.packing import by_prompt
from rlhf_lib.objectives.kl import full_kl
from rlhf_lib.objectives.masked import entropy, masked_mean
from rlhf_lib.runs import Run
from rlhf_lib.runtime import phase
from rlhf_lib.world.rewards import gold_reward


@phase("scoring")
@torch.no_grad()
def raw_scores(
    reward_model: PreTrainedModel, prompts: Tokens, responses: Tokens, batch_size: int = 64
) -> Tensor:
    """The reward model's own output for each response, (B,) on the CPU."""
    scores = torch.zeros(len(prompts))
    for rows in by_prompt(prompts, responses, batch_size):
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
    entropies: Tensor  # (B, T) of the policy at each position, nats
    gold: list[float] | None  # gold rewards, where the world has them
    exact_kl: Tensor | None  # (B, T) full-vocabulary KL at each position, where it was asked for

    @property
    def kl(self) -> Tensor:
        """k1 estimate of each sequence's KL to the reference, nats, (B,)."""
        return ((self.logprobs - self.ref_logprobs) * self.response_mask).sum(1)

    @property
    def lengths(self) -> Tensor:
        return self.response_mask.sum(1)

    @property
    def entropy(self) -> float:
        """Mean over response tokens, nats."""
        return float(masked_mean(self.entropies, self.response_mask))

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
        """The given rows, at most `size` at a time, cut as `by_prompt` does."""
        prompts, responses = [self.prompts[i] for i in rows], [self.responses[i] for i in rows]
        for places in by_prompt(prompts, responses, size):
            part = [rows[i] for i in places]
            responses = [self.responses[i] for i in part]
            lengths = [len(r) for r in responses]
            yield MicroBatch(
                part, [self.prompts[i] for i in part], responses, max(lengths), sum(lengths)
            )


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
        mask = length_mask([len(r) for r in responses])
        measured = torch.zeros(4, *mask.shape)  # log-probs, reference's, entropies, exact KL
        for rows in by_prompt(ids, responses, self.batch_size):
            batch = [ids[i] for i in rows], [responses[i] for i in rows]
            with self.accelerator.autocast():
                part = self._measure(policy, *batch, exact_kl)
            measured[:, rows, : part.shape[-1]] = part
        finished = is_finished(responses, eos_id(self.tokenizer))
        clipped = scores.clamp(-self.reward_clip, self.reward_clip)
        gold = None
        if self.gold_known:
            gold = gold_rewards(self.tokenizer, [p.text for p in prompts], responses)
        return Rollout(
            prompts=ids,
            responses=responses,
            response_mask=mask,
            logprobs=measured[0],
            ref_logprobs=measured[1],
            finished=finished,
            scores=scores,
            rewards=clipped - self.missing_eos_penalty * (~finished).float(),
            entropies=measured[2],
            gold=gold,
            exact_kl=measured[3] if exact_kl else None,
        )

    @phase("log-probs")
    def _measure(
        self, policy: PreTrainedModel, prompts: Tokens, responses: Tokens, exact_kl: bool
    ) -> Tensor:
        """(4, B, T) on the CPU: log-probs under policy and reference, entropies, exact KL or 0."""
        hidden, labels, mask = response_hidden(policy, prompts, responses)
        with adapters_off(self.reference):
            ref_hidden, _, _ = response_hidden(self.reference, prompts, responses)
        parts = []
        for part in zip(*(x.split(CHUNK) for x in (hidden, ref_hidden, labels)), strict=True):
            logits = output_logits(policy, part[0], self.temperature)
            ref_logits = output_logits(self.reference, part[1], self.temperature)
            kl = full_kl(logits, ref_logits) if exact_kl else torch.zeros(len(part[2]))
            logprobs, ref_logprobs = (token_logprobs(x, part[2]) for x in (logits, ref_logits))
            parts.append(torch.stack([
                x.cpu() for x in (logprobs, ref_logprobs, entropy(logits), kl)
            ]))  # fmt: skip
        return torch.stack([unflatten(x, mask.cpu()) for x in torch.cat(parts, dim=1)])
