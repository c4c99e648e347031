"""Held-out texts and chosen replies: from where they should be, and scored as by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_lib.data.encoding import Encoder, Prompt
from rlhf_lib.data.truth import truth_of
from rlhf_lib.measure import evaluate
from rlhf_lib.models.load import load_tokenizer


def test_the_bundled_worlds_texts_are_its_own_and_distinct(tiny_data: Any) -> None:
    world = replace(tiny_data, truth=truth_of("bundled"))
    encoder = Encoder(load_tokenizer("tiny"), 80, 48)
    texts, what = evaluate.heldout_texts(world, encoder, 300)
    assert what == world.truth.heldout_what
    assert len({(t.prompt_text, t.response_text) for t in texts}) == 300
    assert all(t.prompt_text.endswith("Assistant:") and t.response for t in texts)


def test_real_datas_texts_are_the_chosen_replies_of_the_test_pairs(
    tiny_data: Any, tiny_tokenizer: Any
) -> None:
    test = tiny_data.pairs["test"]
    twice = replace(tiny_data, pairs=tiny_data.pairs | {"test": [test[0], *test]})
    texts, what = evaluate.heldout_texts(twice, Encoder(tiny_tokenizer, 24, 8), 5)
    assert what == evaluate.REAL_TEXTS
    assert [t.response for t in texts] == [p.chosen for p in test[:5]]
    assert [t.prompt for t in texts] == [p.prompt for p in test[:5]]


def test_negative_logprobs_are_those_of_each_token_by_hand(
    make_model: Callable, tiny_data: Any
) -> None:
    model, texts = make_model("gpt2"), tiny_data.demonstrations[:5]
    got = evaluate.negative_logprobs(model, texts, batch_size=2)
    for text, total in zip(texts, got, strict=True):
        ids = torch.tensor([[*text.prompt, *text.response]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        start = len(text.prompt)
        by_hand = -sum(
            float(logprobs[start + t - 1, token]) for t, token in enumerate(text.response)
        )
        assert total == pytest.approx(by_hand, abs=1e-4)


def test_a_chosen_reply_is_found_by_the_prompts_tokens(tiny_data: Any) -> None:
    first, second, *_ = tiny_data.pairs["test"]
    twin = replace(first, chosen_text="another reply to it")
    prompts = [
        Prompt("longer before it was cut", second.prompt),
        Prompt("unknown", [31, 31, 31]),
        Prompt("first", first.prompt),
    ]
    found = evaluate.chosen_replies(prompts, [first, second, twin])
    assert found == {"longer before it was cut": second, "first": first}
