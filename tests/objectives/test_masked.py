"""Masked reductions: exact values, properties, and padding that may hold anything."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lib.objectives.masked import entropy, masked_mean, masked_var, masked_whiten

X = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # 1, 2 and 6 count


def test_mean_over_everything_and_along_a_dimension() -> None:
    assert masked_mean(X, MASK).item() == pytest.approx(3.0)
    assert masked_mean(X, MASK, dim=1).tolist() == pytest.approx([1.5, 6.0])
    assert masked_mean(X, MASK, dim=0).tolist() == pytest.approx([3.5, 2.0, 0.0])


def test_mean_of_nothing_is_zero() -> None:
    assert masked_mean(X, torch.zeros_like(X)).item() == 0
    assert masked_mean(X, torch.tensor([[1.0, 1, 1], [0, 0, 0]]), dim=1).tolist() == [4.0, 0.0]


def test_mean_takes_masks_of_any_type() -> None:
    for dtype in (torch.bool, torch.long, torch.float64):
        assert masked_mean(X, MASK.to(dtype)).item() == pytest.approx(3.0)


def test_variance_with_and_without_bessels_correction() -> None:
    # squared distances from the mean 3: 4, 1 and 9
    assert masked_var(X, MASK).item() == pytest.approx(14 / 2)
    assert masked_var(X, MASK, unbiased=False).item() == pytest.approx(14 / 3)


def test_variance_of_a_single_value() -> None:
    single = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="at least two unmasked values, got 1"):
        masked_var(X, single)
    assert masked_var(X, single, unbiased=False).item() == 0


def test_whitened_has_mean_0_and_variance_1() -> None:
    x, mask = 5 + 3 * torch.randn(7, 11), (torch.rand(7, 11) < 0.6).float()
    whitened = masked_whiten(x, mask)
    real = whitened[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.var().item() == pytest.approx(1, abs=1e-5)
    assert (whitened[~mask.bool()] == 0).all()


def test_whitening_can_keep_the_mean() -> None:
    x, mask = 5 + 3 * torch.randn(7, 11), (torch.rand(7, 11) < 0.6).float()
    real = masked_whiten(x, mask, shift_mean=False)[mask.bool()]
    assert real.mean().item() == pytest.approx(x[mask.bool()].mean().item(), abs=1e-5)
    assert real.var().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
def test_padding_changes_neither_value_nor_gradient(
    function: Callable[[Tensor, Tensor], Tensor], junk: float
) -> None:
    weight = torch.randn(2, 3)

    def value_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        value = function(x, MASK)
        (value * weight).sum().backward()
        assert x.grad is not None
        return value.detach(), x.grad

    clean, spoilt = X.where(MASK.bool(), 0.0), X.where(MASK.bool(), junk)
    for expected, got in zip(value_and_gradient(clean), value_and_gradient(spoilt), strict=True):
        assert torch.equal(expected, got)


def test_entropy_of_known_distributions() -> None:
    uniform = entropy(torch.zeros(2, 3, 8))
    assert uniform.shape == (2, 3)
    assert uniform.flatten().tolist() == pytest.approx([math.log(8)] * 6)
    quarter = torch.tensor([0.5, 0.25, 0.25]).log()
    assert entropy(quarter).item() == pytest.approx(1.5 * math.log(2))
    assert entropy(quarter + 100).item() == pytest.approx(1.5 * math.log(2), abs=1e-4)


def test_entropy_is_taken_in_fp32() -> None:
    logits = torch.randn(4, 50)
    rounded = logits.bfloat16()
    assert torch.allclose(entropy(rounded), entropy(rounded.float()))
    assert entropy(rounded).dtype is torch.float32
