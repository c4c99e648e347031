"""How rows are cut into batches: nothing lost, nothing twice, the same from the same seed."""

from __future__ import annotations

import random

import pytest
import torch

from rlhf_lib.data.batches import by_length, chunks, prompt_batches, shuffled_batches
from rlhf_lib.models.packing import by_prompt, first_fit, runs_of_equal


def test_chunks_cover_everything_once() -> None:
    assert [list(c) for c in chunks(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_similar_lengths_come_together_and_every_row_once() -> None:
    assert list(by_length([7, 1, 9, 3, 8], 2)) == [[1, 3], [0, 4], [2]]


def test_every_epoch_is_a_fresh_order_of_everything() -> None:
    batches = shuffled_batches(10, 4, epochs=3, seed=1)
    assert [len(b) for b in batches] == [4, 4, 2] * 3
    epochs = [[*a, *b, *c] for a, b, c in (batches[0:3], batches[3:6], batches[6:9])]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert shuffled_batches(10, 4, 3, seed=1) == batches
    assert shuffled_batches(10, 4, 3, seed=2) != batches


def test_batches_do_not_hang_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first, state = shuffled_batches(10, 4, 1, seed=1), torch.get_rng_state()
    torch.manual_seed(2)
    assert shuffled_batches(10, 4, 1, seed=1) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_prompt_batches_are_whole_and_as_many_as_asked() -> None:
    batches = prompt_batches(10, 4, updates=5, seed=0)
    assert [len(b) for b in batches] == [4] * 5
    for start in (0, 2):  # two whole batches an epoch: no prompt twice within one
        assert len(set(batches[start] + batches[start + 1])) == 8


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 training prompts do not fill a batch of 4: .*rl_pro"):
        prompt_batches(3, 4, updates=1, seed=0)


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
    assert first_fit([3, 10, 6, 4, 7]) == [(1, 7), (0, 0), (2, 0), (2, 6), (1, 0)]


@pytest.mark.parametrize("seed", range(5))
def test_shared_rows_hold_each_item_once_and_are_never_too_long(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [30, *(rng.randint(1, 12) for _ in range(50))]
    places = first_fit(lengths)
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
