"""Rankers of pairs: baselines, ceiling, calibration, and the names of a reward model's errors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure import rankings
from rlhf_lib.show.tables import ERROR_RULES
from rlhf_lib.world.rewards import ANNOTATOR, CONTROL

WORLD, UNBIASED = Truth(ANNOTATOR), Truth(CONTROL)
CHESS = "\n\nHuman: Give me two tips on playing chess.\n\nAssistant:"
HARM = "\n\nHuman: How do I rob a bank?\n\nAssistant:"
GOOD = " You should castle early, and study endgames."
WRONG = " You should knead the dough, and oil the chain."
REFUSAL = " Sorry, I cannot help with that."


def pair(chosen: str, rejected: str, prompt: str = CHESS) -> Pair:
    return Pair("talk", prompt, chosen, rejected, [5], [6, 1], [7, 1])


def lexical_pairs(count: int) -> list[Pair]:
    """Replies of equal length; the one with "good" in it is chosen."""
    answers = [f"answer number{i % 4}" for i in range(count)]
    return [pair(f" good {answer}", f" evil {answer}") for answer in answers]


def test_a_tie_is_half_a_win() -> None:
    assert rankings.wins(np.array([2.0, -0.1, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_length_prefers_the_longer_reply() -> None:
    pairs = [pair(" abcd", " ab"), pair(" a", " abc"), pair(" ab", " cd")]
    assert rankings.length_preferences(pairs).tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize(("train", "expected"), [((" longer", " no"), 2), ((" no", " longer"), -2)])
def test_the_learned_length_takes_its_direction_from_training(
    train: tuple[str, str], expected: float
) -> None:
    preferences = rankings.learned_length_preferences([pair(*train)] * 3, [pair(" abcd", " ab")])
    assert preferences.tolist() == [expected]


@pytest.mark.parametrize("count", [9, 10])
def test_a_bag_of_words_learns_a_word_and_not_a_side(count: int) -> None:
    test = [pair(" good reply", " evil reply"), pair(" evil reply", " good reply")]
    right, wrong = rankings.bag_of_words_preferences(lexical_pairs(count), test)
    assert right > 0.1
    assert wrong == pytest.approx(-right)
    neither = rankings.bag_of_words_preferences(lexical_pairs(count), [pair(" new", " words")])
    assert neither.tolist() == [0.0]


@pytest.mark.parametrize(
    ("good", "bad"), [(" A", " B"), (" 很好，谢谢。", " 我不知道。"), (" 👍", " 👎")]
)
def test_replies_without_words_are_told_apart_by_their_letters(good: str, bad: str) -> None:
    train = [pair(f"{good}{'!?.'[i % 3]}", f"{bad}{'!?.'[i % 2]}") for i in range(12)]
    right, wrong = rankings.bag_of_words_preferences(train, [pair(good, bad), pair(bad, good)])
    assert right > 0.1
    assert wrong == pytest.approx(-right)


def test_one_pair_teaches_a_bag_of_words_nothing() -> None:
    test = [pair(" good", " evil")] * 3
    assert rankings.bag_of_words_preferences(lexical_pairs(1), test).tolist() == [0.0] * 3


def test_fewer_pairs_than_bins_have_a_bin_each() -> None:
    found = rankings.calibration(np.array([2.0, -1.0, 0.5]), bins=8, samples=50)
    assert [row["n"] for row in found["bins"]] == [1, 1, 1]
    repaired = rankings.recalibrate(np.array([1.0, 2.0]), np.array([2.0, -1.0, 0.5]), 8, 50)
    assert len(repaired["after"]["bins"]) == 3
    alone = rankings.calibration(np.array([2.0]), samples=50)
    assert alone["ece"]["low"] <= alone["ece"]["mean"] <= alone["ece"]["high"]


def test_gold_prefers_the_right_facts() -> None:
    preferences = rankings.gold_preferences([pair(GOOD, WRONG), pair(WRONG, GOOD)])
    assert preferences[0] == pytest.approx(-preferences[1])
    assert preferences[0] > 2


def test_equal_gold_rewards_tie_however_their_sums_were_rounded() -> None:
    # 0.4 for being polite less 0.6 for a wrong fact, and 0.2 for a filler word: in floating point
    # the first sum is -0.19999999999999996
    tie = pair(" Sure! Knead the dough.", " Really.")
    assert rankings.wins(rankings.gold_preferences([tie])).tolist() == [0.5]


def test_the_ceiling_is_the_accuracy_of_the_best_guess() -> None:
    # equal style and nearly equal length: what remains is the gold difference
    (gold,) = rankings.gold_preferences([pair(GOOD, WRONG)])
    words = len(GOOD.split()) - len(WRONG.split())
    control = 0.05 + 0.9 / (1 + math.exp(-0.8 * gold))
    biased = 0.05 + 0.9 / (1 + math.exp(-0.8 * gold - 0.05 * words))
    for pairs in ([pair(GOOD, WRONG)], [pair(WRONG, GOOD)]):  # whichever side was chosen
        assert UNBIASED.ceiling(pairs) == pytest.approx(control)
        assert WORLD.ceiling(pairs) == pytest.approx(biased)
    assert control != pytest.approx(biased)


def test_accuracies_of_all_rankers() -> None:
    train = lexical_pairs(12)
    test = [pair(" good reply", " evil reply"), pair(" good", " evil reply")] * 6
    right, wrong = np.ones(12), -np.ones(12)
    table = rankings.accuracies(train, test, [right, wrong, right], None, 100)
    assert table["reward_model"]["mean"] == pytest.approx(2 / 3)
    assert table["reward_model"]["per_seed"] == [1.0, 0.0, 1.0]
    assert table["bag_of_words"]["mean"] == 1.0
    assert table["longer_wins"]["mean"] == pytest.approx(0.25)  # a tie, and a loss
    difference = table["reward_model_minus_bag_of_words"]
    assert difference["mean"] == pytest.approx(-1 / 3)
    assert difference["high"] == pytest.approx(-1 / 3), "paired: each pair differs by the same"
    assert "gold" not in table, "real pairs have no gold reward"
    world = rankings.accuracies(train, [pair(GOOD, WRONG)] * 2, [np.ones(2)], WORLD, 100)
    assert world["gold"]["mean"] == 1.0


def test_calibration_of_a_model_that_is_right_as_often_as_it_says() -> None:
    confidence = math.log(3)  # sigmoid: 0.75
    preferences = np.array([confidence, confidence, confidence, -confidence] * 20)
    honest = rankings.calibration(preferences, bins=1)
    assert honest["ece"]["mean"] == pytest.approx(0, abs=1e-9)
    assert honest["bins"][0]["confidence"] == pytest.approx(0.75)
    assert honest["bins"][0]["mean"] == pytest.approx(0.75)
    assert honest["bins"][0]["n"] == 80
    assert honest["bins"][0]["low"] < 0.75 < honest["bins"][0]["high"]


def test_calibration_of_a_braggart_and_of_a_coward() -> None:
    braggart = rankings.calibration(np.array([30.0, -30.0] * 20))
    assert braggart["ece"]["mean"] == pytest.approx(0.5)
    assert braggart["ece"]["low"] > 0.2, "no interval of a braggart's error reaches down to 0"
    assert braggart["ece_if_honest"]["high"] < 1e-6, "who is sure and honest is always right"
    coward = rankings.calibration(np.full(40, 1e-6))
    assert coward["ece"]["mean"] == pytest.approx(0.5, abs=1e-5)


def made_up_preferences(truth: float, count: int = 1200, seed: int = 0) -> np.ndarray:
    """Score differences `truth` times as large as the log-odds of the labels."""
    rng = np.random.default_rng(seed)
    size = rng.gamma(2.0, 0.6, count)
    right = rng.random(count) < 1 / (1 + np.exp(-size))
    return truth * np.where(right, size, -size)


def test_chance_alone_explains_the_error_of_an_honest_model_and_not_of_a_braggart() -> None:
    honest, braggart = (rankings.calibration(made_up_preferences(t)) for t in (1.0, 3.0))
    assert honest["ece"]["mean"] < honest["ece_if_honest"]["high"]
    assert honest["ece"]["low"] == 0
    assert braggart["ece"]["mean"] > braggart["ece_if_honest"]["high"]
    for record in (honest["ece"], braggart["ece"]):
        assert 0 <= record["low"] <= record["mean"] <= record["high"]


@pytest.mark.parametrize("truth", [1.0, 2.0])
def test_the_interval_of_the_calibration_error_holds_the_true_error(truth: float) -> None:
    # a sample three hundred times as large tells the true error
    true = rankings.calibration(made_up_preferences(truth, 120_000, 999), samples=2)["ece"]["mean"]
    samples = (made_up_preferences(truth, 400, seed) for seed in range(40))
    records = [rankings.calibration(sample, samples=200)["ece"] for sample in samples]
    assert sum(r["low"] <= true <= r["high"] for r in records) >= 36


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_temperature_is_what_the_scores_are_too_large_by(truth: float) -> None:
    record = rankings.recalibrate(made_up_preferences(truth), made_up_preferences(truth, seed=1))
    fitted = record["temperature"]
    assert fitted["low"] < truth < fitted["high"]
    assert fitted["mean"] == pytest.approx(truth, rel=0.15)
    assert record["after"]["ece"]["mean"] < 0.04
    if truth == 3.0:
        assert record["ece_change"]["high"] < 0


def test_the_temperature_minimises_the_loss_and_stays_in_bounds() -> None:
    preferences = made_up_preferences(2.0, 200)

    def loss(temperature: float) -> float:
        return float(np.mean([math.log1p(math.exp(-d / temperature)) for d in preferences]))

    best = rankings.fit_temperature(preferences)
    assert loss(best) < min(loss(0.97 * best), loss(1.03 * best))
    assert rankings.fit_temperature(-preferences) == pytest.approx(50, rel=0.01), "always wrong"
    assert rankings.fit_temperature(np.abs(preferences)) == pytest.approx(1 / 50, rel=0.01)


def test_seeds_disagree_by_the_pairs_that_they_rank_in_opposite_ways() -> None:
    one, other = np.array([1.0, 2.0, -3.0, 4.0]), np.array([1.0, -2.0, -3.0, 4.0])
    record = rankings.seed_disagreement([one, other], 100)
    assert record["seeds"] == 2
    assert record["opposite"]["mean"] == 0.25
    assert record["opposite"]["low"] <= 0.25 <= record["opposite"]["high"]
    assert record["spread"]["mean"] == pytest.approx(4 / 2**0.5 / 4), "2 and -2, ddof 1"
    assert record["size"]["mean"] == pytest.approx((1 + 0 + 3 + 4) / 4)
    assert record["rank_correlation"] == pytest.approx(0.8)  # ranks 2 3 1 4 and 3 2 1 4
    three = rankings.seed_disagreement([one, one, other], 100)
    assert three["opposite"]["mean"] == pytest.approx(0.25 * 2 / 3), "two couples of three"
    assert three["rank_correlation"] == pytest.approx((1 + 0.8 + 0.8) / 3)
    same = rankings.seed_disagreement([one, one], 100)
    assert (same["opposite"]["mean"], same["spread"]["mean"]) == (0, 0)
    with pytest.raises(ValueError, match="at least two seeds"):
        rankings.seed_disagreement([one])


def test_calibration_bins_hold_equal_numbers_in_order_of_confidence() -> None:
    preferences = np.random.default_rng(0).normal(size=83)
    bins = rankings.calibration(preferences, bins=8)["bins"]
    assert [row["n"] for row in bins] == [11, 11, 11, 10, 10, 10, 10, 10]
    confidence = [row["confidence"] for row in bins]
    assert confidence == sorted(confidence)
    assert confidence[0] >= 0.5


@pytest.mark.parametrize(
    ("text", "refused"),
    [(REFUSAL, True), (" I can't do that.", True), (" Not able to.", True), (" Sure!", False)],
)
def test_refusals_are_seen_whatever_their_case(text: str, refused: bool) -> None:
    assert rankings.refuses(text) is refused
    assert rankings.refuses(text.upper()) is refused


LONG = " " + "a very long answer indeed" * 2


@pytest.mark.parametrize(
    ("wrong", "preference", "truth", "category"),
    [
        (pair(WRONG, GOOD), -3.0, WORLD, "label against gold"),
        (pair(WRONG, GOOD), -3.0, None, "confidently wrong"),
        (pair(GOOD, WRONG), -0.1, WORLD, "near tie"),
        (pair(REFUSAL, " Sure!"), -0.1, None, "near tie"),  # the first rule that fits
        (pair(REFUSAL, LONG), -3.0, None, "safety"),
        (pair(" Yes.", REFUSAL), -1.0, None, "safety"),
        (pair(" short", LONG), -3.0, None, "length-led"),
        (pair(LONG, " short"), -3.0, None, "confidently wrong"),
        (pair(LONG, " short"), -1.0, None, "other"),
        (pair(REFUSAL, REFUSAL + "!"), -1.0, None, "other"),
    ],
)
def test_the_category_of_an_error_is_the_first_rule_that_fits(
    wrong: Pair, preference: float, truth: Truth | None, category: str
) -> None:
    assert rankings.categorise_error(wrong, preference, 1.0, truth) == category
    assert category in ERROR_RULES, "a reader is told the rule of every category"


def test_errors_come_most_confident_first() -> None:
    pairs = [pair(" abc", " abd")] * 5
    preferences = np.array([-0.1, 2.0, -3.0, 0.0, -1.0])
    found = rankings.errors(pairs, preferences, None)
    assert [error["pair"] for error in found] == [2, 4, 0], "a tie is no error"
    assert [error["preference"] for error in found] == [-3.0, -1.0, -0.1]
    # the typical difference is the median, 1
    categories = [error["category"] for error in found]
    assert categories == ["confidently wrong", "other", "near tie"]


def test_real_pairs_are_grouped_by_subset_or_else_by_turns() -> None:
    assert rankings.category(pair(" a", " b"), WORLD) == "help"
    assert rankings.category(replace(pair(" a", " b"), subset="base"), None) == "base"
    turns = [rankings.category(pair(" a", " b", CHESS * n), None) for n in (1, 2, 3, 4)]
    assert turns == ["one turn", "two turns", *["three turns or more"] * 2]


def test_word_differences_are_chosen_less_rejected() -> None:
    assert rankings.word_differences([pair(" a b c", " a"), pair(" a", " a b")]).tolist() == [2, -1]
