"""Each row of the parity table fails when a mistake is put into this library.

A mistake is a change to one of our functions, made in memory; TRL stays what it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is an optional dependency: pip install -e '.[parity]'")

from rlhf_lib.methods import dpo, reward_model, sft
from rlhf_lib.objectives import advantages, kl, losses, preference
from rlhf_lib.objectives.masked import masked_mean
from rlhf_lib.proofs import parity, parity_trl
from rlhf_lib.proofs.claims import Proof
from rlhf_lib.proofs.parity import BETA


def averaged(loss: Callable) -> Callable:
    return lambda *sums, **rest: loss(*(x / 5 for x in sums[:4]), *sums[4:], **rest)


def aggregated(how: str) -> Callable[[Callable], Callable]:
    return lambda loss: lambda *rest, **named: loss(*rest, **named | {"aggregation": how})


def turned(estimator: Callable) -> Callable:
    return lambda logprobs, ref_logprobs: estimator(ref_logprobs, logprobs)


def mean_of_all(rewards: Tensor, size: int) -> Tensor:
    groups = rewards.view(-1, size)
    return (groups - groups.mean(1, keepdim=True)).view(-1)


def over_n(rewards: Tensor, size: int, scale: str = "group") -> Tensor:
    """The standard deviation divided by n where n - 1 belongs."""
    groups = rewards.view(-1, size)
    spread = groups if scale == "group" else rewards
    deviation = spread.std(-1, correction=0, keepdim=True)
    return ((groups - groups.mean(1, keepdim=True)) / (deviation + 1e-4)).view(-1)


def unpositioned(model: Any, prompts: list, responses: list) -> tuple[Tensor, Tensor]:
    """Our log-probs, computed as TRL's."""
    logprobs = parity_trl.padded_logprobs(copy.deepcopy(model), prompts, responses)
    return logprobs, torch.ones_like(logprobs)


def one_step() -> list[Proof]:
    return parity.step_rows(["gpt2"])


class Mistake(NamedTuple):
    what: str
    claim: str  # of the row that has to fail
    place: Any  # a module of ours, or a dictionary in it
    name: str
    wrong: Callable[[Any], Any]  # from what stands there to what is put there


PADDED = "log-probs of padded rows, gpt2: ours are those of each row alone"
SEQUENCE, TOKEN = "GRPO loss, sequence (grpo)", "GRPO loss, token (bnpo)"
MISTAKES: dict[Callable[[], list[Proof]], list[Mistake]] = {
    parity.preference_rows: [
        Mistake("sums averaged", "DPO", preference, "dpo_loss", averaged),
        Mistake(
            "beta ignored",
            "DPO",
            preference,
            "dpo_loss",
            lambda loss: lambda *sums_and_beta, **rest: loss(*sums_and_beta[:4], **rest),
        ),
        Mistake(
            "reference ignored",
            "DPO",
            preference,
            "dpo_loss",
            lambda loss: (
                lambda c, r, ref_c, ref_r, *rest, **more: loss(
                    c, r, 0 * ref_c, 0 * ref_r, *rest, **more
                )
            ),
        ),
        Mistake(
            "smoothing ignored",
            "conservative DPO",
            preference,
            "dpo_loss",
            lambda loss: lambda *sums_and_beta, label_smoothing=0.0: loss(*sums_and_beta),
        ),
        Mistake(
            "target of 1 / beta",
            "IPO",
            preference,
            "ipo_loss",
            lambda loss: lambda *sums_and_beta: loss(*sums_and_beta[:4], BETA / 2),
        ),
        Mistake(
            "KL ignored",
            "KTO",
            preference,
            "kto_loss",
            lambda loss: (
                lambda c, r, ref_c, ref_r, kl, *rest, **weights: loss(
                    c, r, ref_c, ref_r, 0 * kl, *rest, **weights
                )
            ),
        ),
        Mistake(
            "weights swapped",
            "KTO",
            preference,
            "kto_loss",
            lambda loss: (
                lambda *rest, desirable_weight, undesirable_weight: loss(
                    *rest,
                    desirable_weight=undesirable_weight,
                    undesirable_weight=desirable_weight,
                )
            ),
        ),
    ],
    parity.length_rows: [
        Mistake(
            "lengths ignored",
            "length-normalised DPO",
            preference,
            "length_normalised_dpo_loss",
            lambda _: lambda *rest: preference.dpo_loss(*rest[:4], BETA),
        ),
        Mistake(
            "sums for averages",
            "IPO, given averages over tokens",
            preference,
            "ipo_loss",
            lambda loss: lambda *rest: loss(*(5 * x for x in rest[:4]), BETA),
        ),
        Mistake(
            "margin times beta",
            "SimPO",
            preference,
            "simpo_loss",
            lambda loss: lambda *rest, beta, margin: loss(*rest, beta, beta * margin),
        ),
        Mistake(
            "lengths ignored",
            "SimPO",
            preference,
            "simpo_loss",
            lambda loss: lambda c, r, m, n, **more: loss(c, r, 0 * m + 1, 0 * n + 1, **more),
        ),
        Mistake(
            "probabilities for odds",
            "ORPO, replies of one length",
            preference,
            "_log_odds",
            lambda _: lambda logprobs: logprobs,
        ),
    ],
    parity.reward_rows: [
        Mistake(
            "margin added",
            "reward loss with a margin",
            losses,
            "reward_loss",
            lambda loss: lambda c, r, margin, center: loss(c, r, -margin, center),
        ),
        Mistake(
            "not centred",
            "reward loss with a margin, centred",
            losses,
            "reward_loss",
            lambda loss: lambda c, r, margin, center: loss(c, r, margin),
        ),
    ],
    parity.grpo_rows: [
        Mistake("mean over all tokens", SEQUENCE, losses, "grpo_loss", aggregated("token")),
        Mistake("mean of means", TOKEN, losses, "grpo_loss", aggregated("sequence")),
        Mistake(
            "padding counted",
            "GRPO loss, token (dapo)",
            losses,
            "grpo_loss",
            aggregated("constant"),
        ),
        Mistake(
            "divided by tokens",
            "GRPO loss, constant (dr_grpo)",
            losses,
            "grpo_loss",
            aggregated("token"),
        ),
        Mistake(
            "one clip for both",
            SEQUENCE,
            losses,
            "grpo_loss",
            lambda loss: lambda *rest, **named: loss(*rest[:7], rest[6], **named),
        ),
        Mistake(
            "KL ignored",
            f"{SEQUENCE}, KL",
            losses,
            "grpo_loss",
            lambda loss: lambda *rest, **named: loss(*rest[:5], 0.0, *rest[6:], **named),
        ),
        Mistake(
            "a ratio for each token",
            "GRPO loss, sequence (GSPO)",
            losses,
            "grpo_loss",
            lambda loss: lambda *rest, **named: loss(*rest, **named | {"ratio": "token"}),
        ),
        Mistake(
            "clipped",
            "GRPO loss, token (cispo)",
            losses,
            "grpo_loss",
            lambda loss: lambda *rest, **named: loss(*rest, **named | {"surrogate": "clip"}),
        ),
        Mistake("k3 with its ratio turned", f"{TOKEN}, KL", kl.ESTIMATORS, "k3", turned),
    ],
    parity.advantage_rows: [
        Mistake(
            "one token late",
            "soft overlong penalty",
            advantages,
            "soft_overlong_penalty",
            lambda penalty: lambda lengths, *rest: penalty(lengths - 1, *rest),
        ),
        *(
            Mistake(
                "another deviation",
                f"group advantages, scale={scale}",
                advantages,
                "group_advantages",
                lambda _: over_n,
            )
            for scale in ("group", "batch", "none")
        ),
        Mistake(
            "mean of all",
            "leave-one-out advantages",
            advantages,
            "leave_one_out_advantages",
            lambda _: mean_of_all,
        ),
        Mistake(
            "KL added", "leave-one-out advantages, KL in the reward", kl.ESTIMATORS, "k1", turned
        ),
    ],
    one_step: [
        Mistake(
            "sums averaged",
            "one DPO step, gpt2",
            dpo,
            "paired_logprobs",
            lambda sums: lambda *rest: tuple(x / 3 for x in sums(*rest)),
        ),
        Mistake(
            "a token too early",
            "one reward step, gpt2",
            reward_model,
            "paired_scores",
            lambda scores: (
                lambda model, prompts, chosen, rejected: scores(
                    model, prompts, [c[:-1] or c for c in chosen], rejected
                )
            ),
        ),
        Mistake(
            "mean of means",
            "one SFT step, gpt2",
            sft,
            "sft_loss",
            lambda _: lambda logprobs, mask: -masked_mean(logprobs, mask, dim=1).mean(),
        ),
    ],
    parity.position_rows: [
        Mistake("no positions", PADDED, parity, "response_logprobs", lambda _: unpositioned),
    ],
}


@pytest.mark.parametrize(
    ("rows", "mistake"),
    [
        pytest.param(rows, mistake, id=f"{mistake.claim}: {mistake.what}")
        for rows, mistakes in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_of_ours_fails_its_row(
    rows: Callable[[], list[Proof]], mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name = mistake.place, mistake.name
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, mistake.wrong(place[name]))
    else:
        monkeypatch.setattr(place, name, mistake.wrong(getattr(place, name)))
    with parity_trl.undisturbed():
        (row,) = [row for row in rows() if row.claim == mistake.claim]
    assert not row.holds, row
