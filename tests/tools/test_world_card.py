"""Statistics of pairs, by hand."""

from __future__ import annotations

import pytest

from rlhf_lib.world import rewards
from rlhf_lib.world.grammar import ASSISTANT
from tools.world_card import MEANINGS, pair_statistics


def test_statistics_by_hand():
    prompt = f"\n\nHuman: Give me one tip on baking bread.{ASSISTANT}"
    good, bad = " First, weigh the flour.", " Sure! Happy to help! Maybe I am wrong."
    row = {"chosen": prompt + bad, "rejected": prompt + good}
    found = pair_statistics([row, row, row])
    p = rewards.preference_probability(prompt, good, bad)
    assert p > 0.5
    assert found.keys() == MEANINGS.keys()
    assert found["bayes_accuracy"] == pytest.approx(p)
    assert found["annotator_agreement"] == pytest.approx(p**2 + (1 - p) ** 2)
    wins = [found[name] for name in ("gold_agreement", "longer_wins", "politer_wins")]
    assert wins == [0.0, 1.0, 1.0]
    assert (found["chosen_words"], found["rejected_words"]) == (8.0, 4.0)
    tie = pair_statistics([{"chosen": prompt + good, "rejected": prompt + " Knead the dough, ok."}])
    assert (tie["gold_agreement"], tie["longer_wins"]) == (0.5, 0.5)
