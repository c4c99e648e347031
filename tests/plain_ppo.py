"""PPO a second time, as plainly as can be: loops over single tokens, in Python's own floats.

Nothing here uses the library. A model is asked for one row at a time, without padding; what a
model's own layers do to gradients is left to autograd, and everything above them is written out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rows = list[list[float]]  # a number for each token of each response

PROMPTS = [[5, 9, 4], [11, 3, 17, 8, 21], [30], [4, 4], [13, 14, 15, 16], [26, 25, 24]]
RESPONSES = [[7, 8, 1], [21, 1], [9, 10, 11, 12, 13], [19, 20, 5, 1], [1], [18, 15, 14, 6, 28, 1]]


@torch.no_grad()
def logprobs_of(model: Any, temperature: float) -> Rows:
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0].tolist()
        row = []
        for t, token in enumerate(response):
            scaled = [x / temperature for x in logits[len(prompt) + t - 1]]
            top = max(scaled)
            total = math.log(math.fsum(math.exp(x - top) for x in scaled))
            row.append(scaled[token] - top - total)
        rows.append(row)
    return rows


@torch.no_grad()
def values_of(model: Any) -> Rows:
    """The value before a token is what a classifier says of the text so far, and nothing else."""
    return [
        [model(torch.tensor([p + r[:t]])).logits.item() for t in range(len(r))]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]


def shaped(scores: Sequence[float], logprobs: Rows, ref_logprobs: Rows, kl_coef: float) -> Rows:
    rows = []
    for score, row, ref_row in zip(scores, logprobs, ref_logprobs, strict=True):
        rewards = [-kl_coef * (a - b) for a, b in zip(row, ref_row, strict=True)]
        rewards[-1] += score
        rows.append(rewards)
    return rows


def advantages_of(rewards: Rows, values: Rows, gamma: float, gae_lambda: float) -> Rows:
    """The definition: a sum over all later errors of the value, not a recursion."""
    rows = []
    for reward, value in zip(rewards, values, strict=True):
        after = [*value[1:], 0.0]
        errors = [r + gamma * b - a for r, a, b in zip(reward, value, after, strict=True)]
        rows.append([
            sum((gamma * gae_lambda) ** (k - t) * errors[k] for k in range(t, len(errors)))
            for t in range(len(errors))
        ])  # fmt: skip
    return rows


def flat(rows: Rows) -> list[float]:
    return [x for row in rows for x in row]


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def whitened(rows: Rows) -> Rows:
    numbers = flat(rows)
    middle = mean(numbers)
    variance = math.fsum((x - middle) ** 2 for x in numbers) / (len(numbers) - 1)
    return [[(x - middle) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


class Policy(NamedTuple):
    """A policy loss, its statistics, and its derivative by the log-prob of each token."""

    loss: float
    clip_fraction: float
    approx_kl: float
    ratio: float
    ratio_var: float
    slopes: list[float]


def policy_loss(logprobs: Rows, old_logprobs: Rows, advantages: Rows, clip: float) -> Policy:
    losses, outside, kls, ratios, slopes = [], [], [], [], []
    for new, old, advantage in zip(*map(flat, (logprobs, old_logprobs, advantages)), strict=True):
        ratio = math.exp(new - old)
        kept = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(ratio * advantage, kept * advantage))
        outside.append(float(ratio < 1 - clip or ratio > 1 + clip))
        kls.append(ratio - 1 - (new - old))
        ratios.append(ratio)
        # a clipped ratio is a constant
        slopes.append(-ratio * advantage if ratio * advantage <= kept * advantage else 0.0)
    spread = mean([(x - mean(ratios)) ** 2 for x in ratios])
    slopes = [slope / len(losses) for slope in slopes]
    return Policy(mean(losses), mean(outside), mean(kls), mean(ratios), spread, slopes)


class Value(NamedTuple):
    loss: float
    clip_fraction: float  # the share of tokens at which the clipped error is the larger one
    slopes: list[float]  # the derivative of the loss by each value


def value_loss(values: Rows, old_values: Rows, returns: Rows, clip: float) -> Value:
    losses, clipped, slopes = [], [], []
    for new, old, target in zip(*map(flat, (values, old_values, returns)), strict=True):
        kept = min(max(new, old - clip), old + clip)
        error, kept_error = (new - target) ** 2, (kept - target) ** 2
        losses.append(0.5 * max(error, kept_error))
        clipped.append(float(kept_error > error))
        slopes.append(0.0 if kept_error > error else new - target)
    return Value(mean(losses), mean(clipped), [slope / len(losses) for slope in slopes])


def policy_gradient(model: Any, slopes: Sequence[float], temperature: float) -> list[Tensor]:
    """The gradient of a loss on all parameters, from its slope at the log-prob of each token."""
    logprobs = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0]
        for t, token in enumerate(response):
            logprobs.append((logits[len(prompt) + t - 1] / temperature).log_softmax(-1)[token])
    return _gradient(model, logprobs, slopes)


def value_gradient(model: Any, slopes: Sequence[float]) -> list[Tensor]:
    """The same, from the slope at each value."""
    values = [
        model(torch.tensor([prompt + response[:t]])).logits[0, 0]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        for t in range(len(response))
    ]
    return _gradient(model, values, slopes)


def _gradient(model: Any, outputs: list[Tensor], slopes: Sequence[float]) -> list[Tensor]:
    total = torch.zeros(())
    for output, slope in zip(outputs, slopes, strict=True):
        total = total + slope * output
    return list(torch.autograd.grad(total, list(model.parameters())))


@torch.no_grad()
def slope_along(
    model: Any, direction: list[Tensor], loss: Callable[[Any], float], step: float
) -> float:
    """How fast a loss rises when the parameters move, from its values at both ends of a step."""
    ends = []
    for sign in (1, -1):
        there = copy.deepcopy(model).double()
        for parameter, d in zip(there.parameters(), direction, strict=True):
            parameter.add_(sign * step * d)
        ends.append(loss(there))
    return (ends[0] - ends[1]) / (2 * step)
