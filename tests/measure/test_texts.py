"""Variety and repetition of replies, counted by hand."""

from __future__ import annotations

import pytest

from rlhf_lib.measure.texts import distinct, ngrams, repetition


def test_ngrams_are_runs_of_words_in_lower_case() -> None:
    assert ngrams("The cat  the", 2) == [("the", "cat"), ("cat", "the")]
    assert ngrams("one", 2) == ngrams("", 1) == []


def test_distinct_counts_within_a_block() -> None:
    texts = ["a b", "a c", "a b", "d"]
    # a b a c: three words of four; a b d: all three
    assert distinct(texts, 1, block=2) == [3 / 4, 1.0]
    assert distinct(texts, 2, block=2) == [1.0, 1.0]
    assert distinct(texts, 1, block=4) == [4 / 7]


def test_it_does_not_fall_with_the_number_of_replies() -> None:
    few, many = ["a b"] * 16, ["a b"] * 160
    assert set(distinct(few, 1)) == set(distinct(many, 1)) == {2 / 32}
    assert len(distinct(many, 1)) == 10


def test_what_is_left_over_counts_only_where_it_is_all() -> None:
    assert distinct(["a", "a", "b"], 1, block=2) == [0.5]
    assert distinct(["a", "b"], 1, block=16) == [1.0]
    assert distinct(["", ""], 1, block=2) == [0.0]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d e f", 0.0),
        ("a a a a a", 0.5),  # two runs of four, one of them new
        ("a b c d a b c d", 1 / 5),
        ("a b c", 0.0),
        ("", 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_said_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)
