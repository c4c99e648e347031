"""What stands at padding positions changes no loss, no statistic and no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lib.objectives.losses import grpo_loss, ppo_policy_loss, ppo_value_loss, sft_loss

MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, old ones and advantages (3, 4); ratios on both sides of the clip range."""
    old = -2 * torch.rand(3, 4)
    return old + 0.4 * torch.randn(3, 4), old, torch.randn(3, 4)


def _sft(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, tuple]:
    return sft_loss(x, MASK), ()


def _policy(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, tuple]:
    return ppo_policy_loss(x, a, b, MASK)


def _value(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, tuple]:
    return ppo_value_loss(x, a, b, MASK)


def _grpo(aggregation: str) -> Callable:
    def loss(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, tuple]:
        value, stats = grpo_loss(x, a, b, MASK, c, kl_coef=0.3, aggregation=aggregation)
        return value, (*stats.policy, stats.kl)

    loss.__name__ = aggregation
    return loss


LOSSES = [_sft, _policy, _value, *map(_grpo, ("sequence", "token", "constant"))]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("junk", [300.0, math.inf, -math.inf, math.nan])
def test_padding_changes_neither_loss_nor_statistics_nor_gradient(
    loss: Callable, junk: float
) -> None:
    inputs = [*sample(), -torch.rand(3, 4)]

    def everything(fill: list[float]) -> list[Tensor]:
        x, *rest = (i.where(MASK.bool(), f) for i, f in zip(inputs, fill, strict=True))
        x.requires_grad_()
        value, stats = loss(x, *rest)
        value.backward()
        return [value.detach(), *stats, x.grad]

    clean = everything([0.0] * 4)
    assert clean[-1].abs().max() > 0
    for place in range(4):  # in one input at a time, then in all
        fill = [junk if i == place else 0.0 for i in range(4)]
        for one, other in zip(clean, everything(fill), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(clean, everything([junk, -junk, junk, -junk]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss", [_sft, _policy, _value, _grpo("token"), _grpo("sequence")])
def test_more_padding_changes_nothing(loss: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [*sample(), -torch.rand(3, 4)]
    before, stats_before = loss(*inputs)
    wider = [torch.cat([x, torch.randn(3, 5)], dim=1) for x in inputs]
    monkeypatch.setitem(globals(), "MASK", torch.cat([MASK, torch.zeros(3, 5)], dim=1))
    after, stats_after = loss(*wider)
    assert torch.allclose(before, after, atol=1e-6)
    for one, other in zip(stats_before, stats_after, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
