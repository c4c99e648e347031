"""DPO against `proofs/plain.py`: gradients and weights of its steps, with mistakes put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lib.course.twins import library_dpo
from rlhf_lib.data.encoding import Pair
from rlhf_lib.methods import dpo
from rlhf_lib.methods.learner import Learner
from rlhf_lib.proofs import plain
from tests.independent import (
    PROMPTS,
    RATE,
    RESPONSES,
    assert_gradients,
    assert_weights,
    caught_gradients,
    double,
    learner_of,
    moved,
)
from tests.traps.test_traps import Mistake, holds_unless, kinds, put_back

TRIPLES = list(zip(PROMPTS, RESPONSES, [*RESPONSES[2:], *RESPONSES[:2]], strict=True))
SETTINGS = plain.Settings(beta=0.3, max_grad_norm=math.inf)


def library_steps(policy: Learner, reference: Any, s: plain.Settings) -> list[float]:
    """Three steps by the library on all pairs, in micro-batches of 4 and 2; their losses."""
    pairs = [Pair("", "", "", "", *triple) for triple in TRIPLES]
    return [library_dpo(policy, reference, pairs, s)["loss"] for _ in range(3)]


def averages_for_sums(patch: pytest.MonkeyPatch) -> None:
    sums = dpo.paired_logprobs

    def averaged(model: Any, prompts: list, *replies: list) -> tuple:
        return tuple(
            total / total.new_tensor([len(reply) for reply in side])
            for total, side in zip(sums(model, prompts, *replies), replies, strict=True)
        )

    patch.setattr(dpo, "paired_logprobs", averaged)


def a_token_left_out(patch: pytest.MonkeyPatch) -> None:
    sums = dpo.paired_logprobs

    def shorter(model: Any, prompts: list, *replies: list) -> tuple:
        return sums(model, prompts, *([reply[:-1] or reply for reply in side] for side in replies))

    patch.setattr(dpo, "paired_logprobs", shorter)


def no_reference(patch: pytest.MonkeyPatch) -> None:
    table = dpo.reference_logprobs
    patch.setattr(dpo, "reference_logprobs", lambda *rest: 0 * table(*rest))


def the_reference_of_the_other_reply(patch: pytest.MonkeyPatch) -> None:
    table = dpo.reference_logprobs
    patch.setattr(dpo, "reference_logprobs", lambda *rest: table(*rest).flip(1))


def changed_loss(patch: pytest.MonkeyPatch, change: Callable) -> None:
    loss = dpo.dpo_loss
    patch.setattr(dpo, "dpo_loss", lambda *rest: loss(*change(*rest)))


def rejected_for_chosen(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda c, r, ref_c, ref_r, *rest: (r, c, ref_r, ref_c, *rest))


def half_of_beta(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda c, r, ref_c, ref_r, beta, *rest: (c, r, ref_c, ref_r, beta / 2))


def doubtful_labels(patch: pytest.MonkeyPatch) -> None:
    changed_loss(patch, lambda c, r, ref_c, ref_r, beta, *rest: (c, r, ref_c, ref_r, beta, 0.1))


def micro_batches_that_weigh_the_same(patch: pytest.MonkeyPatch) -> None:
    """The two last pairs count as much as the four before."""
    step = Learner.step

    def even(self: Learner, losses: Any) -> tuple[float, float]:
        shares = iter((6 / 4 / 2, 6 / 2 / 2))
        return step(self, (loss * next(shares) for loss in losses))

    patch.setattr(Learner, "step", even)


@kinds
@put_back(
    averages_for_sums,
    a_token_left_out,
    no_reference,
    the_reference_of_the_other_reply,
    rejected_for_chosen,
    half_of_beta,
    doubtful_labels,
    micro_batches_that_weigh_the_same,
)
def test_three_steps_equal_the_plain_ones(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = make_model(kind)
    reference = moved(start, 0.05, 1)
    plain_policy = double(start)
    optimizer = plain.adamw(plain_policy, RATE)
    expected = caught_gradients(optimizer)
    losses = []
    for _ in range(3):
        chosen, rejected = plain.dpo_update(
            plain_policy, double(reference), TRIPLES, optimizer, SETTINGS
        )
        losses.append(-torch.nn.functional.logsigmoid(chosen - rejected).mean().item())

    with holds_unless(mistake, monkeypatch):
        policy = learner_of(start)
        gradients = caught_gradients(policy.optimizer.optimizer)
        assert library_steps(policy, reference, SETTINGS) == pytest.approx(losses, rel=1e-4)
        assert_gradients(gradients, expected)
        assert_weights(policy.model, plain_policy, start)
