"""The reward model's part of the results: from made-up scores to accuracies and groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.measure.rankings import fit_temperature
from rlhf_lib.profiles import load_profile
from rlhf_lib.results import rankings
from rlhf_lib.runs import Run, Stage

SIZES = (3, 9, 27)


def pair(number: int, words: int) -> Pair:
    """A made-up pair whose chosen reply says "good" and is `words` words longer."""
    replies = " good answer indeed" + " really" * words, " evil answer indeed"
    return Pair(
        f"talk {number}",
        "\n\nHuman: Hi?\n\nAssistant:",
        *replies,
        [5],
        [6],
        [7],
        subset="even" if number % 2 == 0 else "odd",
    )


DATA = PreferenceData(
    {"train": [pair(i, 0) for i in range(27)], "test": [pair(i, i % 5) for i in range(40)]},
    [],
    {},
    {},
    "made up",
)


def scores(right: np.ndarray, size: float = 1.0) -> list[dict]:
    """Scores that rank the pairs in `right` as labelled, and the others the other way."""
    return [
        {
            "pair": i,
            "chosen_score": size * (i + 1) if r else 0.0,
            "rejected_score": 0.0 if r else size * (i + 1),
        }
        for i, r in enumerate(right)
    ]


@pytest.fixture
def stages(tmp_path: Path) -> Callable[[int], list[dict[str, Stage]]]:
    """`stages(seeds)`: reward models that err on the odd pairs of 40, seed s also on pair 2 s."""

    def finish(run: Run, name: str, rows: list[dict], result: dict) -> Stage:
        def build(work: Any) -> dict:
            work.write_samples(rows)
            return result

        return run.stage(name, {}, {}, "config").ensure(build)

    def make(seeds: int) -> list[dict[str, Stage]]:
        made = []
        for seed in range(seeds):
            run = Run(load_profile("smoke"), seed, tmp_path)
            right = np.arange(40) % 2 == 0
            right[2 * seed] = False
            made.append({"reward_model": finish(run, "reward_model", scores(right), {})})
            if seed == 0:
                rows = [
                    {"train_pairs": n, "split": "test", **row}
                    for n, first in zip(SIZES, (10, 15), strict=False)
                    for row in scores(np.arange(40) < first)
                ]
                rows += [
                    {"train_pairs": 27, "split": "validation", **row}
                    for row in scores(np.arange(20) < 15, 0.1)
                ]
                made[0]["reward_model_curve"] = finish(run, "reward_model_curve", rows, {})
        return made

    return make


def summary(stages: list[dict[str, Stage]]) -> dict:
    return rankings.reward_model_summary(stages, DATA, 200)


def test_accuracy_groups_and_errors_of_one_seed(stages: Callable) -> None:
    record = summary(stages(1))
    json.dumps(record, allow_nan=False)
    assert record["accuracy"]["reward_model"]["mean"] == 19 / 40
    assert record["accuracy"]["bag_of_words"]["mean"] == 1.0
    assert record["by_kind"]["even"]["mean"] == 19 / 20
    assert record["by_kind"]["odd"]["mean"] == 0
    assert [(r["from"], r["to"], r["n"]) for r in record["by_length"]] == [
        (words, words, 8) for words in range(5)
    ]
    assert sum(row["n"] for row in record["by_margin"]) == 40
    assert record["by_margin"][-1]["to"] == 40, "the margin is the score difference's size"
    assert record["errors"]["count"] == 21 == sum(record["errors"]["by_category"].values())
    assert len(record["errors"]["first"]) == 21
    assert not {"disagreement", "ceiling", "control_accuracy"} & record.keys()


def test_no_text_of_a_pair_is_in_it(stages: Callable) -> None:
    text = json.dumps(summary(stages(2)))
    assert "good" not in text
    assert "Human" not in text


def test_several_seeds_are_averaged_and_their_disagreement_is_measured(stages: Callable) -> None:
    record = summary(stages(2))
    assert record["accuracy"]["reward_model"]["per_seed"] == [19 / 40, 19 / 40]
    apart = record["disagreement"]
    assert apart["opposite"]["mean"] == 2 / 40, "pairs 0 and 2"
    assert apart["accuracy"]["seeds disagree"]["mean"] == 0.5
    assert apart["accuracy"]["seeds agree"]["mean"] == 18 / 38
    assert apart["accuracy"]["seeds agree"]["n"] == 38


def test_the_learning_curve_is_measured_on_the_same_pairs(stages: Callable) -> None:
    points = summary(stages(1))["learning_curve"]
    assert [p["train_pairs"] for p in points] == list(SIZES)
    assert [p["reward_model"]["mean"] for p in points] == [10 / 40, 15 / 40, 19 / 40]
    assert "gain" not in points[0]
    gain = points[1]["gain"]
    assert gain["mean"] == pytest.approx(5 / 40)
    assert gain["verdict"] == "higher"
    # paired: five pairs gained and none lost, where two independent samples could not be told apart
    assert gain["low"] > 0
    alone = points[0]["reward_model"], points[1]["reward_model"]
    assert alone[0]["high"] > alone[1]["low"]
    assert points[-1]["bag_of_words"]["mean"] == 1.0


def test_the_temperature_comes_from_the_validation_pairs(stages: Callable) -> None:
    made = stages(1)
    differences = rankings.validation_differences(made[0]["reward_model_curve"])
    assert len(differences) == 20
    assert differences[:2] == pytest.approx([0.1, 0.2])
    record = summary(made)["recalibrated"]
    assert record["temperature"]["mean"] == pytest.approx(fit_temperature(differences))
    assert record["temperature"]["n"] == 20
    assert record["after"]["ece"]["n"] == 40


def test_without_a_curve_the_rest_is_there(stages: Callable) -> None:
    made = stages(1)
    del made[0]["reward_model_curve"]
    record = summary(made)
    assert not {"learning_curve", "recalibrated"} & record.keys()
    assert {"accuracy", "calibration", "by_kind", "by_length", "by_margin"} < record.keys()
