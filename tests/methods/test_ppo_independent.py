"""PPO against `plain_ppo`, a second implementation that shares nothing with the library.

TRL, with which `test_parity` compares the other methods, has no PPO any more. Each test runs once
with the library as it is, and once for each mistake that is put into it: then it has to fail.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_lib.methods import ppo
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.learner import Learner
from rlhf_lib.objectives.advantages import gae, kl_shaped_rewards
from rlhf_lib.objectives.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lib.objectives.masked import masked_mean, masked_whiten
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import PPOConfig
from tests import plain_ppo as plain
from tests.plain_ppo import PROMPTS, RESPONSES, Rows, flat
from tests.traps.test_traps import Mistake, holds_unless, kinds, put_back

SCORES = [0.7, -1.2, 0.1, 2.0, -0.4, 0.9]
CONFIG = PPOConfig(
    kl_coef=0.15, gamma=0.9, gae_lambda=0.8, temperature=0.7, clip_range=0.2, value_clip_range=0.3,
    epochs=1, minibatch_size=6, micro_batch_size=2,
)  # fmt: skip


def padded(rows: Rows) -> Tensor:
    """(B, T), with what must never matter after the end of a row."""
    width = max(map(len, rows))
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows])


def response_mask() -> Tensor:
    return padded([[1.0] * len(r) for r in RESPONSES]).nan_to_num(0)


def assert_rows(tensor: Tensor, expected: Rows, tolerance: float = 1e-5) -> None:
    rows = [tensor[i, : len(row)].tolist() for i, row in enumerate(expected)]
    assert flat(rows) == pytest.approx(flat(expected), abs=tolerance)


def draw(rng: random.Random, spread: float = 1.0, around: Rows | None = None) -> Rows:
    start = around or [[0.0] * len(r) for r in RESPONSES]
    return [[x + rng.gauss(0, spread) for x in row] for row in start]


def added(rows: Rows, others: Rows) -> Rows:
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(rows, others, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_each_function_equals_its_plain_twin(seed: int) -> None:
    rng = random.Random(seed)
    old, values, targets = draw(rng), draw(rng), draw(rng)
    logprobs, reference = draw(rng, 0.4, old), draw(rng, 0.4, old)
    old_values, mask = draw(rng, 0.4, values), response_mask()

    rewards = plain.shaped(SCORES, old, reference, 0.15)
    scores = torch.tensor(SCORES)
    assert_rows(kl_shaped_rewards(scores, padded(old), padded(reference), mask, 0.15), rewards)

    expected = plain.advantages_of(rewards, values, 0.9, 0.8)
    advantages, returns = gae(padded(rewards), padded(values), mask, 0.9, 0.8)
    assert_rows(advantages, expected)
    assert_rows(returns, added(expected, values))
    assert_rows(masked_whiten(padded(expected), mask), plain.whitened(expected))

    loss, stats = ppo_policy_loss(padded(logprobs), padded(old), padded(expected), mask, 0.2)
    policy = plain.policy_loss(logprobs, old, expected, 0.2)
    assert 0.1 < policy.clip_fraction < 0.9
    assert [loss.item(), *map(float, stats)] == pytest.approx(policy[:-1], abs=1e-5)

    tensors = padded(values), padded(old_values), padded(targets), mask
    loss, (clipped,) = ppo_value_loss(*tensors, 0.3)
    value = plain.value_loss(values, old_values, targets, 0.3)
    assert 0 < value.clip_fraction < 1
    assert [loss.item(), clipped.item()] == pytest.approx(value[:-1], abs=1e-5)


# ------------------------------------------------------------------------------- a whole update


class Setting(NamedTuple):
    """The models of an update, its experience, and what `plain_ppo` makes of the same responses."""

    policy: Any
    value: Any
    experience: ppo.Experience
    old_logprobs: Rows
    old_values: Rows
    advantages: Rows  # whitened
    returns: Rows

    def policy_loss(self, model: Any) -> plain.Policy:
        logprobs = plain.logprobs_of(model, CONFIG.temperature)
        return plain.policy_loss(logprobs, self.old_logprobs, self.advantages, CONFIG.clip_range)

    def value_loss(self, model: Any) -> plain.Value:
        values = plain.values_of(model)
        return plain.value_loss(values, self.old_values, self.returns, CONFIG.value_clip_range)


def moved(model: Any, by: float, seed: int) -> Any:
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return other


def learner_of(model: Any) -> Learner:
    return Learner(
        make_accelerator("fp32"), model, learning_rate=0.0, steps=100, max_grad_norm=math.inf
    )


def setting_of(make_model: Callable, kind: str) -> Setting:
    sampler, old_value = make_model(kind), make_model(kind, head="score")
    old = plain.logprobs_of(sampler, CONFIG.temperature)
    reference = plain.logprobs_of(moved(sampler, 0.05, 1), CONFIG.temperature)
    values = plain.values_of(old_value)
    rewards = plain.shaped(SCORES, old, reference, CONFIG.kl_coef)
    advantages = plain.advantages_of(rewards, values, CONFIG.gamma, CONFIG.gae_lambda)
    scores = torch.tensor(SCORES)
    rollout = Rollout(
        PROMPTS, RESPONSES, response_mask(), padded(old), padded(reference),
        finished=torch.ones(6).bool(), scores=scores, rewards=scores,
        entropies=response_mask(), gold=None, exact_kl=None,
    )  # fmt: skip
    return Setting(
        moved(sampler, 0.03, 2), moved(old_value, 0.05, 3),
        ppo.make_experience(rollout, learner_of(old_value), CONFIG), old, values,
        plain.whitened(advantages), added(advantages, values),
    )  # fmt: skip


def caught_gradients(learner: Learner) -> list[list[Tensor]]:
    """A list that will hold the gradients of each of its steps."""
    caught: list[list[Tensor]] = []

    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        caught.append([p.grad.detach().clone() for p in optimizer.param_groups[0]["params"]])

    learner.optimizer.optimizer.register_step_pre_hook(catch)
    return caught


def assert_metrics(metrics: dict[str, float], setting: Setting) -> None:
    policy, value = setting.policy_loss(setting.policy), setting.value_loss(setting.value)
    expected = {
        "loss/policy_avg": policy.loss, "loss/value_avg": value.loss,
        "loss": policy.loss + value.loss, "policy/clipfrac_avg": policy.clip_fraction,
        "policy/approxkl_avg": policy.approx_kl, "val/ratio": policy.ratio,
        "val/ratio_var": policy.ratio_var, "val/clipfrac_avg": value.clip_fraction,
    }  # fmt: skip
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=2e-5)


def assert_gradient(
    gradient: list[Tensor], expected: list[Tensor], model: Any, loss: Callable[[Any], float]
) -> None:
    """The gradient entry by entry; and its size, from how the plain loss changes along it."""
    size = torch.cat([g.flatten() for g in expected]).norm().item()
    assert size > 1
    difference = max((g - e).abs().max().item() for g, e in zip(gradient, expected, strict=True))
    assert difference < 1e-5 * size
    direction = [g / size for g in gradient]
    assert plain.slope_along(model, direction, loss, 2e-4) == pytest.approx(size, rel=1e-4)


def scored_after_the_end(patch: pytest.MonkeyPatch) -> None:
    """The score goes to the place behind the last token."""

    def shaped(scores: Tensor, *rest: Any) -> Tensor:
        rewards = kl_shaped_rewards(0 * scores, *rest)
        ends = rest[2].sum(1).long().clamp(max=rewards.shape[1] - 1)
        return rewards.scatter_add(1, ends[:, None], scores[:, None])

    patch.setattr(ppo, "kl_shaped_rewards", shaped)


def gamma_and_lambda_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "gae", lambda r, v, mask, gamma, lam: gae(r, v, mask, lam, gamma))


def returns_of_whitened_advantages(patch: pytest.MonkeyPatch) -> None:
    def whitened_first(rewards: Tensor, values: Tensor, mask: Tensor, *rest: float) -> tuple:
        advantages, _ = gae(rewards, values, mask, *rest)
        return advantages, (masked_whiten(advantages, mask) + values) * mask

    patch.setattr(ppo, "gae", whitened_first)


def no_whitening(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "masked_whiten", lambda x, mask: x)


def a_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Tokens averaged within a response, then responses."""

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple:
        _, stats = ppo_policy_loss(logprobs, old, advantages, mask, clip)
        ratio = (logprobs - old.nan_to_num(0)).exp()
        worst = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
        return masked_mean(worst, mask, dim=1).mean(), stats

    patch.setattr(ppo, "ppo_policy_loss", loss)


def the_clip_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "ppo_policy_loss", lambda *a: ppo_policy_loss(*a[:4], 1e9))


def the_value_clip_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ppo, "ppo_value_loss", lambda *a: ppo_value_loss(*a[:4], 1e9))


def a_value_loss_without_its_half(patch: pytest.MonkeyPatch) -> None:
    def doubled(*tensors: Any) -> tuple:
        loss, stats = ppo_value_loss(*tensors)
        return 2 * loss, stats

    patch.setattr(ppo, "ppo_value_loss", doubled)


def scored_at_another_temperature(patch: pytest.MonkeyPatch) -> None:
    scored = ppo.response_logprobs
    patch.setattr(ppo, "response_logprobs", lambda *a: scored(*a[:3], 1.0))


@kinds
@put_back(
    scored_after_the_end, gamma_and_lambda_swapped, returns_of_whitened_advantages, no_whitening,
    a_mean_of_means, the_clip_left_out, the_value_clip_left_out, a_value_loss_without_its_half,
    scored_at_another_temperature,
)  # fmt: skip
def test_an_update_equals_the_plain_one(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holds_unless(mistake, monkeypatch):
        s = setting_of(make_model, kind)
        assert_rows(s.experience.values, s.old_values)
        assert_rows(s.experience.returns, s.returns)
        assert_rows(s.experience.advantages, s.advantages, 2e-5)

        policy, value = learner_of(s.policy), learner_of(s.value)
        gradients, value_gradients = caught_gradients(policy), caught_gradients(value)
        assert_metrics(ppo.update(policy, value, s.experience, CONFIG, seed=0), s)

        plain_policy, plain_value = s.policy_loss(s.policy), s.value_loss(s.value)
        assert plain_policy.clip_fraction > 0.1, "the clip should bind somewhere"
        assert plain_value.clip_fraction > 0
        expected = plain.policy_gradient(s.policy, plain_policy.slopes, CONFIG.temperature)
        assert_gradient(gradients[0], expected, s.policy, lambda m: s.policy_loss(m).loss)
        expected = plain.value_gradient(s.value, plain_value.slopes)
        assert_gradient(value_gradients[0], expected, s.value, lambda m: s.value_loss(m).loss)


def test_minibatches_see_each_token_once_an_epoch(make_model: Callable) -> None:
    """At a learning rate of 0, the averages over minibatches are those of the whole batch."""
    s = setting_of(make_model, "gpt2")
    policy, value = learner_of(s.policy), learner_of(s.value)
    gradients = caught_gradients(policy)
    config = replace(CONFIG, epochs=2, minibatch_size=4)
    assert_metrics(ppo.update(policy, value, s.experience, config, seed=1), s)
    assert len(gradients) == 4
