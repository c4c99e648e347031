"""Masked reductions, entropy, and a running spread.

`mask` is 1 where a value counts; elsewhere may stand anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is that: half precision is too coarse to take a softmax of."""
    return x if x.dtype == torch.float64 else x.float()


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with 0 where masked out. Not a product: 0 times nan is nan, also in gradients."""
    return torch.where(mask.bool(), x, torch.zeros_like(x))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is 1, over `dim` or everything; a row without any entry gives 0."""
    x, mask = zero_padding(x, mask), mask.to(x.dtype)
    total, count = (x.sum(), mask.sum()) if dim is None else (x.sum(dim), mask.sum(dim))
    return total / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `x` where `mask` is 1 (scalar). Raises ValueError with fewer than two entries."""
    x, count = zero_padding(x, mask), mask.sum()
    if unbiased and count < 2:
        raise ValueError(f"variance needs at least two unmasked values, got {int(count)}")
    variance = masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return variance * count / (count - 1) if unbiased else variance


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x` scaled to variance 1, and to mean 0 unless `shift_mean` is False; 0 where masked out."""
    x = zero_padding(x, mask)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return zero_padding(whitened, mask)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the categorical over the last dimension; (..., V) -> (...)."""
    logprobs = wide(logits).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


class RunningScale:
    """Standard deviation of all rewards seen so far, to divide the next ones by.

    The mean is left alone, so that 0 stays what it was: the reward of a demonstration.
    Source: reward scaling in Zheng et al. 2023, arXiv:2307.04964.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, rewards: Tensor) -> None:
        """Take in a batch of rewards, of any shape."""
        count, mean = rewards.numel(), float(rewards.mean())
        total, shift = self.count + count, mean - self.mean
        self.squares += float(((rewards - mean) ** 2).sum())
        self.squares += shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """1 until two rewards that differ have been seen."""
        variance = self.squares / max(self.count - 1, 1)
        return math.sqrt(variance) if variance > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean = int(state["count"]), state["mean"]
        self.squares = state["squares"]
