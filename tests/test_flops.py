"""What passes cost is what torch counts, and measuring is not counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib.flops import sizes_of
from rlhf_lib.models.generation import generate
from rlhf_lib.models.load import add_lora
from rlhf_lib.models.logprobs import response_logprobs, sequence_scores
from rlhf_lib.runtime import MEASURING, count, counted, phase

PROMPTS, RESPONSES = [[3, 4, 5]] * 2 + [[6, 7]], [[8, 9], [10], [11, 12, 13]]


def added(do: Callable[[], object]) -> tuple[dict[str, float], int]:
    """What `do` adds to what is counted, and what torch sees of it: products with weights."""
    before = counted()
    with FlopCounterMode(display=False) as counter:
        do()
    seen = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in seen.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return {k: v - before.get(k, 0.0) for k, v in counted().items()}, products


def test_a_forward_pass_costs_what_torch_counts(causal_model: PreTrainedModel) -> None:
    with torch.no_grad():
        spent, seen = added(lambda: response_logprobs(causal_model, [[3, 4]], [[5, 6, 7]]))
    trunk, head = sizes_of(causal_model)
    assert spent["flops"] == seen == 2 * (5 * trunk + 3 * head)
    with torch.no_grad():  # a shared prompt once, and no padding
        spent, _ = added(lambda: response_logprobs(causal_model, PROMPTS, RESPONSES))
    assert spent["flops"] == 2 * ((3 + 3 + 2 + 3) * trunk + 6 * head)


def test_a_backward_pass_costs_twice_as_much(causal_model: PreTrainedModel) -> None:
    def learn() -> None:
        response_logprobs(causal_model, [[3, 4]], [[5, 6, 7]])[0].sum().backward()

    spent, seen = added(learn)
    trunk, head = sizes_of(causal_model)
    assert spent["flops"] == 6 * (5 * trunk + 3 * head)
    # torch sees the output layer once more, which is computed again in the backward pass
    assert seen == spent["flops"] + 2 * 3 * head


def test_what_does_not_learn_is_spared_a_product(causal_model: PreTrainedModel) -> None:
    trunk, _ = sizes_of(causal_model)
    add_lora(causal_model, 2, 4.0)
    causal_model.requires_grad_(False)
    for name, weights in causal_model.named_parameters():
        weights.requires_grad_("lora_" in name)
    whole, head = sizes_of(causal_model)
    adapters, no_head = sizes_of(causal_model, learnt=True)
    assert (whole, no_head) == (trunk + adapters, 0)
    assert adapters > 0
    spent, _ = added(lambda: response_logprobs(causal_model, [[3, 4]], [[5, 6, 7]]))
    assert spent["flops"] == 2 * (5 * (2 * whole + adapters) + 3 * 2 * head)


def test_a_scalar_head_counts_as_none(score_model: PreTrainedModel) -> None:
    with torch.no_grad():
        spent, _ = added(lambda: sequence_scores(score_model, [[3, 4]], [[5, 6, 7]]))
    assert spent["flops"] == 2 * 5 * sizes_of(score_model)[0]


def test_generation_counts_its_tokens_and_equal_prompts_once(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    replies: list[list[int]] = []
    spent, _ = added(lambda: replies.extend(generate(causal_model, tiny_tokenizer, PROMPTS, 4)))
    generated = sum(map(len, replies))
    trunk, head = sizes_of(causal_model)
    assert spent["generated"] == generated
    assert spent["flops"] == 2 * ((3 + 2 + generated) * trunk + generated * head)


def test_measuring_costs_nothing_however_deep_it_lies() -> None:
    before = counted()
    with phase("probe"):
        count(flops=1.0)
        with phase(MEASURING), phase("generation"):
            count(flops=100.0)
    assert counted()["flops"] == pytest.approx(before.get("flops", 0.0) + 1.0)
