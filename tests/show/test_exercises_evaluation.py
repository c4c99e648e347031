"""The exercises of notebook 7: a blank is no failure, solutions are right, mistakes get a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from rlhf_lib.show.exercises_evaluation import CHECKS, check

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "07_evaluation.ipynb"

MISTAKES = {
    "07-1": "def paired_error(a, b): return (a.var(ddof=1) / 50 + b.var(ddof=1) / 50) ** 0.5",
    "07-2": "def win_rate(a, b): return (a > b).mean()",
    "07-3": "def best_of_n_kl(n): return float(np.log(n))",
    "07-4": "def seed_interval(m):\n"
    "    half = 1.96 * np.std(m, ddof=1) / len(m) ** 0.5\n"
    "    return np.mean(m) - half, np.mean(m) + half",
}


def tagged(tag: str) -> dict[str, str]:
    """Exercise -> the source of its cell with this tag."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    sources = [cell.source for cell in cells if tag in cell.metadata.get("tags", ())]
    return {f"07-{place}": source for place, source in enumerate(sources, 1)}


SCAFFOLDS, SOLUTIONS = tagged("exercise"), tagged("solution")


def verdict(answer: str, name: str, printed: Any) -> str:
    """What the check at the scaffold's end says of this answer."""
    call = SCAFFOLDS[name].splitlines()[-1]
    exec(f"{answer}\n{call}", {"check": check, "np": np})
    return printed.readouterr().out.strip()


def test_every_check_has_its_exercise_solution_and_mistake() -> None:
    assert list(SCAFFOLDS) == list(SOLUTIONS) == list(CHECKS) == list(MISTAKES)


@pytest.mark.parametrize("name", CHECKS)
def test_scaffold_solution_and_mistake(name: str, capsys: Any) -> None:
    exec(SCAFFOLDS[name], {"check": check})
    assert capsys.readouterr().out.strip() == f"{name}: not answered yet"
    code = SOLUTIONS[name].split("```python\n")[1].split("\n```")[0]
    assert verdict(code, name, capsys) == f"{name}: right"
    assert verdict(MISTAKES[name], name, capsys).startswith(f"{name}: not yet. ")
