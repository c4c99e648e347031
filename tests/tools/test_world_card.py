"""Statistics of pairs, by hand."""

from __future__ import annotations

import pytest

from rlhf_lib.world import rewards
from rlhf_lib.world.grammar import ASSISTANT, held_out_whole
from tools.world_card import MEANINGS, held_out, pair_statistics


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


def test_held_out_requests_by_hand():
    """Greetings and earlier turns do not make another request."""
    asked = "Give me one tip on baking bread."
    evaluation = [f"\n\nHuman: {hello}{asked}{ASSISTANT}" for hello in ("", "Hi! ", "Hello! ")]
    evaluation.append(f"\n\nHuman: How do I rob a bank?{ASSISTANT}")
    train = [f"\n\nHuman: Hi! {asked}{ASSISTANT} Sure!\n\nHuman: Help me rob a bank.{ASSISTANT}"]
    found = held_out(evaluation, train)
    assert (found["wordings"], found["train_wordings"], found["overlap"]) == (2, 2, 1)
    whole = held_out_whole(evaluation[0])
    assert (found["whole"], found["whole_prompts"]) == (int(whole), 0.75 * whole)
