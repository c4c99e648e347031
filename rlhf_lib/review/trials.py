"""Trials of tuning: what was tried for each method, and what it came to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_lib.catalogue import label
from rlhf_lib.measure.statistics import interval
from rlhf_lib.settings import SettingsError

BEFORE = "data", "model", "reward_model", "sft"  # sections that every trial hangs on
Trial = Mapping[str, Any]  # method, values, the mean reward and its interval, and who judged


def load(path: Path, settings: str = "") -> list[Trial]:
    """The trials of a file, none where there is none yet.

    Raises SettingsError for what is no such file, and for one of other settings than this hash has.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        trials, measured = found["trials"], found["settings"]
        _ = [(t["method"], t["values"].items(), t["mean"]) for t in trials]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} is no file of trials: move it away to begin anew") from error
    if settings and measured != settings:
        raise SettingsError(
            f"{path} was measured with other settings of {', '.join(BEFORE)} or of a method: move "
            "it away to begin anew"
        )
    return trials


def of(trials: Sequence[Trial], method: str) -> list[Trial]:
    return [trial for trial in trials if trial["method"] == method]


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The best first; those that diverged last."""
    return sorted(trials, key=lambda t: (t["mean"] is not None, t["mean"] or 0.0), reverse=True)


def best(trials: Sequence[Trial], method: str) -> Trial:
    return ranked(of(trials, method))[0]


def as_text(trial: Trial) -> str:
    """Its values, and what they came to."""
    pairs = ((key.rpartition(".")[2], value) for key, value in trial["values"].items())
    values = " ".join(f"{name}={value:g}" for name, value in pairs)
    found = "diverged" if trial["mean"] is None else f"{trial['rater']} {interval(trial, 3)}"
    return f"{values:<52} {found}"


def table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Each method's best values and the next, and whether they stand where the search ended."""
    rows = []
    for method in dict.fromkeys(trial["method"] for trial in trials):
        row = {"method": label(method), "tried": str(len(of(trials, method)))}
        tried = ranked([t for t in of(trials, method) if t["mean"] is not None])
        if not tried:
            rows.append(row | {"best": "all diverged"})
            continue
        first, second = tried[0], tried[min(1, len(tried) - 1)]
        ends = []
        for key, value in first["values"].items():
            values = [t["values"][key] for t in of(trials, method)]  # of those that diverged too
            lowest, highest = min(values), max(values)
            if lowest < highest and value in (lowest, highest):
                word = "highest" if value == highest else "lowest"
                ends.append(f"{key.rpartition('.')[2]} ({word})")
        row |= {k: " ".join(as_text(t).split()) for k, t in (("best", first), ("next", second))}
        rows.append(row | {"best at the end of what was tried": ", ".join(ends) or "no"})
    return pd.DataFrame(rows).fillna("–")
