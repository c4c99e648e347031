"""Figures of what reward costs each method: KL, at several coefficients; tokens and minutes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_lib.display import NAMES
from rlhf_lib.frontier import swept
from rlhf_lib.plots import COLORS, label_right


def sweep(points: pd.DataFrame, rewards: list[str]) -> Figure:
    """One panel a reward: the ends of runs at rising coefficients, joined, beside best-of-n."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(rewards), squeeze=False)[0]
    ends, free = swept(points), points[points["policy"] == "best_of_n_default"]
    for axis, reward in zip(panels, rewards, strict=True):
        mean = free.groupby("step")[["kl", reward]].mean()
        axis.plot(np.sqrt(mean["kl"]), mean[reward], "s--", ms=3, lw=1,
                  color=COLORS["best_of_n_default"], label=NAMES["best_of_n_default"])  # fmt: skip
        for name, runs in ((str(name), runs) for name, runs in ends.groupby("method", sort=False)):
            x = np.sqrt(runs["kl"].clip(lower=0))
            axis.plot(x, runs[reward], "o-", ms=4, lw=1.2, color=COLORS[name], label=NAMES[name])
            for place, y, value in zip(x, runs[reward], runs["coefficient"], strict=True):
                axis.annotate(f"{value:g}", (place, y), (3, 3), textcoords="offset points",
                              fontsize=6.5, color=COLORS[name])  # fmt: skip
        axis.set_xlabel("√KL to SFT (nats a reply)")
        axis.set_ylabel(f"{reward} reward")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def budgets(runs: Mapping[str, pd.DataFrame], reward: str) -> Figure:
    """Reward along training against tokens and against minutes, a line a method (`spent`)."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    labels = {"tokens": "thousand tokens", "minutes": "minutes"}
    panels = figure.subplots(1, len(labels), sharey=True)
    for axis, (budget, label) in zip(panels, labels.items(), strict=True):
        smallest = min(run[budget].max() for run in runs.values())
        axis.axvline(smallest, color="#888888", lw=0.8, ls=":")
        for name, run in runs.items():
            axis.plot(run[budget], run[reward], lw=1.4, color=COLORS[name])
        axis.set_xlabel(label)
    for axis, budget in zip(panels, labels, strict=True):
        label_right(axis, [
            (NAMES[name], float(run[budget].iloc[-1]), float(run[reward].iloc[-1]), COLORS[name])
            for name, run in runs.items()
        ])  # fmt: skip
    panels[0].set_ylabel(f"{reward} reward")
    return figure
