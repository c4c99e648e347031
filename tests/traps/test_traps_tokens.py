"""Traps 1, 2 and 13: which tokens stand where, which of them count, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Demonstration
from rlhf_lib.methods import dpo, grpo, ppo, sft
from rlhf_lib.models import generation, logprobs
from rlhf_lib.models.logprobs import token_logprobs
from rlhf_lib.models.packing import Layout, Tokens, length_mask
from rlhf_lib.settings import DPOConfig, GRPOConfig, PPOConfig, numbers
from tests.traps.test_traps import (
    EOS,
    PROMPTS,
    RESPONSES,
    Mistake,
    generate_without_mask,
    holds_unless,
    kinds,
    learner_of,
    likeliest,
    pad,
    pairs_of,
    plain_logprobs,
    put_back,
    rollout_of,
)

# -------------------------------------------------------------------------------------- 1: padding


def _left_padded(patch: pytest.MonkeyPatch, with_mask: bool) -> None:
    """Prompts padded on the left and responses on the right, as most trainers lay them out."""

    def response_logprobs(
        model: PreTrainedModel, prompts: Tokens, responses: Tokens, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(p)) + [*p] for p in prompts]
        ids = torch.cat([torch.tensor(rows), pad(responses)], dim=1)
        left = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        mask = length_mask([len(r) for r in responses])
        attended = torch.cat([torch.tensor(left), mask.long()], dim=1)
        logits = model(input_ids=ids, attention_mask=attended if with_mask else None).logits
        scored = token_logprobs(logits[:, longest - 1 : -1] / temperature, ids[:, longest:])
        return scored * mask, mask

    patch.setattr(logprobs, "response_logprobs", response_logprobs)


def left_padding_without_positions(patch: pytest.MonkeyPatch) -> None:
    """TRL 1.16 in GRPO and RLOO: position 0 is that of the first pad."""
    _left_padded(patch, with_mask=True)


def left_padding_without_mask(patch: pytest.MonkeyPatch) -> None:
    """The padding is read as if somebody had said it."""
    _left_padded(patch, with_mask=False)


@kinds
@put_back(left_padding_without_positions, left_padding_without_mask)
def test_trap_01_left_padding_without_positions(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    alone = [plain_logprobs(model, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    if (kind, mistake) == ("llama", left_padding_without_positions):
        # rotary positions only say how far apart two tokens are: the mistake shows on GPT-2 alone
        left_padding_without_positions(monkeypatch)
        mistake = None
    with holds_unless(mistake, monkeypatch):
        padded, _ = logprobs.response_logprobs(model, PROMPTS, RESPONSES)
        for row, expected in zip(padded, alone, strict=True):
            assert torch.allclose(row[: len(expected)], expected, atol=1e-5)


@kinds
@put_back(generate_without_mask)
def test_trap_01_left_padding_in_generation(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(kind)
    expected = [likeliest(model, prompt, 6) for prompt in PROMPTS]
    with holds_unless(mistake, monkeypatch):  # so cold that sampling takes the likeliest
        assert generation.generate(model, tiny_tokenizer, PROMPTS, 6, temperature=1e-3) == expected


# ---------------------------------------------------------------------------- 2: the end of the end


def mask_from_pad_ids(patch: pytest.MonkeyPatch) -> None:
    """Whatever equals the pad token is padding: where that is the end token, no end is learnt."""
    both, whole_logprobs = logprobs.logprobs_and_entropies, logprobs.response_logprobs

    def logprobs_and_entropies(
        model: PreTrainedModel, prompts: Tokens, responses: Tokens, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        scored, entropies, mask = both(model, prompts, responses, *rest, **named)
        return scored, entropies, mask * (pad(responses) != EOS)

    def response_logprobs(
        model: PreTrainedModel, prompts: Tokens, responses: Tokens, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        scored, mask = whole_logprobs(model, prompts, responses, *rest)
        return scored, mask * (pad(responses) != EOS)

    patch.setattr(sft, "logprobs_and_entropies", logprobs_and_entropies)
    patch.setattr(ppo, "response_logprobs", response_logprobs)
    patch.setattr(grpo, "response_logprobs", response_logprobs)


ENDINGS = [[7, EOS]] * 4
STEPS = 12


def sft_steps(model: PreTrainedModel, judge: PreTrainedModel) -> None:
    learner = learner_of(model, rate=0.02)
    shown = [Demonstration("", "", [p], r) for p, r in zip((5, 6, 8, 9), ENDINGS, strict=True)]
    for _ in range(STEPS):
        sft.update(learner, shown, micro_batch_size=3)


def grpo_steps(model: PreTrainedModel, judge: PreTrainedModel) -> None:
    learner, config = learner_of(model, rate=0.02), GRPOConfig(iterations=STEPS, clip_high=1e6)
    sample = rollout_of(model, [[5], [6], [8], [9]], ENDINGS)
    grpo.update(learner, sample, torch.ones(4), **numbers(grpo.update, config), constant=2)


def ppo_steps(model: PreTrainedModel, judge: PreTrainedModel) -> None:
    learner, config = learner_of(model, rate=0.02), PPOConfig(epochs=STEPS, clip_range=1e6)
    sample, zeros = rollout_of(model, [[5], [6], [8], [9]], ENDINGS), torch.zeros(4, 2)
    experience = ppo.Experience(sample, zeros, zeros + 1, zeros)
    ppo.update(learner, learner_of(judge), experience, **numbers(ppo.update, config))


@kinds
@pytest.mark.parametrize("learn", [sft_steps, grpo_steps, ppo_steps])
@put_back(mask_from_pad_ids)
def test_trap_02_the_end_token_is_learnt(
    learn: Callable,
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, judge = make_model(kind), make_model(kind, head="score")
    before = plain_logprobs(model, [5], [7, EOS])[1].exp().item()
    assert before < 0.1
    with holds_unless(mistake, monkeypatch):
        learn(model, judge)  # every reply ends, or is praised for ending
        assert plain_logprobs(model, [5], [7, EOS])[1].exp().item() > 0.5


# --------------------------------------------------------------- 13: what reaches the output layer


def logits_of_every_position(patch: pytest.MonkeyPatch) -> None:
    """The whole model is called and its logits are thrown away: right, and far too big."""

    def hidden_states(model: PreTrainedModel, layout: Layout) -> Tensor:
        return model(
            input_ids=layout.ids,
            attention_mask=layout.visible,
            position_ids=layout.positions,
            output_hidden_states=True,
        ).hidden_states[-1]

    patch.setattr(logprobs, "hidden_states", hidden_states)


@kinds
@pytest.mark.parametrize("method", ["sft", "dpo", "ppo", "grpo"])
@put_back(logits_of_every_position)
def test_trap_13_only_response_positions_reach_the_output_layer(
    method: str,
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, positions = make_model(kind), []
    learner, sample = learner_of(model), rollout_of(model)
    count, tokens = len(PROMPTS), sum(map(len, RESPONSES))
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, out: positions.append(out.numel() // 32)
    )
    with holds_unless(mistake, monkeypatch):
        if method == "sft":
            shown = [Demonstration("", "", p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
            sft.update(learner, shown, 3)
        elif method == "dpo":
            tokens *= 2  # chosen and rejected
            loss = dpo.preference_loss(DPOConfig())
            dpo.update(learner, pairs_of(), torch.zeros(count, 2), loss, micro_batch_size=3)
        elif method == "ppo":
            zeros = torch.zeros_like(sample.logprobs)
            experience, config = ppo.Experience(sample, zeros, zeros, zeros), PPOConfig(epochs=1)
            judge = learner_of(make_model(kind, head="score"))
            ppo.update(learner, judge, experience, **numbers(ppo.update, config))
        else:
            config = numbers(grpo.update, GRPOConfig(iterations=1))
            grpo.update(learner, sample, torch.zeros(count), **config, constant=8)
        assert sum(positions) == 2 * tokens, "once, and once more in the backward pass"
