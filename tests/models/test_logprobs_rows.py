"""Shared prompts, shared rows, output layer in parts: values and gradients of one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.models import logprobs, packing
from rlhf_lib.models.logprobs import (
    output_logprobs,
    response_hidden,
    response_logprobs,
    sequence_scores,
    token_values,
)
from rlhf_lib.models.packing import Layout, lay_out
from rlhf_lib.objectives.masked import entropy

# a pair, a group, and loners short enough to stand behind one another
PROMPTS = [[5, 6, 7, 8]] * 2 + [[12]] * 3 + [[9, 1, 0], [20], [4, 4], [21]]
RESPONSES = [[15, 1], [16, 17, 18, 19], [3], [0, 1], [22, 23, 1], [30], [1], [8, 9], [10, 11, 1]]
WEIGHTS = torch.linspace(-1, 2, sum(map(len, RESPONSES)))  # no two tokens count alike


def heads(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """What the model says at each place of one row without padding."""
    ids = torch.tensor([[*prompt, *response]])
    if hasattr(model, "score"):
        return model.score(model.base_model(ids).last_hidden_state)[0, :, 0]
    return model(ids).logits[0].log_softmax(-1)


def one_at_a_time(model: PreTrainedModel, what: str) -> Tensor:
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        said, first = heads(model, prompt, response), len(prompt) - 1
        if what == "scores":
            found.append(said[-1:])
        elif what == "values":
            found.append(said[first:-1])
        else:
            found.append(said[range(first, first + len(response)), response])
    return torch.cat(found)


def together(model: PreTrainedModel, what: str) -> Tensor:
    if what == "scores":
        return sequence_scores(model, PROMPTS, RESPONSES)
    if what == "values":
        rows = token_values(model, PROMPTS, RESPONSES)
    else:
        rows, _ = response_logprobs(model, PROMPTS, RESPONSES)
    return torch.cat([row[: len(r)] for row, r in zip(rows, RESPONSES, strict=True)])


def gradient(model: PreTrainedModel, values: Tensor) -> Tensor:
    loss = (values * WEIGHTS[: len(values)]).sum()
    parameters = list(model.parameters())
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def assert_same(model: PreTrainedModel, values: Tensor, expected: Tensor) -> None:
    assert torch.allclose(values, expected, atol=1e-5)
    wanted = gradient(model, expected)
    assert (gradient(model, values) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("what", ["logprobs", "values", "scores"])
def test_shared_rows_equal_one_row_at_a_time(what: str, kind: str, make_model: Callable) -> None:
    model = make_model(kind, head="lm" if what == "logprobs" else "score")
    assert_same(model, together(model, what), one_at_a_time(model, what))


def without_mask(layout: Layout) -> Layout:
    length = layout.ids.shape[1]
    return layout._replace(visible=torch.ones(length, length).bool().tril()[None, None])


def without_positions(layout: Layout) -> Layout:
    return layout._replace(positions=torch.arange(layout.ids.shape[1])[None])


@pytest.mark.parametrize("broken", [without_mask, without_positions])
def test_the_comparison_sees_a_broken_layout(
    broken: Callable, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2")
    monkeypatch.setattr(packing, "lay_out", lambda *a: broken(lay_out(*a)))
    with pytest.raises(AssertionError):
        assert_same(model, together(model, "logprobs"), one_at_a_time(model, "logprobs"))


def test_the_output_layer_in_parts_equals_the_whole(
    causal_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored() -> tuple[Tensor, Tensor, Tensor]:
        hidden, labels, _ = response_hidden(causal_model, PROMPTS, RESPONSES)
        values, entropies = output_logprobs(causal_model, hidden, labels, 0.7, "read")
        assert entropies is not None
        logits = causal_model.get_output_embeddings()(hidden) / 0.7
        assert torch.allclose(values, logits.log_softmax(-1)[range(len(labels)), labels], atol=1e-5)
        assert torch.allclose(entropies, entropy(logits), atol=1e-5)
        assert not entropies.requires_grad
        return values, entropies, gradient(causal_model, values)

    whole, parts = scored(), []
    causal_model.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, out: parts.append(len(out))
    )
    monkeypatch.setattr(logprobs, "CHUNK", 3)
    for one, other in zip(scored(), whole, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max().clamp(min=1)
    count = len(WEIGHTS)
    parts.remove(count)  # the test's own call
    assert max(parts) == 3
    assert sum(parts) == 2 * count, "once, and once more in the backward pass"


def test_entropy_is_computed_only_where_it_is_asked_for(causal_model: PreTrainedModel) -> None:
    hidden, labels, _ = response_hidden(causal_model, PROMPTS, RESPONSES)
    assert output_logprobs(causal_model, hidden, labels)[1] is None


@pytest.mark.parametrize(("multiple", "most", "width"), [(64, None, 64), (64, 40, 40), (8, 4, 10)])
def test_rows_of_a_multiple_are_read_the_same(
    multiple: int,
    most: int | None,
    width: int,
    causal_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a GPU gets them: few lengths, and a mask to add where rows are shared."""
    usual = response_logprobs(causal_model, PROMPTS, RESPONSES)[0]
    layout = lay_out(PROMPTS, RESPONSES, multiple=multiple, most=most)
    assert layout.ids.shape[1] == width, "the longest tree has 10 places"
    mask = packing.added(layout.visible)
    monkeypatch.setattr(logprobs, "lay_out_for", lambda *a: layout._replace(visible=mask))
    found = response_logprobs(causal_model, PROMPTS, RESPONSES)[0]
    torch.testing.assert_close(found, usual, rtol=0, atol=1e-5)
