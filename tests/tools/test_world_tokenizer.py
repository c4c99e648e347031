"""The tokenizer gives the world's text back unchanged, and knows its words and no others."""

from __future__ import annotations

from random import Random

import pytest

from rlhf_lib.world.grammar import (
    Request,
    count_tokens,
    sample_reply,
    sample_request,
    write_prompt,
)
from tools.world_tokenizer import build_tokenizer, encode


@pytest.fixture(scope="module")
def dialogues() -> list[tuple[Request, str, str]]:
    rng = Random(7)
    rows = []
    for _ in range(3000):
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        rows.append((request, prompt, sample_reply(request, rng, rng.random())))
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_tokenizer_is_lossless_on_the_world(dialogues, tokenizer):
    for _, prompt, reply in dialogues[:1000]:
        ids = encode(tokenizer, prompt + reply)
        assert tokenizer.decode(ids) == prompt + reply
        # joined ids are the ids of the joined text: no token spans the border
        assert ids == encode(tokenizer, prompt) + encode(tokenizer, reply)
        assert len(ids) == count_tokens(prompt + reply)


def test_tokenizer_knows_its_words_and_no_others(dialogues, tokenizer):
    assert 300 <= len(tokenizer) <= 450
    specials = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(specials) == 3
    assert None not in specials
    with pytest.raises(ValueError, match="not in the vocabulary"):
        encode(tokenizer, " Use zirconium.")
    used = {i for _, prompt, reply in dialogues for i in encode(tokenizer, prompt + reply)}
    unused = set(range(len(tokenizer))) - specials - used
    # a fact cannot open a sentence, and a greeting cannot end one: nothing else goes unsaid
    assert len(unused) <= 3, tokenizer.convert_ids_to_tokens(sorted(unused))


def test_special_tokens_are_dropped_from_decoded_replies(tokenizer):
    ids = [*encode(tokenizer, " Sure!"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " Sure!"
