"""The reader as one more judge of the pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lib.course.annotator import COUNT, Annotator
from rlhf_lib.data.encoding import Pair

PAIRS = [
    Pair(str(i), f"\n\nHuman: request {i}\n\nAssistant:", f" good <b>{i}", f" bad {i}", [], [], [])
    for i in range(50)
]
LABELS = np.ones(50)


def annotator(**judges: Any) -> Annotator:
    return Annotator(PAIRS, {"label": LABELS, **judges})


def test_a_reader_who_takes_the_good_replies_agrees_with_the_labels() -> None:
    asked = annotator(contrary=-LABELS, idle=0 * LABELS)
    for place in range(COUNT):
        first, _ = asked.replies(place)
        asked.answer(first.startswith("good"))
    table = asked.agreement().set_index("judge")
    assert table.loc["you", "with label"].startswith("100% [")
    assert table.loc["you", "with contrary"].startswith("0% [")
    assert table.loc["you", "with idle"].startswith("50% [")
    assert table.loc["label", "with contrary"].startswith("0% [")
    assert table.loc["you", "with you"] == ""


def test_no_difference_is_half_an_agreement() -> None:
    asked = annotator()
    asked.answer(None)
    assert asked.agreement().set_index("judge").loc["you", "with label"].startswith("50% [")


def test_the_order_of_the_replies_says_nothing() -> None:
    firsts = [annotator().replies(place)[0].startswith("good") for place in range(COUNT)]
    assert 8 <= sum(firsts) <= 22
    assert firsts == [annotator().replies(place)[0].startswith("good") for place in range(COUNT)]
    other = Annotator(PAIRS, {"label": LABELS}, seed=1)
    assert firsts != [other.replies(place)[0].startswith("good") for place in range(COUNT)]


def test_a_judge_is_asked_about_the_same_pairs() -> None:
    prefers = np.where(np.arange(50) % 2, 1.0, -1.0)
    asked = annotator(odd=prefers)
    odd = [int(pair.conversation) % 2 for pair in asked.pairs]
    assert asked.judges["odd"].tolist() == [1.0 if is_odd else -1.0 for is_odd in odd]
    with pytest.raises(ValueError, match="no preference for each of the 50 pairs"):
        annotator(short=[1.0])


def test_the_buttons_go_through_all_pairs_and_end() -> None:
    asked = annotator()
    page, buttons, found = asked.control().children
    first, second, neither = buttons.children
    assert "Pair 1 of 30" in page.value
    assert "&lt;b&gt;" in page.value, "a reply's text is text, not markup"
    assert not found.value
    for press in range(COUNT):
        (first, second, neither)[press % 3].click()
    assert "last pair" in page.value
    assert first.disabled
    assert len(asked.said) == COUNT
    assert "with label" in found.value


def test_the_twin_shows_some_pairs_as_they_are_asked() -> None:
    asked = annotator()
    rows = asked.some().to_dict("records")
    assert len(rows) == 3
    for place, row in enumerate(rows):
        better = row[f"{row['labelled better']} reply"]
        assert better.startswith("good"), place
