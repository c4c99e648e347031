"""Rollouts: what responses are worth, and metrics that padding does not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods.rewards import read_replies
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.load import load_policy
from rlhf_lib.models.logprobs import response_logits, response_logprobs
from rlhf_lib.models.packing import length_mask
from rlhf_lib.objectives.kl import full_kl
from rlhf_lib.objectives.masked import entropy, masked_mean
from tests.conftest import EOS

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [9, 8, 7, 6], [20, 21, 22]]
SETTINGS = {
    "temperature": 0.7,
    "micro_batch_size": 3,
    "reward_clip": 0.5,
    "missing_eos_penalty": 2.0,
}


@pytest.fixture
def sampler(make_sampler: Callable) -> Sampler:
    return make_sampler()


@pytest.fixture
def policy(tiny_base: Path) -> PreTrainedModel:
    """Not the model that the reference is, and less sure of itself."""
    model = load_policy(tiny_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7).add_(0.1 * torch.randn_like(parameter))
    return model


def prompts() -> list[Prompt]:
    return [Prompt(str(ids), ids) for ids in PROMPTS * 4]


def test_a_rollout_is_what_its_parts_say(sampler: Sampler, policy: PreTrainedModel) -> None:
    sample = sampler.sample(policy, prompts(), **SETTINGS, exact_kl=True)
    assert max(map(len, sample.responses)) <= 8
    assert sample.response_mask.sum(1).tolist() == [len(r) for r in sample.responses]
    # rows were computed three at a time; each must be what it is alone
    for i, response in enumerate(sample.responses):
        n = len(response)
        row = [sample.prompts[i]], [response]
        logits, _, _ = response_logits(policy, *row, temperature=0.7)
        ref_logits, _, _ = response_logits(sampler.reference, *row, temperature=0.7)
        expected = {
            "logprobs": response_logprobs(policy, *row, temperature=0.7)[0][0],
            "ref_logprobs": response_logprobs(sampler.reference, *row, temperature=0.7)[0][0],
            "exact_kl": full_kl(logits, ref_logits),
        }
        for name, value in expected.items():
            got = getattr(sample, name)
            assert torch.allclose(got[i, :n], value, atol=1e-5), name
            assert (got[i, n:] == 0).all()
    logits, _, _ = response_logits(policy, sample.prompts, sample.responses, temperature=0.7)
    assert sample.metrics()["entropy"] == pytest.approx(entropy(logits).mean().item(), abs=1e-5)
    replies = read_replies(sampler.tokenizer, sample.responses)
    scores, parts = sampler.score(prompts(), replies)
    assert torch.allclose(sample.scores, scores, atol=1e-5)
    assert sample.parts == parts == {}, "one reward has no parts"
    assert sample.finished.tolist() == [r[-1] == EOS for r in sample.responses]
    assert sample.num_tokens == sum(map(len, sample.prompts + sample.responses))


def test_rewards_are_clipped_and_pay_for_a_missing_end(
    sampler: Sampler, policy: PreTrainedModel
) -> None:
    sample = sampler.sample(policy, prompts(), **SETTINGS)
    assert 0 < sample.finished.sum() < len(sample.finished)
    assert (sample.scores.abs() > 0.5).any()
    for got, raw, end in zip(sample.rewards, sample.scores, sample.finished, strict=True):
        clipped = min(max(raw.item(), -0.5), 0.5)
        assert got.item() == pytest.approx(clipped if end else clipped - 2.0, abs=1e-6)


def test_against_itself_a_policy_has_no_divergence(sampler: Sampler) -> None:
    sample = sampler.sample(sampler.reference, prompts(), **SETTINGS, exact_kl=True)
    assert torch.equal(sample.logprobs, sample.ref_logprobs)
    assert sample.kl.tolist() == [0.0] * 20
    assert sample.exact_kl is not None
    assert sample.exact_kl.abs().max() < 1e-6


def test_the_sampled_kl_estimates_the_exact_one(sampler: Sampler, policy: PreTrainedModel) -> None:
    # E[k1] at a position given what came before is the full KL there: their sums agree in the mean
    sample = sampler.sample(policy, prompts() * 20, **SETTINGS, exact_kl=True)
    assert sample.exact_kl is not None
    difference = sample.kl - sample.exact_kl.sum(1)
    standard_error = difference.std().item() / len(difference) ** 0.5
    assert abs(difference.mean().item()) < 4 * standard_error
    assert sample.exact_kl.sum(1).mean() > 5 * standard_error, "the example cannot tell them apart"


def test_gold_rewards_come_where_the_truth_is_known_only(
    make_sampler: Callable, policy: PreTrainedModel
) -> None:
    sampler = make_sampler()
    sample = sampler.sample(policy, prompts(), **SETTINGS)
    assert sample.gold is None
    assert "gold" not in sample.metrics()
    signs = iter([{"polite": 1.0}] * 19 + [{"polite": 3.0, "refused": 1.0}])
    truth = SimpleNamespace(
        gold=lambda *_: SimpleNamespace(total=2.5), signs=lambda *_: next(signs)
    )
    sampler = make_sampler(truth=truth)
    sample = sampler.sample(policy, prompts(), **SETTINGS)
    assert sample.gold == [2.5] * 20
    metrics = sample.metrics()
    assert metrics["gold"] == 2.5
    assert metrics["signs/polite"] == pytest.approx(1.1)
    assert metrics["signs/refused"] == 1.0, "of the replies that can show it"
    assert sample.select([0, 19]).metrics()["signs/polite"] == 2.0


def made_up(**changes: Any) -> Rollout:
    fields = {
        "prompts": [[5], [5, 6], [5, 6, 7]],
        "responses": [[3, 4, EOS], [4], [5, EOS]],
        "response_mask": length_mask([3, 1, 2]),
        "logprobs": torch.tensor([[-1.0, -1, -1], [-2, 9, 9], [-3, -3, 9]]),
        "ref_logprobs": torch.tensor([[-2.0, -1, 0], [-5, 7, 7], [-3, -4, 7]]),
        "finished": torch.tensor([True, False, True]),
        "scores": torch.tensor([1.0, 2.0, 6.0]),
        "rewards": torch.tensor([1.0, 1.0, 5.0]),
        "entropies": torch.tensor([[0.5, 0.25, 0], [0.5, 9, 9], [0.25, 0, 9]]),
        "gold": None,
        "exact_kl": None,
    }
    return Rollout(**fields | changes)


def test_metrics_by_hand() -> None:
    sample = made_up()
    assert sample.kl.tolist() == [0.0, 3.0, 1.0]
    assert sample.lengths.tolist() == [3, 1, 2]
    assert sample.num_tokens == 12
    assert sample.metrics() == pytest.approx(
        {
            "reward": 3.0,
            "kl": 4 / 3,
            "entropy": 0.25,
            "reply_tokens": 6.0,
            "completions/mean_length": 2.0,
            "completions/min_length": 1.0,
            "completions/max_length": 3.0,
            "completions/clipped_ratio": 1 / 3,
        }
    )
    json.dumps(sample.metrics())


def test_more_padding_changes_no_metric() -> None:
    sample = made_up()
    fills = {"response_mask": 0.0, "logprobs": 7.0, "ref_logprobs": -7.0, "entropies": 7.0}
    wider = {
        name: torch.cat([getattr(sample, name), torch.full((3, 4), fill)], dim=1)
        for name, fill in fills.items()
    }
    assert made_up(**wider).metrics() == sample.metrics()


def test_micro_batches_cover_the_rows_with_similar_lengths_together() -> None:
    first, second = made_up().micro_batches([2, 0, 1], 2)
    assert first == ([1, 0], [[5, 6], [5]], [[4], [3, 4, EOS]], 3, 4)
    assert second == ([2], [[5, 6, 7]], [[5, EOS]], 2, 2)
    mean = masked_mean(made_up().logprobs[first.rows, : first.width], length_mask([1, 3]))
    assert mean.item() == pytest.approx(-5 / 4)
