"""KL(policy || reference): three sampled estimators, the exact sum over V, and a leash on it.

The estimators take the log-probabilities (any equal shapes) of tokens that the *policy* sampled
(J. Schulman, "Approximating KL divergence", 2020). All are in nats. As a differentiable loss on
on-policy samples, k1's expected gradient is 0; k2's is the gradient of the KL at the state where
the token was sampled (of the whole KL, if the log-probabilities are those of whole responses).
"""

from __future__ import annotations

from torch import Tensor

from rlhf_lib.objectives.masked import wide


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference): unbiased, may be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, never negative, low variance."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """reference / policy - 1 - log(reference / policy): unbiased and never negative."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL at each position, summed over the vocabulary; (B, T, V) twice -> (B, T)."""
    logprobs, ref_logprobs = wide(logits).log_softmax(-1), wide(ref_logits).log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


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
