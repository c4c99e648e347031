"""SFT's best of n samples, which trains nothing: its curve, and its peak beside the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.measure.statistics import compare, direction, estimate, minus
from rlhf_lib.results.policies import Samples
from rlhf_lib.runs import Stage, read_jsonl

Curves = Sequence[pd.DataFrame]  # of each seed, rows of `best_of_n.jsonl`


def read_curves(stages: Sequence[Mapping[str, Stage]]) -> Curves:
    return [pd.DataFrame(read_jsonl(s["evaluate"].path / "best_of_n.jsonl")) for s in stages]


def curves(seeds: Curves) -> dict[str, list[dict]]:
    """Of each picker one point for each n: n, KL, and the rewards that are known, estimated."""
    measured = [key for key in ("proxy", "gold", "judge") if key in seeds[0]]
    found: dict[str, list[dict]] = {}
    for (picker, n, kl), _ in seeds[0].groupby(["picked_by", "n", "kl"], sort=False):
        parts = [rows[(rows["picked_by"] == picker) & (rows["n"] == n)] for rows in seeds]
        units = [part["prompt"].to_numpy() for part in parts]
        point: dict = {"n": int(n), "kl": float(kl)}
        point |= {key: estimate([part[key] for part in parts], units) for key in measured}
        found.setdefault(str(picker), []).append(point)
    return found


def peak(seeds: Curves, samples: Samples) -> dict:
    """Where the deciding reward peaks, and how the methods stand to it on the same prompts.

    `n` is chosen on every other prompt, and all that is said of it measured on those in between:
    the best of several points is too good where it was found. `last_minus_peak`: the largest n,
    less the peak. `methods`: each method less the peak, one family.
    """
    deciding = samples.deciding
    picked = [rows[rows["picked_by"] == "default"] for rows in seeds]
    grids = [rows[deciding].to_numpy(float).reshape(rows["n"].nunique(), -1) for rows in picked]
    sizes, units = picked[0]["n"].unique(), picked[0]["prompt"].to_numpy()[: grids[0].shape[1]]
    chosen = int(np.mean(grids, axis=0)[:, 0::2].mean(1).argmax())
    at_peak, at_last = ([grid[place, 1::2] for grid in grids] for place in (chosen, -1))
    asked = [units[1::2]] * len(seeds)
    fall = estimate(minus(at_last, at_peak), asked)
    methods = {}
    for name in samples.measured(catalogue.methods()):
        own = [values[: len(units)][1::2] for values in samples.column(name, deciding)]
        methods[name] = estimate(minus(own, at_peak), asked)
    return {
        "n": int(sizes[chosen]),
        deciding: estimate(at_peak, asked),
        "last": int(sizes[-1]),
        "last_minus_peak": fall | {"verdict": direction(fall)},
        "methods": compare(methods),
    }
