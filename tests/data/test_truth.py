"""What is known of data: of the bundled world all, of anything else nothing."""

from __future__ import annotations

import pytest

from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.truth import Truth, truth_of
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.settings import load_profile
from rlhf_lib.world.rewards import ANNOTATOR, CONTROL, gold_reward, preference_probability


@pytest.fixture(scope="module")
def world() -> PreferenceData:
    return load_data(load_profile("smoke").data, load_tokenizer("tiny"))


@pytest.mark.parametrize(
    ("source", "truth"),
    [
        ("bundled", Truth(ANNOTATOR)),
        ("bundled:control", Truth(CONTROL)),
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


def test_held_out_texts_are_those_of_the_world_and_in_no_train_split(world: PreferenceData) -> None:
    texts = world.truth.heldout()
    assert len(texts) == 1000
    assert all(reply.startswith(" ") for _, reply in texts)
    trained = {(d.prompt_text, d.response_text) for d in world.demonstrations}
    assert not trained & set(texts)
