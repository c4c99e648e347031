"""How rows are cut into batches: in order, by length, or in a fresh order each epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
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

    Where one batch needs more prompts than there are, it goes on with the next epochs', and says
    so: a prompt is asked several times in an update then.
    """
    if count >= batch_size:
        epochs = -(-updates // (count // batch_size))
        batches = shuffled_batches(count, batch_size, epochs, seed)
        return [batch for batch in batches if len(batch) == batch_size][:updates]
    warnings.warn(
        f"{count} training prompts for a batch of {batch_size}: each stands in it several times",
        stacklevel=2,
    )
    epochs = -(-updates * batch_size // count)
    endless = list(chain.from_iterable(shuffled_batches(count, count, epochs, seed)))
    return list(chunks(endless, batch_size))[:updates]  # type: ignore[arg-type]
