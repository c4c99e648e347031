"""Decoding with a fixed cache: the same tokens as decoding step by step, whoever ends when."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lib.models import generation
from rlhf_lib.models.generation import generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [12], [9, 8, 7, 6], [20, 21, 22]] * 8


def unrecorded(step: generation.Step) -> generation.Step:
    return step


def test_the_fixed_cache_says_the_same(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    luck = torch.rand(len(PROMPTS), 24, dtype=torch.float64, generator=torch.manual_seed(3))
    usual = generate(causal_model, tiny_tokenizer, PROMPTS, 24, 0.7, uniforms=luck)
    eos = tiny_tokenizer.eos_token_id
    cache = generation.roomy_cache(causal_model, 24)
    with torch.no_grad():
        mask, logits = generation.prefill(causal_model, PROMPTS, eos, cache)

        def draw(logits: torch.Tensor, luck: torch.Tensor) -> torch.Tensor:
            return generation.draw_tokens(logits / 0.7, luck)

        found = generation.decode_recorded(
            causal_model, cache, mask, logits, draw, luck, eos, record=unrecorded
        )
    assert found == usual
    assert len({len(reply) for reply in usual}) > 1, "the example should have several lengths"
