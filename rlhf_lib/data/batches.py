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
