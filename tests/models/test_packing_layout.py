"""Where tokens lie: masks come from lengths, and neighbours share their prompt."""

from __future__ import annotations

import torch

from rlhf_lib.models.packing import lay_out, length_mask, unflatten

# a pair, a group, and loners short enough to stand behind one another
PROMPTS = [[5, 6, 7, 8]] * 2 + [[12]] * 3 + [[9, 1, 0], [20], [4, 4], [21]]
RESPONSES = [[15, 1], [16, 17, 18, 19], [3], [0, 1], [22, 23, 1], [30], [1], [8, 9], [10, 11, 1]]


def test_masks_come_from_lengths() -> None:
    assert length_mask([1, 3]).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_unflatten_puts_rows_back() -> None:
    mask = length_mask([1, 3, 2])
    assert unflatten(torch.arange(1.0, 7), mask).tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]


def test_neighbours_share_their_prompt_and_short_ones_a_row() -> None:
    layout = lay_out(PROMPTS, RESPONSES)
    assert layout.ids.shape == (4, 10)  # 10 + 7 + 4 + 2 + 4 + 4 places in rows of 10
    assert int((layout.ids != 0).sum()) == 31 - 2, "every token once, two of them being 0"
    assert layout.ids[layout.ends].tolist() == [r[-1] for r in RESPONSES]
    assert layout.positions is not None
    last = [len(p) + len(r) - 1 for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert layout.positions[layout.ends].tolist() == last, "as in a row of its own"
