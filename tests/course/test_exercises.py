"""The score at a notebook's end, and what it leaves for a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lib.course import exercises


def test_an_exercise_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError, match="09-1"):
        exercises.check("09-1", 1)


def test_a_number_where_a_function_is_asked_for_is_said(capsys: Any) -> None:
    exercises.check("05-1", 0.5, 11)
    assert "The answer is a function" in capsys.readouterr().out


def test_the_score_counts_the_last_answers(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exercises, "RIGHT", {})
    exercises.check("06-4", lambda beta: 1 / (2 * beta))
    exercises.check("06-1", ...)
    exercises.check("06-2", lambda smoothing: smoothing)
    capsys.readouterr()
    exercises.score("06", tmp_path / "score.json")
    said = capsys.readouterr().out
    assert said == (
        "1 of 5 exercises of chapter 06 are right; still open: 06-1, 06-2, 06-3, 06-5\n"
    )
    record = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    assert record["right"] == ["06-4"]
    assert len(record["of"]) == 5

    exercises.check("06-4", lambda beta: 1 / beta)
    exercises.score("06")
    assert "0 of 5" in capsys.readouterr().out
