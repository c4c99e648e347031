"""Figures of the probes: one small panel a measure, a dot with its interval for each policy."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_lib.display import NAMES
from rlhf_lib.plots import COLORS


def panels(measured: Mapping[str, Mapping[str, Mapping]], share: bool) -> Figure:
    """Small multiples of `failures` (`share`: all axes from 0 to 100 %) or `scores`.

    A filled dot differs from SFT, as `change` says; an open one does not, or is SFT itself. The
    line is SFT.
    """
    wide = 4 if share else 3
    rows = -(-len(measured) // wide)
    policies = list(next(iter(measured.values())))
    figure = Figure(figsize=(7.2, rows * (0.19 * len(policies) + 0.62)), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False, sharey=True)
    for axis, (measure, records) in zip(axes.flat, measured.items(), strict=False):
        axis.axvline(records["sft"]["mean"], color=COLORS["sft"], lw=0.7, alpha=0.5)
        for place, (policy, record) in enumerate(records.items()):
            differs = record.get("change", {}).get("verdict", "not") in ("higher", "lower")
            error = [[record["mean"] - record["low"]], [record["high"] - record["mean"]]]
            axis.errorbar(
                record["mean"], place, xerr=error, fmt="o", ms=4, lw=1.1, color=COLORS[policy],
                mfc=COLORS[policy] if differs else "white", clip_on=False,
            )  # fmt: skip
        axis.set_title(measure, fontsize=8.5, loc="left")
        axis.tick_params(labelsize=7.5, length=2)
        axis.grid(axis="y", visible=False)
        if share:
            axis.set_xlim(0, 1)
            axis.set_xticks([0, 0.5, 1])
            axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    for row in axes:
        row[0].set_yticks(range(len(policies)), [NAMES[p] for p in policies])
        for label, policy in zip(row[0].get_yticklabels(), policies, strict=True):
            label.set_color(COLORS[policy])
    axes[0, 0].invert_yaxis()
    for axis in list(axes.flat)[len(measured) :]:
        axis.set_visible(False)
    return figure
