"""Tables of what a study cost: time by phase, and what a minute and a million tokens bought."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from rlhf_lib.display import NAMES, interval
from rlhf_lib.policy_summary import CANDIDATES

PHASE_CAPTION = (
    "Minutes of each stage by what was going on, a mean over its seeds; other: all that no phase "
    "counts, such as reading data, statistics and writing metrics."
)
PRICE_CAPTION = (
    "What training bought: {judge} gain over SFT for each minute of a method's own stage, and for "
    "each million tokens in it (sampled, scored or learnt from). 95 % intervals of the gain, "
    "divided by the mean cost; the reward model's own training is not in it."
)


def phase_table(results: Mapping) -> pd.DataFrame:
    """Minutes of each stage by phase; phases that no stage spent time in are left out."""
    rows = []
    for name, cost in results["cost"].items():
        phases = {phase: seconds / 60 for phase, seconds in cost["phases"].items()}
        total = cost["seconds"]["mean"] / 60
        other = total - sum(phases.values())
        rows.append({"stage": NAMES.get(name, name), **phases, "other": other, "all": total})
    frame = pd.DataFrame(rows).fillna(0.0)
    order = ["stage", *sorted(set(frame) - {"stage", "other", "all"}), "other", "all"]
    frame = frame[order]
    sums = frame.drop(columns="stage").sum()
    frame.loc[len(frame)] = {"stage": "sum", **sums}
    return frame.map(lambda x: x if isinstance(x, str) else f"{max(x, 0.0):.2f}")


def price_table(results: Mapping) -> pd.DataFrame:
    """Gain over SFT per minute and per million tokens of each trained policy's stage."""
    judge, rows = results["judge"], []
    for name in (c for c in CANDIDATES if c in results["policies"]):
        gain, cost = results["policies"][name][f"{judge}_gain"], results["cost"][name]
        rows.append({
            "policy": NAMES[name],
            "gain a minute": interval(_divided(gain, cost["seconds"]["mean"] / 60)),
            "gain a million tokens": interval(_divided(gain, cost["num_tokens"]["mean"] / 1e6)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _divided(estimate: Mapping, by: float) -> dict:
    parts = {key: estimate[key] for key in ("mean", "low", "high")}
    return {key: None if value is None else value / by for key, value in parts.items()}
