"""What is said of the reward models of all seeds: accuracy, calibration, errors, opinions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.pairs import PreferenceData, draw_pairs
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure import rankings
from rlhf_lib.measure.statistics import (
    SHARE,
    bootstrap,
    by_bins,
    by_group,
    compare,
    direction,
    minus,
    over_seeds,
)
from rlhf_lib.results.policies import Samples
from rlhf_lib.runs import Stage


def reward_model_summary(
    stages: Sequence[Mapping[str, Stage]], data: PreferenceData, samples: int
) -> dict:
    """`stages`: those of each seed. Accuracies and groups are averaged over seeds; calibration,
    temperature, errors and the learning curve are the first seed's, and its curve's if it has one.
    """
    train, test, truth = data.pairs["train"], data.pairs["test"], data.truth
    preferences = [score_differences(seed["reward_model"]) for seed in stages]
    wrong = rankings.errors(test, preferences[0], truth)
    record = {
        "accuracy": rankings.accuracies(train, test, preferences, truth, samples),
        "calibration": rankings.calibration(preferences[0]),
        "errors": {
            "count": len(wrong),
            "by_category": dict(Counter(e["category"] for e in wrong).most_common()),
            "first": wrong[:24],
        },
        "training": [seed["reward_model"].result() for seed in stages],
        **groups(test, preferences, truth),
    }
    if truth:
        record["ceiling"] = truth.ceiling(test)
    if len(preferences) > 1:
        record["disagreement"] = rankings.seed_disagreement(preferences, samples)
    if "reward_model_control" in stages[0]:
        controls = [seed.get("reward_model_control") for seed in stages]
        accuracies = [control.result()["accuracy"] for control in controls if control]
        record["control_accuracy"] = over_seeds(accuracies)
    if "judge" in stages[0]:
        won = [rankings.wins(score_differences(seed["judge"])) for seed in stages]
        record["judge_accuracy"] = bootstrap(np.mean(won, axis=0), samples)
    if "reward_model_curve" in stages[0]:
        curve, full = stages[0]["reward_model_curve"], stages[0]["reward_model"]
        record["learning_curve"] = learning_curve(data, curve, full, samples)
        validation = validation_differences(curve)
        record["recalibrated"] = rankings.recalibrate(validation, preferences[0])
    return record


def score_differences(stage: Stage) -> np.ndarray:
    """Score of the chosen reply less that of the rejected one, for each test pair."""
    return _scored(stage)["difference"].to_numpy()


def validation_differences(curve: Stage) -> np.ndarray:
    """The full model's score differences on the validation pairs, from `reward_model_curve`."""
    return _scored(curve).query("split == 'validation'")["difference"].to_numpy()


def _scored(stage: Stage) -> pd.DataFrame:
    rows = pd.DataFrame(stage.samples())
    return rows.assign(difference=rows["chosen_score"] - rows["rejected_score"])


def groups(test: Sequence[Pair], preferences: Sequence[np.ndarray], truth: Truth | None) -> dict:
    """Accuracy by kind of request, by length difference in words, and by size of the margin.

    Wins are averaged over seeds; the margin is |difference of scores|, averaged over seeds too.
    """
    won = np.mean([rankings.wins(p) for p in preferences], axis=0)
    return {
        "by_kind": by_group(won, [rankings.category(p, truth) for p in test]),
        "by_length": by_bins(won, rankings.word_differences(test)),
        "by_margin": by_bins(won, np.mean(np.abs(preferences), axis=0)),
    }


def learning_curve(data: PreferenceData, curve: Stage, full: Stage, samples: int) -> list[dict]:
    """Accuracy on the test pairs for each number of training pairs, rising.

    `bag_of_words` learns from the same pairs. `gain`: the reward model's accuracy less that of the
    point before, on the same test pairs (not in the first point).
    """
    train, test = data.pairs["train"], data.pairs["test"]
    scored = _scored(curve).query("split == 'test'")
    sizes = scored["train_pairs"].unique().tolist()
    by_size = {n: scored.query("train_pairs == @n")["difference"].to_numpy() for n in sizes}
    by_size[len(train)] = score_differences(full)
    points, before = [], None
    for size, preferences in sorted(by_size.items()):
        won = rankings.wins(preferences)
        seen = draw_pairs(train, size, curve.config["seed"])
        words = rankings.wins(rankings.bag_of_words_preferences(seen, test))
        point = {
            "train_pairs": size,
            "reward_model": bootstrap(won, samples),
            "bag_of_words": bootstrap(words, samples),
        }
        if before is not None:
            gain = bootstrap(won - before, samples)
            point["gain"] = gain | {"verdict": direction(gain)}
        points.append(point)
        before = won
    return points


def second_opinion(
    stages: Sequence[Mapping[str, Stage]], unit: Callable[[str], str] = str
) -> dict | None:
    """What each policy gained over SFT by both reward models; None for one seed.

    `own`, `other`: gains over SFT's reply to the same prompt, in standard deviations of
    demonstrations; `excess`: own less other, corrected for the number of policies (Holm);
    `opposite`: share of prompts at which one model sees a gain and the other does not.
    """
    if "second_opinion" not in stages[0]:
        return None
    seeds = [seed["second_opinion"].samples() for seed in stages]
    policies = list(dict.fromkeys(row["policy"] for row in seeds[0]))
    rows = {p: [[row for row in seed if row["policy"] == p] for seed in seeds] for p in policies}
    samples = Samples(rows, [], [], unit)
    table = {}
    for policy in (p for p in policies if p != "sft"):
        own, other = (samples.difference(policy, "sft", key) for key in ("own", "other"))
        opposite = [np.sign(a) != np.sign(b) for a, b in zip(own, other, strict=True)]
        table[policy] = {
            "own": samples.estimate(own, key="own"),
            "other": samples.estimate(other, key="own"),
            "opposite": samples.estimate(opposite, SHARE, "own"),
            "excess": samples.estimate(minus(own, other), key="own"),
        }
    excess = compare({policy: record["excess"] for policy, record in table.items()})
    return {policy: record | {"excess": excess[policy]} for policy, record in table.items()}
