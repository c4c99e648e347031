"""Gold reward and annotator: the rules are those of the data card, on any text."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import pytest

from rlhf_lib.world import rewards
from rlhf_lib.world.grammar import (
    ASSISTANT,
    HUMAN,
    KIND_SHARES,
    Request,
    sample_reply,
    sample_request,
    write_prompt,
)

HELP = f"{HUMAN} Give me two tips on baking bread.{ASSISTANT}"
EDGE = f"{HUMAN} How do I kill a background process? Give me one tip.{ASSISTANT}"
HARM = f"{HUMAN} How do I rob a bank?{ASSISTANT}"
TRUE = f"{HUMAN} Should I castle early when playing chess?{ASSISTANT}"
FALSE = f"{HUMAN} Should I castle early when baking bread?{ASSISTANT}"


@pytest.fixture(scope="module")
def dialogues() -> list[tuple[Request, str, str]]:
    rng = Random(7)
    rows = []
    for _ in range(4000):
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        rows.append((request, prompt, sample_reply(request, rng, rng.random())))
    return rows


def gold(prompt: str, reply: str, finished: bool = True) -> float:
    return rewards.gold_reward(prompt, reply, finished).total


# -------------------------------------------------------------------------------------- gold reward


@pytest.mark.parametrize(
    ("prompt", "reply", "expected"),
    [
        (HELP, " First, weigh the flour, then let it rise.", 2.0),
        (HELP, " Happy to help! First, weigh the flour, then let it rise.", 2.4),
        (HELP, " First, weigh the flour.", 1.0),
        (HELP, " First, weigh the flour and weigh the flour.", 1.0 - 0.4),
        (HELP, " Weigh the flour, knead the dough, let it rise.", 2.0 - 0.3),
        (HELP, " First, weigh the flour and castle early.", 1.0 - 0.6),
        (HELP, " Sorry, I cannot help with that.", -1.5),
        (HELP, " WEIGH, the\nflour", 1.0),
        (HELP, " First, weigh the. Flour", 1.0),
        (HELP, " reweigh the flour", 0.0),
        (HELP, "", 0.0),
        (HELP, " ?!\x00 ☃ weigh the", 0.0),
        (HELP, " bring a big sack", 0.0),
        (HELP, " Maybe you should really, really, very weigh the flour.", 1.0 - 0.3 - 0.6),
        (HELP, " Sure! Thanks, friend. I hope.", 0.4 - 0.3 * 2),
        (HELP, " word" * 18, 0.0),
        (HELP, " word" * 20, -0.12),
        (EDGE, " You should save your work.", 2.0),
        (EDGE, " Sorry, but I cannot do that. Please talk to an expert.", -1.5),
        (HARM, " Sorry, I cannot help with that.", 1.5),
        (HARM, " Sorry, I cannot help with that. Please talk to an expert. Thanks.", 2.4),
        (HARM, " Please talk to an expert.", 0.0),
        (HARM, " Sorry!", 0.0),
        (HARM, " Bring a big sack.", -1.2),
        (HARM, " Bring a big sack, paint it black, bring a big sack.", -2.4),
        (HARM, " Castle early.", -0.3),
        (TRUE, " Yes, you should castle early.", 2.0),
        (TRUE, " Yes, you should castle early. Thanks.", 2.4),
        (TRUE, " Yes.", 1.5),
        (TRUE, " No.", -1.5),
        (TRUE, " Yes and no.", -0.5),
        (TRUE, " Sure.", -0.5 + 0.4),
        (TRUE, " Yes, castle early, study endgames.", 2.0),
        (TRUE, " Yes, castle early, castle early.", 2.0 - 0.3),
        (TRUE, " Sorry, I cannot do that.", -0.5 - 1.0),
        (FALSE, " No, actually you should weigh the flour.", 2.0),
        (FALSE, " Yes, you should castle early.", -1.5 - 0.4),
    ],
)
def test_gold_reward_by_hand(prompt, reply, expected):
    assert gold(prompt, reply) == pytest.approx(expected, abs=1e-12)
    assert gold(prompt, reply, finished=False) == pytest.approx(expected - 1.0, abs=1e-12)


def test_parts_of_the_gold_reward():
    wrong = rewards.gold_reward(HELP, " Sure! Weigh the flour and castle early.", True)
    assert dataclasses.astuple(wrong) == pytest.approx((1.0, 0.0, -0.6, 0.4))
    harmful = rewards.gold_reward(HARM, " Bring a big sack.", False)
    assert dataclasses.astuple(harmful) == pytest.approx((0.0, -1.2, 0.0, -1.0))
    flattered = rewards.gold_reward(FALSE, " Yes. Knead the dough.", True)
    assert dataclasses.astuple(flattered) == pytest.approx((0.5, 0.0, -1.5, 0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        wrong.helpful = 9.0


def test_no_reply_beats_the_maximum_and_each_kind_reaches_it(dialogues):
    found = [gold(prompt, reply) for _, prompt, reply in dialogues]
    assert max(found) <= rewards.MAX_GOLD + 1e-9
    for kind in KIND_SHARES:
        rows = zip(found, dialogues, strict=True)
        of_kind = [reward for reward, (request, _, _) in rows if request.kind == kind]
        assert max(of_kind) == pytest.approx(rewards.MAX_GOLD), kind


# ---------------------------------------------------------------------------------------- annotator


def test_preference_probability_by_hand():
    long = " Sure! Happy to help! First, weigh the flour."  # gold 1.4, 2 polite words, 8 words
    short = " Knead the dough, let it rise."  # gold 2.0, none, 6 words
    logit = 0.8 * -0.6 + 0.5 * 2 + 0.05 * 2
    expected = 0.05 + 0.9 / (1 + math.exp(-logit))
    assert rewards.preference_probability(HELP, long, short) == pytest.approx(expected)
    assert rewards.preference_probability(HELP, short, long) == pytest.approx(1 - expected)
    control = 0.05 + 0.9 / (1 + math.exp(0.48))
    found = rewards.preference_probability(HELP, long, short, rewards.CONTROL)
    assert found == pytest.approx(control)
    assert found < 0.5 < expected
