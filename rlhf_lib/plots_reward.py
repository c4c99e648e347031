"""Figures of the reward model's chapter: growth with data, accuracy in groups, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_lib.display import NAMES
from rlhf_lib.plots import COLORS

WORDS = "#6b7785"  # the bag of words, grey as baselines are


def _errorbar(axis: Axes, x: object, rows: pd.DataFrame, **style: object) -> None:
    error = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    axis.errorbar(x, rows["mean"], yerr=error, capsize=3, **style)  # type: ignore[arg-type]


def learning_curve(points: Sequence[Mapping], ceiling: float | None) -> Figure:
    """Held-out accuracy over the number of training pairs, with intervals; labels at the lines."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axis = figure.subplots()
    sizes = [point["train_pairs"] for point in points]
    styles = {"reward_model": (COLORS["reward_model"], "o-"), "bag_of_words": (WORDS, "s--")}
    last = {name: points[-1][name]["mean"] for name in styles}
    for name, (color, marker) in styles.items():
        rows = pd.DataFrame([point[name] for point in points])
        # a hair to the left and right, so that the intervals stand beside each other
        shift = 1.02 if name == "reward_model" else 1 / 1.02
        _errorbar(axis, [n * shift for n in sizes], rows, fmt=marker, color=color, lw=1.3, ms=4)
        above = last[name] >= max(last.values())
        axis.annotate(
            NAMES[name], (sizes[-1] * 1.02, last[name]), xytext=(9, 3 if above else -3),
            textcoords="offset points", va="bottom" if above else "top", color=color,
        )  # fmt: skip
    axis.axhline(0.5, color="#888888", lw=0.8, ls=":")
    side = axis.get_yaxis_transform()
    axis.text(0.99, 0.502, "chance", transform=side, color="#666666", fontsize=8, ha="right",
              va="bottom")  # fmt: skip
    if ceiling is not None:
        axis.axhline(ceiling, color=COLORS["gold"], lw=1)
        axis.text(0.99, ceiling - 0.004, "reachable ceiling", transform=side, fontsize=8,
                  color=COLORS["gold"], ha="right", va="top")  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    axis.set_xlim(sizes[0] / 1.3, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.35 * 1.3)
    axis.set_xlabel("training pairs (logarithmic)")
    axis.set_ylabel("accuracy on test pairs")
    return figure


def accuracy_in_groups(sections: Mapping[str, Mapping[str, Mapping]], overall: float) -> Figure:
    """One row a group, in sections: accuracy with its interval, and how many pairs there are.

    `sections`: heading -> group -> record with `mean`, `low`, `high`, `n`.
    """
    rows = sum(1 + len(groups) for groups in sections.values())
    figure = Figure(figsize=(7.2, 0.23 * rows + 0.6), layout="constrained")
    axis = figure.subplots()
    ticks = []
    for heading, groups in sections.items():
        ticks.append(heading)
        for name, record in groups.items():
            place = len(ticks)
            ticks.append(name)
            error = [[record["mean"] - record["low"]], [record["high"] - record["mean"]]]
            axis.errorbar(record["mean"], place, xerr=error, fmt="o", ms=4, capsize=2.5,
                          color=COLORS["reward_model"])  # fmt: skip
            axis.text(1.01, place, f"n = {record['n']:,}", transform=axis.get_yaxis_transform(),
                      fontsize=8, color="#666666", va="center")  # fmt: skip
    axis.set_yticks(range(rows), ticks, fontsize=8)
    for label, name in zip(axis.get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if name in sections else "normal")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.axvline(0.5, color="#888888", lw=0.8, ls=":")
    axis.axvline(overall, color=COLORS["reward_model"], lw=0.8, alpha=0.6)
    sides = ("right", "left") if overall >= 0.5 else ("left", "right")  # so that they never meet
    axis.text(0.5, -0.7, "chance", fontsize=8, color="#666666", ha=sides[0], va="bottom")
    axis.text(overall, -0.7, "all pairs", fontsize=8, color=COLORS["reward_model"], ha=sides[1],
              va="bottom")  # fmt: skip
    axis.set_ylim(rows - 0.5, -0.7)
    axis.set_xlabel("accuracy on test pairs")
    return figure


def bin_labels(rows: Sequence[Mapping], template: str) -> dict[str, Mapping]:
    """Rows of `groups.by_bins` by name: `template` with {low} and {high} of the bin.

    Raises ValueError where two bins would get the same name.
    """
    named = {template.format(low=row["from"], high=row["to"]): row for row in rows}
    if len(named) < len(rows):
        raise ValueError(f"several bins have the same name: give {template!r} more digits")
    return named


def reliability(calibrations: Mapping[str, Mapping]) -> Figure:
    """Confidence against accuracy in bins of equally many pairs: one panel a calibration."""
    figure = Figure(figsize=(3.6 * len(calibrations), 3.2), layout="constrained")
    axes = figure.subplots(1, len(calibrations), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (title, calibration) in zip(axes, calibrations.items(), strict=True):
        bins = pd.DataFrame(calibration["bins"])
        axis.plot([0.5, 1], [0.5, 1], color="#888888", lw=0.8, ls=":")
        _errorbar(axis, bins["confidence"], bins, fmt="o-", color=COLORS["reward_model"], ms=4)
        axis.set_title(title)
        axis.set_xlabel("confidence, σ(|difference of scores|)")
    axes[0].set_ylabel("accuracy")
    axes[0].text(0.93, 0.97, "as sure as right", fontsize=8, color="#666666", ha="right")
    return figure
