"""What is said of data that were read: counts, reasons, repeats, prompts told apart or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_lib.data import audit
from rlhf_lib.data.dialogues import TextPair
from rlhf_lib.data.pairs import load_data
from rlhf_lib.data.sources import DataError
from rlhf_lib.models.load import load_tokenizer
from tests.data.test_pairs import TOKENIZER, config, pair, write


def text_pair(chosen: str, rejected: str, prompt: str = "Q") -> TextPair:
    return TextPair("", prompt, chosen, rejected, None, None, "row 1")


@pytest.mark.parametrize(
    ("pairs", "notes"),
    [
        ([("a", "b"), ("c", "d")], []),
        ([("a", "b"), ("a", "b"), ("a", "b")], ["2 pairs repeat another word for word"]),
        ([("a", "b"), ("b", "a")], ["1 pairs of replies stand there with either one preferred"]),
        (
            [("a", "b"), ("b", "a"), ("b", "a"), ("a", "b")],
            ["2 pairs repeat another", "1 pairs of replies stand there with either one"],
        ),
    ],
)
def test_pairs_that_stand_there_more_than_once_are_told(pairs: list, notes: list[str]) -> None:
    found = audit.repeated([text_pair(*sides) for sides in pairs])
    assert len(found) == len(notes)
    assert all(note in told for note, told in zip(notes, found, strict=True))
    other_prompts = [text_pair(*sides, prompt=str(i)) for i, sides in enumerate(pairs)]
    assert not audit.repeated(other_prompts)


def test_what_was_read_is_said_line_by_line(tmp_path: Path) -> None:
    rows = [pair(f"Q{i}?") for i in range(20)]
    rows += [pair("Q1?"), pair("Q2?", "No!", "Yes."), {**pair("Q3?"), "rejected": None}]
    data = load_data(config(write(tmp_path / "pairs.jsonl", rows), train=99), TOKENIZER)
    said = audit.said(data.audit)
    assert said[0].startswith("23 rows read, 22 usable; pairs: ")
    assert f"train {len(data.pairs['train'])}" in said[0]
    assert "left out: 1, no `rejected` (first: pairs.jsonl, row 23)" in said
    assert "train: 1 pairs repeat another word for word: they count each time" in said
    assert "train: 1 pairs of replies stand there with either one preferred" in said


def test_prompts_that_are_one_to_a_model_are_told(tmp_path: Path) -> None:
    rows = [pair(f"How do I mend a zyx{i}?", "no", "nothing is known") for i in range(40)]
    asked: Any = config(write(tmp_path / "pairs.jsonl", rows), train=20, test=10)
    notes = load_data(asked, load_tokenizer("tiny")).audit["notes"]
    assert [n for n in notes if n.startswith("20 different training prompts are 2 to")], notes


def test_columns_are_named_where_some_are_missing(tmp_path: Path) -> None:
    rows = [{"question": "Hi", "better": "Yes.", "worse": "No."}] * 9
    with pytest.raises(DataError, match=r"Rename the columns .*it has question, better, worse\)"):
        load_data(config(write(tmp_path / "pairs.jsonl", rows)), TOKENIZER)
