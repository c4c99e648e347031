"""Recorded passes, on a machine that records nothing: an emulator replays the same operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rlhf_lib.models import graphs, logprobs
from rlhf_lib.models.load import adapters_off, add_lora
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.models.packing import lay_out

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
REPLIES = [[3, 4], [5, 6, 7], [8]]


class Recorded(TorchDispatchMode):
    """Every operation with the places that it reads and writes, as a CUDA graph has them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        found = operation(*args, **(kwargs or {}))
        self.steps.append((operation, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for operation, args, kwargs, places in self.steps:
            found = operation(*args, **kwargs)
            for place, new in zip(tree_leaves(places), tree_leaves(found), strict=True):
                if isinstance(new, Tensor) and place.data_ptr() != new.data_ptr():
                    place.copy_(new)


def emulated(compute: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    with Recorded() as recorded:
        found = compute()

    def replay() -> None:
        with torch.no_grad():
            recorded.replay()

    return replay, found


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "record", emulated)
    monkeypatch.setattr(graphs, "_on_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(logprobs, "lay_out_for", lambda model, *rows: lay_out(*rows, multiple=8))
    monkeypatch.setattr(graphs, "MEMORY", graphs.Memory())


def loss(model: PreTrainedModel, shift: int) -> Tensor:
    """Of other tokens for each `shift`, and from 10 on of fewer rows."""
    prompts = [[token + shift % 10 for token in prompt] for prompt in PROMPTS]
    rows = 3 if shift < 10 else 2
    return -response_logprobs(model, prompts[:rows], REPLIES[:rows])[0].sum()


def gradients(model: PreTrainedModel, shifts: list[int]) -> list[Tensor]:
    """Of a sum over micro-batches, added up in `.grad`."""
    model.zero_grad()
    for shift in shifts:
        loss(model, shift).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_replayed_passes_give_the_same_gradients(
    causal_model: PreTrainedModel, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [gradients(causal_model, [i, i + 1, i + 12]) for i in range(4)]
    assert len(graphs.RECORDERS[causal_model].recordings) == 2, "one for each number of rows"
    monkeypatch.setattr(graphs, "_on_gpu", lambda model: False)
    for i, ours in enumerate(found):
        theirs = gradients(causal_model, [i, i + 1, i + 12])
        assert len(ours) == len(theirs) > 10
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_pass_whose_memory_is_still_needed_is_not_overwritten(
    causal_model: PreTrainedModel, recording: None
) -> None:
    for _ in range(4):
        gradients(causal_model, [0])
    alone = gradients(causal_model, [0])
    causal_model.zero_grad()
    first, second = loss(causal_model, 0), loss(causal_model, 5)
    first.backward()
    for ours, p in zip(alone, causal_model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, ours)
    del second


def test_a_reference_that_is_the_policy_without_adapters_is_read_without_them(
    causal_model: PreTrainedModel, recording: None
) -> None:
    add_lora(causal_model, 2, 4.0)
    for name, weight in causal_model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    with torch.no_grad():
        for _ in range(4):
            policy = loss(causal_model, 0)
            with adapters_off(causal_model):
                reference = loss(causal_model, 0)
    assert abs(policy - reference) > 1e-3


def test_other_weights_that_learn_have_other_gradients(
    causal_model: PreTrainedModel, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = [w for name, w in causal_model.base_model.named_parameters() if "norm" not in name]
    halves = trunk[: len(trunk) // 2], trunk[len(trunk) // 2 :], trunk
    found = []
    for learning in halves:
        causal_model.requires_grad_(False)
        for weight in learning:
            weight.requires_grad_(True)
        found += [gradients(causal_model, [1]) for _ in range(4)][-1]
    monkeypatch.setattr(graphs, "_on_gpu", lambda model: False)
    theirs = []
    for learning in halves:
        causal_model.requires_grad_(False)
        for weight in learning:
            weight.requires_grad_(True)
        theirs += gradients(causal_model, [1])
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_recorded_pass_goes_backward_once(causal_model: PreTrainedModel, recording: None) -> None:
    for _ in range(4):
        gradients(causal_model, [0])
    again = loss(causal_model, 0)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        again.backward()


def test_what_cannot_be_recorded_is_said_and_computed_as_before(
    causal_model: PreTrainedModel, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", refuse)
    first = gradients(causal_model, [3])
    gradients(causal_model, [3])
    with pytest.warns(UserWarning, match="not recorded: operation not permitted"):
        third = gradients(causal_model, [3])
    for a, b in zip(first, third, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode_leaves_no_recording(causal_model: PreTrainedModel, recording: None) -> None:
    with torch.inference_mode():
        for _ in range(4):
            loss(causal_model, 0)
    assert len(gradients(causal_model, [0])) > 10
    assert not graphs.RECORDERS[causal_model].recordings
