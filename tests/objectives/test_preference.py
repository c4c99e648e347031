"""Preference losses: values by hand, gradients, first steps, invariances, and extreme inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lib.objectives.preference import (
    PreferenceStats,
    dpo_loss,
    ipo_loss,
    kto_loss,
    length_normalised_dpo_loss,
    orpo_loss,
    simpo_loss,
)

# one pair: log-probs of the replies, the same under the reference, and their lengths
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -6.0, -8.0, -6.6, -7.0  # log-ratios 0.6 and -1
CHOSEN_LENGTH, REJECTED_LENGTH = 3, 2  # averages -2 and -4
KL = 0.2

# every loss on the same six inputs: log-probs, the reference's, lengths
LOSSES: dict[str, Callable[..., tuple[Tensor, PreferenceStats]]] = {
    "dpo": lambda c, r, rc, rr, nc, nr: dpo_loss(c, r, rc, rr, 0.5),
    "conservative": lambda c, r, rc, rr, nc, nr: dpo_loss(c, r, rc, rr, 0.5, 0.2),
    "dpo_normalised": lambda c, r, rc, rr, nc, nr: length_normalised_dpo_loss(
        c, r, rc, rr, nc, nr, 2.0
    ),
    "ipo": lambda c, r, rc, rr, nc, nr: ipo_loss(c, r, rc, rr, 0.25),
    "simpo": lambda c, r, rc, rr, nc, nr: simpo_loss(c, r, nc, nr, 2.0, 1.0),
    "orpo": lambda c, r, rc, rr, nc, nr: orpo_loss(c, r, nc, nr, 0.3),
    "kto": lambda c, r, rc, rr, nc, nr: kto_loss(c, r, rc, rr, torch.tensor(KL), 0.5, 1.5, 2.5),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def inputs(**changes: float | list[float]) -> list[Tensor]:
    """The pair above as tensors (B,), the log-probs of the policy with gradient."""
    numbers = {
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "ref_chosen": REF_CHOSEN,
        "ref_rejected": REF_REJECTED,
        "chosen_length": CHOSEN_LENGTH,
        "rejected_length": REJECTED_LENGTH,
    } | changes
    tensors = [torch.tensor(x, dtype=torch.float32).reshape(-1) for x in numbers.values()]
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


def gradients(name: str, **changes: float) -> tuple[float, float]:
    """Slope of a loss in the chosen and in the rejected log-prob."""
    chosen, rejected, *rest = inputs(**changes)
    loss, _ = LOSSES[name](chosen, rejected, *rest)
    one, other = torch.autograd.grad(loss, (chosen, rejected))
    return one.item(), other.item()


# ------------------------------------------------------------------------------ values by hand

ODDS = [math.exp(a) / (1 - math.exp(a)) for a in (-2, -4)]


@pytest.mark.parametrize(
    ("name", "loss", "rewards"),
    [
        ("dpo", -math.log(sigmoid(0.3 + 0.5)), (0.3, -0.5)),
        ("conservative", -math.log(sigmoid(0.8) ** 0.8 * sigmoid(-0.8) ** 0.2), (0.3, -0.5)),
        ("dpo_normalised", -math.log(sigmoid(2 * 0.2 + 2 * 0.5)), (0.4, -1.0)),
        ("ipo", (1.6 - 2) ** 2, (0.15, -0.25)),
        ("simpo", -math.log(sigmoid(-4 + 8 - 1)), (-4.0, -8.0)),
        ("orpo", 2 - 0.3 * math.log(ODDS[0] / (ODDS[0] + ODDS[1])), (-0.6, -1.2)),
        ("kto", (1.5 * (1 - sigmoid(0.2)) + 2.5 * (1 - sigmoid(0.6))) / 2, (0.3, -0.5)),
    ],
)
def test_loss_and_rewards_by_hand(name: str, loss: float, rewards: tuple[float, float]) -> None:
    value, stats = LOSSES[name](*inputs())
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert (stats.chosen_rewards.item(), stats.rejected_rewards.item()) == pytest.approx(rewards)
    assert not stats.chosen_rewards.requires_grad
    assert not stats.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_the_mean_of_its_pairs(name: str) -> None:
    rows = [-10 * torch.rand(5) for _ in range(4)] + [torch.randint(1, 9, (5,)) for _ in range(2)]
    loss, stats = LOSSES[name](*rows)
    singles = [LOSSES[name](*(x[i : i + 1] for x in rows)) for i in range(5)]
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in singles) / 5, rel=1e-5)
    for field, values in zip(
        PreferenceStats._fields, zip(*(s for _, s in singles), strict=True), strict=True
    ):
        assert torch.allclose(getattr(stats, field), torch.cat(values)), field


# ----------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("name", "chosen", "rejected"),
    [
        # arXiv:2305.18290, sec. 4: beta times the chance of the wrong order
        ("dpo", -0.5 * sigmoid(-0.8), 0.5 * sigmoid(-0.8)),
        ("dpo_normalised", -2 / 3 * sigmoid(-1.4), 2 / 2 * sigmoid(-1.4)),
        ("ipo", 2 * (1.6 - 2), -2 * (1.6 - 2)),
        ("simpo", -2 / 3 * sigmoid(-3), 2 / 2 * sigmoid(-3)),
        # d log odds / d log p = 1 / (1 - p); arXiv:2403.07691, eq. 8-10
        (
            "orpo",
            -1 / 3 - 0.3 / 3 * ODDS[1] / sum(ODDS) / (1 - math.exp(-2)),
            0.3 / 2 * ODDS[1] / sum(ODDS) / (1 - math.exp(-4)),
        ),
        (
            "kto",
            -1.5 * 0.5 * sigmoid(0.2) * sigmoid(-0.2) / 2,
            2.5 * 0.5 * sigmoid(0.6) * sigmoid(-0.6) / 2,
        ),
    ],
)
def test_gradients_by_hand(name: str, chosen: float, rejected: float) -> None:
    assert gradients(name) == pytest.approx((chosen, rejected), rel=1e-4)
    assert chosen < 0 < rejected, "descending makes the chosen reply more likely, not the other"


def test_ipo_stops_at_its_target_where_dpo_goes_on() -> None:
    # log-ratios differ by 1.6 in `inputs`; the target of beta = 0.25 is 2
    at_target, beyond = {"chosen": CHOSEN + 0.4}, {"chosen": CHOSEN + 3.0}
    assert gradients("ipo", **at_target) == pytest.approx((0, 0), abs=1e-5)
    assert gradients("ipo", **beyond)[0] > 0, "past its target the margin is drawn back"
    assert gradients("dpo", **beyond)[0] < 0


@pytest.mark.parametrize("loss", [dpo_loss, length_normalised_dpo_loss])
def test_label_smoothing_has_its_optimum_where_the_share_of_labels_says(loss: Callable) -> None:
    # beta = 1, lengths 1: a margin of log(0.8 / 0.2) says that 80 % of such labels are right
    chosen = torch.tensor([-5 + math.log(4)], requires_grad=True)
    others = [torch.tensor([x]) for x in (-7.0, -5.0, -7.0)]
    lengths = [] if loss is dpo_loss else [torch.ones(1)] * 2
    value, _ = loss(chosen, *others, *lengths, beta=1.0, label_smoothing=0.2)
    assert torch.autograd.grad(value, chosen)[0].item() == pytest.approx(0, abs=1e-6)
    plain, _ = loss(chosen, *others, *lengths, beta=1.0)
    assert torch.autograd.grad(plain, chosen)[0].item() == pytest.approx(-0.2, abs=1e-6)


def test_kto_judges_each_reply_alone() -> None:
    slopes = {gradients("kto", rejected=x)[0] for x in (-1.0, -8.0, -60.0)}
    assert len(slopes) == 1
    assert len({gradients("dpo", rejected=x)[0] for x in (-1.0, -8.0, -60.0)}) == 3
    # a reply far on either side of the reference point is let go: mislabelled ones do not pull
    near = abs(gradients("kto", chosen=REF_CHOSEN + KL)[0])
    assert near == pytest.approx(1.5 * 0.5 / 4 / 2)
    for far in (-60.0, 60.0):
        assert abs(gradients("kto", chosen=REF_CHOSEN + far)[0]) < 1e-6 * near


def test_kto_takes_no_gradient_through_its_reference_point_and_none_below_0() -> None:
    values = {}
    for kl in (-3.0, 0.0, 0.7):
        point = torch.tensor(kl, requires_grad=True)
        chosen, *rest = inputs()[:4]
        loss, _ = kto_loss(chosen, *rest, point)
        loss.backward()
        assert point.grad is None
        values[kl] = loss.item()
    assert values[-3.0] == values[0.0] != values[0.7]


# --------------------------------------------------------------------------------- first steps


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("dpo", math.log(2)),
        ("conservative", math.log(2)),
        ("dpo_normalised", math.log(2)),
        ("ipo", (1 / (2 * 0.25)) ** 2),
    ],
)
def test_the_first_loss_of_a_policy_that_is_its_reference(name: str, first: float) -> None:
    both = -10 * torch.rand(2, 5)
    loss, stats = LOSSES[name](*both, *both, *torch.randint(1, 9, (2, 5)))
    assert loss.item() == pytest.approx(first, rel=1e-6)
    assert stats.chosen_rewards.tolist() == stats.rejected_rewards.tolist() == [0] * 5


def test_the_first_kto_loss_is_half_the_weights() -> None:
    both = -10 * torch.rand(2, 5)
    loss, _ = kto_loss(*both, *both, torch.zeros(()), 0.1, 1.5, 2.5)
    assert loss.item() == pytest.approx((1.5 + 2.5) / 4)
    assert kto_loss(*both, *both, torch.zeros(()))[0].item() == pytest.approx(0.5)


# ------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("name", ["dpo_normalised", "simpo", "orpo"])
def test_losses_of_averages_do_not_see_a_reply_said_three_times(name: str) -> None:
    once = inputs()
    thrice = [3 * once[0], once[1], 3 * once[2], once[3], 3 * once[4], once[5]]
    assert LOSSES[name](*thrice)[0].item() == pytest.approx(LOSSES[name](*once)[0].item())


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_losses_of_sums_do(name: str) -> None:
    # trap: DPO averaged over the length without saying so
    once = inputs()
    thrice = [3 * once[0], once[1], 3 * once[2], once[3], 3 * once[4], once[5]]
    assert abs(LOSSES[name](*thrice)[0].item() - LOSSES[name](*once)[0].item()) > 0.01


def test_the_margin_of_simpo_is_not_multiplied_by_beta() -> None:
    averages = torch.tensor([-1.0]), torch.tensor([-1.5]), torch.ones(1), torch.ones(1)
    # beta * 0.5 = margin: even odds
    assert simpo_loss(*averages, beta=4.0, margin=2.0)[0].item() == pytest.approx(math.log(2))


# ------------------------------------------------------------------------------------ extremes


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4)])
def test_losses_stay_finite_for_hopeless_replies(name: str, chosen: float, rejected: float) -> None:
    loss, _ = LOSSES[name](*inputs(chosen=chosen, rejected=rejected))
    assert math.isfinite(loss.item())
    assert all(map(math.isfinite, gradients(name, chosen=chosen, rejected=rejected)))


NEARLY_CERTAIN = [0.0, -1e-38, -1e-9, -1e-7, -1e-3]


@pytest.mark.parametrize("average", NEARLY_CERTAIN)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_orpo_stays_finite_for_certain_replies(side: str, average: float) -> None:
    change = {side: 3 * average, f"{side}_length": 3.0}
    assert math.isfinite(LOSSES["orpo"](*inputs(**change))[0].item())
    chosen, rejected = gradients("orpo", **change)
    assert math.isfinite(chosen)
    assert math.isfinite(rejected)
    assert chosen < 0 < rejected
    both = {"chosen": average, "rejected": average, "chosen_length": 1.0, "rejected_length": 1.0}
    assert LOSSES["orpo"](*inputs(**both))[0].item() == pytest.approx(0.3 * math.log(2), abs=2e-3)


@pytest.mark.parametrize("average", [-1e-6, -1e-4, -0.3, -5.0])
def test_log_odds_keep_their_digits_close_to_certainty(average: float) -> None:
    # chosen at even odds: the loss tells the log odds of the rejected reply, here in float64
    even = math.log(0.5)
    odds = math.log(-math.expm1(average)) - average  # minus log odds
    expected = -even + math.log1p(math.exp(-odds))
    loss, _ = orpo_loss(*(torch.tensor([x]) for x in (even, average, 1.0, 1.0)), beta=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_orpo_pushes_down_a_rejected_reply_that_is_certain() -> None:
    # a reply of one token: its log odds are its logit, so the slope there is never above beta
    logits = torch.tensor([[17.0, 0.0]], requires_grad=True)
    rejected = logits.log_softmax(-1)[:, 0]
    assert rejected.item() == 0, "certain, as far as fp32 can tell"
    ones = torch.ones(1)
    loss, _ = orpo_loss(torch.tensor([-1.0]), rejected, ones, ones, beta=0.1)
    loss.backward()
    assert logits.grad is not None
    assert -0.1 < logits.grad[0, 1].item() < -0.01, "descending raises the other token"
