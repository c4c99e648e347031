"""A policy so small that every response can be listed: exact expectations, KL and gradients.

    policy, reference = TinyPolicy(seed=0), TinyPolicy(seed=1)
    rewards = torch.tensor([float(len(r)) for r in policy.responses])
    policy.expectation(rewards)                             # no sampling, no standard error
    policy.gradient(policy.expectation(rewards))            # what a policy gradient estimates
    policy.gradient(policy.kl(reference))

Shapes: N responses, T the longest length, S states (prefixes that go on), V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

EOS = 0  # the token that ends a response


def list_responses(vocabulary: int, max_length: int) -> list[tuple[int, ...]]:
    """Every response of tokens 0 .. vocabulary - 1 that ends at `EOS` or is cut at `max_length`."""

    def grow(prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for token in range(vocabulary):
            response = (*prefix, token)
            if token == EOS or len(response) == max_length:
                yield response
            else:
                yield from grow(response)

    return list(grow(()))


class TinyPolicy:
    """A softmax policy with its own row of logits for every state, in float64.

    The table can express every distribution over the responses, so that a method's optimum is
    never out of reach. Logits start as standard normal numbers drawn from `seed`.

    responses       list of N tuples of tokens
    tokens (N, T)   the same, padded with 0;  mask (N, T): 1 at every token, EOS included
    states (N, T)   which row of the logits each token was drawn from; 0 at padding
    logits (S, V)   the parameters: a leaf tensor for autograd and optimizers
    """

    def __init__(self, seed: int = 0, vocabulary: int = 3, max_length: int = 4) -> None:
        self.responses = list_responses(vocabulary, max_length)
        prefixes = {r[:t] for r in self.responses for t in range(len(r))}
        row = {prefix: i for i, prefix in enumerate(sorted(prefixes))}

        def padded(rows: Iterable[Sequence[float]]) -> Tensor:
            return pad_sequence([torch.tensor(r) for r in rows], batch_first=True)

        self.tokens = padded(self.responses)
        self.mask = padded([1.0] * len(r) for r in self.responses).double()
        self.states = padded([row[r[:t]] for t in range(len(r))] for r in self.responses)
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(row), vocabulary, dtype=torch.float64, generator=draw)
        self.logits = logits.requires_grad_()

    def token_logprobs(self) -> Tensor:
        """Log-probability of each token of each response: (N, T), 0 at padding."""
        table = self.logits.log_softmax(-1)
        return table[self.states, self.tokens] * self.mask

    def logprobs(self) -> Tensor:
        """Log-probability of each whole response: (N,)."""
        return self.token_logprobs().sum(1)

    def probabilities(self) -> Tensor:
        """Probability of each response: (N,), with sum 1."""
        return self.logprobs().exp()

    def expectation(self, values: Tensor) -> Tensor:
        """Mean of `values` (N,), one for each response, weighted by its probability."""
        return (self.probabilities() * values).sum()

    def kl(self, reference: TinyPolicy) -> Tensor:
        """KL(self || reference) over whole responses, in nats; its gradient is self's alone."""
        return self.expectation(self.logprobs() - reference.logprobs().detach())

    def gradient(self, value: Tensor) -> Tensor:
        """Exact gradient (S, V) of a scalar in this policy's logits. The graph stays for more."""
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]


class Example(NamedTuple):
    """A policy with 31 responses of up to 4 tokens, another as its reference, and rewards."""

    policy: TinyPolicy
    reference: TinyPolicy
    rewards: Tensor  # (N,), no two equal
    weights: Tensor  # (N,) the policy's probabilities as constants
    ref_logprobs: Tensor  # (N, T)


def example(max_length: int = 4) -> Example:
    """What all proofs by enumeration are about, made afresh."""
    policy, reference = TinyPolicy(0, max_length=max_length), TinyPolicy(1, max_length=max_length)
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(len(policy.responses), dtype=torch.float64, generator=generator)
    weights = policy.probabilities().detach()
    return Example(policy, reference, rewards, weights, reference.token_logprobs().detach())
