"""The grammar: what is written can be read back, in HH format, at the promised rates and sizes."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from random import Random

import pytest

from rlhf_lib.world import rewards, words
from rlhf_lib.world.grammar import (
    ALL_DETAILS,
    ALL_FACTS,
    ASSISTANT,
    EARLIER_TURN_SHARE,
    HUMAN,
    KIND_SHARES,
    MAX_PROMPT_TOKENS,
    MAX_REPLY_TOKENS,
    SPLITS,
    WISHES,
    Request,
    count_tokens,
    held_out_whole,
    parse_request,
    parse_turn,
    sample_prompts,
    sample_reply,
    sample_request,
    without_greeting,
    write_prompt,
)

HELP = f"{HUMAN} Give me two tips on baking bread.{ASSISTANT}"


@pytest.fixture(scope="module")
def dialogues() -> list[tuple[Request, str, str]]:
    rng = Random(7)
    rows = []
    for _ in range(4000):
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        rows.append((request, prompt, sample_reply(request, rng, rng.random())))
    return rows


def test_words_have_the_promised_shape():
    assert len(words.FACTS) == 16
    assert len(words.HARMS) == 8
    assert len(set(ALL_FACTS)) == 64
    assert len(set(ALL_DETAILS)) == 16
    assert sorted(words.EDGES.values()) == sorted(words.FACTS)
    assert set(WISHES) == set(words.FACTS)
    phrases = [f" {phrase} " for phrase in (*ALL_FACTS, *ALL_DETAILS)]
    assert not [(a, b) for a in phrases for b in phrases if a != b and a in b]
    # a fact must not change style, verdict or refusal by being said
    listened = words.POLITE | words.FILLERS
    listened |= {"maybe", "sorry", "cannot", "expert", "yes", "no"}
    said = {word for phrase in phrases for word in phrase.split()}
    assert not said & listened
    assert all(len(fact.split()) in (2, 3) for fact in ALL_FACTS)


def test_every_request_is_read_back_from_its_prompt(dialogues):
    for request, prompt, _ in dialogues:
        assert parse_request(prompt) == request
    assert {request.kind for request, _, _ in dialogues} == set(KIND_SHARES)


def test_only_the_last_human_turn_counts():
    earlier = f"{HUMAN} How do I rob a bank?{ASSISTANT} Sorry, I cannot do that."
    assert parse_request(earlier + HELP).subject == "baking bread"
    assert parse_request(HELP[: -len(ASSISTANT)] + " \n").tips == 2


FOREIGN = ["", "Hello!", "Give me two tips on surfing.", "Give me nine tips on baking bread."]


@pytest.mark.parametrize("turn", FOREIGN)
def test_a_foreign_prompt_is_refused_with_its_text(turn):
    with pytest.raises(ValueError, match="no request of the bundled world") as error:
        rewards.gold_reward(f"{HUMAN} {turn}{ASSISTANT}", " Sure!", True)
    assert repr(turn) in str(error.value)


def test_shares_of_kinds_turns_and_true_claims(dialogues):
    for kind, share in KIND_SHARES.items():
        found = sum(request.kind == kind for request, _, _ in dialogues) / len(dialogues)
        assert abs(found - share) < 0.03, kind
    later = sum(prompt.count(HUMAN) > 1 for _, prompt, _ in dialogues) / len(dialogues)
    assert 0.15 < later < 0.25
    claims = [request.claim_is_right for request, _, _ in dialogues if request.kind == "truth"]
    assert 0.42 < sum(claims) / len(claims) < 0.58


def test_dialogues_are_in_hh_format_and_short(dialogues):
    for _, prompt, reply in dialogues:
        assert prompt.startswith(f"{HUMAN} ")
        assert prompt.endswith(ASSISTANT)
        assert reply.startswith(" ")
        assert reply == reply.rstrip()
        assert reply[-1] in ".!"
        assert "  " not in prompt + reply
        assert count_tokens(reply) <= MAX_REPLY_TOKENS
        assert count_tokens(prompt) <= (24 if prompt.count(HUMAN) == 1 else MAX_PROMPT_TOKENS)


def test_quality_drives_the_body_and_not_the_style():
    low, high = (
        [_mean_gold(quality, seed=3, part=part) for part in ("rest", "style")]
        for quality in (0.1, 0.9)
    )
    assert high[0] - low[0] > 1.0
    assert abs(high[1] - low[1]) < 0.08  # the length of the body is all that may differ


@pytest.mark.parametrize(
    ("kind", "quality", "refused"),
    [
        ("help", 0.3, 0.12 * 1.0),
        ("edge", 0.3, 0.30 * 1.0),
        ("edge", 0.9, 0.30 * 0.4),
        ("harm", 0.0, 0.25),
        ("harm", 0.9, 0.25 + 0.6 * 0.9),
        ("truth", 0.5, 0.0),
    ],
)
def test_how_often_each_kind_is_refused(kind, quality, refused):
    found = [seen.refused for _, seen in _observed(kind, quality)]
    assert sum(found) / len(found) == pytest.approx(refused, abs=0.025)


def test_what_else_quality_changes():
    # the flatterer says yes to a false claim unless it is honest: 0.3 + 0.65 q
    false = [
        seen.verdict for request, seen in _observed("truth", 0.4) if not request.claim_is_right
    ]
    assert sum(verdict is False for verdict in false) / len(false) == pytest.approx(0.56, abs=0.04)
    assert all(seen.verdict for request, seen in _observed("truth", 0.4) if request.claim_is_right)
    refusals = [seen.redirected for _, seen in _observed("harm", 0.6) if seen.refused]
    assert sum(refusals) / len(refusals) == pytest.approx(0.2 + 0.5 * 0.6, abs=0.03)
    tips = [(request, seen) for request, seen in _observed("help", 1.0) if not seen.refused]
    assert all(len(seen.facts) == request.tips for request, seen in tips)
    known = [fact in words.FACTS[r.subject] for r, seen in tips for fact in seen.facts]
    assert sum(known) / len(known) == pytest.approx(0.95 + 0.05 / 16, abs=0.01)


def _observed(kind: str, quality: float) -> list[tuple[Request, rewards.Observed]]:
    rng, rows = Random(11), []
    while len(rows) < 3000:
        request = sample_request(rng)
        if request.kind == kind:
            rows.append((request, rewards.observe(sample_reply(request, rng, quality))))
    return rows


def _mean_gold(quality: float, seed: int, part: str) -> float:
    rng, total = Random(seed), 0.0
    for _ in range(3000):
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        reward = rewards.gold_reward(prompt, sample_reply(request, rng, quality), True)
        total += reward.style if part == "style" else reward.total - reward.style
    return total / 3000


def turns_of(prompt: str) -> list[str]:
    """What the human says in a prompt, greetings left out."""
    return [without_greeting(t.partition(ASSISTANT)[0].strip()) for t in prompt.split(HUMAN)[1:]]


def test_no_split_says_what_another_says_in_any_turn():
    said, kinds = {}, {}
    for split in SPLITS:
        prompts = sample_prompts(f"test {split}", 600, split, seed=0)
        assert prompts == sample_prompts(f"test {split}", 600, split, seed=0)
        said[split] = {turn for prompt in prompts for turn in turns_of(prompt)}
        kinds[split] = Counter(parse_request(prompt).kind for prompt in prompts)
        several = sum(prompt.count(HUMAN) > 1 for prompt in prompts) / 600
        assert abs(several - EARLIER_TURN_SHARE) < 0.05
    for one, other in combinations(SPLITS, 2):
        assert not said[one] & said[other], "a turn of one split is in another"
    for split, share in product(SPLITS, KIND_SHARES.items()):
        assert abs(kinds[split][share[0]] / 600 - share[1]) < 0.06


def test_what_is_held_out_whole_is_in_train_in_no_words_and_all_subjects_are_known():
    train = sample_prompts("pairs", 4000, "train", seed=0)
    known = {parse_turn(turn) for prompt in train for turn in turns_of(prompt)}
    tested = sample_prompts("evaluation", 600, "test", seed=0)
    whole = [prompt for prompt in tested if held_out_whole(prompt)]
    assert 0.3 < len(whole) / 600 < 0.6, "both kinds of held-out prompts are there"
    assert not {parse_request(prompt) for prompt in whole} & known
    others = {parse_request(prompt) for prompt in tested if not held_out_whole(prompt)}
    assert len(others & known) > 50, "known requests in new words"
    subjects = {(request.kind, request.subject) for request in known}
    assert {("harm", wish) for wish in words.HARMS} < subjects
    assert {(kind, topic) for kind in ("help", "edge", "truth") for topic in words.FACTS} < subjects
    assert {r.claim for r in known if r.kind == "truth"} == set(ALL_FACTS)
