"""The plain methods: each step against single rows and loops, and that they learn."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lib.proofs import plain

PROMPTS = [[5, 9, 4, 13, 21, 7], [11], [30, 31, 6]]
REPLIES = [[7, 8, 1], [21, 22, 23, 24, 1], [9]]
EOS = 1


def test_it_shares_nothing_with_the_library() -> None:
    tree = ast.parse(Path(str(plain.__file__)).read_text(encoding="utf-8"))
    taken = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            taken.add(str(node.module).partition(".")[0])
    assert taken - sys.stdlib_module_names == {"torch"}


@torch.no_grad()
def test_log_probs_of_padded_rows_are_those_of_each_row_alone(causal_model: Any) -> None:
    found = plain.logprobs(causal_model, plain.pad(PROMPTS, REPLIES), 0.7)
    for row, prompt, reply in zip(found, PROMPTS, REPLIES, strict=True):
        logits = causal_model(torch.tensor([prompt + reply])).logits[0] / 0.7
        predicting = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
        expected = logits.log_softmax(-1)[predicting, reply]
        assert torch.allclose(row[: len(reply)], expected, atol=1e-5)
        assert not row[len(reply) :].any()


@torch.no_grad()
def test_values_and_scores_are_those_of_the_text_so_far(score_model: Any) -> None:
    batch = plain.pad(PROMPTS, REPLIES)
    values, scores = plain.values(score_model, batch), plain.scores(score_model, batch)
    for i, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        for t in range(len(reply)):
            alone = score_model(torch.tensor([prompt + reply[:t]])).logits.item()
            assert values[i, t].item() == pytest.approx(alone, abs=1e-5)
        assert not values[i, len(reply) :].any()
        whole = score_model(torch.tensor([prompt + reply])).logits.item()
        assert scores[i].item() == pytest.approx(whole, abs=1e-5)


def test_gae_is_its_definition() -> None:
    rewards, values = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    advantages, returns = plain.gae(rewards, values * mask, mask, 0.9, 0.8)
    for i, length in enumerate(mask.sum(1).tolist()):
        value = [*values[i, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                0.72 ** (k - t) * (rewards[i, k].item() + 0.9 * value[k + 1] - value[k])
                for k in range(t, length)
            )
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[i, t].item() == pytest.approx(expected + value[t], abs=1e-5)
        assert not advantages[i, length:].any()


def test_samples_follow_the_softmax_and_stop_at_the_end(make_model: Callable) -> None:
    policy, prompts = make_model("gpt2"), [[5, 9], [11, 3, 17]] * 1000
    with torch.no_grad():
        logits = policy(torch.tensor([[11, 3, 17]])).logits[0, -1] / 0.7
    settings = plain.Settings(max_new_tokens=3, temperature=0.7)
    batch = plain.sample(policy, prompts, EOS, settings)
    replies = batch.ids[:, 3:]
    share = torch.bincount(replies[1::2, 0], minlength=32) / 1000
    exact = logits.softmax(-1)
    assert ((share - exact).abs() < 4 * (exact * (1 - exact) / 1000).sqrt() + 1e-3).all()
    ended = (replies == EOS).cumsum(1) - (replies == EOS).long() > 0
    assert ended.any()
    assert torch.equal(batch.mask, (~ended).long())
    assert torch.equal(batch.attention[:, 3:], batch.mask)


def share_of_late_words(batch: plain.Batch) -> Tensor:
    """A reward that wants tokens from the second half of the vocabulary, between 0 and 1."""
    late = (batch.ids[:, -batch.mask.shape[1] :] >= 16) * batch.mask
    return late.sum(1) / batch.mask.sum(1)


SETTINGS = plain.Settings(
    updates=10, batch_size=32, minibatch_size=16, max_new_tokens=4, kl_coef=0.0, learning_rate=5e-3
)


def test_ppo_and_grpo_earn_more_and_more(make_model: Callable) -> None:
    policy, value, reference = (
        make_model("llama"),
        make_model("llama", "score"),
        make_model("llama"),
    )
    others = reference, share_of_late_words, PROMPTS, EOS, SETTINGS
    for updates in (
        list(plain.ppo(policy, value, *others)),
        list(plain.grpo(make_model("llama"), *others)),
    ):
        assert len(updates) == 10
        scores = [seen.earned.mean() for _, seen in updates]
        assert scores[0] < 0.7
        assert sum(scores[-3:]) / 3 > 0.85


def test_dpo_prefers_what_was_chosen(make_model: Callable) -> None:
    policy, reference = make_model("gpt2"), make_model("gpt2")
    pairs = [(prompt, [7, EOS], [8, EOS]) for prompt in PROMPTS * 3]
    updates = list(plain.dpo(policy, reference, pairs, plain.Settings(updates=20)))
    margins = [(chosen - rejected).mean() for _, (chosen, rejected) in updates]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.4


def test_sft_imitates_replies_and_reads_prompts_only(make_model: Callable) -> None:
    policy = make_model("gpt2")
    examples = [(prompt, [7, EOS]) for prompt in PROMPTS * 3]
    losses = list(plain.sft(policy, examples, plain.Settings(updates=20)))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        loss = plain.sft_loss(policy, [([5, 9], [7, EOS]), ([11], [8, 3, EOS])])
        by_hand = [
            -policy(torch.tensor([row])).logits[0].log_softmax(-1)[place - 1, row[place]]
            for row, start in (([5, 9, 7, EOS], 2), ([11, 8, 3, EOS], 1))
            for place in range(start, len(row))
        ]
    assert loss.item() == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-5)


def test_the_reward_model_ranks_what_was_chosen_higher(make_model: Callable) -> None:
    pairs = [(prompt, [7, 5, EOS], [8, EOS]) for prompt in PROMPTS * 3]
    model = make_model("gpt2", "score")
    losses = list(plain.reward_model(model, pairs, plain.Settings(updates=20)))
    assert losses[-1] < losses[0] - 0.2
    with torch.no_grad():
        (margin,) = plain.reward_margins(model, pairs[:1])
        one, other = (
            model(torch.tensor([PROMPTS[0] + reply])).logits.item() for reply in pairs[0][1:]
        )
    assert margin.item() == pytest.approx(one - other, abs=1e-5)
