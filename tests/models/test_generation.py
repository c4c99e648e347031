"""Generation: where responses end, what they are samples of, and that padding plays no part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lib.models import generation
from rlhf_lib.models.generation import CACHE, draw_tokens, generate
from rlhf_lib.models.logprobs import response_logprobs

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
    temperature: float,
    causal_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # of the rows in the batch, which leave it when they have ended
    rows = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    select, steps = DynamicCache.batch_select_indices, []

    def follow(cache: DynamicCache, places: Tensor) -> None:
        rows[:] = [rows[i] for i in places.tolist()]
        select(cache, places)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", follow)
    hook = causal_model.register_forward_hook(
        lambda m, i, out: steps.append(dict(zip(rows, out.logits[:, -1], strict=True)))
    )
    responses = generate(causal_model, tiny_tokenizer, PROMPTS, 8, temperature)
    hook.remove()
    logprobs, mask = response_logprobs(causal_model, PROMPTS, responses, temperature)
    for i, response in enumerate(responses):
        for t, token in enumerate(response):
            cached = (steps[t][i] / temperature).log_softmax(-1)[token]
            assert logprobs[i, t].item() == pytest.approx(cached.item(), abs=1e-4)
    assert mask.sum() > 10


# ------------------------------------------------------------------------------------- drawing


def test_draws_follow_the_softmax_to_its_rarest_token() -> None:
    n, p = 200_000, torch.tensor([0.5, 0.3, 0.15, 0.0495, 0.0005], dtype=torch.float64)
    luck = torch.rand(n, 1, dtype=torch.float64)
    tokens = draw_tokens((p.log() + 7).float().expand(n, -1), luck)
    assert tokens.shape == (n, 1)
    counts = torch.bincount(tokens[:, 0], minlength=5)
    assert chisquare(counts.numpy(), (n * p).numpy()).pvalue > 1e-3


def test_every_place_of_the_unit_interval_draws_a_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    places = torch.tensor([[0.25], [0.75], [1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(logits, places)[:, 0].tolist() == [1, 3, 3]


def test_a_certain_token_is_always_drawn() -> None:
    certain = torch.tensor([0, 3, 31]).repeat(500)
    logits = torch.full((1500, 32), -torch.inf).scatter(1, certain[:, None], 2.0)
    luck = torch.rand(1500, 1, dtype=torch.float64)
    assert torch.equal(draw_tokens(logits, luck)[:, 0], certain)


def test_the_luck_of_a_reply_is_its_own_wherever_it_is_drawn(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Alone, in a batch that rows leave, or in another order: equal luck says equal things."""
    prompts = PROMPTS * 8
    luck = torch.rand(len(prompts), 12, dtype=torch.float64)
    together = generate(causal_model, tiny_tokenizer, prompts, 12, uniforms=luck)
    assert len({len(reply) for reply in together}) > 3, "rows leave at different times"
    order = torch.randperm(len(prompts)).tolist()
    shuffled = generate(
        causal_model, tiny_tokenizer, [prompts[i] for i in order], 12, batch_size=7,
        uniforms=luck[order],
    )  # fmt: skip
    assert shuffled == [together[i] for i in order]
    assert together != generate(causal_model, tiny_tokenizer, prompts, 12, uniforms=1 - luck)


# ------------------------------------------------------------------- shared prompts, leaving rows


def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """Without cache, padding or company."""
    response: list[int] = []
    while len(response) < length and response[-1:] != [EOS]:
        ids = torch.tensor([[*prompt, *response]])
        response.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
    return response


def test_rows_that_end_leave_and_change_nothing_for_the_others(
    make_model: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for kind in ("gpt2", "llama"):
        model = make_model(kind)
        prompts = [[3 + i, 15 + i] * (1 + i % 3) for i in range(12)]
        # random models seldom end: a token that many say soon takes the place of the end
        says = [greedy(model, p, 12) for p in prompts]
        common = max({t for r in says for t in r[:6]}, key=lambda t: sum(t in r[:6] for r in says))
        model.get_output_embeddings().register_forward_hook(swapped(common))
        expected = [greedy(model, p, 12) for p in prompts]
        ended = [len(r) for r in expected if r[-1] == EOS]
        assert 3 < len(ended) < len(prompts), "the example should have both kinds"
        batches: list[int] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=batches: seen.append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        assert generate(model, tiny_tokenizer, prompts, 12, COLD) == expected
        assert batches[0] == len(prompts)
        assert batches[-1] <= len(prompts) - 0.75 * len(ended)
        assert batches == sorted(batches, reverse=True)


def swapped(token: int) -> Callable:
    """A hook: what the model says of `token`, it says of the end, and the other way round."""
    order = torch.arange(32)
    order[[EOS, token]] = order[[token, EOS]]
    return lambda layer, inputs, out: out[..., order]


def test_equal_prompts_are_computed_once(
    causal_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    shapes: list[tuple] = []
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 3 + [PROMPTS[0]]
    expected = [greedy(causal_model, p, 4) for p in prompts]
    assert expected[0] != expected[4]
    causal_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert generate(causal_model, tiny_tokenizer, prompts, 4, COLD) == expected
    assert shapes[0] == (2, 7)
    assert shapes[1] == (8, 1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_cache_has_room_from_the_start_and_grows_in_place(
    repeats: int,
    causal_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generation, "FINISHED_SHARE", 1.0)  # who leaves takes the cache along
    causal_model.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, out: out.index_fill(-1, torch.tensor([EOS]), -100.0)
    )
    seen: list[tuple[int, int, int]] = []

    def look(model: PreTrainedModel, args: tuple, kwargs: dict, output: object) -> None:
        layer = kwargs[CACHE].layers[-1]
        assert layer.keys.data_ptr() == layer.stores[0].data_ptr()
        assert layer.values.data_ptr() == layer.stores[1].data_ptr()
        seen.append((layer.keys.data_ptr(), layer.keys.shape[-2], layer.stores[0].shape[-2]))

    causal_model.register_forward_hook(look, with_kwargs=True)
    responses = generate(causal_model, tiny_tokenizer, PROMPTS * repeats, 9)
    assert {len(r) for r in responses} == {9}
    assert [places for _, places, _ in seen] == list(range(7, 16))
    grown = seen if repeats == 1 else seen[1:]  # repeated prompts leave the prefill's own store
    assert len({pointer for pointer, _, _ in grown}) == 1
    assert seen[-1][1] <= seen[-1][2] <= 8 + 9, "as much room as was asked for, and no more"
