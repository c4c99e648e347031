"""Traps 5, 7 and 12: what a loss is the mean of, and which divergence it descends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lib.data.encoding import Demonstration
from rlhf_lib.methods import dpo, grpo, ppo, reward_model, sft
from rlhf_lib.methods.rollout import MicroBatch, Rollout
from rlhf_lib.models.learner import Learner
from rlhf_lib.models.logprobs import response_logits
from rlhf_lib.objectives import advantages, kl, losses
from rlhf_lib.settings import DPOConfig, GRPOConfig, PPOConfig
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
    return replace(sample, **{
        name: torch.cat([getattr(sample, name), torch.full((rows, 5), fill)], dim=1)
        for name, fill in fills.items()
    })  # fmt: skip


def logged(
    policy: Learner, value: Learner, sample: Rollout, micro_batch_size: int
) -> dict[str, float]:
    """Every number that the methods log of these responses, by method and name."""
    shown = [Demonstration("", "", p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    numbers = {"sft": sft.update(policy, shown, micro_batch_size)}
    numbers["reward_model"] = reward_model.update(value, pairs_of(), micro_batch_size, 0.1, 0.1)
    table = torch.linspace(-20, -10, 2 * len(PROMPTS)).view(-1, 2)
    preferences = DPOConfig(micro_batch_size=micro_batch_size)
    numbers["dpo"] = dpo.update(policy, pairs_of(), table, preferences)
    config = PPOConfig(epochs=1, minibatch_size=len(PROMPTS), micro_batch_size=micro_batch_size)
    experience = ppo.make_experience(sample, value, config)
    numbers["ppo"] = ppo.update(policy, value, experience, config, seed=0)
    numbers["ppo"] |= ppo.rollout_metrics(experience, config)
    group = GRPOConfig(
        group_size=len(PROMPTS), iterations=1, micro_batch_size=micro_batch_size, kl_coef=0.1
    )
    rewards, compared = grpo.make_advantages(sample, group)
    numbers["grpo"] = grpo.update(policy, sample, compared, group, constant=8)
    numbers["grpo"] |= grpo.rollout_metrics(sample, rewards, compared, group)
    return {f"{m}: {name}": x for m, found in numbers.items() for name, x in found.items()}


@kinds
@put_back(
    plain_mean_in_place_of_masked_mean, padding_is_whitened, kl_over_padding,
    explained_variance_over_padding,
)  # fmt: skip
def test_trap_07_padding_changes_no_logged_number(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, value = learner_of(make_model(kind)), learner_of(make_model(kind, head="score"))
    sample = rollout_of(other_model(make_model, kind))  # somebody else's: no statistic is trivial
    with holds_unless(mistake, monkeypatch):
        alone = logged(policy, value, sample, micro_batch_size=1)
        assert alone["ppo: policy/clipfrac_avg"] > 0.1
        for wider in (sample, padded(sample)):
            together = logged(policy, value, wider, micro_batch_size=len(PROMPTS))
            assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)


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
    learner.optimizer.step = lambda: (  # type: ignore[method-assign]
        kept.extend(p.grad.flatten() for p in learner.model.parameters()), take()
    )  # fmt: skip
    step(learner, *args)
    return torch.cat(kept)


@kinds
@pytest.mark.parametrize("method", ["sft", "ppo", "grpo"])
@put_back(a_mean_of_means)
def test_trap_12_accumulated_equals_one_batch(
    method: str, kind: str, mistake: Mistake | None, make_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    count, value = len(PROMPTS), learner_of(make_model(kind, head="score"))
    shown = [Demonstration("", "", p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    sample = rollout_of(other_model(make_model, kind))
    compared, per_token = torch.randn(count), torch.randn_like(sample.logprobs)
    experience = ppo.Experience(sample, per_token, per_token, per_token)

    def gradients(size: int) -> Tensor:
        learner = learner_of(make_model(kind))
        if method == "sft":
            return gradients_of(learner, sft.update, shown, size)
        if method == "ppo":
            config = PPOConfig(epochs=1, minibatch_size=count, micro_batch_size=size)
            return gradients_of(learner, ppo.update, value, experience, config, 0)
        config = GRPOConfig(iterations=1, micro_batch_size=size, aggregation="token", kl_coef=0.1)
        return gradients_of(learner, grpo.update, sample, compared, config, 8)

    with holds_unless(mistake, monkeypatch):
        whole = gradients(count)
        for size in (2, 1):
            error = (gradients(size) - whole).abs().max() / whole.abs().max()
            assert error < 1e-6
