"""Which sequences share a prompt, a batch or a row, so that nothing is computed twice or padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
