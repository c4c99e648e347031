"""Figures of the reward model's chapter show the numbers that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lib.catalogue import label
from rlhf_lib.measure import rankings
from rlhf_lib.measure.statistics import by_bins, by_group
from rlhf_lib.show import figures, tables
from rlhf_lib.show.display import figure_bundle


def record(mean: float, n: int = 100) -> dict:
    return {"mean": mean, "low": mean - 0.04, "high": mean + 0.02, "n": n}


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


POINTS = [
    {"train_pairs": n, "reward_model": record(a), "bag_of_words": record(b)}
    for n, a, b in ((100, 0.55, 0.56), (300, 0.6, 0.58), (900, 0.66, 0.6))
]


def test_the_learning_curve_has_both_judges_at_every_size() -> None:
    axis = figures.learning_curve(POINTS, 0.72).axes[0]
    lines, _, bars = zip(*(container.lines for container in axis.containers), strict=True)
    assert lines[0].get_ydata().tolist() == [0.55, 0.6, 0.66]
    assert lines[1].get_ydata().tolist() == [0.56, 0.58, 0.6]
    for line in lines:
        assert line.get_xdata() == pytest.approx([100, 300, 900], rel=0.03)
    ends = np.array(bars[0][0].get_segments())[:, :, 1]
    assert ends == pytest.approx(np.array([[0.51, 0.57], [0.56, 0.62], [0.62, 0.68]]))
    assert [label.get_text() for label in axis.get_xticklabels()] == ["100", "300", "900"]
    assert {label("reward_model"), label("bag_of_words"), "chance"} < set(texts(axis))
    assert "reachable ceiling" in texts(axis)
    assert "reachable ceiling" not in texts(figures.learning_curve(POINTS, None).axes[0])


def test_a_curve_of_one_point_can_be_drawn() -> None:
    assert figure_bundle(figures.learning_curve(POINTS[-1:], None))["image/svg+xml"]


def test_groups_stand_under_their_headings_with_their_numbers() -> None:
    sections = {
        "kind": {"help": record(0.7, 30), "harm": record(0.6, 1200)},
        "margin": {"0 to 1": record(0.52, 7)},
    }
    axis = figures.accuracy_in_groups(sections, 0.65).axes[0]
    labels = [(t.get_text(), t.get_fontweight()) for t in axis.get_yticklabels()]
    assert labels == [
        ("kind", "bold"),
        ("help", "normal"),
        ("harm", "normal"),
        ("margin", "bold"),
        ("0 to 1", "normal"),
    ]
    dots = [container.lines[0] for container in axis.containers]
    assert [(d.get_xdata()[0], d.get_ydata()[0]) for d in dots] == [(0.7, 1), (0.6, 2), (0.52, 4)]
    assert {"n = 30", "n = 1,200", "n = 7", "chance", "all pairs"} == set(texts(axis))
    assert 0.65 in {line.get_xdata()[0] for line in axis.lines}
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first section stands on top"


def test_bins_are_named_by_their_ends() -> None:
    rows = by_bins(np.ones(4), np.array([1.0, 2.0, 5.0, 9.0]), bins=2)
    named = tables.bin_labels(rows, "{low:.0f} to {high:.0f}")
    assert list(named) == ["1 to 2", "5 to 9"]
    assert named["1 to 2"]["n"] == 2
    assert list(tables.bin_labels(rows, "few")) == ["1 to 2", "5 to 9"]
    close = by_bins(np.ones(4), np.array([1.0, 1.0, 1.0001, 1.0001]), bins=2)
    assert list(tables.bin_labels(close, "{low:.2g}")) == ["1 to 1", "1.0001 to 1.0001"]


def test_reliability_has_a_panel_a_calibration() -> None:
    preferences = np.random.default_rng(0).normal(0.5, 1.0, size=80)
    calibrations = {
        "before": rankings.calibration(preferences, samples=20),
        "after": rankings.calibration(preferences / 2, samples=20),
    }
    figure = figures.reliability(calibrations)
    assert [axis.get_title() for axis in figure.axes] == list(calibrations)
    for axis, calibration in zip(figure.axes, calibrations.values(), strict=True):
        diagonal, curve = axis.lines[:2]
        assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist() == [0.5, 1]
        assert curve.get_xdata().tolist() == [row["confidence"] for row in calibration["bins"]]
        assert curve.get_ydata().tolist() == [row["mean"] for row in calibration["bins"]]


def test_every_kind_of_bin_that_the_groups_give_can_be_drawn() -> None:
    won = np.array([1.0, 0.0, 0.5, 1.0])
    sections = {
        "kind": by_group(won, ["a", "a", "b", "b"]),
        "all right": by_group(np.ones(4), ["a"] * 4),
    }
    assert figure_bundle(figures.accuracy_in_groups(sections, 0.6))["image/svg+xml"]
