"""KL estimators against exact values, by enumerating a small categorical: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_lib.objectives.kl import full_kl, k1, k2, k3

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.3, 0.3], dtype=torch.float64)
KL = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))


def test_the_example_is_not_symmetric() -> None:
    # otherwise a reversed estimator would pass the tests below
    reverse = (REFERENCE * (REFERENCE / POLICY).log()).sum().item()
    assert abs(KL - reverse) > 0.05


@pytest.mark.parametrize("estimator", [k1, k3])
def test_expectation_under_the_policy_is_the_kl(estimator) -> None:
    expected = (POLICY * estimator(POLICY.log(), REFERENCE.log())).sum().item()
    assert expected == pytest.approx(KL, abs=1e-12)


def test_single_values_by_hand() -> None:
    # policy 0.5, reference 0.25: the log-ratio is ln 2
    pair = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert k1(*pair).item() == pytest.approx(math.log(2))
    assert k2(*pair).item() == pytest.approx(0.5 * math.log(2) ** 2)
    assert k3(*pair).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k2_and_k3_are_never_negative_and_k1_is() -> None:
    logprobs, ref_logprobs = torch.randn(2, 1000)
    assert (k1(logprobs, ref_logprobs) < 0).any()
    assert (k2(logprobs, ref_logprobs) >= 0).all()
    assert (k3(logprobs, ref_logprobs) >= 0).all()


def test_k3_keeps_its_digits_for_close_policies() -> None:
    # exp(x) - 1 - x in fp32 is all rounding error at x = 1e-3
    x = torch.tensor([1e-3, -1e-3])
    exact = torch.tensor([math.expm1(v) - v for v in (1e-3, -1e-3)])
    assert torch.allclose(k3(-x, torch.zeros(2)), exact, rtol=2e-3, atol=0)


def _gradients() -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the exact KL, and expected gradients of the estimators used as a loss."""
    logits = POLICY.log().requires_grad_()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    exact = gradient((logits.softmax(-1) * (logits.log_softmax(-1) - REFERENCE.log())).sum())
    expected = {
        # sampling does not pass gradients on: the weights are constants
        f.__name__: gradient((POLICY * f(logits.log_softmax(-1), REFERENCE.log())).sum())
        for f in (k1, k2, k3)
    }
    return exact, expected


def test_gradient_of_k2_is_that_of_the_kl_and_of_k1_is_zero() -> None:
    exact, expected = _gradients()
    assert exact.abs().max() > 0.05
    assert torch.allclose(expected["k2"], exact, atol=1e-12)
    assert torch.allclose(expected["k1"], torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_gradient_of_k3_is_that_of_the_reverse_kl() -> None:
    # which is p - q, the gradient of KL(reference || policy) in the logits
    assert torch.allclose(_gradients()[1]["k3"], POLICY - REFERENCE, atol=1e-12)


def test_full_kl_equals_the_sum_over_the_vocabulary() -> None:
    logits, ref_logits = POLICY.log().float(), REFERENCE.log().float()
    both = full_kl(torch.stack([logits + 7, ref_logits])[None], ref_logits.expand(1, 2, 4) - 3)
    assert both.shape == (1, 2)
    assert both[0].tolist() == pytest.approx([KL, 0.0], abs=1e-6)
