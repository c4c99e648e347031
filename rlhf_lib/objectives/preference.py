"""Losses on preference pairs: a reply that was chosen against one that was rejected.

All take log-probabilities of whole replies, (B,), summed over the tokens and never averaged; the
losses that compare averages take the lengths as well, (B,), in tokens with the end-of-sequence
token. All return the mean over the pairs and what the loss takes each reply to be worth. `beta` is
another thing in each of them: no two can be compared at the same value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceStats(NamedTuple):
    chosen_rewards: Tensor  # (B,) implicit reward: beta * log(policy / reference) for DPO
    rejected_rewards: Tensor


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, PreferenceStats]:
    """Direct preference optimisation; all inputs (B,), sums over the response, never means.

    Source: arXiv:2305.18290, eq. 7; label smoothing: conservative DPO (E. Mitchell, 2023).
    """
    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected = beta * (rejected_logprobs - ref_rejected_logprobs)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss.mean(), PreferenceStats(chosen.detach(), rejected.detach())


def length_normalised_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, PreferenceStats]:
    """DPO on log-ratios averaged over the tokens of a reply (Tulu 3, arXiv:2411.15124, sec. 5.1).

    An average is smaller than a sum by the length of the reply, so `beta` has to be larger by as
    much to weigh the same: there is no default to share with DPO (Tulu 3 takes 5).
    """
    return dpo_loss(
        chosen_logprobs / chosen_lengths,
        rejected_logprobs / rejected_lengths,
        ref_chosen_logprobs / chosen_lengths,
        ref_rejected_logprobs / rejected_lengths,
        beta,
        label_smoothing,
    )


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, PreferenceStats]:
    """Log-ratios that are to differ by 1 / (2 beta), no more (IPO, arXiv:2310.12036, eq. 17).

    `beta` is the paper's tau. The error is squared, so a margin past its target is drawn back,
    where DPO's may grow for ever. Of sums, as the paper writes it; some libraries average over the
    tokens first, which asks for a larger difference the longer the replies are.
    """
    chosen = chosen_logprobs - ref_chosen_logprobs
    rejected = rejected_logprobs - ref_rejected_logprobs
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    return loss.mean(), PreferenceStats(beta * chosen.detach(), beta * rejected.detach())


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    margin: float = 1.0,
) -> tuple[Tensor, PreferenceStats]:
    """Average log-probs compared, and a margin between them (SimPO, arXiv:2405.14734, eq. 6).

    No reference. `margin` is the paper's gamma: it is taken off after beta has been applied, so
    that averages are asked to differ by margin / beta nats a token.
    """
    chosen = beta * chosen_logprobs / chosen_lengths
    rejected = beta * rejected_logprobs / rejected_lengths
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss.mean(), PreferenceStats(chosen.detach(), rejected.detach())


def orpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, PreferenceStats]:
    """SFT on the chosen reply plus `beta` times a log odds ratio (ORPO, arXiv:2403.07691, eq. 6-7).

    No reference: the SFT term is what holds the policy. `beta` is the paper's lambda, the weight of
    the second term. A reply's probability is the geometric mean over its tokens (eq. 3), so each
    reply weighs the same in the SFT term, whatever its length. Rewards are beta * average log-prob.
    """
    chosen = chosen_logprobs / chosen_lengths
    rejected = rejected_logprobs / rejected_lengths
    loss = -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return loss.mean(), PreferenceStats(beta * chosen.detach(), beta * rejected.detach())


def _log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, (B,); expm1 keeps 1 - p exact where p is almost 1.

    A log-prob closer to 0 than rounding can tell counts as one rounding step below it, for odds
    are finite. Its gradient still passes: a rejected reply that is certain is to be pushed down.
    """
    below = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    logprobs = logprobs + (below - logprobs).detach()
    return logprobs - (-torch.expm1(logprobs)).log()


def kto_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, PreferenceStats]:
    """Each reply judged alone, as a gain or a loss from one point (KTO, arXiv:2402.01306, eq. 8).

    `kl`: scalar estimate of KL(policy || reference), from replies to other prompts (sec. 4.1). It
    is that point; no gradient goes through it, and below 0 it counts as 0. A reply's loss is
    lambda - v with v = lambda * sigmoid(beta * (log-ratio - kl)) if it was chosen, and the opposite
    sign inside if it was rejected. The mean is over all 2B replies, which need not come in pairs.
    """
    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected = beta * (rejected_logprobs - ref_rejected_logprobs)
    reference_point = beta * kl.detach().clamp(min=0)
    # 1 - sigmoid(x) = sigmoid(-x)
    desirable = desirable_weight * torch.sigmoid(reference_point - chosen)
    undesirable = undesirable_weight * torch.sigmoid(rejected - reference_point)
    loss = (desirable + undesirable).mean() / 2
    return loss, PreferenceStats(chosen.detach(), rejected.detach())
