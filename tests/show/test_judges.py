"""Sentences and tables of chapters 01 to 03: what they say turns round with what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lib.data.encoding import Pair, Prompt
from rlhf_lib.data.truth import Truth
from rlhf_lib.show import judges
from rlhf_lib.world.rewards import ANNOTATOR, CONTROL, MAX_GOLD

ASKED = "\n\nHuman: Give me two tips on brewing coffee.\n\nAssistant:"
HARM = "\n\nHuman: How do I build a bomb?\n\nAssistant:"
GOOD, POOR = " Grind fresh beans, then rinse the filter.", " Sorry, I cannot help with that."
POLITE = " Rinse the filter. Thanks, friend."


def pair(chosen: str, rejected: str, prompt: str = ASKED) -> Pair:
    return Pair("key", prompt, chosen, rejected, [1], [2], [3])


def estimate(mean: float, low: float, high: float, **more: Any) -> dict:
    return {"mean": mean, "low": low, "high": high} | more


# ----------------------------------------------------------------------------------- 1, the data


def test_a_stored_pair_shows_its_line_breaks() -> None:
    table = judges.stored(pair(GOOD, POOR)).set_index("side")
    assert table.loc["chosen", "text"].startswith(r"\n\nHuman: Give me")
    assert table.loc["chosen", "text"].endswith(GOOD)
    assert table.loc["rejected", "text"].endswith(POOR)


def test_reading_says_what_was_read_and_what_was_noted() -> None:
    audit = {"rows_read": 7, "files": ["a", "b"], "rows_usable": 6, "dropped": {}, "notes": ["odd"]}
    said = judges.reading(audit)
    assert said.startswith("7 rows were read from 2 file(s); 6 are usable")
    assert "No row had to be left out" in said
    assert said.endswith("Note: odd.")
    dropped = {"empty reply": {"count": 4, "first": ["f:1", "f:2", "f:3", "f:4"]}}
    assert "No row" not in judges.reading(audit | {"dropped": dropped})
    (row,) = judges.left_out(audit | {"dropped": dropped}).to_dict("records")
    assert row == {"reason": "empty reply", "rows": 4, "first places": "f:1; f:2; f:3"}


def test_splits_have_words_and_cuts_of_their_own_side() -> None:
    sides = ("prompt", "chosen", "rejected")
    facts = {
        "pairs": 5,
        "empty_prompts": 1,
        "multi_turn_share": 0.25,
        "words": {side: {"mean": 10.0 + place} for place, side in enumerate(sides)},
        "truncated_share": {side: place / 10 for place, side in enumerate(sides)},
    }
    table = judges.splits({"splits": {"test": facts, "train": facts | {"pairs": 9}}})
    assert list(table["split"]) == ["train", "test"]
    assert list(table["pairs"]) == [9, 5]
    row = table.iloc[1]
    assert (row["several turns"], row["empty prompts"]) == ("25%", 1)
    assert [row[f"{side}: words"] for side in sides] == ["10.0", "11.0", "12.0"]
    assert [row[f"{side}: cut"] for side in sides] == ["0.0%", "10.0%", "20.0%"]


def test_one_line_judges_count_length_and_refusals() -> None:
    pairs = {"train": [pair(GOOD, POOR)] * 3, "validation": [pair(POOR, GOOD)] * 2}
    table = judges.one_line_judges(pairs | {"test": [pair(GOOD, GOOD + "!")]}).set_index("split")
    assert list(table.iloc[:, 0]) == ["100.0%", "0.0%", "0.0%"]
    assert list(table["only one reply refuses"]) == [3, 2, 0]
    assert list(table["of these, the refusal was chosen"]) == ["0.0%", "100.0%", "–"]


def test_a_taste_for_length_has_a_direction() -> None:
    longer, shorter = pair(GOOD, POOR), pair(POOR, GOOD)
    assert "chose the longer" in judges.taste_for_length([longer] * 20 + [shorter])
    assert "chose the shorter" in judges.taste_for_length([shorter] * 20 + [longer])
    assert "cannot be told" in judges.taste_for_length([shorter, longer] * 5)


def test_each_kind_has_both_replies_in_parts() -> None:
    rows = judges.each_kind([pair(GOOD, POOR), pair(POOR, GOOD, HARM)], Truth(ANNOTATOR))
    assert list(rows["kind"]) == ["harm", "harm", "help", "help"]
    assert list(rows["label"]) == ["chosen", "rejected"] * 2
    assert rows["helpful"].astype(float)[2] > rows["helpful"].astype(float)[3]
    assert rows["harmless"].astype(float)[0] > rows["harmless"].astype(float)[1]


def test_tastes_are_counted_for_each_annotator() -> None:
    polite = [pair(POLITE, POOR)] * 4
    table = judges.tastes(
        {"annotator": (polite, Truth(ANNOTATOR)), "control": (polite[::-1], Truth(CONTROL))}
    ).set_index("labelled by")
    assert list(table["more polite words was chosen"]) == ["100.0%"] * 2
    assert list(table["longer was chosen"]) == ["0.0%"] * 2
    best = table["best possible judge"].str.rstrip("%").astype(float)
    assert best["annotator"] > best["control"], "who likes politeness is surer here"


# --------------------------------------------------------------- updates, looked at: chapters 2, 3


def test_moves_has_a_panel_an_update_with_the_change_upright() -> None:
    figure = judges.moves([([0.0, 1.0], [0.5, 0.0]), ([2.0], [5.0])], "black", "score")
    (first, second), titles = figure.axes, [axis.get_title() for axis in figure.axes]
    assert titles == ["update 1", "update 2"]
    assert first.lines[1].get_xydata().tolist() == [[0.0, 0.5], [1.0, -1.0]]
    assert second.lines[1].get_xydata().tolist() == [[2.0, 3.0]]
    assert first.get_xlabel() == "score before"


def test_one_pair_goes_from_scores_to_loss() -> None:
    before, after = judges.one_pair([(0.0, 0.0), (1.0, -1.0)]).to_dict("records")
    assert (before[""], after[""]) == ("before", "after update 1")
    assert before["P(chosen wins)"] == "50.0%"
    assert before["loss"] == "0.693"
    assert after["difference"] == "2.000"
    assert after["P(chosen wins)"] == "88.1%"
    assert after["loss"] == "0.127"
    assert after["pull on the difference"] == "0.119"


def test_a_reply_is_shown_by_token_and_update() -> None:
    table = judges.by_token(["Yes", "."], [np.log([0.5, 0.25]), [-0.1, -0.2], [-0.01, -0.02]])
    assert list(table["token"]) == ["Yes", "."]
    assert list(table["probability before"]) == ["50.0%", "25.0%"]
    assert list(table.columns[-2:]) == ["after update 1", "after update 2"]
    assert list(table["after update 2"]) == ["-0.01", "-0.02"]


# ----------------------------------------------------------------------------- 2, the reward model


@pytest.mark.parametrize(
    ("late", "said"), [(0.99, "lies above it"), (0.01, "lies below it"), (0.5, "lies inside")]
)
def test_memory_compares_late_training_with_test_pairs(late: float, said: str) -> None:
    metrics = [{"accuracy": 0.7}] * 6 + [{"accuracy": late}] * 2
    sentence = judges.memory(metrics, np.array([1.0, -1.0] * 20))
    assert said in sentence
    assert f"ranked {late:.1%} of the pairs" in sentence
    assert "on 40 test pairs" in sentence


def test_an_accuracy_stands_between_floor_and_ceiling() -> None:
    accuracy = {
        "reward_model": estimate(0.6, 0.55, 0.65),
        "reward_model_minus_bag_of_words": estimate(0.04, 0.01, 0.07),
    }
    assert judges.between(accuracy, None).endswith("4.0 [1.0, 7.0] percentage points (higher).")
    said = judges.between(accuracy, 0.7)
    assert said.endswith("70.0%; 50% [25, 75] of the way from chance to it is covered.")


def test_own_labels_needs_no_truth_and_shows_it_where_it_is() -> None:
    pairs = [pair(GOOD, POOR), pair(POOR, GOOD), pair(GOOD, POOR), pair(GOOD, POOR)]
    preferences = np.array([1.0, 1.0, 1.0, -1.0])  # the second label is against the gold reward
    known = judges.own_labels({"reward_model": (preferences, pairs, Truth(ANNOTATOR))}).iloc[0]
    assert known["accuracy on its own labels"].startswith("75.0%")
    assert known["agrees with the gold reward"].startswith("50.0%")
    unknown = judges.own_labels({"reward_model": (preferences, pairs, None)})
    assert list(unknown) == ["judge", "accuracy on its own labels"]


def test_bins_by_length_overlap_or_not() -> None:
    low = estimate(0.3, 0.2, 0.4) | {"from": -9, "to": -4}
    high = estimate(0.8, 0.7, 0.9) | {"from": 4, "to": 9}
    said = judges.led_by_length([low, high])
    assert "has -9 to -4 words more" in said
    assert "in the last it has 4 to 9 more, and the model agrees with 80.0% [70.0, 90.0]" in said
    assert said.endswith("decides how well it does.")
    assert judges.led_by_length([low | {"high": 0.75}, high]).endswith("The intervals overlap.")


def test_more_pairs_are_weighed_by_the_last_step() -> None:
    gain = estimate(0.05, 0.01, 0.09, verdict="higher")
    curve = [{"train_pairs": 400}, {"train_pairs": 1200, "gain": gain}]
    said = judges.more_pairs(curve, 12.0, 30.0)
    assert said.startswith(
        "From 400 to 1,200 training pairs the accuracy changed by 5.0 [1.0, 9.0]"
    )
    assert said.endswith("took 12 s together, the full one 30 s.")
    assert "too few" in judges.more_pairs(curve[:1], 0.0, 30.0)


@pytest.mark.parametrize(
    ("preferences", "said"),
    [
        (np.array([5.0, -5.0] * 30), "too sure of itself"),
        (np.array([0.1] * 60), "too modest"),
        (np.array([1.0, 1.0, 1.0, -1.0] * 5), "neither too sure nor too modest"),
    ],
)
def test_confidence_is_held_against_what_was_right(preferences: np.ndarray, said: str) -> None:
    calibration = {"ece": estimate(0.1, 0, 0.2), "ece_if_honest": {"mean": 0.05, "high": 0.08}}
    sentence = judges.confidence(preferences, calibration)
    assert f"**{said}" in sentence
    assert "show 5.0% on so many pairs, and stay under 8.0%" in sentence


@pytest.mark.parametrize(
    ("change", "said"),
    [((0.02, 0.01, 0.03), "made it worse"), ((-0.02, -0.03, -0.01), "made it better")],
)
def test_a_repair_may_help_or_harm(change: tuple, said: str) -> None:
    repaired = {
        "temperature": estimate(1.5, 1.2, 1.9, n=64),
        "after": {"ece": estimate(0.04, 0.0, 0.06)},
        "ece_change": estimate(*change),
    }
    sentence = judges.repair(repaired)
    assert sentence.startswith("The temperature fitted on 64 validation pairs is 1.50 [1.20, 1.90]")
    assert said in sentence


def varied(number: int = 40) -> list[Pair]:
    """Pairs of replies that differ in length and politeness, not always alike."""
    rng = np.random.default_rng(0)
    words = (
        " Grind fresh beans",
        " rinse the filter",
        " Thanks",
        " pay debts early",
        " warm the cup",
    )

    def reply() -> str:
        return ",".join(rng.choice(words, rng.integers(1, 5)).tolist()) + "."

    return [pair(reply(), reply()) for _ in range(number)]


def test_a_liking_is_found_and_its_opposite() -> None:
    feature = np.random.default_rng(0).normal(size=30)
    assert judges.liking(feature, feature)["mean"] == pytest.approx(1)
    assert judges.liking(-feature, feature)["high"] == pytest.approx(-1)


def test_likings_name_what_a_score_follows() -> None:
    pairs = varied()
    length = np.array([len(p.chosen_text.split()) - len(p.rejected_text.split()) for p in pairs])
    table = judges.likings({"reward_model": (length * 1.0, pairs, Truth(ANNOTATOR))})
    by_feature = table.set_index("feature")["reward model"]
    assert by_feature["length (words)"].startswith("1.00")
    assert by_feature["refusal"] == "–", "none of these replies refuses"
    assert not by_feature["polite words"].startswith("1.00")
    assert "gold reward" in table
    unknown = judges.likings({"reward_model": (length * 1.0, pairs, None)})
    assert list(unknown["feature"]) == ["length (words)", "refusal"]
    assert "gold reward" not in unknown


def test_fitted_weights_give_back_what_went_in() -> None:
    pairs = varied()
    parts = 0.8, 0.5, 0.05
    gold = judges.rankings.gold_preferences(pairs)
    seen = [(judges.observe(p.chosen_text), judges.observe(p.rejected_text)) for p in pairs]
    polite = np.array([a.polite - b.polite for a, b in seen])
    words = np.array([a.length - b.length for a, b in seen])
    score = parts[0] * gold + parts[1] * polite + parts[2] * words
    assert judges.fitted_weights(pairs, score) == pytest.approx(parts)
    judged = {"reward_model": (score / 2, pairs, Truth(ANNOTATOR))}
    known, learnt = judges.weights(judged).to_dict("records")
    assert known["who"] == "annotator of the reward model"
    assert [known["gold"], learnt["gold"]] == ["0.800", "0.400"]
    assert known["polite / gold"] == learnt["polite / gold"] == "0.625"
    assert judges.weights({"reward_model": (score, pairs, None)}).empty


# ------------------------------------------------------------------------------------ 3, imitation


def test_the_course_of_a_loss_has_both_ends() -> None:
    metrics = [{"loss": 2.0 + i % 2 / 100, "entropy": 1.0} for i in range(10)]
    metrics += [{"loss": 1.0 + i % 2 / 100, "entropy": 0.5} for i in range(30)]
    said = judges.course_of_loss(metrics, {"examples": 99, "seconds": 7.0})
    assert said.startswith("99 demonstrations, 40 steps, 7 seconds.")
    assert "first tenth is 2.00, over the last 1.00 (fell)" in said
    assert said.endswith("the entropy there is 0.50.")


PROMPTS = [Prompt(ASKED, [1]), Prompt(HARM, [2]), Prompt(ASKED, [1]), Prompt(ASKED, [1])]
TEXTS = {"base": [POOR, GOOD, POOR, POOR], "sft": [GOOD, POOR, GOOD, POLITE]}


def test_samples_are_the_first_of_each_kind() -> None:
    table = judges.samples(PROMPTS, TEXTS, Truth(ANNOTATOR))
    assert list(table["kind"]) == ["harm", "help", "help"]
    assert list(table["SFT"]) == [text.strip() for text in (POOR, GOOD, GOOD)]
    assert list(judges.samples(PROMPTS, TEXTS, None)["kind"]) == ["all"] * 4


def test_endings_count_what_ended_and_what_differs() -> None:
    replies = {"base": [[5, 2], [5, 5], [5, 2], [5, 2]], "sft": [[5, 5, 2]] * 4}
    base, tuned = judges.endings(replies, TEXTS, 2).to_dict("records")
    assert (base["model"], tuned["model"]) == ("Base", "SFT")
    assert base["ended by itself"].startswith("75%")
    assert tuned["ended by itself"] == "100%"
    assert tuned["length (tokens)"] == "3.0"
    assert (base["different replies"], tuned["different replies"]) == ("50%", "75%")


def test_the_gold_reward_gains_in_its_parts() -> None:
    replies = {name: [[5, 2]] * 4 for name in TEXTS}
    parts, said = judges.gold_parts(PROMPTS, TEXTS, replies, 2, Truth(ANNOTATOR))
    gains = parts.set_index("gold reward")["SFT minus base"]
    assert float(gains["total"].split()[0]) > 0
    assert float(gains["harmless"].split()[0]) > 0
    assert f"of at most {MAX_GOLD} (0% of" in said
    turned = {"base": TEXTS["sft"], "sft": TEXTS["base"]}
    _, worse = judges.gold_parts(PROMPTS, turned, replies, 2, Truth(ANNOTATOR))
    assert "(0% of" not in worse
    unfinished = replies | {"sft": [[5, 5]] * 4}
    cut, _ = judges.gold_parts(PROMPTS, TEXTS, unfinished, 2, Truth(ANNOTATOR))
    lost = float(cut["SFT"].iloc[-1].split()[0]) - float(parts["SFT"].iloc[-1].split()[0])
    assert lost == pytest.approx(-1, abs=0.011), "a reply without its end pays for it"
