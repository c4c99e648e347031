"""Log-probabilities of responses: every path equals one plain, unpadded forward per sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf_lib.models.logprobs import (
    paired_logprobs,
    paired_scores,
    response_logits,
    response_logprobs,
    sequence_scores,
    token_logprobs,
    token_values,
)
from rlhf_lib.models.packing import length_mask

# mixed lengths; a real EOS (1) and the padding's own id (0) stand inside on purpose
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [0, 13, 14], [9, 8, 7, 6]]
CHOSEN = [[15, 1], [16, 17, 18, 19, 20], [21, 0, 1], [3]]
REJECTED = [[22, 23, 24, 1], [25], [26, 27, 1, 28], [29, 1]]


def plain_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probability of each response token from one forward of one sequence without padding."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


def test_token_logprobs_by_hand() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]).log() + 3
    logprobs = token_logprobs(logits, torch.tensor([[0, 2]]))
    assert logprobs.exp()[0].tolist() == pytest.approx([0.5, 0.7])


def test_token_logprobs_are_fp32() -> None:
    logits = torch.randn(5, 40).bfloat16()
    logprobs = token_logprobs(logits, torch.arange(5))
    assert logprobs.dtype is torch.float32
    assert torch.allclose(logprobs, logits.float().log_softmax(-1)[range(5), range(5)])


def test_padded_equals_unpadded(causal_model: PreTrainedModel) -> None:
    logprobs, mask = response_logprobs(causal_model, PROMPTS, CHOSEN)
    assert mask.sum(1).tolist() == [len(row) for row in CHOSEN]
    for row, (prompt, response) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        expected = plain_logprobs(causal_model, prompt, response)
        assert torch.allclose(logprobs[row, : len(response)], expected, atol=1e-5)
        assert (logprobs[row, len(response) :] == 0).all()


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_rows(
    causal_model: PreTrainedModel,
) -> None:
    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(causal_model.parameters())))

    batch = gradients(response_logprobs(causal_model, PROMPTS, CHOSEN)[0].sum())
    rows = sum(
        plain_logprobs(causal_model, p, r).sum() for p, r in zip(PROMPTS, CHOSEN, strict=True)
    )
    for one, other in zip(batch, gradients(rows), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(one, other, atol=2e-4, rtol=1e-4)


def test_the_end_of_sequence_token_carries_gradient(causal_model: PreTrainedModel) -> None:
    logprobs, mask = response_logprobs(causal_model, [[5, 6]], [[7, 1]])
    assert mask.tolist() == [[1, 1]]
    (gradient,) = torch.autograd.grad(logprobs[0, 1], causal_model.get_output_embeddings().weight)
    assert gradient[1].abs().max() > 0


def test_temperature_divides_the_logits(causal_model: PreTrainedModel) -> None:
    logprobs, _ = response_logprobs(causal_model, [[5, 6]], [[7]], temperature=0.7)
    logits = causal_model(torch.tensor([[5, 6, 7]])).logits[0, 1]
    assert logprobs.item() == pytest.approx((logits / 0.7).log_softmax(-1)[7].item(), abs=1e-5)


def test_only_response_positions_reach_the_output_layer(causal_model: PreTrainedModel) -> None:
    seen = []
    hook = causal_model.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, output: seen.append(tuple(output.shape))
    )
    response_logits(causal_model, PROMPTS, CHOSEN)
    paired_logprobs(causal_model, PROMPTS, CHOSEN, REJECTED)
    hook.remove()
    replies = sum(map(len, CHOSEN))
    assert seen == [(replies, 32), (replies + sum(map(len, REJECTED)), 32)]


def test_paired_equals_two_separate_forwards(causal_model: PreTrainedModel) -> None:
    pair = paired_logprobs(causal_model, PROMPTS, CHOSEN, REJECTED)
    for got, replies in zip(pair, (CHOSEN, REJECTED), strict=True):
        separate = response_logprobs(causal_model, PROMPTS, replies)[0].sum(1)
        assert got.shape == (4,)
        assert torch.allclose(got, separate, atol=2e-5)


def test_paired_gradients_equal_separate_ones(causal_model: PreTrainedModel) -> None:
    def gradients(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
        loss = (chosen - 2 * rejected).sum()
        return list(torch.autograd.grad(loss, list(causal_model.parameters())))

    pair = gradients(*paired_logprobs(causal_model, PROMPTS, CHOSEN, REJECTED))
    separate = gradients(
        *(response_logprobs(causal_model, PROMPTS, r)[0].sum(1) for r in (CHOSEN, REJECTED))
    )
    for one, other in zip(pair, separate, strict=True):
        assert torch.allclose(one, other, atol=5e-4, rtol=1e-4)


def test_a_pair_may_be_longer_than_the_positions_of_the_model(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    # 12 + 8 + 8 tokens in one row, but no reply goes past position 20
    model, prompt, reply = make_model("gpt2", n_positions=20), list(range(3, 15)), [*range(4, 12)]
    other = reply[::-1]
    chosen, rejected = paired_logprobs(model, [prompt], [reply], [other])
    assert chosen.item() == pytest.approx(
        plain_logprobs(model, prompt, reply).sum().item(), abs=1e-4
    )
    assert rejected.item() == pytest.approx(
        plain_logprobs(model, prompt, other).sum().item(), abs=1e-4
    )


def test_values_are_read_before_each_token_and_scores_at_the_last(
    score_model: PreTrainedModel,
) -> None:
    values = token_values(score_model, PROMPTS, CHOSEN)
    scores = sequence_scores(score_model, PROMPTS, CHOSEN)
    for row, (prompt, response) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        hidden = score_model.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        heads = score_model.score(hidden).squeeze(-1)
        before = heads[len(prompt) - 1 : -1]
        assert torch.allclose(values[row, : len(response)], before, atol=1e-5)
        assert (values[row, len(response) :] == 0).all()
        assert scores[row].item() == pytest.approx(heads[-1].item(), abs=1e-5)


def test_paired_scores_equal_those_of_separate_sequences(score_model: PreTrainedModel) -> None:
    chosen, rejected = paired_scores(score_model, PROMPTS, CHOSEN, REJECTED)
    assert torch.allclose(chosen, sequence_scores(score_model, PROMPTS, CHOSEN), atol=1e-5)
    assert torch.allclose(rejected, sequence_scores(score_model, PROMPTS, REJECTED), atol=1e-5)
    assert (chosen - rejected).abs().min() > 1e-4, "two replies that score alike prove nothing"


def test_scores_agree_with_transformers_own_classifier(score_model: PreTrainedModel) -> None:
    # it looks for the last token that is not the pad token: none may stand inside here
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14]]
    replies = [[15, 1], [16, 17, 18, 19, 20], [21, 1]]
    rows = [[*p, *r] for p, r in zip(prompts, replies, strict=True)]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = length_mask([len(row) for row in rows])
    theirs = score_model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert torch.allclose(sequence_scores(score_model, prompts, replies), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[5], []], [[6], [7]], "prompt 1 of the batch is empty"),
        ([[5], [6]], [[], [7]], "response 0 of the batch is empty"),
    ],
)
def test_empty_sequences_are_refused(
    prompts: list, responses: list, message: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model, judge = make_model("gpt2"), make_model("gpt2", head="score")
    for function, its_model in (
        (response_logprobs, model),
        (token_values, judge),
        (sequence_scores, judge),
    ):
        with pytest.raises(ValueError, match=message):
            function(its_model, prompts, responses)
    for sides in ((responses, [[3], [3]]), ([[3], [3]], responses)):
        with pytest.raises(ValueError, match=message):
            paired_logprobs(model, prompts, *sides)


def test_lists_of_different_lengths_are_refused(make_model: Callable) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        response_logprobs(make_model("gpt2"), [[5], [6]], [[7]])
