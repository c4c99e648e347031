"""Rows that share a prompt, a batch or a row: nothing lost, nothing twice, no row too long."""

from __future__ import annotations

import random

import pytest

from rlhf_lib.models.packing import by_prompt, first_fit, runs_of_equal


def test_equal_neighbours_make_a_run_and_no_run_is_too_long() -> None:
    items = [[1], [2], [2], [2], [1], [1]]
    assert runs_of_equal(items, 8) == [[0], [1, 2, 3], [4, 5]]
    assert runs_of_equal(items, 2) == [[0], [1, 2], [3], [4, 5]]
    assert runs_of_equal([], 2) == []


def test_rows_of_one_prompt_stay_together_and_every_row_comes_once() -> None:
    prompts = [[5] * 9] * 3 + [[6]] * 3 + [[7, 7]] * 5
    responses = [[1]] * 6 + [[1] * n for n in (1, 2, 3, 4, 20)]
    batches = list(by_prompt(prompts, responses, 4))
    # lengths 10, 2, 6 and 22; the run of five is cut at 4
    assert batches == [[3, 4, 5], [6, 7, 8, 9], [0, 1, 2, 10]]
    assert list(by_prompt([], [], 4)) == []


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_batches_of_any_size_hold_every_row_once(size: int) -> None:
    rng = random.Random(size)
    prompts = [[rng.randrange(3)] * rng.randint(1, 2) for _ in range(60)]
    responses = [[1] * rng.randint(1, 9) for _ in prompts]
    batches = list(by_prompt(prompts, responses, size))
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    assert all(0 < len(batch) <= size for batch in batches)


def test_short_items_share_a_row() -> None:
    assert first_fit([3, 10, 6, 4, 7], 10) == [(1, 7), (0, 0), (2, 0), (2, 6), (1, 0)]


@pytest.mark.parametrize("seed", range(5))
def test_shared_rows_hold_each_item_once_and_are_never_too_long(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [30, *(rng.randint(1, 12) for _ in range(50))]
    places = first_fit(lengths, max(lengths))
    taken = [
        (row, place)
        for (row, start), length in zip(places, lengths, strict=True)
        for place in range(start, start + length)
    ]
    assert len(taken) == len(set(taken)) == sum(lengths), "two items in one place"
    assert max(place for _, place in taken) < max(lengths)
    rows = {row for row, _ in places}
    assert rows == set(range(len(rows)))
    # two rows half empty could be one
    assert len(rows) <= 2 * sum(lengths) / max(lengths) + 1
