"""Traps 5, 7 and 12: what a loss is the mean of, and which divergence it descends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lib.data.encoding import Demonstration
from rlhf_lib.methods import dpo, grpo, ppo, reward_model, sft
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import MicroBatch, Rollout
from rlhf_lib.models.logprobs import response_logits
from rlhf_lib.objectives import advantages, kl, losses
from rlhf_lib.settings import DPOConfig
from tests.traps.test_traps import (
    PROMPTS,
    RESPONSES,
    Mistake,
    holds_unless,
    kinds,
    learner_of,
    other_model,
    pairs_of,
    put_back,
    rollout_of,
)

# ------------------------------------------------------------------------------------------- 5: KL


def _estimator(patch: pytest.MonkeyPatch, name: str, function: Callable) -> None:
    patch.setattr(kl, name, function)
    patch.setitem(kl.ESTIMATORS, name, function)


def k1_with_its_sign_turned(patch: pytest.MonkeyPatch) -> None:
    """log(reference / policy), which is negative on average."""
    _estimator(patch, "k1", lambda logprobs, ref_logprobs: ref_logprobs - logprobs)


def a_bonus_for_drifting_away(patch: pytest.MonkeyPatch) -> None:
    """The KL is added to the reward."""
    shaped = advantages.kl_shaped_rewards
    patch.setattr(advantages, "kl_shaped_rewards", lambda *a: shaped(*a[:4], -a[4], *a[5:]))


def a_logged_kl_with_its_sign_turned(patch: pytest.MonkeyPatch) -> None:
    """The training is right, and its curve goes down."""
    turned = property(lambda r: ((r.ref_logprobs - r.logprobs) * r.response_mask).sum(1))
    patch.setattr(Rollout, "kl", turned)


def k3_with_its_ratio_turned(patch: pytest.MonkeyPatch) -> None:
    """policy / reference where reference / policy belongs: still never negative, and no KL."""
    k3 = kl.k3
    _estimator(patch, "k3", lambda logprobs, ref_logprobs: k3(ref_logprobs, logprobs))


def k1_as_a_loss(patch: pytest.MonkeyPatch) -> None:
    """A fine estimate of the KL, and its gradient is 0 on average: it holds nothing back."""
    _estimator(patch, "k3", kl.k1)


EVERY_TOKEN = [[5, 6]] * 32, [[token] for token in range(32)]  # one prompt, every response of one


@kinds
@put_back(
    k1_with_its_sign_turned,
    k3_with_its_ratio_turned,
    a_bonus_for_drifting_away,
    a_logged_kl_with_its_sign_turned,
)
def test_trap_05_the_mean_of_every_estimate_is_the_kl(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference = make_model(kind), other_model(make_model, kind)
    with torch.no_grad():
        p, q = (response_logits(m, *EVERY_TOKEN)[0][0] for m in (policy, reference))
    exact = kl.full_kl(p, q).item()
    assert exact > 0.02
    assert abs(exact - kl.full_kl(q, p).item()) > 1e-3, "the example cannot tell the directions"
    weights, (p, q) = p.softmax(-1), (x.log_softmax(-1)[:, None] for x in (p, q))
    sample = rollout_of(policy, *EVERY_TOKEN, ref_logprobs=q)
    with holds_unless(mistake, monkeypatch):
        penalised = advantages.kl_shaped_rewards(torch.zeros(32), p, q, torch.ones(32, 1), 2.0)
        means = {
            "k1": weights @ kl.k1(p, q),
            "k3": weights @ kl.k3(p, q),
            "reward": weights @ penalised / -2,
            "logged": weights @ sample.kl,
        }
        for name, mean in means.items():
            assert mean.item() == pytest.approx(exact, abs=1e-5), name


@kinds
@put_back(k1_as_a_loss, k3_with_its_ratio_turned)
def test_trap_05_the_mean_gradient_of_the_penalty_is_that_of_a_kl(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference = make_model(kind), other_model(make_model, kind)
    layer = policy.get_output_embeddings().weight
    logits, labels, _ = response_logits(policy, *EVERY_TOKEN)
    ref_logits = response_logits(reference, *EVERY_TOKEN)[0].detach()
    logprobs = logits.log_softmax(-1)[labels, labels][:, None]
    ref_logprobs = ref_logits.log_softmax(-1)[labels, labels][:, None]
    # of the reverse KL: see the docstring of grpo_loss
    (exact,) = torch.autograd.grad(kl.full_kl(ref_logits[0], logits[0]), layer, retain_graph=True)
    assert exact.abs().max() > 0.01
    one = torch.ones(1, 1)
    with holds_unless(mistake, monkeypatch):
        penalty = torch.zeros(())
        for row, ref_row in zip(logprobs, ref_logprobs, strict=True):
            old = row.detach()[None]
            loss, _ = losses.grpo_loss(row[None], old, torch.zeros(1), one, ref_row[None], 1.0)
            penalty = penalty + old.exp().squeeze() * loss  # how often the policy says this token
        (mean,) = torch.autograd.grad(penalty, layer)
        assert torch.allclose(mean, exact, atol=1e-5)


# ------------------------------------------------------ what the tests of traps 7 and 12 stand on


@pytest.fixture
def make_double(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`make_model`, with all that the library computes of its models in float64.

    Rounding then stays at some 1e-15 on any processor; the mean of means below moves a gradient by
    5 % of its largest entry at the least.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the library's losses ask for float32
    return lambda *args, **settings: make_model(*args, **settings).double()


def update(
    method: str, learner: Learner, value: Learner, sample: Rollout, size: int, aggregation: str
) -> dict[str, float]:
    """One step of a method on the same responses, in micro-batches of `size`: all that it logs.

    The reward model's learner and that of PPO's values is `value`, all others' is `learner`.
    """
    count = len(PROMPTS)
    # rounding alone would say which side of two equal replies has the higher score
    pairs = [pair for pair in pairs_of() if pair.chosen != pair.rejected]
    if method == "sft":
        shown = [Demonstration("", "", p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        return sft.update(learner, shown, size)
    if method == "reward_model":
        return reward_model.update(value, pairs, size, margin=0.1, center_coef=0.1)
    if method == "dpo":
        table = torch.linspace(-20, -10, 2 * len(pairs)).view(-1, 2)
        loss = dpo.preference_loss(DPOConfig())
        return dpo.update(learner, pairs, table, loss, micro_batch_size=size)
    if method == "ppo":
        experience = ppo.make_experience(sample, value, kl_coef=0.2, micro_batch_size=size)
        metrics = ppo.update(
            learner, value, experience, epochs=1, minibatch_size=count, micro_batch_size=size
        )
        return metrics | ppo.rollout_metrics(experience, kl_coef=0.2)
    rewards, compared = grpo.make_advantages(sample, group_size=count, kl_reward_coef=0.2)
    metrics = grpo.update(
        learner,
        sample,
        compared,
        constant=8,
        micro_batch_size=size,
        kl_coef=0.1,
        aggregation=aggregation,
    )
    return metrics | grpo.rollout_metrics(sample, rewards, compared, group_size=count)


# -------------------------------------------------------------------- 7: statistics over padding


def plain_mean_in_place_of_masked_mean(patch: pytest.MonkeyPatch) -> None:
    """The zeros of the padding count as tokens."""
    patch.setattr(
        losses, "masked_mean", lambda x, mask, dim=None: x.mean() if dim is None else x.mean(dim)
    )


def padding_is_whitened(patch: pytest.MonkeyPatch) -> None:
    """Mean and deviation of the advantages are those of tokens and zeros together."""
    patch.setattr(ppo, "masked_whiten", lambda x, mask: (x - x.mean()) / x.std())


def kl_over_padding(patch: pytest.MonkeyPatch) -> None:
    """The log-ratio of what stands behind the end is added."""
    patch.setattr(Rollout, "kl", property(lambda r: (r.logprobs - r.ref_logprobs).sum(1)))


def explained_variance_over_padding(patch: pytest.MonkeyPatch) -> None:
    """Zeros are easily predicted."""
    patch.setattr(ppo, "explained_variance", lambda v, r, mask: 1 - (r - v).var() / r.var())


def padded(sample: Rollout) -> Rollout:
    """The same rollout with five more places, at which there stands anything."""
    rows = len(sample.prompts)
    fills = {"response_mask": 0.0, "logprobs": 3.0, "ref_logprobs": -2.0, "entropies": 5.0}
    wider = {
        name: torch.cat([getattr(sample, name), torch.full((rows, 5), fill)], dim=1)
        for name, fill in fills.items()
    }
    return replace(sample, **wider)


def logged(
    policy: Learner, value: Learner, sample: Rollout, micro_batch_size: int
) -> dict[str, float]:
    """Every number that the methods log of these responses, by method and name."""
    found = {}
    for method in ("sft", "reward_model", "dpo", "ppo", "grpo"):
        numbers = update(method, policy, value, sample, micro_batch_size, "sequence")
        found |= {f"{method}: {name}": number for name, number in numbers.items()}
    return found


@kinds
@put_back(
    plain_mean_in_place_of_masked_mean,
    padding_is_whitened,
    kl_over_padding,
    explained_variance_over_padding,
)
def test_trap_07_padding_changes_no_logged_number(
    kind: str, mistake: Mistake | None, make_double: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, value = learner_of(make_double(kind)), learner_of(make_double(kind, head="score"))
    sample = rollout_of(other_model(make_double, kind))  # somebody else's: no statistic is trivial
    with holds_unless(mistake, monkeypatch):
        alone = logged(policy, value, sample, micro_batch_size=1)
        assert alone["ppo: policy/clipfrac_avg"] > 0.1
        for wider in (sample, padded(sample)):
            together = logged(policy, value, wider, micro_batch_size=len(PROMPTS))
            assert together == pytest.approx(alone, rel=1e-9, abs=1e-9)


# -------------------------------------------------------------------------------- 12: accumulation


def a_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """A row counts the same in every micro-batch, however many tokens stand in it."""
    tokens, count, parts = sum(map(len, RESPONSES)), len(RESPONSES), Rollout.micro_batches

    def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
        # update() multiplies by the share of tokens: back to the share of rows
        return losses.sft_loss(logprobs, mask) * len(mask) / count * tokens / mask.sum()

    def micro_batches(sample: Rollout, rows: list[int], size: int) -> Iterator[MicroBatch]:
        for micro in parts(sample, rows, size):
            yield micro._replace(tokens=tokens * len(micro.rows) / count)

    patch.setattr(sft, "sft_loss", sft_loss)
    patch.setattr(Rollout, "micro_batches", micro_batches)


def gradients_of(learner: Learner, step: Callable, *args: Any) -> Tensor:
    """The gradient with which `step` moves the model, as one vector."""
    kept: list[Tensor] = []
    take = learner.optimizer.step

    def keep_and_take() -> None:
        kept.extend(p.grad.flatten() for p in learner.model.parameters())
        take()

    learner.optimizer.step = keep_and_take  # type: ignore[method-assign]
    step(learner, *args)
    return torch.cat(kept)


@kinds
@pytest.mark.parametrize("method", ["sft", "ppo", "grpo"])
@put_back(a_mean_of_means)
def test_trap_12_accumulated_equals_one_batch(
    method: str,
    kind: str,
    mistake: Mistake | None,
    make_double: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = learner_of(make_double(kind, head="score"))
    sample = rollout_of(other_model(make_double, kind))

    def gradients(size: int) -> Tensor:
        # a token's weight is the same everywhere only where GRPO's loss is a mean over tokens
        step = partial(update, method)
        return gradients_of(learner_of(make_double(kind)), step, value, sample, size, "token")

    with holds_unless(mistake, monkeypatch):
        whole = gradients(len(PROMPTS))
        for size in (2, 1):
            error = (gradients(size) - whole).abs().max() / whole.abs().max()
            assert error < 1e-9
