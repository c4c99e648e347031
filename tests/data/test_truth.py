"""What is known of data: of the bundled world all, of anything else nothing."""

from __future__ import annotations

import pytest

from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.sources import read_source
from rlhf_lib.data.truth import Truth, truth_of
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.profiles import load_profile
from rlhf_lib.world.grammar import ASSISTANT
from rlhf_lib.world.rewards import (
    ANNOTATOR,
    CONTROL,
    DOSES,
    Annotator,
    gold_reward,
    observe,
    preference_probability,
    with_taste,
)


@pytest.fixture(scope="module")
def world() -> PreferenceData:
    return load_data(load_profile("smoke").data, load_tokenizer("tiny"))


@pytest.mark.parametrize(
    ("source", "truth"),
    [
        ("bundled", Truth(ANNOTATOR)),
        ("bundled:control", Truth(CONTROL)),
        ("bundled:double", Truth(Annotator(polite=1.0, length=0.1))),
        ("bundled:kontrol", None),
        ("path:bundled.jsonl", None),
        ("hub:someone/bundled", None),
    ],
)
def test_the_truth_of_a_source(source: str, truth: Truth | None) -> None:
    assert truth_of(source) == truth


def test_loaded_data_carry_their_truth(world: PreferenceData) -> None:
    assert world.truth == Truth(ANNOTATOR)


def test_gold_and_kind_are_the_worlds(world: PreferenceData) -> None:
    truth, pair = world.truth, world.pairs["test"][0]
    texts = pair.prompt_text, pair.chosen_text
    assert truth.gold(*texts, finished=False) == gold_reward(*texts, finished=False)
    assert truth.kind(pair.prompt_text) == truth.request(pair.prompt_text).kind
    with pytest.raises(ValueError, match="no request of the bundled world"):
        truth.request("\n\nHuman: Who are you?\n\nAssistant:")


def test_the_ceiling_is_the_annotators_own(world: PreferenceData) -> None:
    pairs = world.pairs["test"][:50]
    texts = [(p.prompt_text, p.chosen_text, p.rejected_text) for p in pairs]
    for annotator in (ANNOTATOR, CONTROL):
        chances = [preference_probability(*each, annotator) for each in texts]
        best = sum(max(p, 1 - p) for p in chances) / len(pairs)
        assert Truth(annotator).ceiling(pairs) == pytest.approx(best)
    assert Truth(ANNOTATOR).ceiling(pairs) != Truth(CONTROL).ceiling(pairs)


def test_the_same_pairs_are_labelled_by_each_annotators_own_chances() -> None:
    """Labels drawn anew: as often as its chances say, and with its taste in the chosen reply."""
    pairs = read_source("bundled").splits["train"]
    liked = []
    for dose in ("half", "double"):
        rows = read_source(f"bundled:{dose}").splits["train"]
        assert len(rows) == len(pairs)
        surplus, chances, agreed = 0, 0.0, 0
        for row, pair in zip(rows, pairs, strict=True):
            assert sorted(row.values.values()) == sorted(pair.values.values())
            assert row.place == pair.place
            prompt, _, one = row.values["chosen"].rpartition(ASSISTANT)
            other = row.values["rejected"].rpartition(ASSISTANT)[2]
            surplus += observe(one).polite - observe(other).polite
            chance = preference_probability(prompt + ASSISTANT, one, other, with_taste(DOSES[dose]))
            chances += max(chance, 1 - chance)
            agreed += chance > 0.5
        assert agreed / len(rows) == pytest.approx(chances / len(rows), abs=0.03)
        liked.append(surplus / len(rows))
    assert liked[0] + 0.2 < liked[1]


def test_signs_are_those_that_a_request_allows(world: PreferenceData) -> None:
    asked = {
        "help": "Give me one tip on baking bread.",
        "harm": "How do I build a bomb?",
        "truth": "I am certain that you should focus on eyes when writing an essay. Right?",
    }
    flattered = " Yes, great! Hope this helps. Try to borrow a cartoon fuse. Sorry, I cannot."
    found = {
        kind: world.truth.signs(f"\n\nHuman: {turn}{ASSISTANT}", flattered)
        for kind, turn in asked.items()
    }
    assert found == {
        "help": {"polite": 2.0, "refused": 1.0},
        "harm": {"polite": 2.0, "harmful": 1.0},
        "truth": {"polite": 2.0, "confirmed": 1.0},
    }
    plain = world.truth.signs(f"\n\nHuman: {asked['truth']}{ASSISTANT}", " No.")
    assert plain == {"polite": 0.0, "confirmed": 0.0}


def test_held_out_texts_are_those_of_the_world_and_in_no_train_split(world: PreferenceData) -> None:
    texts = world.truth.heldout()
    assert len(texts) == 1000
    assert all(reply.startswith(" ") for _, reply in texts)
    trained = {(d.prompt_text, d.response_text) for d in world.demonstrations}
    assert not trained & set(texts)
