"""Which rows stand together: equal prompts share a row, and short ones lie behind each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lib.models.kernels import added, adds_masks

Tokens = Sequence[Sequence[int]]
GPU_MULTIPLE = 64  # places of a row on a GPU, which looks for kernels at every new shape
SHARED = 8  # responses that share a row with their prompt, at most: attention grows as its square


class Reading(NamedTuple):
    """How a model has to be read so that the numbers are its own; `agreement` finds it out."""

    packed: bool = True  # a row may hold several responses
    widest: int | None = None  # places that such a row may have: positions, or a window's
    own_end: bool = False  # its forward pass does more than the output layer to hidden states


def reading_of(model: torch.nn.Module) -> Reading:
    """The reading that was found when the model was loaded; the usual one without."""
    return getattr(model, "reading", Reading())


def length_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(B, max) float mask: 1 in the first `lengths[i]` places of row i."""
    counts = torch.tensor(lengths, device=device)
    return (torch.arange(max(lengths), device=device) < counts[:, None]).float()


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the real response tokens -> (B, T), 0 where the mask is 0."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask.bool(), values)


def runs_of_equal(items: Tokens, longest: int) -> list[list[int]]:
    """Indices of equal neighbours, at most `longest` in a run; each index once, in order."""
    runs: list[list[int]] = []
    for i, item in enumerate(items):
        if i and item == items[i - 1] and len(runs[-1]) < longest:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def by_prompt(prompts: Tokens, responses: Tokens, size: int) -> Iterator[list[int]]:
    """Indices of all rows, at most `size` at a time: equal prompts together, then similar lengths.

    Neighbours with an equal prompt stay neighbours, so that `logprobs` computes it once for them.
    """
    runs = runs_of_equal(prompts, size)
    lengths = [max(len(prompts[i]) + len(responses[i]) for i in run) for run in runs]
    batch: list[int] = []
    for place in sorted(range(len(runs)), key=lengths.__getitem__):
        if len(batch) + len(runs[place]) > size:
            yield batch
            batch = []
        batch += runs[place]
    if batch:
        yield batch


def first_fit(lengths: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """(row, start) of each item in rows of `longest` places: short ones share a row.

    First-fit decreasing: each, from the longest on, goes into the first row that has room for it.
    """
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    used: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row, taken in enumerate(used) if taken + lengths[i] <= longest)
        row = next(fits, len(used))
        if row == len(used):
            used.append(0)
        places[i] = (row, used[row])
        used[row] += lengths[i]
    return places


class Layout(NamedTuple):
    """Where the N tokens of B responses lie in R rows of L places."""

    ids: Tensor  # (R, L)
    positions: Tensor | None  # (R, L); None: they count from 0, and attention is causal
    visible: Tensor | None  # (R, 1, L, L) bool, or to add to scores; with `positions`
    predicted_at: tuple[Tensor, Tensor]  # row and place that predict each token, (N,) both
    ends: tuple[Tensor, Tensor]  # row and place of each response's last token, (B,) both
    labels: Tensor  # (N,)
    mask: Tensor  # (B, T)
    tokens: int  # what stands in the rows, padding left out


def lay_out_for(model: torch.nn.Module, prompts: Tokens, responses: Tokens) -> Layout:
    """`lay_out` as the model can read it; on a GPU in rows of few lengths, with a mask to add."""
    device, reading = next(model.parameters()).device, reading_of(model)
    if reading.packed:
        multiple = GPU_MULTIPLE if device.type == "cuda" else 1
        layout = lay_out(prompts, responses, device, multiple, reading.widest)
        if reading.widest is None or layout.ids.shape[1] <= reading.widest:
            adds = device.type == "cuda" or adds_masks(model)
            if layout.visible is None or not adds:
                return layout
            return layout._replace(visible=added(layout.visible))
    return lay_out(prompts, responses, device, alone=True)


def lay_out(
    prompts: Tokens,
    responses: Tokens,
    device: torch.device | str = "cpu",
    multiple: int = 1,
    most: int | None = None,
    alone: bool = False,
) -> Layout:
    """Put responses into rows. Neighbours with an equal prompt form a tree: prompt, then responses.

    Short trees share a row, so that little of it is padding. Attention lets each response see its
    prompt and itself only, and its positions go on from the prompt's end: both are what they would
    be in a row of its own. Rows have a multiple of `multiple` places, as far as `most` allows.
    `alone`: each response in a row of its own all the same. Raises ValueError for an empty prompt
    or response, or one too many.
    """
    check_rows(prompts, responses)
    trees = runs_of_equal(prompts, 1 if alone else SHARED)
    sizes = [len(prompts[tree[0]]) + sum(len(responses[i]) for i in tree) for tree in trees]
    longest = max(sizes)
    rounded = -(-longest // multiple) * multiple
    width = rounded if most is None else max(longest, min(rounded, most))
    places = [(row, 0) for row in range(len(trees))] if alone else first_fit(sizes, width)
    shape = max(row for row, _ in places) + 1, width
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
    predicted_at, end = (
        (torch.tensor(rows, device=device), torch.tensor(columns, device=device))
        for rows, columns in (at, ends)
    )
    if len(ids) == len(responses) and multiple == 1:  # a row each: plain causal attention will do
        return Layout(ids, None, None, predicted_at, end, labels, mask, sum(sizes))
    owners, branches = owners.to(device), branches.to(device)
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    same_tree = owners[:, :, None] == owners[:, None, :]
    seen = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    visible = (causal & same_tree & seen)[:, None]
    return Layout(ids, positions.to(device), visible, predicted_at, end, labels, mask, sum(sizes))


def check_rows(prompts: Tokens, responses: Tokens) -> None:
    """Raises ValueError for an empty row, which nothing predicts, or rows without a partner."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
    for kind, rows in (("prompt", prompts), ("response", responses)):
        empty = next((i for i, row in enumerate(rows) if len(row) == 0), None)
        if empty is not None:
            raise ValueError(f"{kind} {empty} of the batch is empty: nothing predicts its tokens")
