"""Mistakes that are put back: one line is another, and what was right is so no more."""

from __future__ import annotations

import inspect

import pytest
import torch

from rlhf_lib.course import mistakes
from rlhf_lib.proofs import plain

ALL = [
    pytest.param(mistake, id=name)
    for family in ("REWARD_MODEL", "SFT", "PPO", "GRPO", "DPO")
    for name, mistake in getattr(mistakes, family).items()
]


@pytest.mark.parametrize("mistake", ALL)
def test_a_mistake_is_one_line_of_the_source(mistake: mistakes.Mistake) -> None:
    source = inspect.getsource(plain)
    assert source.count(mistake.right) == 1
    broken = mistakes.put_back(mistake)
    assert broken is not plain
    assert broken.Settings() == plain.Settings()
    assert inspect.getsource(plain) == source, "the module itself stays as it is"


def test_the_broken_module_does_what_its_line_says() -> None:
    right_line = "return advantages, advantages + values"
    broken = mistakes.put_back(mistakes.Mistake(right_line, right_line.replace("+", "-")))
    rewards, values, mask = torch.randn(2, 4), torch.randn(2, 4), torch.ones(2, 4)
    right, wrong = (m.gae(rewards, values, mask, 1.0, 0.9) for m in (plain, broken))
    assert torch.equal(right[0], wrong[0])
    assert torch.allclose(right[1] - wrong[1], 2 * values)


@pytest.mark.parametrize("piece", ["no such line", "def "])
def test_a_piece_that_does_not_stand_there_once_is_refused(piece: str) -> None:
    with pytest.raises(ValueError, match=r"stands in plain\.py \d+ times; once is needed"):
        mistakes.put_back(mistakes.Mistake(piece, ""))


def test_the_lines_are_shown_as_a_diff(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(mistakes, "display", lambda bundle, raw: shown.append(bundle))
    mistakes.show_lines(mistakes.Mistake("a = 1", "a = 2"))
    assert shown[0]["text/markdown"] == "```diff\n- a = 1\n+ a = 2\n```"
