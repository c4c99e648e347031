"""Log-probabilities of responses, computed where they are needed and nowhere else.

Prompts and responses arrive as lists of token-id lists and are joined with padding on the *right*:
positions then count from 0 without help, causal attention never sees the padding, and masks come
from lengths, so a pad token that is also the end-of-sequence token is harmless. Only the positions
that predict a response token reach the output layer: the vocabulary-sized tensor is the large one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Tokens = Sequence[Sequence[int]]


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


def response_logits(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that predict each response token.

    Returns flat logits (N, V) over the N response tokens of all rows in order, their labels (N,),
    and the response mask (B, T): `unflatten` puts anything of shape (N,) back into (B, T).
    """
    _check(prompts, responses)
    device = next(model.parameters()).device
    ids = pad([[*p, *r] for p, r in zip(prompts, responses, strict=True)], device)
    hidden = model.base_model(input_ids=ids).last_hidden_state  # type: ignore[operator]
    mask = length_mask([len(r) for r in responses], device)
    rows, columns = mask.nonzero(as_tuple=True)
    # the token at place t is predicted at place t - 1
    starts = torch.tensor([len(p) - 1 for p in prompts], device=device)
    places = starts[rows] + columns
    logits = model.get_output_embeddings()(hidden[rows, places])  # type: ignore[operator]
    return logits.float() / temperature, ids[rows, places + 1], mask


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the real response tokens -> (B, T), 0 where the mask is 0."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask.bool(), values)


def response_logprobs(
    model: torch.nn.Module, prompts: Tokens, responses: Tokens, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token: ((B, T) float32, response mask (B, T)).

    `temperature` must be the one that the tokens were sampled at. Raises ValueError for an empty
    prompt or response.
    """
    logits, labels, mask = response_logits(model, prompts, responses, temperature)
    return unflatten(token_logprobs(logits, labels), mask), mask


def token_values(model: torch.nn.Module, prompts: Tokens, responses: Tokens) -> Tensor:
    """A value model's estimate before each response token is chosen: (B, T), 0 after the end.

    The value of a state is read where its next token is predicted: V(prompt + response[:t]).
    """
    _check(prompts, responses)
    device = next(model.parameters()).device
    ids = pad([[*p, *r] for p, r in zip(prompts, responses, strict=True)], device)
    hidden = model.base_model(input_ids=ids).last_hidden_state  # type: ignore[operator]
    mask = length_mask([len(r) for r in responses], device)
    rows, columns = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(p) - 1 for p in prompts], device=device)
    return unflatten(_head(model, hidden[rows, starts[rows] + columns]), mask)


def sequence_scores(model: torch.nn.Module, prompts: Tokens, responses: Tokens) -> Tensor:
    """A reward model's raw output at the last real token of each sequence: (B,) float32."""
    _check(prompts, responses)
    device = next(model.parameters()).device
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    ids = pad(rows, device)
    hidden = model.base_model(input_ids=ids).last_hidden_state  # type: ignore[operator]
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    return _head(model, hidden[torch.arange(len(rows)), last])


def _head(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The scalar head in fp32: bf16 would round scores to three digits and make ties."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float()).squeeze(-1)  # type: ignore[operator]


def paired_logprobs(
    model: torch.nn.Module, prompts: Tokens, chosen: Tokens, rejected: Tokens
) -> tuple[Tensor, Tensor]:
    """Sequence log-probabilities of two responses to each prompt, (B,) and (B,), float32.

    The prompt is computed once for both.
    """
    hidden = _paired_hidden(model, prompts, chosen, rejected)
    rows, places, labels, owners = [], [], [], []
    for row, (p, c, r) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        prompt_end = len(p) - 1  # predicts the first token of both replies
        for side, reply, start in ((0, c, len(p)), (1, r, len(p) + len(c))):
            rows += [row] * len(reply)
            places += [prompt_end, *range(start, start + len(reply) - 1)]
            labels += reply
            owners += [row + side * len(prompts)] * len(reply)
    logits = model.get_output_embeddings()(hidden[rows, places])  # type: ignore[operator]
    device = logits.device
    logprobs = token_logprobs(logits, torch.tensor(labels, device=device))
    sums = torch.zeros(2 * len(prompts), device=device)
    sums = sums.index_add(0, torch.tensor(owners, device=device), logprobs)
    return sums[: len(prompts)], sums[len(prompts) :]


def paired_scores(
    model: torch.nn.Module, prompts: Tokens, chosen: Tokens, rejected: Tokens
) -> tuple[Tensor, Tensor]:
    """A reward model's raw scores of two responses to each prompt, (B,) and (B,), float32.

    Equal to `sequence_scores` of both; the prompt is computed once.
    """
    hidden = _paired_hidden(model, prompts, chosen, rejected)
    chosen_ends = [len(p) + len(c) - 1 for p, c in zip(prompts, chosen, strict=True)]
    rejected_ends = [end + len(r) for end, r in zip(chosen_ends, rejected, strict=True)]
    rows = list(range(len(prompts)))
    return _head(model, hidden[rows, chosen_ends]), _head(model, hidden[rows, rejected_ends])


def _paired_hidden(
    model: torch.nn.Module, prompts: Tokens, chosen: Tokens, rejected: Tokens
) -> Tensor:
    """Hidden states of rows that hold prompt + chosen + rejected, (B, longest, width).

    The rejected tokens take the positions that follow the prompt, and attention lets each reply see
    the prompt and itself only: both are what they would be in a row of their own.
    """
    _check(prompts, chosen)
    _check(prompts, rejected)
    device = next(model.parameters()).device
    triples = list(zip(prompts, chosen, rejected, strict=True))
    ids = pad([[*p, *c, *r] for p, c, r in triples], device)
    # segment of each place: 0 prompt, 1 chosen, 2 rejected, 3 padding
    segment = torch.full_like(ids, 3)
    position = torch.zeros_like(ids)
    for row, (p, c, r) in enumerate(triples):
        a, b, end = len(p), len(p) + len(c), len(p) + len(c) + len(r)
        segment[row, :a], segment[row, a:b], segment[row, b:end] = 0, 1, 2
        position[row, :b] = torch.arange(b)
        position[row, b:end] = torch.arange(a, a + len(r))
    queries, keys = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    visible = causal & ((keys == 0) | (queries == keys))
    return model.base_model(  # type: ignore[operator]
        input_ids=ids, attention_mask=visible[:, None], position_ids=position
    ).last_hidden_state


def _check(prompts: Tokens, responses: Tokens) -> None:
    for kind, rows in (("prompt", prompts), ("response", responses)):
        empty = next((i for i, row in enumerate(rows) if len(row) == 0), None)
        if empty is not None:
            raise ValueError(f"{kind} {empty} of the batch is empty: nothing predicts its tokens")
