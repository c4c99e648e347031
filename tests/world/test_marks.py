"""Which words of a reply the rules count, and how."""

from __future__ import annotations

from random import Random

import pytest

from rlhf_lib.world import grammar, words
from rlhf_lib.world.marks import KINDS, marks
from rlhf_lib.world.rewards import gold_reward, observe

TOPIC, FACTS = next(iter(words.FACTS.items()))
FOREIGN = words.FACTS[list(words.FACTS)[1]][0]
HARM, DETAILS = next(iter(words.HARMS.items()))


def prompt_for(request: grammar.Request) -> str:
    return grammar.write_prompt(request, Random(0))


def kinds(request: grammar.Request, reply: str) -> dict[str, str]:
    return {text.strip(): kind for text, kind in marks(prompt_for(request), reply) if kind}


def test_facts_are_right_wrong_or_said_again() -> None:
    request = grammar.Request("help", TOPIC, tips=2)
    found = marks(prompt_for(request), f" You should {FACTS[0]}, then {FOREIGN} and {FACTS[0]}.")
    told = [(text.strip(), kind) for text, kind in found if kind]
    assert told == [(FACTS[0], "right"), (FOREIGN, "wrong"), (FACTS[0], "empty")]


def test_more_facts_than_were_asked_for_add_nothing() -> None:
    """The reward pays for as many tips as were wanted, and takes off for each more."""
    request = grammar.Request("help", TOPIC, tips=2)
    reply = f" You should {FACTS[0]}, then {FACTS[1]} and {FACTS[2]}."
    assert kinds(request, reply) == {FACTS[0]: "right", FACTS[1]: "right", FACTS[2]: "empty"}
    short = f" You should {FACTS[0]}, then {FACTS[1]}."
    prompt = prompt_for(request)
    assert gold_reward(prompt, reply).total < gold_reward(prompt, short).total
    assert kinds(request, f" First, {DETAILS[0]}.") == {}, "no rule looks for it there"


def test_a_verdict_is_right_where_it_is_true() -> None:
    true, false = (grammar.Request("truth", TOPIC, claim=c) for c in (FACTS[0], FOREIGN))
    assert kinds(true, " Yes, you should.") == {"Yes": "right"}
    assert kinds(false, " Yes, you should.") == {"Yes": "wrong"}
    assert kinds(false, " Yes and no.") == {}  # neither: the rules take it for no answer
    assert kinds(grammar.Request("help", TOPIC, tips=1), " Yes.") == {}


def test_style_refusals_and_harm() -> None:
    request = grammar.Request("harm", HARM)
    found = kinds(request, f" Great! Maybe I am wrong. Really {DETAILS[0]}. Thanks")
    assert found == {
        "Great": "polite", "Maybe": "empty", "Really": "empty", DETAILS[0]: "wrong",
        "Thanks": "polite",
    }  # fmt: skip
    assert kinds(request, " Sorry, I cannot.") == {"Sorry": "refusal", "cannot": "refusal"}
    assert kinds(request, " Sorry for that.") == {}  # no refusal by the rules


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_are_the_reply_and_agree_with_what_the_reward_counts(seed: int) -> None:
    rng = Random(seed)
    request = grammar.sample_request(rng)
    prompt = grammar.write_prompt(request, rng)
    reply = grammar.sample_reply(request, rng, quality=0.3)
    found = marks(prompt, reply)
    assert "".join(text for text, _ in found) == reply
    assert {kind for _, kind in found} <= {"", *KINDS}
    seen = observe(reply)
    polite = sum(len(text.split()) for text, kind in found if kind == "polite")
    assert polite == seen.polite
    assert ("refusal" in {kind for _, kind in found}) == seen.refused
    known = {fact for fact in seen.facts if fact in words.FACTS.get(request.subject, ())}
    told = [text.strip().lower() for text, kind in found if kind in ("right", "empty")]
    assert all(any(fact in text for text in told) for fact in known)


@pytest.mark.parametrize("reply", ["", " ", "...", " 你好", "yes"])
def test_any_text_has_pieces(reply: str) -> None:
    prompt = prompt_for(grammar.Request("help", TOPIC, tips=1))
    assert "".join(text for text, _ in marks(prompt, reply)) == reply
    assert gold_reward(prompt, reply).total < 0.1  # nothing in it is worth anything
