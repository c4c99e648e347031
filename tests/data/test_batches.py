"""How rows are cut into batches: nothing lost, nothing twice, the same from the same seed."""

from __future__ import annotations

import pytest
import torch

from rlhf_lib.data.batches import by_length, chunks, prompt_batches, shuffled_batches


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


def test_few_prompts_fill_a_batch_several_times_and_say_so() -> None:
    with pytest.warns(UserWarning, match="3 training prompts for a batch of 4"):
        batches = prompt_batches(3, 4, updates=3, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    asked = [index for batch in batches for index in batch]
    assert [sorted(asked[start : start + 3]) for start in range(0, 12, 3)] == [[0, 1, 2]] * 4
