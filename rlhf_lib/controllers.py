"""Two small states that follow a run: the KL coefficient, and the spread of the rewards.

Both have `state_dict` and `load_state_dict`, so a checkpoint holds them.
"""

from __future__ import annotations

import math

from torch import Tensor


class AdaptiveKL:
    """A KL coefficient that rises while the KL is above `target`, and falls while it is below.

    `target` in nats a response, `horizon` in responses; a target of 0 leaves the coefficient alone.
    Source: Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Follow the mean `kl` of `samples` responses; an error counts at most 20 %."""
        if self.target > 0:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


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
