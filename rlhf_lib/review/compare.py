"""Two studies beside each other: settings that differ, and results with their intervals.

    python -m rlhf_lib compare runs/laptop /elsewhere/runs/laptop

A run is its folder, an evaluation's, one that `export` wrote, or a results.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import pandas as pd

from rlhf_lib.catalogue import label
from rlhf_lib.measure.statistics import direction, interval
from rlhf_lib.settings import UserError

NOTE = (
    "Brackets are 95 % intervals; a difference's is made of the two (square and add), as if the "
    "studies shared neither seeds nor prompts: where they do, it is wider than it need be. No "
    "difference is taken of what is measured on two scales: of proxy and judge, where their reward "
    "models learnt from other data or with other settings, of KL and length, where models differ."
)
# what two studies have to share before a measure is on the same scale in both
SCALES = {
    "proxy": ("source", "model", "data", "reward_model"),
    "judge": ("source", "model", "data", "reward_model"),
    "kl": ("model",),
    "length": ("model",),
}


def load(place: Path) -> dict:
    """Raises UserError where there are no results, naming what to give."""
    found = [place] if place.is_file() else [place / "results.json"]
    found += sorted(place.glob("evaluation-*/results.json"), key=lambda f: -f.stat().st_mtime)
    file = next((f for f in found if f.is_file()), None)
    try:
        results = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(results, dict) or not {"settings", "policies"} <= results.keys():
        raise UserError(
            f"{place} holds no results of a study: give a folder such as runs/laptop, where a "
            "study has ended, or its results.json"
        )
    return results


def settings_table(one: Mapping, other: Mapping) -> pd.DataFrame:
    """Every setting, and what else results hang on, that the two do not share."""
    sides = [_flat(results) for results in (one, other)]
    names = [*sides[0], *(name for name in sides[1] if name not in sides[0])]
    rows = [
        {"setting": name, "A": str(sides[0].get(name, "–")), "B": str(sides[1].get(name, "–"))}
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]
    return pd.DataFrame(rows, columns=["setting", "A", "B"])


def _flat(results: Mapping) -> dict:
    found = {key: results.get(key) for key in ("profile", "model", "source", "seeds")}
    for section, values in results["settings"].items():
        if isinstance(values, Mapping):
            found |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            found[section] = values
    packages = results.get("environment", {}).get("packages", {})
    return found | {f"version of {name}": version for name, version in packages.items()}


def results_table(one: Mapping, other: Mapping) -> pd.DataFrame:
    """What both measured of the policies that both have, and the difference B − A."""
    rows = []
    for name in one["policies"]:
        if name not in other["policies"]:
            continue
        for measure in ("gold", "judge", "proxy", "kl", "length"):
            a, b = (results["policies"][name].get(measure) for results in (one, other))
            if not (a and b):
                continue
            row = {"policy": label(name), "measure": measure, "A": interval(a), "B": interval(b)}
            gap = _difference(a, b) if _same_scale(measure, one, other) else None
            row["B − A"] = "–" if gap is None else interval(gap)
            row["verdict"] = "–" if gap is None else direction(gap)
            rows.append(row)
    if not rows:
        raise UserError("the two studies have no policy in common that both have measured")
    return pd.DataFrame(rows)


def _same_scale(measure: str, one: Mapping, other: Mapping) -> bool:
    sides = [
        [results["settings"].get(key, results.get(key)) for key in SCALES.get(measure, ())]
        for results in (one, other)
    ]
    return sides[0] == sides[1]


def _difference(a: Mapping, b: Mapping) -> dict | None:
    """None where one of the two has no interval."""
    if None in (a["low"], a["high"], b["low"], b["high"]):
        return None
    mean = b["mean"] - a["mean"]
    low = mean - sqrt((b["mean"] - b["low"]) ** 2 + (a["high"] - a["mean"]) ** 2)
    high = mean + sqrt((b["high"] - b["mean"]) ** 2 + (a["mean"] - a["low"]) ** 2)
    return {"mean": mean, "low": low, "high": high}


def as_text(one: Mapping, other: Mapping) -> str:
    """Both tables, for a terminal."""
    changed = settings_table(one, other)
    settings = changed.to_string(index=False) if len(changed) else "All settings are the same."
    return "\n\n".join([settings, results_table(one, other).to_string(index=False), NOTE])
