"""Figures show the numbers they are given; each can be drawn from both kinds of results."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rlhf_lib import catalogue
from rlhf_lib.catalogue import color, label
from rlhf_lib.show import figures
from rlhf_lib.show.display import figure_bundle

MADE_UP = Path(__file__).parents[1] / "made_up"


@pytest.fixture
def results() -> dict:
    return json.loads((MADE_UP / "gold.json").read_text())


@pytest.fixture
def real_results() -> dict:
    return json.loads((MADE_UP / "proxy.json").read_text())


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_yticklabels()]


def points(axis: Any) -> list[float]:
    """Horizontal places of the dots of error bars."""
    return [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]


def heights(axis: Any) -> list[list[float]]:
    """At which heights each of the stepped outlines runs, from the ground up."""
    outlines = [shape.get_paths()[0].vertices[:, 1] for shape in axis.collections]
    return [np.unique(outline.round(9)).tolist() for outline in outlines]


def metrics(shift: float = 0.0) -> list[dict]:
    """Twelve steps; `gold` and `kl` are logged at every other one."""
    rows: list[dict] = [{"step": s, "reward": s + shift} for s in range(12)]
    for row in rows[::2]:
        row |= {"gold": -row["reward"], "kl": 0.1 * row["step"]}
    return rows


def test_every_policy_has_a_colour_of_its_own() -> None:
    policies = catalogue.policies()
    assert len({color(name) for name in policies}) == len(policies)


def test_curves_have_a_panel_a_metric_and_a_band_from_seed_to_seed() -> None:
    figure = figures.curves([metrics(), metrics(2.0)], {"reward": "Reward", "kl": "KL"})
    reward, kl, unused = figure.axes
    assert (reward.get_title(), kl.get_title()) == ("Reward", "KL")
    assert not unused.get_visible()
    (mean,) = reward.lines
    assert mean.get_ydata().tolist() == [s + 1.0 for s in range(12)]
    (band,) = reward.collections
    assert band.get_datalim(reward.transData).intervaly.tolist() == [0.0, 13.0]
    assert kl.lines[0].get_xdata().tolist() == [0, 2, 4, 6, 8, 10], "joined up over the gaps"
    (lone,) = figures.curves([metrics()], {"reward": "Reward"}).axes[0].lines
    assert lone.get_ydata().tolist() == [float(s) for s in range(12)]


def test_a_curve_that_never_moves_says_so() -> None:
    run = [{"step": step, "kl_coef": 0.05, "reward": step} for step in range(4)]
    still, moving = figures.curves([run, run], {"kl_coef": "β", "reward": "Reward"}).axes[:2]
    assert texts(still) == ["0.05 at every step"]
    assert texts(moving) == []


def test_accuracy_bars_hold_every_judge_and_the_ceiling(results: dict, real_results: dict) -> None:
    record = results["reward_model"]
    axis = figures.accuracy_bars(record["accuracy"], record["ceiling"]).axes[0]
    names = ("reward_model", "bag_of_words", "learned_length", "longer_wins", "gold")
    assert ticks(axis) == [label(name) for name in names]
    assert axis.yaxis_inverted(), "the first is on top"
    assert points(axis) == [record["accuracy"][name]["mean"] for name in names]
    assert {"chance", "reachable ceiling", "72.0%"} <= set(texts(axis))
    axis = figures.accuracy_bars(real_results["reward_model"]["accuracy"], None).axes[0]
    assert "reachable ceiling" not in texts(axis)
    assert label("gold") not in ticks(axis)


@pytest.mark.parametrize("judge", ["gold", "proxy"])
def test_reward_distributions_have_a_box_a_policy(judge: str) -> None:
    frame = pd.DataFrame({"proxy": [0.0, 1.0, 2.0], "gold": [3.0, 4.0, 5.0]})
    figure = figures.reward_distributions({"sft": frame, "ppo": frame + 1}, judge)
    shown = [axis.get_xlabel().split()[0] for axis in figure.axes]
    assert shown == list(dict.fromkeys(("proxy", judge)))
    for axis in figure.axes:
        faces = [to_hex(shape.get_facecolor()[0]) for shape in axis.collections]
        assert faces == [color("sft"), color("ppo")]
    assert ticks(figure.axes[0]) == ["SFT", "PPO"]


@pytest.fixture
def frontier_points() -> pd.DataFrame:
    rows = [
        {"policy": name, "kind": "final", "kl": kl, "gold": reward}
        for name, kl, reward in (("sft", -0.01, 0.0), ("sft_again", 0.0, 9.0), ("ppo", 4.0, 1.0))
    ]
    rows += [
        {"policy": "ppo", "kind": "training", "step": s, "kl": float(s), "gold": 0.25 * s}
        for s in range(5)
    ]
    rows += [
        {
            "policy": "best_of_n_default",
            "kind": "best_of_n",
            "step": n,
            "kl": n - 1.0,
            "gold": n / 4,
        }
        for n in (1, 2)
    ]
    return pd.DataFrame(rows).assign(seed=0)


def in_legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_frontier_is_over_the_root_of_kl(frontier_points: pd.DataFrame, results: dict) -> None:
    figure = figures.frontier(frontier_points, results, "gold")
    axis = figure.axes[0]
    finals = [tuple(place) for dots in axis.collections for place in dots.get_offsets()]
    assert finals == [(0.0, 0.0), (2.0, 1.0)], "the second draw is no point of its own"
    way, best = axis.lines
    assert way.get_xdata()[-1] == pytest.approx(np.sqrt(np.mean(range(5))))  # mean of five
    assert best.get_xdata().tolist() == [0.0, 1.0]
    assert best.get_ydata().tolist() == [0.25, 0.5]
    assert set(in_legend(figure)) == {"SFT", label("best_of_n_default"), "PPO"}
    assert not axis.texts, "no name that could be taken for a way"
    assert [one.get_legend() for one in figure.axes] == [None, None], "one for both panels"
    assert axis.get_ylabel() == "gold reward"


def test_a_window_shows_how_sure_the_frontiers_ends_are(
    frontier_points: pd.DataFrame, results: dict
) -> None:
    whole, window = figures.frontier(frontier_points, results, "gold").axes
    shown = [n for n in catalogue.policies("baseline", "method") if n in results["policies"]]
    assert len(window.containers) == len(shown)
    for name, bars in zip(shown, window.containers, strict=True):
        across, upright = (bar.get_segments()[0] for bar in bars.lines[2])
        record, kl = results["policies"][name]["gold"], results["policies"][name]["kl"]
        assert upright[:, 1].tolist() == pytest.approx([record["low"], record["high"]])
        assert across[:, 0] == pytest.approx(np.sqrt(np.maximum([kl["low"], kl["high"]], 0)))
        assert window.get_ylim()[0] < record["low"] < record["high"] < window.get_ylim()[1]
    (frame,) = whole.patches
    (left, right), (low, high) = window.get_xlim(), window.get_ylim()
    assert frame.get_bbox().extents.tolist() == pytest.approx([left, low, right, high])


def test_a_frontier_without_intervals_is_drawn(
    frontier_points: pd.DataFrame, results: dict
) -> None:
    for record in results["policies"].values():
        record["gold"] |= {"low": None, "high": None}
    assert figures.frontier(frontier_points, results, "gold").axes[1].containers


def test_a_control_is_on_the_frontier_where_it_is_measured_alike(
    frontier_points: pd.DataFrame, results: dict
) -> None:
    best = frontier_points[frontier_points["kind"] == "best_of_n"]
    both = pd.concat([frontier_points, best.assign(policy="best_of_n_control")])
    names = label("best_of_n_control"), label("best_of_n_default")
    assert set(names) < set(in_legend(figures.frontier(both, results, "gold")))
    proxy = in_legend(figures.frontier(both.assign(proxy=both["gold"]), results, "proxy"))
    assert [name in proxy for name in names] == [False, True]


def shares(*highest: float) -> dict:
    """A measure for each: one whose interval ends there, and one of SFT."""
    records = [{"mean": high / 2, "low": 0.0, "high": high} for high in highest]
    return {f"measure {i}": {"sft": r, "ppo": r} for i, r in enumerate(records)}


def test_axes_of_shares_fit_their_row() -> None:
    axes = figures.panels(shares(1.0, 0.1, 0.1, 0.1, 0.12, 0.05), share=True).axes
    ends = [axis.get_xlim() for axis in axes if axis.get_visible()]
    assert {low for low, _ in ends} == {0.0}
    assert [high for _, high in ends[:4]] == [pytest.approx(1.05, abs=0.01)] * 4
    assert [high for _, high in ends[4:]] == [pytest.approx(0.126, abs=0.01)] * 2


@pytest.mark.parametrize("share", [True, False])
def test_labels_of_neighbouring_panels_do_not_touch(share: bool, results: dict) -> None:
    probed = results["probes"]
    kinds = [shares(1.0, 1.0, 1.0, 1.0), shares(0.1, 0.1, 0.1), probed["failures"]]
    for measured in kinds if share else [probed["scores"], shares(1.0, 0.99, 1.01)]:
        figure = figures.panels(measured, share)
        FigureCanvasAgg(figure).draw()
        boxes = [
            tick.label1.get_window_extent()
            for axis in figure.axes
            if axis.get_visible()
            for tick in axis.xaxis.get_major_ticks()
            if axis.get_xlim()[0] <= tick.get_loc() <= axis.get_xlim()[1]
        ]
        pairs = combinations([box.expanded(1.1, 1.0) for box in boxes], 2)
        assert not [one for one, other in pairs if one.overlaps(other)]


def test_names_at_the_edge_do_not_cover_each_other() -> None:
    axis = Figure(figsize=(4, 3)).subplots()
    axis.set_ylim(0, 1)
    heights = {"a": 0.99, "b": 0.98, "c": 0.2, "d": 0.97}
    figures.name_ends(axis, [(name, 0.5, y, "#000000") for name, y in heights.items()])
    assert texts(axis) == ["c", "d", "b", "a"]
    places = [text.xyann[1] for text in axis.texts]  # type: ignore[attr-defined]
    assert places[0] == pytest.approx(0.2), "who has room stays at its own height"
    assert min(np.diff(places)) > 0.05
    assert places[-1] <= 1.0


def test_best_of_n_draws_a_curve_a_reward_model(results: dict, real_results: dict) -> None:
    proxy, gold = figures.best_of_n(results["best_of_n"], deciding="gold").axes
    assert len(gold.lines) == len(gold.collections) == 2, "two curves, two bands"
    assert len(proxy.lines) == len(proxy.collections) == 1, "a control's proxy is another scale"
    shown = [results["best_of_n"]["default"][0]["proxy"]["mean"], proxy.lines[0].get_ydata()[0]]
    assert shown[0] == shown[1], "the picker that the other policies are measured by"
    assert [tick.get_text() for tick in gold.get_xticklabels()] == ["1 (SFT)", "2", "4", "8"]
    assert len(gold.get_legend().get_texts()) == 2
    default = [row["gold"]["mean"] for row in results["best_of_n"]["default"]]
    assert list(gold.lines[0].get_ydata()) == default
    assert list(proxy.lines[0].get_xdata()) == [1, 2, 4, 8]
    (only,) = figures.best_of_n(real_results["best_of_n"], deciding="proxy").axes
    assert len(only.lines) == 1
    assert len(only.collections) == 1, "the band of a lone seed is over prompts"


def test_gains_have_a_row_a_policy_and_a_tick_a_seed(results: dict, real_results: dict) -> None:
    proxy, gold = figures.gains(results).axes
    names = ("sft_again", "rejection_sft", "ppo", "grpo", "dpo", "ppo_low_kl")
    assert ticks(proxy) == [label(name) for name in names]
    assert points(gold) == [results["policies"][name]["gold_gain"]["mean"] for name in names]
    seeds = [list(line.get_xdata()) for line in proxy.lines if line.get_marker() == "|"]
    each = {name: results["policies"][name]["proxy_gain"]["per_seed"] for name in names}
    assert all((len(values) > 1) == (values in seeds) for values in each.values())
    assert len(each["ppo_low_kl"]) == 1, "a demonstration has one seed, and no tick"
    (only,) = figures.gains(real_results).axes
    assert only.get_xlabel() == "proxy reward gained over SFT"
    caps = {len(line.get_xdata()) for line in only.lines if line.get_marker() == "|"}
    assert 3 not in caps, "one seed has no ticks"
    for policy in real_results["policies"].values():
        if "proxy_gain" in policy:
            policy["judge_gain"] = policy["proxy_gain"]
    both = figures.gains(real_results | {"deciding": "judge"}).axes
    assert [axis.get_xlabel().split()[0] for axis in both] == ["proxy", "judge"]


def test_length_histograms_show_shares_per_token() -> None:
    counts = {
        "prompt": {"edges": [0, 2, 3], "prompt": [6, 4]},
        "reply": {"edges": [0, 1, 2], "chosen": [1, 3], "rejected": [2, 2]},
    }
    prompts, replies = figures.length_histograms(counts).axes
    # six of ten in a bin of two tokens
    assert heights(prompts) == [[0.0, 0.3, 0.4]]
    assert heights(replies) == [[0.0, 0.25, 0.75], [0.0, 0.5]]
    assert replies.get_xlabel() == "tokens in a reply"


def test_figures_are_the_same_files_each_time(results: dict) -> None:
    def draw() -> list[Figure]:
        record = results["reward_model"]
        return [
            figures.gains(results),
            figures.accuracy_bars(record["accuracy"], record["ceiling"]),
            figures.best_of_n(results["best_of_n"], deciding="gold"),
        ]

    one, other = ([figure_bundle(figure) for figure in draw()] for _ in range(2))
    assert one == other
