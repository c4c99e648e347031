"""Half precision: one rounding for policy and reference, steps that overflow, memory let go."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rlhf_lib import catalogue
from rlhf_lib.methods import dpo
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models import kernels, load
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.settings import DPOConfig
from rlhf_lib.study import offer, training
from tests.traps.test_traps import (
    PROMPTS,
    RESPONSES,
    Mistake,
    holds_unless,
    kinds,
    pairs_of,
    put_back,
)


@pytest.fixture
def half() -> Iterator[Callable[[str], Accelerator]]:
    """`half("bf16")`: its handle; `half("fp16")`: one with a scaler, on the CPU."""

    def make(precision: str) -> Accelerator:
        AcceleratorState._reset_state(True)
        if precision == "bf16":
            return Accelerator(mixed_precision="bf16", cpu=True)
        accelerator = Accelerator(cpu=True)
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", 1024.0)
        return accelerator

    yield make
    AcceleratorState._reset_state(True)


def large(make_model: Callable, kind: str) -> Any:
    """Sums between layers that eight bits round visibly, and replies that are far from sure."""
    model = make_model(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)
    return model


# ------------------------------------------------------------------ 21: the reference's numerics


def everything_in_half(patch: pytest.MonkeyPatch) -> None:
    """Embeddings, norms and the sums between layers of the frozen model are rounded as well."""

    def freeze(accelerator: Accelerator, model: Any) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        return model.requires_grad_(False).eval().to(dtype)

    patch.setattr(load, "freeze", freeze)


def one_attention_to_learn_and_another_to_read(patch: pytest.MonkeyPatch) -> None:
    products, read = kernels.by_products, kernels.sdpa_attention_forward

    def by_products(query: Any, key: Any, value: Any, mask: Any, scaling: Any) -> Any:
        if torch.is_grad_enabled():
            return products(query, key, value, mask, scaling)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return read(torch.nn.Module(), query, key, value, mask, scaling=scaling)[0].transpose(1, 2)

    patch.setattr(kernels, "by_products", by_products)


@kinds
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@put_back(everything_in_half)
def test_trap_21_the_reference_reads_as_the_policy_does(
    kind: str,
    precision: str,
    mistake: Mistake | None,
    make_model: Callable,
    half: Callable,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with holds_unless(mistake, monkeypatch):
        accelerator, pairs = half(precision), pairs_of()
        policy = large(make_model, kind)
        reference = large(make_model, kind)
        reference.load_state_dict(policy.state_dict())
        reference = load.freeze(accelerator, reference)
        learner = Learner(accelerator, policy, learning_rate=0.0, steps=9)
        sampler = Sampler(accelerator, tiny_tokenizer, reference, lambda p, r: [0.0] * len(r),
                          max_new_tokens=8)  # fmt: skip
        # DPO's first loss is that of no opinion
        with accelerator.autocast():
            table = dpo.reference_logprobs(reference, pairs, 4)
        loss_of = dpo.preference_loss(DPOConfig(beta=1.0))
        metrics = dpo.update(learner, pairs, table, loss_of, micro_batch_size=3)
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-3)
        # PPO's first ratio is 1, and equal weights are at no distance
        with torch.no_grad(), accelerator.autocast():
            old, ref, *_ = sampler._measure(policy, PROMPTS, RESPONSES, 1.0, False)
        with accelerator.autocast():
            new, mask = response_logprobs(learner.model, PROMPTS, RESPONSES)
        assert ((new - old).exp() - 1).abs().max() < 1e-3
        assert ((old - ref) * mask).abs().max() < 1e-3


@kinds
@put_back(one_attention_to_learn_and_another_to_read)
def test_trap_21_what_is_read_is_rounded_as_what_is_learnt(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    half: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = half("bf16")
    with holds_unless(mistake, monkeypatch):
        model = large(make_model, kind)
        model.set_attn_implementation(kernels.NAME)
        with accelerator.autocast():
            learnt, _ = response_logprobs(model, PROMPTS, RESPONSES)
            with torch.no_grad():
                read, _ = response_logprobs(model, PROMPTS, RESPONSES)
        assert torch.equal(learnt, read)


# --------------------------------------------------------------------- 22: steps that overflow


def accelerate_steps_the_schedule(patch: pytest.MonkeyPatch) -> None:
    """It asks the optimizer whether it stepped, and a fused one always says yes."""
    step = Learner.step

    def counted(learner: Learner, losses: Any) -> tuple[float, float]:
        skipped = learner.skipped
        found = step(learner, losses)
        if learner.skipped > skipped:
            learner.skipped = skipped
            learner.schedule.step()
        return found

    patch.setattr(Learner, "step", counted)


@kinds
@put_back(accelerate_steps_the_schedule)
def test_trap_22_a_step_that_overflows_is_none(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    half: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with holds_unless(mistake, monkeypatch):
        accelerator = half("fp16")
        learner = Learner(accelerator, make_model(kind), learning_rate=1e-3, steps=10)

        def loss(size: float) -> Any:
            with accelerator.autocast():
                logprobs, _ = response_logprobs(learner.model, PROMPTS, RESPONSES)
            return -size * logprobs.mean()

        before = [p.detach().clone() for p in learner.model.parameters()]
        scale = accelerator.scaler.get_scale()  # type: ignore[union-attr]
        total, norm = learner.step([loss(1e36)])  # finite, and too large once it is scaled
        assert math.isfinite(total)
        assert norm == 0
        assert learner.logged() == {"learning_rate": 0.0, "skipped": 1.0}
        assert learner.schedule.last_epoch == 0
        assert accelerator.scaler.get_scale() == scale / 2  # type: ignore[union-attr]
        after = list(learner.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        _, norm = learner.step([loss(1.0)])
        assert norm > 0
        assert learner.logged() == {"learning_rate": 1e-3, "skipped": 0.0}
        assert learner.schedule.last_epoch == 1
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ------------------------------------------------------------------------ 23: memory let go


def nothing_is_released(patch: pytest.MonkeyPatch) -> None:
    """Patched methods hold their model in a circle, and the handle what it prepared."""
    kept: list = []
    patch.setattr(offer.Offer, "release", lambda each: kept.append(each.accelerator))


@put_back(nothing_is_released)
def test_trap_23_a_finished_stage_leaves_memory(
    mistake: Mistake | None,
    make_run: Callable,
    tiny_data: Any,
    half: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two stages in half precision: of the first nothing is left when the second begins."""
    half("bf16")
    run = make_run(tmp_path, "model.precision=bf16")
    monkeypatch.setattr(offer, "make_accelerator", lambda p: half("bf16"))
    alive: list[weakref.ref] = []
    real = Learner.__init__

    def remembered(learner: Learner, *arguments: Any, **settings: Any) -> None:
        gc.disable()  # what only a lucky collection would free is not free
        assert not any(ref() is not None for ref in alive), "of the stage before"
        real(learner, *arguments, **settings)
        alive.extend(map(weakref.ref, (learner.model, learner.optimizer.optimizer)))

    monkeypatch.setattr(Learner, "__init__", remembered)
    try:
        with holds_unless(mistake, monkeypatch):
            for name in ("sft", "reward_model"):
                training.run_stage(run, catalogue.record(name), tiny_data, {})
            assert len(alive) == 4
            assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
