"""SFT's best of n samples, which trains nothing: its curve, and its peak beside the methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.files import read_jsonl
from rlhf_lib.measure.statistics import compare, direction, estimate, minus
from rlhf_lib.results.policies import Samples
from rlhf_lib.runs import Stage
from rlhf_lib.settings import SettingsError

Curves = Sequence[pd.DataFrame]  # of each seed, rows of `best_of_n.jsonl`


def read_curves(stages: Sequence[Mapping[str, Stage]]) -> Curves:
    return [pd.DataFrame(read_jsonl(s["evaluate"].path / "best_of_n.jsonl")) for s in stages]


def curves(seeds: Curves, unit: Callable[[str], str] = str) -> dict[str, list[dict]]:
    """Of each picker one point for each n: n, KL, and the rewards that are known, estimated."""
    measured = [key for key in ("proxy", "gold", "judge") if key in seeds[0]]
    found: dict[str, list[dict]] = {}
    for picker in seeds[0]["picked_by"].unique().tolist():
        all_seeds = (_where(rows, "picked_by", picker) for rows in seeds)
        picked = [rows for rows in all_seeds if len(rows)]  # the control is the first seed's
        for n in picked[0]["n"].unique().tolist():
            parts = [_where(rows, "n", n) for rows in picked]
            units = [[unit(prompt) for prompt in part["prompt"]] for part in parts]
            point: dict = {"n": n, "kl": parts[0]["kl"].tolist()[0]}
            point |= {
                key: estimate([part[key].tolist() for part in parts], units) for key in measured
            }
            found.setdefault(picker, []).append(point)
    return found


def _where(rows: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    return rows.loc[rows[column] == value]


def peak(seeds: Curves, samples: Samples) -> dict:
    """Where the deciding reward peaks, and how the methods stand to it on the same prompts.

    `n` is chosen on every other request, and all that is said of it measured on those in between:
    the best of several points is too good where it was found. `last_minus_peak`: the largest n,
    less the peak. `methods`: each method less the peak, one family. Raises SettingsError for a
    single request, which cannot be both.
    """
    deciding = samples.deciding
    picked = [_where(rows, "picked_by", "default") for rows in seeds]
    sizes = picked[0]["n"].unique().tolist()
    units = [samples.unit(prompt) for prompt in picked[0].query("n == 1")["prompt"]]
    place_of = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    if len(place_of) < 2:
        raise SettingsError(
            f"best-of-n was asked {len(units)} prompt(s), which make one request, and its n is "
            "chosen on one and measured on another: set evaluation.best_of_n_prompts higher"
        )
    measured = np.array([place_of[unit] % 2 == 1 for unit in units])
    shape = len(sizes), len(units)
    grids = [np.array(rows[deciding].tolist(), dtype=float).reshape(shape) for rows in picked]
    chosen = int(np.mean(grids, axis=0)[:, ~measured].mean(1).argmax())
    at_peak, at_last = ([grid[n, measured] for grid in grids] for n in (chosen, -1))
    asked = [np.array(units)[measured]] * len(seeds)
    fall = estimate(minus(at_last, at_peak), asked)
    methods = {}
    for name in samples.measured(catalogue.methods()):
        own = [values[: len(units)][measured] for values in samples.column(name, deciding)]
        methods[name] = estimate(minus(own, at_peak), asked)
    return {
        "n": int(sizes[chosen]),
        deciding: estimate(at_peak, asked),
        "last": int(sizes[-1]),
        "last_minus_peak": fall | {"verdict": direction(fall)},
        "methods": compare(methods),
    }
