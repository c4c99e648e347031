"""The exercises of notebook 2: blanks are no failure, solutions are right, mistakes get a hint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from rlhf_lib.show.exercises_reward import CHECKS, check

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_reward_model.ipynb"
MISTAKES = {
    "02-1": "def difference(p): return p / (1 - p)",
    "02-2": "def last_scores(hidden, weight, lengths): return hidden[:, -1] @ weight",
    "02-3": "def ece(c, won, bins): return abs(c - won).mean()",
    "02-4": "surer_half = (preferences[np.argsort(-preferences)[:20]] > 0).mean()",
}


def tagged(tag: str) -> dict[str, str]:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    sources = [cell.source for cell in cells if tag in cell.metadata.get("tags", ())]
    return {f"02-{place}": source for place, source in enumerate(sources, 1)}


SCAFFOLDS, SOLUTIONS = tagged("exercise"), tagged("solution")


def verdict(answer: str, name: str, capsys: Any) -> str:
    """What the check at the scaffold's end says of this answer."""
    preferences = np.random.default_rng(1).normal(0.5, 1.0, size=41)
    call = SCAFFOLDS[name].splitlines()[-1]
    names = {"math": math, "np": np, "torch": torch, "check": check, "preferences": preferences}
    exec(f"{answer}\n{call}", names)
    return capsys.readouterr().out.strip()


def test_every_check_has_its_exercise_solution_and_mistake() -> None:
    assert list(SCAFFOLDS) == list(SOLUTIONS) == list(CHECKS) == list(MISTAKES)


@pytest.mark.parametrize("name", CHECKS)
def test_a_scaffold_is_not_answered_yet(name: str, capsys: Any) -> None:
    assert verdict(SCAFFOLDS[name], name, capsys).splitlines()[-1] == f"{name}: not answered yet"


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_is_right(name: str, capsys: Any) -> None:
    text = SOLUTIONS[name]
    assert text.startswith("<details><summary>Solution</summary>\n\n")
    assert text.endswith("\n\n</details>")
    code = text.split("```python\n")[1].split("\n```")[0]
    assert verdict(code, name, capsys) == f"{name}: right"


@pytest.mark.parametrize("name", CHECKS)
def test_a_mistake_gets_a_hint(name: str, capsys: Any) -> None:
    said = verdict(MISTAKES[name], name, capsys)
    assert said.startswith(f"{name}: not yet. ")
    assert len(said) > 30
