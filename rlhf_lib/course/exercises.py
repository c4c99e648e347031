"""Exercises that check their answers: what a notebook's reader calls, and the score at its end."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from rlhf_lib.course import updates  # noqa: F401  (it enters its checks)
from rlhf_lib.course.answers import CHECKS, NoAnswer, Unanswered, answered

RIGHT: dict[str, bool] = {}  # exercise -> whether the last answer to it was right


def check(name: str, answer: object, *given: object) -> None:
    """Print whether the answer to exercise `name` is right, a hint if it is not.

    answer: a value or a function, as the exercise asks; `...` counts as not answered yet.
    given: what of the run the check needs. Raises KeyError for an exercise that does not exist.
    """
    RIGHT[name] = False
    try:
        first = next(iter(inspect.signature(CHECKS[name]).parameters.values()))
        hint: str | None = "The answer is a function: give it without calling it."
        if callable(answered(answer)) or first.annotation != "Callable":
            claims = CHECKS[name](answer, *given)
            hint = next((claim.hint for claim in claims if not claim.holds()), None)
    except Unanswered:
        print(f"{name}: not answered yet")
    except NoAnswer:
        print(f"{name}: not yet. Your answer is None: does the function `return` what it found?")
    else:
        RIGHT[name] = hint is None
        print(f"{name}: right" if hint is None else f"{name}: not yet. {hint}")


def score(chapter: str, file: str | Path | None = None) -> None:
    """Print how many exercises of a chapter ("04") are right; `file` gets it as JSON."""
    names = [name for name in CHECKS if name.startswith(f"{chapter}-")]
    right = [name for name in names if RIGHT.get(name)]
    open_ = [name for name in names if name not in right]
    left = f"; still open: {', '.join(open_)}" if open_ else ""
    print(f"{len(right)} of {len(names)} exercises of chapter {chapter} are right{left}")
    if file is not None:
        record = {"chapter": chapter, "right": right, "of": names}
        Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
