"""Subsets for the learning curve: each lies within the larger ones."""

from __future__ import annotations

from typing import Any

from rlhf_lib.data.pairs import draw_pairs


def test_a_smaller_subset_lies_within_a_larger_one(tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"]
    small, large = ([p.conversation for p in draw_pairs(pairs, n, seed=1)] for n in (5, 15))
    assert large[:5] == small
    assert len(set(large)) == 15
    assert small != [p.conversation for p in pairs[:5]], "the order of the file means something"
    other = draw_pairs(pairs, 5, seed=2)
    assert small != [p.conversation for p in other]
