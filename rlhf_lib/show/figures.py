"""Every figure of the study. One colour per policy throughout, and labels at the lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_lib.results.frontier import swept
from rlhf_lib.results.policies import rewards
from rlhf_lib.show.display import GAINERS, NAMES

COLORS = {
    "base": "#8c8c8c", "sft": "#4d4d4d", "ppo": "#0072b2", "ppo_low_kl": "#d55e00",
    "grpo": "#009e73", "dpo": "#aa4499", "rejection_sft": "#56b4e9", "rloo": "#e69f00",
    "reward_model": "#b8860b",
    "proxy": "#b8860b", "gold": "#1f4e79", "best_of_n_default": "#333333",
    "best_of_n_control": "#88aacc",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "path",
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.dpi": 100,
}  # fmt: skip
mpl.rcParams.update(STYLE)  # type: ignore[arg-type]


def _figure(width: float = 7.2, height: float = 3.0) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def curves(
    per_seed: Sequence[Sequence[Mapping]], columns: Mapping[str, str], color: str = "#0072b2"
) -> Figure:
    """Small multiples of training metrics: one panel a metric, a thin line a seed, their mean bold.

    `columns`: metric name -> panel title; a metric that was logged at some steps only is joined up.
    """
    wide = 3
    rows = -(-len(columns) // wide)
    figure = _figure(7.2, 2.0 * rows)
    axes = figure.subplots(rows, wide, squeeze=False).flat
    frames = [pd.DataFrame(list(metrics)) for metrics in per_seed]
    for axis, (key, title) in zip(axes, columns.items(), strict=False):
        lines = [f.set_index("step")[key].dropna() for f in frames]
        for line in lines:
            axis.plot(line.index, line, color=color, alpha=0.3 if len(lines) > 1 else 1, lw=0.9)
        if len(lines) > 1:
            mean = pd.concat(lines, axis=1).mean(axis=1)
            axis.plot(mean.index, mean, color=color, lw=1.6)
        axis.set_title(title)
        axis.set_xlabel("step")
    for axis in list(figure.axes)[len(columns) :]:
        axis.set_visible(False)
    return figure


def accuracy_bars(accuracy: Mapping[str, Mapping], ceiling: float | None) -> Figure:
    """Held-out accuracy of each judge with its interval; chance and ceiling as lines."""
    names = [n for n in ("reward_model", "bag_of_words", "learned_length", "longer_wins", "gold")
             if n in accuracy]  # fmt: skip
    figure = _figure(7.2, 0.45 * len(names) + 0.9)
    axis = figure.subplots()
    for place, name in enumerate(reversed(names)):
        record = accuracy[name]
        color = COLORS["reward_model"] if name == "reward_model" else "#9aa5b1"
        error = [[record["mean"] - record["low"]], [record["high"] - record["mean"]]]
        axis.errorbar(record["mean"], place, xerr=error, fmt="o", color=color, capsize=3)
        axis.text(record["high"] + 0.006, place, f"{record['mean']:.1%}", va="center")
    axis.set_yticks(range(len(names)), [NAMES[n] for n in reversed(names)])
    axis.axvline(0.5, color="#888888", lw=0.8, ls=":")
    axis.text(0.501, -0.7, "chance", color="#666666", fontsize=8, va="bottom")
    if ceiling is not None:
        axis.axvline(ceiling, color=COLORS["gold"], lw=1)
        axis.text(ceiling - 0.002, -0.7, "reachable ceiling", color=COLORS["gold"], fontsize=8,
                  ha="right", va="bottom")  # fmt: skip
    axis.set_ylim(-0.75, len(names) - 0.5)
    axis.set_xlabel("share of held-out pairs ranked as labelled")
    return figure


def histograms(values: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """Overlaid outlines of several distributions on one common grid."""
    figure = _figure(7.2, 2.6)
    axis = figure.subplots()
    everything = np.concatenate([np.asarray(v, dtype=float) for v in values.values()])
    low, high = np.quantile(everything, [0.002, 0.998])
    grid = np.linspace(low, high, 40)
    for name, numbers in values.items():
        axis.hist(numbers, bins=grid, density=True, histtype="step", lw=1.5,
                  color=COLORS.get(name), label=NAMES.get(name, name))  # fmt: skip
    axis.legend(fontsize=8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("density")
    return figure


def reward_distributions(samples: Mapping[str, pd.DataFrame], judge: str) -> Figure:
    """Box of each policy's rewards over the evaluation prompts: proxy, and what decides."""
    kinds = rewards(judge)
    figure = _figure(7.2, 2.8)
    for axis, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        names = list(samples)
        boxes = axis.boxplot(
            [samples[n][kind] for n in names], orientation="horizontal", showfliers=False,
            patch_artist=True, medianprops={"color": "white"}, widths=0.6,
        )  # fmt: skip
        for box, name in zip(boxes["boxes"], names, strict=True):
            box.set(facecolor=COLORS[name], edgecolor=COLORS[name])
        axis.set_yticks(range(1, len(names) + 1), [NAMES[n] for n in names])
        axis.invert_yaxis()
        axis.set_xlabel(f"{kind} reward of a reply")
        if axis is not figure.axes[0]:
            axis.set_yticklabels([])
    return figure


def label_right(
    axis: Axes, labels: Sequence[tuple[str, float, float, str]], fontsize: float = 8
) -> None:
    """Names at the right edge, each led to its point: (text, x, y, color). None covers another.

    Call it when all else is drawn: places depend on the limits of the axis.
    """
    low, high = axis.get_ylim()
    inches = axis.get_figure().get_figheight()  # type: ignore[union-attr]
    gap = 1.5 * fontsize / 72 / (0.8 * inches)  # a line of text, as a share of the axis
    ordered = sorted(labels, key=lambda label: label[2])
    places: list[float] = []
    for _, _, y, _ in ordered:
        wanted = (y - low) / (high - low)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    for i in reversed(range(len(places))):  # what was pushed over the top comes down again
        places[i] = min(places[i], 1.0 - gap * (len(places) - 1 - i))
    for (text, x, y, color), place in zip(ordered, places, strict=True):
        axis.annotate(
            text, (x, y), (1.02, place), textcoords="axes fraction", va="center", color=color,
            fontsize=fontsize, arrowprops={"arrowstyle": "-", "lw": 0.5, "color": color,
                                           "alpha": 0.5, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def _root(kl: object) -> np.ndarray:
    """√KL; a sampled estimate just below 0 counts as 0."""
    return np.sqrt(np.maximum(np.asarray(kl, dtype=float), 0))


def frontier(points: pd.DataFrame, reward: str) -> Figure:
    """Reward against √KL: final policies of every seed, best-of-n, and the way there."""
    figure = _figure(7.2, 3.6)
    axis, labels = figure.subplots(), []
    final = points[(points["kind"] == "final") & (points["policy"] != "sft_again")]
    for name, rows in final.groupby("policy", sort=False):
        x, y = _root(rows["kl"]), rows[reward]
        axis.scatter(x, y, color=COLORS[str(name)], s=26, zorder=3)
        labels.append((NAMES[str(name)], float(x.mean()), float(y.mean()), COLORS[str(name)]))
    drawn = points["policy"].isin(final["policy"])  # runs at other settings: `plots_frontier`
    for name, rows in points[drawn & (points["kind"] == "training")].groupby("policy"):
        mean = rows.groupby("step")[["kl", reward]].mean().rolling(5, min_periods=1).mean()
        axis.plot(_root(mean["kl"]), mean[reward], color=COLORS[str(name)], lw=0.9,
                  alpha=0.6)  # fmt: skip
    for name, rows in points[points["kind"] == "best_of_n"].groupby("policy"):
        mean = rows.groupby("step")[["kl", reward]].mean()
        axis.plot(_root(mean["kl"]), mean[reward], "s--", ms=3, lw=1, color=COLORS[str(name)])
        last = mean.iloc[-1]
        end = float(last["kl"]) ** 0.5, float(last[reward])
        labels.append((NAMES[str(name)], *end, COLORS[str(name)]))
    axis.set_xlabel("√KL to SFT (nats½)")
    axis.set_ylabel(f"{reward} reward")
    label_right(axis, labels)
    return figure


def _smooth(metrics: Sequence[Mapping], key: str) -> pd.Series:
    """A metric by step, averaged over the last three times that it was logged."""
    series = pd.Series({row["step"]: row[key] for row in metrics if key in row})
    return pd.Series(series.rolling(3, 1).mean())


def overoptimisation(per_policy: Mapping[str, Sequence[Sequence[Mapping]]]) -> Figure:
    """Proxy and gold reward along training, one panel a policy; thin lines are seeds."""
    figure = _figure(7.2, 2.6)
    axes, ends = np.atleast_1d(figure.subplots(1, len(per_policy), sharey=True)), []
    for axis, (name, per_seed) in zip(axes, per_policy.items(), strict=True):
        labels = []
        for key, label in (("reward", "proxy"), ("gold", "gold")):
            lines = [_smooth(metrics, key) for metrics in per_seed]
            for line in lines:
                axis.plot(line.index, line, color=COLORS[label], lw=0.7, alpha=0.35)
            mean = pd.concat(lines, axis=1).mean(axis=1)
            axis.plot(mean.index, mean, color=COLORS[label], lw=1.8)
            labels.append((label, float(mean.index[-1]), float(mean.iloc[-1]), COLORS[label]))
        ends.append((axis, labels))
        axis.set_title(NAMES[name], color=COLORS[name])
        axis.set_xlabel("update")
    for axis, labels in ends:  # when all panels have set the limits that they share
        label_right(axis, labels)
    axes[0].set_ylabel("reward")
    return figure


def best_of_n(curves_by_kind: Mapping[str, Sequence[Mapping]], judge: str) -> Figure:
    """Proxy and deciding reward of best-of-n, picked by each reward model; bands over seeds."""
    keys = rewards(judge)
    figure = _figure(7.2, 2.8)
    for axis, key in zip(np.atleast_1d(figure.subplots(1, len(keys))), keys, strict=True):
        for kind, rows in curves_by_kind.items():
            name = f"best_of_n_{kind}"
            n, mean = [row["n"] for row in rows], [row[key]["mean"] for row in rows]
            axis.plot(n, mean, "o-", ms=3, color=COLORS[name], label=NAMES[name])
            if rows[0][key]["low"] is not None:
                low, high = [r[key]["low"] for r in rows], [r[key]["high"] for r in rows]
                axis.fill_between(n, low, high, color=COLORS[name], alpha=0.15, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(n, [str(k) for k in n])
        axis.set_xlabel("n")
        axis.set_title(f"{key} reward of the pick")
    figure.axes[0].legend(fontsize=8)
    return figure


def gains(results: Mapping) -> Figure:
    """The study in one picture: gain over SFT in proxy and in what decides; a tick each seed."""
    keys = rewards(results["judge"])
    names = [name for name in GAINERS if name in results["policies"]]
    figure = _figure(7.2, 2.7)
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(keys), sharey=True)))
    for axis, key in zip(axes, keys, strict=True):
        for place, name in enumerate(names):
            record = results["policies"][name][f"{key}_gain"]
            color = COLORS.get(name, "#9aa5b1")
            error = [[record["mean"] - record["low"]], [record["high"] - record["mean"]]]
            axis.errorbar(record["mean"], place, xerr=error, fmt="o", ms=6, color=color, capsize=3)
            if len(record["per_seed"]) > 1:
                axis.plot(record["per_seed"], [place + 0.22] * len(record["per_seed"]), "|",
                          color=color, ms=7)  # fmt: skip
        axis.axvline(0, color="#444444", lw=0.8)
        axis.set_yticks(range(len(names)), [NAMES[n] for n in names])
        axis.set_xlabel(f"{key} reward gained over SFT")
    axes[0].invert_yaxis()
    return figure


def by_category(estimates: Mapping[str, Mapping], xlabel: str, color: str) -> Figure:
    """One estimate a category, with its interval."""
    figure = _figure(7.2, 0.4 * len(estimates) + 0.8)
    axis = figure.subplots()
    for place, record in enumerate(estimates.values()):
        error = [[record["mean"] - record["low"]], [record["high"] - record["mean"]]]
        axis.errorbar(record["mean"], place, xerr=error, fmt="o", color=color, capsize=3)
    axis.set_yticks(range(len(estimates)), list(estimates))
    axis.invert_yaxis()
    axis.set_xlabel(xlabel)
    return figure


def length_histograms(histogram: Mapping[str, Mapping[str, Sequence[int]]]) -> Figure:
    """Token lengths of prompts and replies, from the counts in a split's audit.

    Bins have whole-number edges and may differ in width, so the height is a share per token.
    """
    figure = _figure(7.2, 2.6)
    sides = {"prompt": "#4d4d4d", "chosen": "#0072b2", "rejected": "#d55e00"}
    for axis, (name, counts) in zip(figure.subplots(1, 2), histogram.items(), strict=True):
        widths = np.diff(counts["edges"])
        for side in (s for s in sides if s in counts):
            share = np.asarray(counts[side]) / sum(counts[side]) / widths
            axis.stairs(share, counts["edges"], color=sides[side], lw=1.4, label=side)
        axis.set_xlabel(f"tokens in a {name}")
        axis.set_ylabel("share of them per token")
        axis.legend(fontsize=8)
    return figure


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
