"""The policy that can be enumerated, against loops, finite differences and its own samples."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lib.proofs.enumeration import EOS, TinyPolicy, list_responses


@pytest.fixture
def policy() -> TinyPolicy:
    return TinyPolicy(seed=0)


def probability(policy: TinyPolicy, response: tuple[int, ...]) -> float:
    """Token by token: the row of each prefix is looked up by a response that passes through it."""
    result = 1.0
    for t, token in enumerate(response):
        owner = next(i for i, r in enumerate(policy.responses) if r[: t + 1] == response[: t + 1])
        exponentials = [math.exp(x) for x in policy.logits[policy.states[owner, t]].tolist()]
        result *= exponentials[token] / sum(exponentials)
    return result


def test_the_responses_of_two_tokens_by_hand() -> None:
    assert list_responses(2, 3) == [(0,), (1, 0), (1, 1, 0), (1, 1, 1)]


@pytest.mark.parametrize(("vocabulary", "max_length", "count"), [(3, 4, 31), (4, 3, 40), (3, 1, 3)])
def test_every_response_ends_or_is_cut(vocabulary: int, max_length: int, count: int) -> None:
    responses = list_responses(vocabulary, max_length)
    assert len(responses) == len(set(responses)) == count
    for response in responses:
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == max_length


def test_tokens_and_mask_are_the_responses(policy: TinyPolicy) -> None:
    for response, tokens, mask in zip(policy.responses, policy.tokens, policy.mask, strict=True):
        assert tuple(tokens[mask.bool()].tolist()) == response, "the mask counts EOS"
        assert mask.tolist() == [1.0] * len(response) + [0.0] * (4 - len(response))


def test_a_state_is_a_prefix(policy: TinyPolicy) -> None:
    seen: dict[int, set] = {}
    for response, states in zip(policy.responses, policy.states.tolist(), strict=True):
        for t in range(len(response)):
            seen.setdefault(states[t], set()).add(response[:t])
    assert sorted(seen) == list(range(len(policy.logits))), "every row of logits is used"
    assert all(len(prefixes) == 1 for prefixes in seen.values())


def test_probabilities_are_those_of_the_loop_and_sum_to_one(policy: TinyPolicy) -> None:
    expected = [probability(policy, response) for response in policy.responses]
    assert policy.probabilities().tolist() == pytest.approx(expected, rel=1e-12)
    assert policy.probabilities().sum().item() == pytest.approx(1, abs=1e-14)
    assert (policy.token_logprobs()[policy.mask == 0] == 0).all()


def test_an_expectation_is_a_weighted_sum(policy: TinyPolicy) -> None:
    lengths = [float(len(response)) for response in policy.responses]
    expected = sum(probability(policy, r) * len(r) for r in policy.responses)
    assert policy.expectation(torch.tensor(lengths)).item() == pytest.approx(expected, rel=1e-12)


def test_kl_is_the_sum_over_responses(policy: TinyPolicy) -> None:
    reference = TinyPolicy(seed=1)
    expected = 0.0
    for response in policy.responses:
        p, q = probability(policy, response), probability(reference, response)
        expected += p * math.log(p / q)
    assert policy.kl(reference).item() == pytest.approx(expected, rel=1e-12)
    assert reference.kl(policy).item() != pytest.approx(expected, rel=0.05), "it is not symmetric"
    assert policy.kl(TinyPolicy(seed=0)).item() == 0


def test_gradients_are_finite_differences(policy: TinyPolicy) -> None:
    reference, step = TinyPolicy(seed=1), 1e-5
    gradient = policy.gradient(policy.kl(reference))
    assert gradient.abs().max() > 0.1
    for row, column in [(0, 0), (3, 2), (14, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                policy.logits[row, column] += sign * step
                values.append(policy.kl(reference).item())
                policy.logits[row, column] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(difference, abs=1e-9)


def test_a_gradient_can_be_asked_twice(policy: TinyPolicy) -> None:
    value = policy.kl(TinyPolicy(seed=1))
    assert torch.equal(policy.gradient(value), policy.gradient(value))


def test_a_seed_is_a_policy() -> None:
    assert torch.equal(TinyPolicy(seed=3).logits, TinyPolicy(seed=3).logits)
    assert not torch.equal(TinyPolicy(seed=3).logits, TinyPolicy(seed=4).logits)
