"""Log-probabilities of responses, computed where they are needed and nowhere else.

Prompts and responses arrive as lists of token-id lists and are joined with padding on the *right*:
positions then count from 0 without help, causal attention never sees the padding, and masks come
from lengths, so a pad token that is also the end-of-sequence token is harmless.

Three savings stand behind every function here. Responses that follow each other with an equal
prompt (a pair, a group) share it, so that it is computed once. Short rows are put behind each
other, not padded. And only the positions that predict a response token reach the output layer, some
at a time: the vocabulary-sized tensor is the large one, and the backward pass computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_lib import processes
from rlhf_lib.flops import spend
from rlhf_lib.models.graphs import last_hidden
from rlhf_lib.models.packing import (
    Layout,
    Tokens,
    by_prompt,
    check_rows,
    lay_out_for,
    reading_of,
    unflatten,
)
from rlhf_lib.objectives.masked import entropy, wide
from rlhf_lib.runtime import phase

CHUNK = 512  # response tokens that reach the output layer at once


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) under softmax(logits); (..., V) and (...) -> (...), float32."""
    return -F.cross_entropy(
        wide(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
    ).view(labels.shape)


def hidden_states(model: torch.nn.Module, layout: Layout) -> Tensor:
    """The model's last hidden states, (R, L, width)."""
    spend(model, layout.tokens)
    return last_hidden(model, layout.ids, layout.visible, layout.positions)


# ------------------------------------------------------------------------- language models


def response_hidden(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states that predict response tokens (N, width), the tokens (N,), the mask (B, T).

    N counts the response tokens of all rows in order: `unflatten` puts (N,) back into (B, T).
    """
    layout = lay_out_for(model, prompts, responses)
    return hidden_states(model, layout)[layout.predicted_at], layout.labels, layout.mask


def output_logits(model: torch.nn.Module, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """The output layer: (N, width) -> (N, V), float32."""
    if reading_of(model).own_end:
        logits = wide(_own_end(model, hidden))
    else:
        logits = wide(model.get_output_embeddings()(hidden))  # type: ignore[operator]
    return logits if temperature == 1.0 else logits / temperature


class _Computed(torch.nn.Module):
    """Stands in a model where its trunk does, and returns what the trunk has computed before."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: object, **named: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)  # type: ignore[arg-type]


def _own_end(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Logits by the model's own forward pass from its trunk on: some scale or cap them there."""
    name: str = model.base_model_prefix  # type: ignore[assignment]
    trunk = model._modules[name]
    model._modules[name] = _Computed(hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model._modules[name] = trunk


def response_logits(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once, (N, V), of the N response tokens; the tokens (N,), the mask (B, T).

    For looking at a few rows: training takes `response_logprobs`, which never holds them all.
    """
    hidden, labels, mask = response_hidden(model, prompts, responses)
    spend(model, 0, len(labels))
    return output_logits(model, hidden, temperature), labels, mask


def response_logprobs(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token: ((B, T) float32, response mask (B, T)).

    `temperature` must be the one that the tokens were sampled at. Raises ValueError for an empty
    prompt or response.
    """
    hidden, labels, mask = response_hidden(model, prompts, responses)
    return unflatten(output_logprobs(model, hidden, labels, temperature)[0], mask), mask


def logprobs_and_entropies(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, temperature: float = 1.0,
    learn: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `response_logprobs`, with the entropy in nats of each state in between, (B, T) too.

    Without `learn` the entropies have no gradient.
    """
    hidden, labels, mask = response_hidden(model, prompts, responses)
    both = output_logprobs(model, hidden, labels, temperature, "learnt" if learn else "read")
    logprobs, entropies = (unflatten(x, mask) for x in both)  # type: ignore[arg-type]
    return logprobs, entropies, mask


def output_logprobs(
    model: torch.nn.Module, hidden: Tensor, labels: Tensor, temperature: float = 1.0,
    entropies: Literal["", "read", "learnt"] = "",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probability of each label and, if asked for, the entropy there in nats: (N,).

    Entropies that are "read" have no gradient.

    CHUNK tokens at a time: their logits are computed again in the backward pass, not kept.
    """

    def chunk(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = output_logits(model, hidden, temperature)
        logprobs = token_logprobs(logits, labels)
        if not entropies:
            return logprobs, None
        return logprobs, entropy(logits if entropies == "learnt" else logits.detach())

    spend(model, 0, len(labels))
    parts = [
        checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    logprobs, of_states = zip(*parts, strict=True)  # type: ignore[arg-type]
    return torch.cat(logprobs), torch.cat(of_states) if entropies else None


@phase("log-probs")
@torch.no_grad()
def reply_logprobs(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, batch_size: int
) -> Tensor:
    """Log-probability of each whole response: (N,), on the CPU and without gradient."""
    sums = torch.zeros(len(prompts))
    for rows in processes.dealt(by_prompt, prompts, responses, size=batch_size):
        batch = [prompts[i] for i in rows], [responses[i] for i in rows]
        sums[rows] = response_logprobs(model, *batch)[0].sum(1).cpu()
    return processes.summed(sums)


def paired_logprobs(
    model: torch.nn.Module, prompts: Tokens, chosen: Tokens, rejected: Tokens
) -> tuple[Tensor, Tensor]:
    """Sequence log-probabilities of two responses to each prompt, (B,) and (B,), float32.

    The prompt is computed once for both.
    """
    logprobs, _ = response_logprobs(model, *_side_by_side(prompts, chosen, rejected))
    return logprobs[0::2].sum(1), logprobs[1::2].sum(1)


def _side_by_side(
    prompts: Tokens, chosen: Tokens, rejected: Tokens
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Every prompt twice, for the chosen and the rejected response."""
    check_rows(prompts, chosen)
    check_rows(prompts, rejected)
    pairs = zip(chosen, rejected, strict=True)
    return [p for p in prompts for _ in range(2)], [reply for pair in pairs for reply in pair]


# ------------------------------------------------------- models with a scalar head `score`


def token_values(model: torch.nn.Module, prompts: Tokens, responses: Tokens) -> Tensor:
    """A value model's estimate before each response token is chosen: (B, T), 0 after the end.

    The value of a state is read where its next token is predicted: V(prompt + response[:t]).
    """
    hidden, _, mask = response_hidden(model, prompts, responses)
    return unflatten(_head(model, hidden), mask)


def sequence_scores(model: torch.nn.Module, prompts: Tokens, responses: Tokens) -> Tensor:
    """A reward model's raw output at the last real token of each sequence: (B,) float32."""
    layout = lay_out_for(model, prompts, responses)
    return _head(model, hidden_states(model, layout)[layout.ends])


def paired_scores(
    model: torch.nn.Module, prompts: Tokens, chosen: Tokens, rejected: Tokens
) -> tuple[Tensor, Tensor]:
    """A reward model's raw scores of two responses to each prompt, (B,) and (B,), float32.

    The prompt is computed once for both.
    """
    scores = sequence_scores(model, *_side_by_side(prompts, chosen, rejected))
    return scores[0::2], scores[1::2]


def _head(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The scalar head in fp32: bf16 would round scores to three digits and make ties."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(wide(hidden)).squeeze(-1)  # type: ignore[operator]
