"""Sampling from a policy and scoring what it said: the data that PPO and GRPO learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib import processes
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.data.truth import Truth
from rlhf_lib.flops import spend
from rlhf_lib.methods.rewards import Reply, Reward, WeightedSum, checked, of_truth, read_replies
from rlhf_lib.models.generation import generate
from rlhf_lib.models.load import adapters_off
from rlhf_lib.models.logprobs import CHUNK, output_logits, response_hidden, token_logprobs
from rlhf_lib.models.packing import Tokens, by_prompt, length_mask, unflatten
from rlhf_lib.objectives.advantages import soft_overlong_penalty
from rlhf_lib.objectives.kl import full_kl
from rlhf_lib.objectives.masked import entropy, masked_mean
from rlhf_lib.runtime import phase


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
    scores: Tensor  # (B,) what the reward says
    rewards: Tensor  # (B,) clipped scores, less the penalties for length and a missing end
    entropies: Tensor  # (B, T) of the policy at each position, nats
    gold: list[float] | None  # gold rewards, where the world has them
    exact_kl: Tensor | None  # (B, T) full-vocabulary KL at each position, where it was asked for
    parts: dict[str, Tensor] = field(default_factory=dict)  # (B,) where the reward sums several
    signs: list[dict[str, float]] | None = None  # as `Truth.signs` has them, where the world does

    @property
    def kl(self) -> Tensor:
        """k1 estimate of each sequence's KL to the reference, nats, (B,)."""
        return ((self.logprobs - self.ref_logprobs) * self.response_mask).sum(1)

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
            "entropy": float(masked_mean(self.entropies, self.response_mask)),
            "reply_tokens": float(lengths.sum()),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float((~self.finished).float().mean()),
        }
        if self.gold is not None:
            metrics["gold"] = sum(self.gold) / len(self.gold)
        for name in sorted(set().union(*self.signs or ())):
            values = [reply[name] for reply in self.signs or () if name in reply]
            metrics[f"signs/{name}"] = sum(values) / len(values)
        return metrics | {f"rewards/{n}/mean": float(x.mean()) for n, x in self.parts.items()}

    def select(self, rows: Sequence[int]) -> Rollout:
        """The given rows alone."""
        taken = {}
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, Tensor):
                taken[column.name] = value[list(rows)]
            elif isinstance(value, list):
                taken[column.name] = [value[i] for i in rows]
        parts = {name: value[list(rows)] for name, value in self.parts.items()}
        return replace(self, **taken, parts=parts)

    def micro_batches(self, rows: Sequence[int], size: int) -> Iterator[MicroBatch]:
        """The given rows, at most `size` at a time, cut as `by_prompt` does; with other processes,
        this one's share of them.
        """
        prompts, responses = [self.prompts[i] for i in rows], [self.responses[i] for i in rows]
        for places in processes.dealt(by_prompt, prompts, responses, size=size):
            part = [rows[i] for i in places]
            responses = [self.responses[i] for i in part]
            lengths = [len(r) for r in responses]
            yield MicroBatch(
                part, [self.prompts[i] for i in part], responses, max(lengths), sum(lengths)
            )


class Sampler:
    """Turns prompts into scored rollouts: what samples, what scores, and how far it may go.

    `reference` is frozen, or a policy with adapters, which is its own reference with them off.
    `truth`, where there is one, adds gold reward and signs to every rollout; nothing learns from
    them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        reference: PreTrainedModel,
        reward: Reward,
        *,
        max_new_tokens: int,
        truth: Truth | None = None,
    ) -> None:
        self.accelerator, self.tokenizer, self.reference = accelerator, tokenizer, reference
        self.reward, self.max_new_tokens = reward, max_new_tokens
        self.truth = truth

    @torch.no_grad()
    def draw(
        self,
        policy: PreTrainedModel,
        prompts: Sequence[Prompt],
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
    ) -> list[Reply]:
        """One reply to each prompt; `uniforms`: their luck, as `generate` takes it."""
        ids, longest = [p.ids for p in prompts], self.max_new_tokens
        with self.accelerator.autocast():
            responses = generate(
                policy, self.tokenizer, ids, longest, temperature, uniforms=uniforms
            )
        return read_replies(self.tokenizer, responses)

    def score(
        self, prompts: Sequence[Prompt], replies: Sequence[Reply]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward of each reply, (B,) float32, and its parts where it sums several."""
        if not isinstance(self.reward, WeightedSum):
            return checked("of the sampler", self.reward, prompts, replies), {}
        each = self.reward.each(prompts, replies)
        return self.reward.total(each), each if len(each) > 1 else {}

    @torch.no_grad()
    def sample(
        self,
        policy: PreTrainedModel,
        prompts: Sequence[Prompt],
        *,
        temperature: float = 1.0,
        micro_batch_size: int = 64,
        reward_clip: float = math.inf,
        missing_eos_penalty: float = 0.0,
        overlong_buffer: int = 0,
        exact_kl: bool = False,
        uniforms: Tensor | None = None,
    ) -> Rollout:
        """Sample one reply per prompt, score it, take log-probs under policy and reference.

        `micro_batch_size`: replies whose log-probs are taken at once. `overlong_buffer`: the last
        tokens of the longest reply, over which it loses a point (`soft_overlong_penalty`).
        """
        ids, replies = [p.ids for p in prompts], self.draw(policy, prompts, temperature, uniforms)
        responses = [reply.ids for reply in replies]
        scores, parts = self.score(prompts, replies)
        mask = length_mask([len(r) for r in responses])
        measured = torch.zeros(4, *mask.shape)  # log-probs, reference's, entropies, exact KL
        for rows in processes.dealt(by_prompt, ids, responses, size=micro_batch_size):
            batch = [ids[i] for i in rows], [responses[i] for i in rows]
            with self.accelerator.autocast():
                part = self._measure(policy, *batch, temperature, exact_kl)
            measured[:, rows, : part.shape[-1]] = part
        processes.summed(measured)
        finished = torch.tensor([reply.finished for reply in replies])
        clipped = scores.clamp(-reward_clip, reward_clip)
        overlong = soft_overlong_penalty(mask.sum(1), self.max_new_tokens, overlong_buffer)
        gold = signs = None
        if self.truth is not None:
            gold = torch.as_tensor(of_truth(self.truth)(prompts, replies)).tolist()
            both = zip(prompts, replies, strict=True)
            signs = [self.truth.signs(prompt.text, reply.text) for prompt, reply in both]
        return Rollout(
            prompts=ids,
            responses=responses,
            response_mask=mask,
            logprobs=measured[0],
            ref_logprobs=measured[1],
            finished=finished,
            scores=scores,
            rewards=clipped - missing_eos_penalty * (~finished).float() + overlong,
            entropies=measured[2],
            gold=gold,
            exact_kl=measured[3] if exact_kl else None,
            parts=parts,
            signs=signs,
        )

    @phase("log-probs")
    def _measure(
        self, policy: PreTrainedModel, prompts: Tokens, responses: Tokens, temperature: float,
        exact_kl: bool,
    ) -> Tensor:  # fmt: skip
        """(4, B, T) on the CPU: log-probs under policy and reference, entropies, exact KL or 0."""
        hidden, labels, mask = response_hidden(policy, prompts, responses)
        with adapters_off(self.reference):
            ref_hidden, _, _ = response_hidden(self.reference, prompts, responses)
        for model in (policy, self.reference):
            spend(model, 0, len(labels))
        parts = []
        for part in zip(*(x.split(CHUNK) for x in (hidden, ref_hidden, labels)), strict=True):
            logits = output_logits(policy, part[0], temperature)
            ref_logits = output_logits(self.reference, part[1], temperature)
            kl = full_kl(logits, ref_logits) if exact_kl else torch.zeros(len(part[2]))
            logprobs, ref_logprobs = (token_logprobs(x, part[2]) for x in (logits, ref_logits))
            parts.append(torch.stack([
                x.cpu() for x in (logprobs, ref_logprobs, entropy(logits), kl)
            ]))  # fmt: skip
        return torch.stack([unflatten(x, mask.cpu()) for x in torch.cat(parts, dim=1)])
