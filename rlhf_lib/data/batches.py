"""How rows are cut into batches: in order, by length, or in a fresh order each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of all rows, at most `size` at a time, similar lengths together: less padding."""
    yield from chunks(sorted(range(len(lengths)), key=lengths.__getitem__), size)  # type: ignore[misc]


def runs_of_equal(items: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """Indices of equal neighbours, at most `longest` in a run; each index once, in order."""
    runs: list[list[int]] = []
    for i, item in enumerate(items):
        if i and item == items[i - 1] and len(runs[-1]) < longest:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def by_prompt(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], size: int
) -> Iterator[list[int]]:
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


def first_fit(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(row, start) of each item when rows are as long as the longest: short ones share a row.

    First-fit decreasing: each, from the longest on, goes into the first row that has room for it.
    """
    places, used, longest = [(0, 0)] * len(lengths), [], max(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row, taken in enumerate(used) if taken + lengths[i] <= longest)
        row = next(fits, len(used))
        if row == len(used):
            used.append(0)
        places[i] = (row, used[row])
        used[row] += lengths[i]
    return places


def shuffled_batches(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices 0..count-1 in a fresh order each epoch, cut into batches (the last may be smaller).

    It depends on the arguments alone, so a resumed run needs no saved place in the data.
    """
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        batches += list(chunks(order, batch_size))
    return batches


def prompt_batches(count: int, batch_size: int, updates: int, seed: int) -> list[list[int]]:
    """Indices of `updates` whole batches, each epoch in a fresh order.

    Raises ValueError when there are fewer prompts than one batch needs.
    """
    if count < batch_size:
        raise ValueError(
            f"{count} training prompts do not fill a batch of {batch_size}: "
            "lower the batch size or raise data.rl_prompts"
        )
    epochs = -(-updates // (count // batch_size))
    batches = shuffled_batches(count, batch_size, epochs, seed)
    return [batch for batch in batches if len(batch) == batch_size][:updates]
