"""What the tests of a method against `proofs/plain.py` share: rows, models, and how to compare.

`plain` computes in float64 on models of its own, the library as it always does. The gradient of
every optimizer step has to be the same, and so have the weights after the last.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.proofs import plain
from rlhf_lib.runtime import make_accelerator

PROMPTS = [[5, 9, 4], [11, 3, 17, 8, 21], [30], [4, 4], [13, 14, 15, 16], [26, 25, 24]]
RESPONSES = [[7, 8, 1], [21, 1], [9, 10, 11, 12, 13], [19, 20, 5, 1], [1], [18, 15, 14, 6, 28, 1]]
SCORES = [0.7, -1.2, 0.1, 2.0, -0.4, 0.9]
RATE = 0.001  # the second and third step start from other log-probs than the first


def moved(model: Any, by: float, seed: int) -> Any:
    """A copy that somebody has trained."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return other


def learner_of(model: Any, rate: float = RATE, max_grad_norm: float = math.inf) -> Learner:
    """A learner of a copy, at one learning rate for as long as a test lasts."""
    rates = {"learning_rate": rate, "steps": 10**9, "max_grad_norm": max_grad_norm, "eps": 1e-5}
    return Learner(make_accelerator("fp32"), copy.deepcopy(model), **rates)


def double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def rollout_of(
    policy: Any, reference: Any, asked: list[list[int]], temperature: float, padding: float
) -> Rollout:
    """`RESPONSES` as if `policy` had sampled them; `padding` stands behind their ends."""
    batch = plain.pad(asked, RESPONSES)
    with torch.no_grad():
        both = [plain.logprobs(double(m), batch, temperature) for m in (policy, reference)]
    mask, scores, ended = batch.mask.float(), torch.tensor(SCORES), torch.ones(6).bool()
    logprobs, ref_logprobs = (x.float().masked_fill(mask == 0, padding) for x in both)
    return Rollout(
        asked, RESPONSES, mask, logprobs, ref_logprobs, ended, scores, scores, mask, None, None
    )


def caught_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A list that will hold the gradient of each step, as the optimizer gets it."""
    caught: list[Tensor] = []

    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        caught.append(torch.cat([g.double().flatten() for g in gradients]))

    optimizer.register_step_pre_hook(catch)
    return caught


def caught_losses(patch: pytest.MonkeyPatch) -> list[float]:
    """A list that will hold each loss that `plain` descends."""
    caught: list[float] = []
    descend: Callable = plain.descend

    def noted(loss: Tensor, *rest: Any) -> None:
        caught.append(loss.item())
        descend(loss, *rest)

    patch.setattr(plain, "descend", noted)
    return caught


def assert_gradients(ours: list[Tensor], theirs: list[Tensor], steps: int = 3) -> None:
    """Each is the same but for float32: some millionths of its length on most processors."""
    assert len(ours) == len(theirs) == steps
    for gradient, expected in zip(ours, theirs, strict=True):
        assert expected.norm() > 0.05
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def assert_weights(ours: Any, theirs: Any, start: Any) -> None:
    """Both have gone the same way, from the same start."""
    end, expected, begin = (
        torch.cat([p.detach().double().flatten() for p in model.parameters()])
        for model in (ours, theirs, start)
    )
    assert (end - expected).norm() < 1e-3 * (expected - begin).norm()
