"""The rows and models of the live loops."""

from __future__ import annotations

import pytest
import torch

from rlhf_lib.course.small import Small
from rlhf_lib.proofs import plain
from rlhf_lib.world.rewards import gold_reward


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def test_models_are_new_at_each_call_and_alike(small: Small) -> None:
    one, other = small.policy(), small.policy()
    assert one is not other
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(small.scorer().score.weight, small.scorer().score.weight)
    assert not any(p.requires_grad for p in small.reference().parameters())
    assert not one.training


def test_gold_is_that_of_the_text_up_to_its_end(small: Small) -> None:
    """Whatever is padding, stands behind the end, or is left out of the mask."""
    prompts = small.prompts[:3]
    texts = [" No, you should not.", " Yes. Thanks, friend.", " I would"]
    replies = small.tokenizer(texts, add_special_tokens=False)["input_ids"]
    replies = [[*replies[0], small.eos, replies[1][0]], [*replies[1], small.eos], replies[2]]
    batch = plain.pad([p.ids for p in prompts], replies)
    found = small.gold(batch)
    for prompt, text, end, gold in zip(prompts, texts, (1, 1, 0), found.tolist(), strict=True):
        assert gold == pytest.approx(gold_reward(prompt.text, text, bool(end)).total)
    fewer = batch._replace(mask=batch.mask * (batch.ids[:, -batch.mask.shape[1] :] != small.eos))
    assert torch.equal(small.gold(fewer), found)


def test_words_show_line_ends(small: Small) -> None:
    words = small.words(small.prompts[0].ids)
    assert "".join(words).replace("\\n", "\n") == small.prompts[0].text
