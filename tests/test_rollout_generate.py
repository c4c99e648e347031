"""Generation: where responses end, what they are samples of, and that padding plays no part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lib.logprobs import response_logprobs
from rlhf_lib.rollout import generate, is_finished

EOS = 1
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [9, 8, 7, 6], [20, 21, 22]]
COLD = 1e-3  # so cold that sampling is taking the likeliest token


@pytest.fixture(autouse=True)
def _readable_ids(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tiny_tokenizer.eos_token_id == EOS


def count_forwards(model: PreTrainedModel) -> list[int]:
    """The number of positions of every forward from now on."""
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


def test_a_response_ends_at_its_first_end_token(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    responses = generate(causal_model, tiny_tokenizer, PROMPTS * 40, max_new_tokens=12)
    ended = [r for r in responses if r[-1] == EOS]
    assert 0 < len(ended) < len(responses), "the example should have both kinds"
    assert len({len(r) for r in ended}) > 1
    assert all(EOS not in r[:-1] for r in responses)
    assert all(len(r) == 12 for r in responses if r[-1] != EOS)
    assert is_finished(responses, EOS).sum() == len(ended)


def test_generation_stops_when_every_row_has_ended(
    make_model: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the same for all tokens, except that ...
    model.lm_head.register_forward_hook(
        lambda layer, inputs, out: out.index_fill(-1, torch.tensor([EOS]), 50.0)
    )
    widths = count_forwards(model)
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=30) == [[EOS]] * 5
    assert len(widths) == 1


def test_the_cache_is_used(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    widths = count_forwards(causal_model)
    generate(causal_model, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    assert widths == [7, 1, 1, 1, 1]


@pytest.mark.parametrize("batch_size", [256, 2, 1])
def test_padding_does_not_change_what_is_said(
    batch_size: int, causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    together = generate(causal_model, tiny_tokenizer, PROMPTS, 10, COLD, batch_size)
    for prompt, response in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for token in response:  # greedy, without cache and without padding
            assert causal_model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_the_order_of_the_prompts_is_kept(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    forth = generate(causal_model, tiny_tokenizer, PROMPTS, 10, COLD, batch_size=2)
    back = generate(causal_model, tiny_tokenizer, PROMPTS[::-1], 10, COLD, batch_size=2)
    assert forth == back[::-1]
    assert len({tuple(r) for r in forth}) > 1


def test_samples_follow_the_whole_softmax_at_the_temperature(
    make_model: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, temperature, n = make_model("gpt2"), 1.7, 4000
    # what a saved model's own settings would do to samples
    model.generation_config.top_k, model.generation_config.top_p = 3, 0.5
    responses = generate(model, tiny_tokenizer, [[5, 6]] * n, 1, temperature, batch_size=n)
    counts = torch.bincount(torch.tensor(responses).flatten(), minlength=32) / n
    p = (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1)
    assert ((counts - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-3).all()
    # a filter would leave the unlikely half unsaid
    unlikely = p < p.median()
    assert counts[unlikely].sum().item() == pytest.approx(p[unlikely].sum().item(), rel=0.25)
    assert counts[unlikely].sum() > 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_generation_and_training_agree_on_the_logprobs(
    temperature: float, causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    steps: list[torch.Tensor] = []
    hook = causal_model.register_forward_hook(lambda m, i, out: steps.append(out.logits[:, -1]))
    torch.manual_seed(3)
    responses = generate(causal_model, tiny_tokenizer, PROMPTS, 8, temperature)
    hook.remove()
    logprobs, mask = response_logprobs(causal_model, PROMPTS, responses, temperature)
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))  # of the rows in the batch
    for row, i in enumerate(order):
        for t, token in enumerate(responses[i]):
            cached = (steps[t][row] / temperature).log_softmax(-1)[token]
            assert logprobs[i, t].item() == pytest.approx(cached.item(), abs=1e-4)
    assert mask.sum() > 10
