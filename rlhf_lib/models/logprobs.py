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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rlhf_lib.models.packing import first_fit, runs_of_equal
from rlhf_lib.objectives.masked import entropy

Tokens = Sequence[Sequence[int]]
SHARED = 8  # responses that share a row with their prompt, at most: attention grows as its square
CHUNK = 512  # response tokens that reach the output layer at once


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) under softmax(logits); (..., V) and (...) -> (...), float32."""
    return -F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
    ).view(labels.shape)


def pad(rows: Tokens, device: torch.device | str = "cpu") -> Tensor:
    """Token lists as one (B, longest) tensor, filled with 0 on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def length_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(B, max) float mask: 1 in the first `lengths[i]` places of row i."""
    counts = torch.tensor(lengths, device=device)
    return (torch.arange(max(lengths), device=device) < counts[:, None]).float()


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the real response tokens -> (B, T), 0 where the mask is 0."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask.bool(), values)


# ------------------------------------------------------------------------------------ rows


class Layout(NamedTuple):
    """Where the N tokens of B responses lie in R rows of L places."""

    ids: Tensor  # (R, L)
    positions: Tensor | None  # (R, L); None: they count from 0, and attention is causal
    visible: Tensor | None  # (R, 1, L, L) bool, with `positions`
    predicted_at: tuple[list[int], list[int]]  # row and place that predict each token, (N,) both
    ends: tuple[list[int], list[int]]  # row and place of each response's last token, (B,) both
    labels: Tensor  # (N,)
    mask: Tensor  # (B, T)


def lay_out(prompts: Tokens, responses: Tokens, device: torch.device | str = "cpu") -> Layout:
    """Put responses into rows. Neighbours with an equal prompt form a tree: prompt, then responses.

    Short trees share a row, so that little of it is padding. Attention lets each response see its
    prompt and itself only, and its positions go on from the prompt's end: both are what they would
    be in a row of its own. Raises ValueError for an empty prompt or response, or one too many.
    """
    _check(prompts, responses)
    trees = runs_of_equal(prompts, SHARED)
    sizes = [len(prompts[tree[0]]) + sum(len(responses[i]) for i in tree) for tree in trees]
    places = first_fit(sizes)
    shape = max(row for row, _ in places) + 1, max(sizes)
    ids, positions, branches = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    owners = torch.full(shape, -1)  # the tree of each place; -1: padding
    at: tuple[list[int], list[int]] = ([], [])
    ends: tuple[list[int], list[int]] = ([], [])
    for number, (tree, (row, start), size) in enumerate(zip(trees, places, sizes, strict=True)):
        prompt = prompts[tree[0]]
        first = start + len(prompt)
        tokens, position, branch = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for number_in_tree, response in enumerate((responses[i] for i in tree), start=1):
            length, begin = len(response), start + len(tokens)
            at[0].extend([row] * length)
            at[1].extend([first - 1, *range(begin, begin + length - 1)])  # predicted one before
            ends[0].append(row)
            ends[1].append(begin + length - 1)
            tokens += response
            position += range(len(prompt), len(prompt) + length)
            branch += [number_in_tree] * length
        taken = slice(start, start + size)
        ids[row, taken], positions[row, taken] = torch.tensor(tokens), torch.tensor(position)
        branches[row, taken], owners[row, taken] = torch.tensor(branch), number
    ids = ids.to(device)
    labels = torch.tensor([token for response in responses for token in response], device=device)
    mask = length_mask([len(r) for r in responses], device)
    if len(ids) == len(responses):  # a row each: plain causal attention will do
        return Layout(ids, None, None, at, ends, labels, mask)
    owners, branches = owners.to(device), branches.to(device)
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    same_tree = owners[:, :, None] == owners[:, None, :]
    seen = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    visible = (causal & same_tree & seen)[:, None]
    return Layout(ids, positions.to(device), visible, at, ends, labels, mask)


def hidden_states(model: torch.nn.Module, layout: Layout) -> Tensor:
    """The model's last hidden states, (R, L, width)."""
    return model.base_model(  # type: ignore[operator]
        input_ids=layout.ids, attention_mask=layout.visible, position_ids=layout.positions
    ).last_hidden_state


def _check(prompts: Tokens, responses: Tokens) -> None:
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
    for kind, rows in (("prompt", prompts), ("response", responses)):
        empty = next((i for i, row in enumerate(rows) if len(row) == 0), None)
        if empty is not None:
            raise ValueError(f"{kind} {empty} of the batch is empty: nothing predicts its tokens")


def _laid_out(model: torch.nn.Module, prompts: Tokens, responses: Tokens) -> Layout:
    return lay_out(prompts, responses, next(model.parameters()).device)


# ------------------------------------------------------------------------- language models


def response_hidden(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states that predict response tokens (N, width), the tokens (N,), the mask (B, T).

    N counts the response tokens of all rows in order: `unflatten` puts (N,) back into (B, T).
    """
    layout = _laid_out(model, prompts, responses)
    return hidden_states(model, layout)[layout.predicted_at], layout.labels, layout.mask


def output_logits(model: torch.nn.Module, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """The output layer: (N, width) -> (N, V), float32."""
    logits = model.get_output_embeddings()(hidden).float()  # type: ignore[operator]
    return logits if temperature == 1.0 else logits / temperature


def response_logits(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once, (N, V), of the N response tokens; the tokens (N,), the mask (B, T).

    For looking at a few rows: training takes `response_logprobs`, which never holds them all.
    """
    hidden, labels, mask = response_hidden(model, prompts, responses)
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


def output_logprobs(
    model: torch.nn.Module, hidden: Tensor, labels: Tensor, temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probability of each label and, if asked for, the entropy there (nats, no gradient): (N,).

    CHUNK tokens at a time: their logits are computed again in the backward pass, not kept.
    """

    def chunk(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = output_logits(model, hidden, temperature)
        logprobs = token_logprobs(logits, labels)
        return logprobs, entropy(logits.detach()) if with_entropy else None

    parts = [
        checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)  # type: ignore[arg-type]
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


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
    _check(prompts, chosen)
    _check(prompts, rejected)
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
    layout = _laid_out(model, prompts, responses)
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
        return model.score(hidden.float()).squeeze(-1)  # type: ignore[operator]
