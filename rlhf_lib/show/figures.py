"""Every figure of the study: one colour a policy, names at the lines, an interval at every dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhf_lib import catalogue
from rlhf_lib.catalogue import GREY, color, label
from rlhf_lib.results.frontier import moving, swept
from rlhf_lib.results.policies import rewards
from rlhf_lib.show.tables import COMPARED

LOOK = {
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # it comes with matplotlib: equal files on all machines
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 100,
}
sns.set_theme(context="paper", style="ticks", palette="colorblind", rc=LOOK)

WIDTH = 7.2  # of a figure, in inches
SMALL = 8  # points of a name at a line
DOT = {"fmt": "o", "markersize": 4.5, "linewidth": 1.2, "capsize": 2.5, "clip_on": False}
LEADER = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3}
CORNERS = ((3, 3), (3, -9), (-3, 3), (-3, -9))  # of a dot, in points: where its number may stand
ROOT_KL = "√KL to SFT (KL in nats a reply)"
Label = tuple[str, float, float, str]  # a name, the point that it belongs to, its colour


def _panels(
    count: int, height: float, wide: int = 0, sharey: bool = False, width: float = WIDTH,
    sharex: Any = False,
) -> tuple[Figure, list]:  # fmt: skip
    """A figure and its panels, `wide` of them in a row (0: all), each of this height in inches."""
    wide = wide or count
    rows = -(-count // wide)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, wide, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


# ------------------------------------------------------------------------- what figures are made of


def dots(
    axis: Axes,
    records: Sequence[Mapping],
    places: Sequence[float],
    color: str,
    upright: bool = False,
    **style: Any,
) -> None:
    """A dot with its interval for each record, at these heights; `upright`: over these places.

    Further `style` is that of matplotlib's `errorbar`.
    """
    rows = pd.DataFrame(list(records))
    ends = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    look: dict[str, Any] = {"yerr" if upright else "xerr": ends} | DOT | style
    x, y = (places, rows["mean"]) if upright else (rows["mean"], places)
    axis.errorbar(x, y, color=color, **look)


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """The names of a figure's rows in their colours, the first on top."""
    axis.set_yticks(range(len(names)), [label(name) for name in names])
    for text, name in zip(axis.get_yticklabels(), names, strict=True):
        text.set_color(color(name))
    axis.set_ylim(len(names) - 0.5, -0.5)


def name_uprights(axis: Axes, lines: Mapping[str, tuple[float, str]]) -> None:
    """Upright lines with their names on top, the first one's to its left, so that none meet."""
    first = min(x for x, _ in lines.values())
    for name, (x, colour) in lines.items():
        axis.axvline(x, color=colour, lw=0.9, ls=":" if name == "chance" else "-")
        side = "right" if x == first else "left"
        axis.annotate(name, (x, 1.01), xycoords=("data", "axes fraction"), ha=side, color=colour)


def name_ends(axis: Axes, labels: Sequence[Label]) -> None:
    """Names at the right edge, each led to its point. None covers another.

    Call it when all else is drawn: places depend on the limits of the axis.
    """
    low, high = axis.get_ylim()
    inches = axis.get_figure().get_figheight()  # type: ignore[union-attr]
    gap = 1.5 * SMALL / 72 / (0.8 * inches)  # a line of text, as a share of the axis
    ordered = sorted(labels, key=lambda label: label[2])
    places: list[float] = []
    for _, _, y, _ in ordered:
        wanted = (y - low) / (high - low)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    for i in reversed(range(len(places))):  # what was pushed over the top comes down again
        places[i] = min(places[i], 1.0 - gap * (len(places) - 1 - i))
    for (text, x, y, colour), place in zip(ordered, places, strict=True):
        look = {"color": colour, "fontsize": SMALL, "arrowprops": LEADER | {"color": colour}}
        axis.annotate(text, (x, y), (1.02, place), textcoords="axes fraction", va="center", **look)


def seeds(axis: Axes, frames: Sequence[pd.DataFrame], key: str, color: str) -> None:
    """A metric by step: the mean over the seeds in a band that holds all of them."""
    rows = pd.concat(frames, keys=range(len(frames)), names=["seed"]).dropna(subset=[key])
    sns.lineplot(rows, x="step", y=key, color=color, errorbar=("pi", 100), ax=axis)


def smooth(metrics: Sequence[Mapping] | pd.DataFrame, key: str) -> pd.DataFrame:
    """A metric by step, averaged over the last three times that it was logged."""
    logged = pd.DataFrame(metrics)[["step", key]].dropna()  # type: ignore[arg-type]
    return logged.assign(**{key: pd.Series(logged[key]).rolling(3, 1).mean()})


# ---------------------------------------------------------------------------------------- training


def curves(
    per_seed: Sequence[Sequence[Mapping]], columns: Mapping[str, str], color: str = "#0072b2"
) -> Figure:
    """Small multiples of training metrics: one panel a metric, a band from seed to seed.

    `columns`: metric name -> panel title; a metric that was logged at some steps only is joined up,
    and of one that never changed its panel says so.
    """
    figure, axes = _panels(len(columns), 2.0, wide=3)
    frames = [pd.DataFrame(list(metrics)) for metrics in per_seed]
    for axis, (key, title) in zip(axes, columns.items(), strict=True):
        seeds(axis, frames, key, color)
        axis.set(title=title, xlabel="step", ylabel="")
        values = pd.concat(frames)[key].dropna()
        if values.nunique() == 1 < len(values):
            still = f"{values.iloc[0]:g} at every step"
            axis.text(0.5, 0.6, still, transform=axis.transAxes, ha="center")
    return figure


def budgets(runs: Mapping[str, pd.DataFrame], reward: str) -> Figure:
    """Reward along training against FLOPs and against minutes, a line a method (`spent`)."""
    budgets = "TFLOPs", "minutes"
    figure, axes = _panels(len(budgets), 3.0, sharey=True)
    for axis, budget in zip(axes, budgets, strict=True):
        axis.axvline(min(run[budget].max() for run in runs.values()), color=GREY, lw=0.8, ls=":")
        for name, run in runs.items():
            sns.lineplot(run, x=budget, y=reward, color=color(name), estimator=None, ax=axis)
        axis.set(xlabel=budget, ylabel=f"{reward} reward", xlim=(0, None))
    for axis, budget in zip(axes, budgets, strict=True):
        ends = {name: run[[budget, reward]].iloc[-1] for name, run in runs.items()}
        name_ends(axis, [(label(name), *end, color(name)) for name, end in ends.items()])
    return figure


def tuning(trials: Sequence[Mapping]) -> Figure:
    """One panel a method: reward on validation prompts by its first tuned setting, a line for each
    value of its second; a ring around the best. Trials that diverged are left out.
    """
    rows = [dict(trial) for trial in trials if trial["mean"] is not None]
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = _panels(len(names), 2.5, wide=3, sharey=True)
    figure.supylabel(f"{rows[0]['rater']} reward", fontsize="medium")
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["method"] == name]
        first, second = own[0]["values"]
        steps = sorted({row["values"][second] for row in own})
        shades = sns.light_palette(color(name), len(steps) + 1).as_hex()[1:]
        for step, shade in zip(steps, shades, strict=True):
            line = [row for row in own if row["values"][second] == step]
            line.sort(key=lambda row: row["values"][first])
            places = [row["values"][first] for row in line]
            dots(axis, line, places, shade, upright=True, fmt="o-", label=f"{step:g}")
        top = max(own, key=lambda row: row["mean"])
        axis.plot(top["values"][first], top["mean"], "o", ms=11, mfc="none", mec="black")
        axis.set(xscale="log", xlabel=first.rpartition(".")[2], title=label(name))
        tried = sorted({row["values"][first] for row in own})
        axis.set_xticks(tried, [f"{value:g}" for value in tried], fontsize=6)
        axis.minorticks_off()
        axis.legend(title=second.rpartition(".")[2], fontsize=6.5, title_fontsize=6.5)
    return figure


# ------------------------------------------------------------------------------- data, reward model


def length_histograms(histogram: Mapping[str, Mapping[str, Sequence[int]]]) -> Figure:
    """Token lengths of prompts and replies, from the counts in a split's audit.

    Bins have whole-number edges and may differ in width, so the height is a share per token.
    """
    figure, axes = _panels(len(histogram), 2.6)
    sides = {"prompt": color("sft"), "chosen": "#0072b2", "rejected": "#c24a00"}
    for axis, (name, counts) in zip(axes, histogram.items(), strict=True):
        edges = counts["edges"]
        for side in (side for side in sides if side in counts):
            look = {"stat": "density", "element": "step", "alpha": 0.2, "color": sides[side]}
            counted = {"x": edges[:-1], "weights": counts[side], "bins": edges}
            sns.histplot(**counted, **look, label=side, ax=axis)
        axis.set(xlabel=f"tokens in a {name}", ylabel="share of them per token")
        axis.legend()
    return figure


def accuracy_bars(accuracy: Mapping[str, Mapping], ceiling: float | None) -> Figure:
    """Held-out accuracy of each ranker with its interval; chance and ceiling as lines."""
    rankers = ("reward_model", "bag_of_words", "learned_length", "longer_wins", "gold")
    names = [name for name in rankers if name in accuracy]
    figure, (axis,) = _panels(1, 0.4 * len(names) + 0.9)
    for place, name in enumerate(names):
        dots(axis, [accuracy[name]], [place], color(name))
        text = f"{accuracy[name]['mean']:.1%}"
        axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center")
    name_rows(axis, names)
    known = {"reachable ceiling": (ceiling, color("gold"))} if ceiling is not None else {}
    name_uprights(axis, {"chance": (0.5, GREY), **known})
    axis.set_xlabel("share of held-out pairs ranked as labelled")
    return figure


def learning_curve(points: Sequence[Mapping], ceiling: float | None) -> Figure:
    """Held-out accuracy over the number of training pairs, with intervals; names at the lines."""
    figure, (axis,) = _panels(1, 3.2)
    sizes, names = [point["train_pairs"] for point in points], {"chance": (0.5, GREY)}
    # a hair to the left and right, so that the intervals stand beside each other
    for name, fmt, shift in (("reward_model", "o-", 1.02), ("bag_of_words", "s--", 1 / 1.02)):
        records = [point[name] for point in points]
        look = {"upright": True, "fmt": fmt, "label": label(name)}
        dots(axis, records, [n * shift for n in sizes], color(name), **look)
        names[label(name)] = records[-1]["mean"], color(name)
    if ceiling is not None:
        axis.axhline(ceiling, color=color("gold"), lw=0.9)
        names["reachable ceiling"] = ceiling, color("gold")
    axis.axhline(0.5, color=GREY, lw=0.9, ls=":")
    axis.set(xscale="log", xlabel="training pairs (logarithmic)", ylabel="accuracy on test pairs")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    name_ends(axis, [(name, sizes[-1], y, colour) for name, (y, colour) in names.items()])
    return figure


def accuracy_in_groups(sections: Mapping[str, Mapping[str, Mapping]], overall: float) -> Figure:
    """One row a group, in sections: accuracy with its interval, and how many pairs there are.

    `sections`: heading -> group -> record with `mean`, `low`, `high`, `n`.
    """
    rows = [row for name, groups in sections.items() for row in ((name, {}), *groups.items())]
    figure, (axis,) = _panels(1, 0.23 * len(rows) + 0.6)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    for place, (text, (_, record)) in enumerate(zip(axis.get_yticklabels(), rows, strict=True)):
        if not record:  # a heading
            text.set_fontweight("bold")
            continue
        dots(axis, [record], [place], color("reward_model"))
        count, beside = f"n = {record['n']:,}", axis.get_yaxis_transform()
        axis.text(1.01, place, count, transform=beside, color=GREY, va="center")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_ylim(len(rows) - 0.5, -0.7)
    name_uprights(axis, {"chance": (0.5, GREY), "all pairs": (overall, color("reward_model"))})
    axis.set_xlabel("accuracy on test pairs")
    return figure


def reliability(calibrations: Mapping[str, Mapping]) -> Figure:
    """Confidence against accuracy in bins of equally many pairs: one panel a calibration."""
    width = WIDTH / 2 * len(calibrations)
    figure, axes = _panels(len(calibrations), 3.2, sharey=True, width=width)
    for axis, (title, calibration) in zip(axes, calibrations.items(), strict=True):
        axis.plot([0.5, 1], [0.5, 1], color=GREY, lw=0.8, ls=":")
        confidence = [row["confidence"] for row in calibration["bins"]]
        look = {"upright": True, "fmt": "o-"}
        dots(axis, calibration["bins"], confidence, color("reward_model"), **look)
        axis.set(title=title, xlabel="confidence, σ(|difference of scores|)")
    axes[0].set_ylabel("accuracy")
    axes[0].text(0.93, 0.97, "as sure as right", color=GREY, ha="right")
    return figure


# ----------------------------------------------------------------------------------------- policies


def gains(results: Mapping) -> Figure:
    """The study in one picture: gain over SFT in proxy and in what decides; a tick each seed."""
    keys, policies = rewards(results["deciding"]), results["policies"]
    names = [name for name in catalogue.policies(*COMPARED) if name in policies]
    figure, axes = _panels(len(keys), 0.36 * len(names) + 0.6, sharey=True)
    for axis, key in zip(axes, keys, strict=True):
        axis.axvline(0, color="#444444", lw=0.8)
        for place, name in enumerate(names):
            record = policies[name][f"{key}_gain"]
            dots(axis, [record], [place], color(name))
            if len(each := record["per_seed"]) > 1:
                axis.plot(each, [place + 0.25] * len(each), "|", color=color(name), ms=7)
        axis.set_xlabel(f"{key} reward gained over SFT")
    name_rows(axes[0], names)
    return figure


def reward_distributions(samples: Mapping[str, pd.DataFrame], deciding: str) -> Figure:
    """Each policy's rewards over the evaluation prompts, with a box: proxy, and what decides."""
    kinds, names = rewards(deciding), list(samples)
    figure, axes = _panels(len(kinds), 0.3 * len(names) + 0.7, sharey=True)
    rows = pd.concat(samples, names=["policy"]).reset_index("policy").reset_index(drop=True)
    look = {"inner": "box", "density_norm": "width", "cut": 0, "saturation": 1, "alpha": 0.6}
    palette = {name: color(name) for name in names}
    for axis, kind in zip(axes, kinds, strict=True):
        what = {"x": kind, "y": "policy", "hue": "policy", "palette": palette, "legend": False}
        sns.violinplot(rows, **what, **look, ax=axis)
        axis.set(xlabel=f"{kind} reward of a reply", ylabel="")
    name_rows(axes[0], names)
    return figure


def best_of_n(curves_by_kind: Mapping[str, Sequence[Mapping]], deciding: str) -> Figure:
    """Proxy and deciding reward of best-of-n, with 95 % bands; a control has a proxy of its own."""
    keys = rewards(deciding)
    figure, axes = _panels(len(keys), 2.8)
    for axis, key in zip(axes, keys, strict=True):
        for kind in ("default",) if key == "proxy" else curves_by_kind:
            rows = curves_by_kind[kind]
            name, n = f"best_of_n_{kind}", [row["n"] for row in rows]
            curve = pd.DataFrame([row[key] for row in rows])
            axis.plot(n, curve["mean"], "o-", ms=3, color=color(name), label=label(name))
            if curve["low"].notna().all():
                band = curve["low"], curve["high"]
                axis.fill_between(n, *band, color=color(name), alpha=0.15, lw=0)
        axis.set(xscale="log", xlabel="n", title=f"{key} reward of the pick")
        axis.set_xticks(n, ["1 (SFT)" if k == 1 else str(k) for k in n])
        axis.minorticks_off()
    axes[-1].legend()
    return figure


def panels(measured: Mapping[str, Mapping[str, Mapping]], share: bool) -> Figure:
    """Small multiples of `failures` (`share`: from 0 to what a row of panels needs) or `scores`.

    A filled dot differs from SFT, which is the line, as `change` says; an open one does not.
    """
    wide, sharex = (4, "row") if share else (3, False)
    policies = list(next(iter(measured.values())))
    figure, axes = _panels(len(measured), 0.19 * len(policies) + 0.62, wide, True, sharex=sharex)
    for axis, (measure, records) in zip(axes, measured.items(), strict=True):
        axis.axvline(records["sft"]["mean"], color=color("sft"), lw=0.7, alpha=0.5)
        for place, (policy, record) in enumerate(records.items()):
            differs = record.get("change", {}).get("verdict") in ("higher", "lower")
            look = {"mfc": color(policy) if differs else "white", "capsize": 0}
            dots(axis, [record], [place], color(policy), **look)
        axis.set_title(measure, loc="left")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))  # labels do not meet
        if share:
            axis.xaxis.set_major_formatter(PercentFormatter(1, 0, ""))
    for axis in axes[::wide]:
        name_rows(axis, policies)
        axis.set_xlim(0 if share else None, None)
    figure.supxlabel("replies that fail, in per cent" if share else "", fontsize="medium")
    return figure


# ----------------------------------------------------------------------------------- reward and KL


def _root(kl: object) -> np.ndarray:
    """√KL; a sampled estimate just below 0 counts as 0."""
    return np.sqrt(np.maximum(np.asarray(kl, dtype=float), 0))


def _by_step(points: pd.DataFrame, reward: str) -> pd.DataFrame:
    """KL and reward at each step, means over the seeds."""
    return pd.DataFrame(points.groupby("step")[["kl", reward]].mean())


def _free(axis: Axes, points: pd.DataFrame, reward: str) -> None:
    """The curve of best-of-n, which trains nothing."""
    name = str(points["policy"].iloc[0])
    mean = _by_step(points, reward)
    x, y = _root(mean["kl"]), mean[reward]
    axis.plot(x, y, "s--", ms=3, lw=1, color=color(name), label=label(name))


def frontier(points: pd.DataFrame, results: Mapping, reward: str) -> Figure:
    """Reward against √KL: final policies of every seed, best-of-n, and the way there.

    Twice: whole, and the window in which baselines and methods end, with their 95 % intervals.
    """
    figure, (whole, window) = _panels(2, 3.8)
    final = points.query("kind == 'final' and policy != 'sft_again'")
    for axis in (whole, window):
        for name, rows in final.groupby("policy", sort=False):
            look = {"color": color(str(name)), "ax": axis, "legend": False}
            way = moving(_by_step(points.query("kind == 'training' and policy == @name"), reward))
            line = {"x": _root(way["kl"]), "y": way[reward], "sort": False, "estimator": None}
            sns.lineplot(**line, lw=0.9, **look)
            x, y = _root(rows["kl"]), rows[reward].to_numpy()
            sns.scatterplot(x=x, y=y, s=26, zorder=3, label=label(str(name)), **look)
        for name, rows in points.query("kind == 'best_of_n'").groupby("policy"):
            if reward != "proxy" or name == "best_of_n_default":  # a control has another scale
                _free(axis, rows, reward)
        axis.set(xlabel=ROOT_KL, ylabel=f"{reward} reward")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _look_into(window, whole, results["policies"], reward)
    return figure


def _look_into(window: Axes, whole: Axes, policies: Mapping, reward: str) -> None:
    """Where baselines and methods end: their intervals in one panel, its frame in the other."""
    ends = []
    for name in (n for n in catalogue.policies("baseline", "method") if n in policies):
        rows = pd.DataFrame([policies[name]["kl"], policies[name][reward]])
        kl, height = rows[["low", "mean", "high"]].to_numpy(float)
        ends.append([kl := _root(kl), height])
        bars = {"xerr": np.diff(kl)[:, None], "yerr": np.diff(height)[:, None], "fmt": "none"}
        window.errorbar(kl[1], height[1], **bars, color=color(name), lw=1.1, label=label(name))
    if not np.isfinite(ends).any():
        window.set_visible(False)
        return
    low, high = np.nanmin(ends, axis=(0, 2)), np.nanmax(ends, axis=(0, 2))
    low, high = low - (margin := np.maximum(0.08 * (high - low), 0.01)), high + margin
    window.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title="where the methods end")
    whole.add_patch(Rectangle(low, *(high - low), fill=False, ec=GREY, lw=0.9, ls=":"))


def sweep(points: pd.DataFrame, rewards: list[str]) -> Figure:
    """One panel a reward: the ends of runs at rising coefficients, joined, beside best-of-n."""
    figure, axes = _panels(len(rewards), 3.2)
    ends = swept(points).groupby("method", sort=False)
    for axis, reward in zip(axes, rewards, strict=True):
        _free(axis, points.query("policy == 'best_of_n_default'"), reward)
        for (dx, dy), (name, runs) in zip(cycle(CORNERS), ends):
            x, look = _root(runs["kl"]), {"color": color(str(name))}
            axis.plot(x, runs[reward], "o-", ms=4, lw=1.2, label=label(str(name)), **look)
            look |= {"fontsize": 6.5, "ha": "left" if dx > 0 else "right"}
            for *point, value in zip(x, runs[reward], runs["coefficient"], strict=True):
                axis.annotate(f"{value:g}", point, (dx, dy), textcoords="offset points", **look)
        axis.set(xlabel=ROOT_KL, ylabel=f"{reward} reward")
    axes[0].legend()
    return figure
