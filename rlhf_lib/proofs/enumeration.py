"""A policy so small that every response can be listed: exact expectations, KL and gradients.

    policy, reference = TinyPolicy(seed=0), TinyPolicy(seed=1)
    rewards = torch.tensor([float(len(r)) for r in policy.responses])
    policy.expectation(rewards)                             # no sampling, no standard error
    policy.gradient(policy.expectation(rewards))            # what a policy gradient estimates
    policy.gradient(policy.kl(reference))

Shapes: N responses, T the longest length, S states (prefixes that go on), V tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

EOS = 0  # the token that ends a response


def list_responses(vocabulary: int, max_length: int) -> list[tuple[int, ...]]:
    """Every response of tokens 0 .. vocabulary - 1 that ends at `EOS` or is cut at `max_length`.

    Raises ValueError for fewer than two tokens or a length below 1.
    """
    if vocabulary < 2 or max_length < 1:
        raise ValueError(
            f"vocabulary={vocabulary}, max_length={max_length}: needs at least 2 tokens, length 1"
        )

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
    tokens (N, T)   the same, padded with EOS;  mask (N, T): 1 at every token, EOS included
    states (N, T)   which row of the logits each token was drawn from; 0 at padding
    logits (S, V)   the parameters: a leaf tensor for autograd and optimizers
    """

    def __init__(self, seed: int = 0, vocabulary: int = 3, max_length: int = 4) -> None:
        self.responses = list_responses(vocabulary, max_length)
        prefixes = {r[:t] for r in self.responses for t in range(len(r))}
        row = {prefix: i for i, prefix in enumerate(sorted(prefixes))}
        shape = (len(self.responses), max_length)
        self.tokens = torch.full(shape, EOS)
        self.states = torch.zeros(shape, dtype=torch.long)
        self.mask = torch.zeros(shape, dtype=torch.float64)
        for i, response in enumerate(self.responses):
            for t, token in enumerate(response):
                self.tokens[i, t] = token
                self.states[i, t] = row[response[:t]]
                self.mask[i, t] = 1
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(
            len(row), vocabulary, dtype=torch.float64, generator=generator
        ).requires_grad_()

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

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Row numbers of `count` sampled responses: (count,). For checks against sampling."""
        probabilities = self.probabilities().detach()
        return torch.multinomial(probabilities, count, replacement=True, generator=generator)
