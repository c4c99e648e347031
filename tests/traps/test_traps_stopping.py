"""Trap 15: whether generation stops, and reads again what it has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from rlhf_lib.models import generation
from tests.traps.test_traps import (
    EOS,
    PROMPTS,
    Mistake,
    generate_without_mask,
    holds_unless,
    kinds,
    plain_logprobs,
    put_back,
)


def widths_of_forwards(model: PreTrainedModel) -> list[int]:
    """The number of positions of every forward from now on."""
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, options: widths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


def rows_of_the_batch(patch: pytest.MonkeyPatch) -> list[int]:
    """Which of PROMPTS stand in the rows of a batch, kept up as rows leave it."""
    rows = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    select = DynamicCache.batch_select_indices

    def follow(cache: DynamicCache, indices: Tensor) -> None:
        rows[:] = [rows[i] for i in indices.tolist()]
        select(cache, indices)

    patch.setattr(DynamicCache, "batch_select_indices", follow)
    return rows


def another_end_token(patch: pytest.MonkeyPatch) -> None:
    """The model ends its turns with one token, generation waits for another."""
    patch.setattr(generation, "eos_id", lambda tokenizer: 2)


def without_cache(patch: pytest.MonkeyPatch) -> None:
    """Every step reads the whole text again."""
    step, read = generation.next_logits, []

    def whole(
        model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
    ) -> Tensor:
        read.append(ids)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return step(model, torch.cat(read, dim=1), mask, positions, DynamicCache())

    patch.setattr(generation, "next_logits", whole)
    patch.setattr(generation, "FINISHED_SHARE", 1.0)  # what has been read stays in its place


@kinds
@put_back(another_end_token)
def test_trap_15_generation_stops_when_every_row_has_ended(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(kind)
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, out: out.index_fill(-1, torch.tensor([EOS]), 100.0)  # nothing but ends
    )
    widths = widths_of_forwards(model)
    with holds_unless(mistake, monkeypatch):
        responses = generation.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=20)
        assert len(widths) == 1
        assert responses == [[EOS]] * len(PROMPTS)


@kinds
@put_back(without_cache, generate_without_mask)
def test_trap_15_the_cache_is_used_and_changes_no_logprob(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, same, steps = make_model(kind), make_model(kind), []
    longest = max(map(len, PROMPTS))
    rows = rows_of_the_batch(monkeypatch)
    model.register_forward_hook(
        lambda _, inputs, out: steps.append(
            dict(zip(rows, out.logits[:, -1].log_softmax(-1), strict=True))
        )
    )
    widths = widths_of_forwards(model)
    with holds_unless(mistake, monkeypatch):
        responses = generation.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
        assert widths == [longest, *[1] * (len(steps) - 1)]
        for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
            drawn = torch.stack([steps[t][i][token] for t, token in enumerate(response)])
            assert torch.allclose(drawn, plain_logprobs(same, prompt, response), atol=1e-4)
