"""One optimizer step, schedules and averages."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.methods.learner import SKIPS, Averages, DivergedError, Learner
from rlhf_lib.models.load import load_policy, trainable
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.runtime import make_accelerator, peak_memory_gb, reset_peak_memory
from rlhf_lib.settings import ModelConfig

ROOT = Path(__file__).parents[2]
PROMPTS, RESPONSES = [[5, 6], [7], [8, 9, 10], [11]], [[3, 1], [4, 5, 6], [7], [8, 1]]


@pytest.fixture
def accelerator() -> Accelerator:
    return make_accelerator("fp32")


def nll(model: PreTrainedModel, rows: slice = slice(None)) -> Tensor:
    return -response_logprobs(model, PROMPTS[rows], RESPONSES[rows])[0].sum() / 8


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_step_lowers_the_loss_and_reports_it(
    causal_model: PreTrainedModel, accelerator: Accelerator
) -> None:
    learner = Learner(accelerator, causal_model, learning_rate=1e-2, steps=10)
    before = nll(causal_model).item()
    gradient = torch.autograd.grad(nll(causal_model), list(causal_model.parameters()))
    expected = math.sqrt(sum((g**2).sum().item() for g in gradient))
    loss, norm = learner.step([nll(learner.model)])
    assert loss == pytest.approx(before)
    assert norm == pytest.approx(expected, rel=1e-4), "the norm is the one before clipping"
    assert nll(causal_model).item() < before


def test_accumulated_equals_one_big_batch(make_model: Callable, accelerator: Accelerator) -> None:
    ends = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        # SGD-like: with a large eps, Adam's update is proportional to the gradient
        learner = Learner(accelerator, make_model("llama"), learning_rate=0.1, steps=9, eps=100.0)
        results = [learner.step(nll(learner.model, rows) for rows in parts) for _ in range(2)]
        ends.append((results, weights(learner.model)))
    (results, whole), *others = ends
    for other_results, other in others:
        for one, two in zip(results, other_results, strict=True):
            assert one == pytest.approx(two, rel=1e-5)
        assert max((a - b).abs().max().item() for a, b in zip(whole, other, strict=True)) < 1e-6


def test_gradients_do_not_carry_over_to_the_next_step(
    make_model: Callable, accelerator: Accelerator
) -> None:
    learner = Learner(accelerator, make_model("gpt2"), learning_rate=0.0, steps=9)
    assert learner.step([nll(learner.model)]) == learner.step([nll(learner.model)])


def test_the_gradient_is_clipped_to_its_norm(
    make_model: Callable, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(
        accelerator, make_model("gpt2"), learning_rate=1e-3, steps=9, max_grad_norm=0.01
    )
    seen = []

    def look() -> None:
        grads = [p.grad for p in learner.model.parameters() if p.grad is not None]
        seen.append(math.sqrt(sum((g**2).sum().item() for g in grads)))

    step = learner.optimizer.step
    monkeypatch.setattr(learner.optimizer, "step", lambda: (look(), step()))
    _, norm = learner.step([nll(learner.model)])
    assert norm > 0.1
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_the_rate_warms_up_and_falls_to_zero(
    make_model: Callable, accelerator: Accelerator
) -> None:
    learner = Learner(
        accelerator, make_model("gpt2"), learning_rate=1.0, steps=10, warmup_ratio=0.2
    )
    rates = []
    for _ in range(10):
        learner.step([next(learner.model.parameters()).sum() * 0])
        rates.append(learner.learning_rate)
    assert rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    bad: float, make_model: Callable, accelerator: Accelerator
) -> None:
    learner = Learner(accelerator, make_model("gpt2"), learning_rate=1.0, steps=9)
    before = weights(learner.model)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf): lower the learning rate"):
        learner.step([nll(learner.model), nll(learner.model) * bad])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learner.model), strict=True))


def test_one_micro_batch_is_in_memory_at_a_time(
    make_model: Callable, accelerator: Accelerator
) -> None:
    learner = Learner(accelerator, make_model("gpt2"), learning_rate=1.0, steps=9)
    parameter = next(learner.model.parameters())
    backward_done = []

    def losses() -> Iterator[Tensor]:
        yield nll(learner.model)
        backward_done.append(parameter.grad is not None)
        yield nll(learner.model)

    learner.step(losses())
    assert backward_done == [True]


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    tiny_base: Path, accelerator: Accelerator
) -> None:
    results = []
    for checkpointing in (False, True):
        model = trainable(load_policy(tiny_base), ModelConfig(gradient_checkpointing=checkpointing))
        forwards = []
        model.transformer.h[0].attn.register_forward_pre_hook(
            lambda *_, forwards=forwards: forwards.append(1)
        )
        learner = Learner(accelerator, model, learning_rate=1e-2, steps=9)
        learner.step(nll(learner.model) for _ in range(1))
        results.append((len(forwards), weights(model)))
        assert not model.training, "generation wants its cache, which train mode takes away"
    (plain, expected), (recomputed, got) = results
    assert (plain, recomputed) == (1, 2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, got, strict=True))


def test_averages_weigh_what_they_are_given() -> None:
    averages = Averages()
    averages.add({"a": torch.tensor(1.0), "b": 5.0}, 3)
    averages.add({"a": 2.0}, 1)
    assert averages["a"] == 1.25
    assert averages.means() == {"a": 1.25, "b": 5.0}


@pytest.fixture
def overflowing(
    causal_model: PreTrainedModel, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A `learner` in fp16's way, and `step(factor)`: its gradient is multiplied by `factor`."""
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", 2.0**16))
    learner = Learner(accelerator, causal_model, learning_rate=1e-3, steps=100)
    factors = [1.0]
    next(causal_model.parameters()).register_hook(lambda gradient: gradient * factors[-1])

    def step(factor: float) -> tuple[float, float]:
        factors.append(factor)
        return learner.step([nll(learner.model)])

    return SimpleNamespace(learner=learner, step=step)


def test_a_gradient_that_is_never_finite_is_no_overflow(overflowing: SimpleNamespace) -> None:
    """In fp16 a step may be skipped, for the next loss is scaled by less; not again and again."""
    for _ in range(SKIPS - 1):
        assert overflowing.step(math.nan)[1] == 0.0
    with pytest.raises(DivergedError, match="the gradient's norm is nan"):
        overflowing.step(math.nan)
    assert overflowing.learner.logged()["skipped"] == SKIPS - 1


def test_skips_count_in_a_row(overflowing: SimpleNamespace) -> None:
    for factor in [math.inf] * (SKIPS - 1) + [1.0] + [math.inf] * (SKIPS - 1):
        overflowing.step(factor)
    assert overflowing.learner.logged()["skipped"] == 2 * (SKIPS - 1)


def test_what_skipped_every_step_has_learnt_nothing(overflowing: SimpleNamespace) -> None:
    learner = overflowing.learner
    learner.check_learnt()  # no step has been asked of it
    before = weights(learner.model)
    for _ in range(SKIPS - 1):
        overflowing.step(math.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learner.model), strict=True))
    with pytest.raises(DivergedError, match=r"every step was skipped.*model\.precision=fp32"):
        learner.check_learnt()
    overflowing.step(1.0)
    overflowing.step(math.inf)
    learner.check_learnt()  # a last step that was skipped undoes nothing


def slowly(model: PreTrainedModel) -> Iterator[Tensor]:
    yield nll(model)
    time.sleep(0.2)  # gradients live until the step, and memory is looked at only now and then


def test_peak_memory_holds_weights_gradients_and_moments(
    make_model: Callable, tmp_path: Path
) -> None:
    """Weights that are read from a file are allocated as well, not views of that file."""
    config = make_model("gpt2").config
    config.n_embd, config.n_layer, config.vocab_size = 256, 6, 200
    type(make_model("gpt2"))(config).save_pretrained(tmp_path)
    # in a process of its own: what tests before this one have left goes when it likes
    measure = [sys.executable, "-c", f"import {__name__} as t; t.print_peaks({str(tmp_path)!r})"]
    done = subprocess.run(measure, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, trained = map(float, done.stdout.split()[-2:])
    assert loaded > 0.99
    assert 3.9 < trained < 5.5


def print_peaks(folder: str) -> None:
    """Peaks over the size of the model in `folder`: when it is loaded, and when it has learnt."""
    for _ in range(2):  # in the first, libraries set themselves up
        reset_peak_memory()
        model = load_policy(folder)
        size = 4 * model.num_parameters() / 1e9
        time.sleep(0.2)
        loaded = peak_memory_gb()
        learner = Learner(make_accelerator("fp32"), model, learning_rate=1e-3, steps=10)
        for _ in range(2):
            learner.step(slowly(learner.model))
        trained = peak_memory_gb()
        learner.accelerator.free_memory()
        del model, learner
    print(loaded / size, trained / size)
