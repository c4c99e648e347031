"""Traps 8, 17, 18 and 20: where a score lands, what is whitened, and what a reply is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods import dpo, grpo, ppo, rewards, rollout
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.load import load_policy, load_reward_model
from rlhf_lib.models.logprobs import paired_logprobs
from rlhf_lib.models.packing import Tokens
from rlhf_lib.objectives.masked import masked_whiten
from rlhf_lib.settings import DPOConfig, GRPOConfig, PPOConfig, numbers
from tests.traps.test_traps import (
    EOS,
    PROMPTS,
    RESPONSES,
    Mistake,
    holds_unless,
    kinds,
    learner_of,
    other_model,
    pad,
    pairs_of,
    plain_logprobs,
    put_back,
    rollout_of,
    sampler_of,
    write_models,
)


def experience_of(sample: Rollout, value: Learner, config: PPOConfig) -> ppo.Experience:
    return ppo.make_experience(sample, value, **numbers(ppo.make_experience, config))


# --------------------------------------------------------------------------- 8: where a score lands


def the_score_on_the_pad_after_the_end(patch: pytest.MonkeyPatch) -> None:
    """One place too far: the mask takes the score away, unless the row is the longest."""

    def shaped(
        scores: Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        mask: Tensor,
        kl_coef: float,
        *estimator: str,
    ) -> Tensor:
        after = mask.sum(1).long().clamp(max=mask.shape[1] - 1)
        rewards = -kl_coef * (logprobs - ref_logprobs) * mask
        return rewards.scatter_add(1, after[:, None], scores[:, None])

    patch.setattr(ppo, "kl_shaped_rewards", shaped)


def the_score_read_at_the_pad(patch: pytest.MonkeyPatch) -> None:
    """The last column of a padded batch is taken for the last token."""

    def scores(model: PreTrainedModel, prompts: Tokens, responses: Tokens) -> Tensor:
        ids = pad([[*p, *r] for p, r in zip(prompts, responses, strict=True)])
        return model.score(model.base_model(input_ids=ids).last_hidden_state[:, -1])[:, 0]

    patch.setattr(rewards, "sequence_scores", scores)


def the_end_looked_for_in_the_padding(patch: pytest.MonkeyPatch) -> None:
    """Padded with the end token, every row has one: no response is ever found to be cut."""
    read = rollout.read_replies
    patch.setattr(
        rollout,
        "read_replies",
        lambda *given: [replace(reply, finished=True) for reply in read(*given)],
    )


@kinds
@put_back(
    the_score_on_the_pad_after_the_end, the_score_read_at_the_pad, the_end_looked_for_in_the_padding
)
def test_trap_08_the_score_lands_on_the_end_token_and_a_missing_end_costs(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path, kind, make_model, tiny_tokenizer)
    sampler, asked = sampler_of(made), [Prompt("", ids) for ids in PROMPTS * 12]
    policy = load_policy(made.sft.model_path)
    judge, _ = load_reward_model(made.reward_model.model_path, tiny_tokenizer, 0)
    value = learner_of(make_model(kind, head="score"))
    # with these, the return of every token is all the reward that is still to come
    config = PPOConfig(kl_coef=0.0, gamma=1.0, gae_lambda=1.0)
    with holds_unless(mistake, monkeypatch):
        sample = sampler.sample(policy, asked, missing_eos_penalty=3.0)
        returns = experience_of(sample, value, config).returns
        seen = set()
        for row, prompt, response in zip(returns, sample.prompts, sample.responses, strict=True):
            with torch.no_grad():
                hidden = judge.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state
                reward = (judge.score(hidden[0, -1]).item() - 0.2) / 0.7
            seen.add((finished := response[-1] == EOS, len(response) < 8))
            expected = [reward if finished else reward - 3.0] * len(response)
            assert row[: len(response)].tolist() == pytest.approx(expected, abs=1e-4)
        assert seen >= {(True, True), (False, False)}, "short ones that end, long ones that do not"


# ------------------------------------------------------------------------------------ 17: whitening


def advantages_whitened_before_returns(patch: pytest.MonkeyPatch) -> None:
    """The value model is then taught whitened numbers."""
    gae = ppo.gae

    def whitened(rewards: Tensor, values: Tensor, mask: Tensor, *rest: float) -> tuple:
        advantages = masked_whiten(gae(rewards, values, mask, *rest)[0], mask)
        return advantages, advantages + values

    patch.setattr(ppo, "gae", whitened)


@kinds
@put_back(advantages_whitened_before_returns)
def test_trap_17_returns_come_before_whitening(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, value = rollout_of(make_model(kind)), learner_of(make_model(kind, head="score"))
    config = PPOConfig(kl_coef=0.1, gae_lambda=0.9)
    with holds_unless(mistake, monkeypatch):
        experience = experience_of(sample, value, config)
        plain, expected = [], []
        for i, response in enumerate(RESPONSES):
            values = [*experience.values[i, : len(response)].tolist(), 0.0]
            k1 = (sample.logprobs - sample.ref_logprobs)[i, : len(response)].tolist()
            rewards = [-0.1 * x for x in k1]
            rewards[-1] += float(sample.rewards[i])
            errors = [r + values[t + 1] - values[t] for t, r in enumerate(rewards)]
            advantages = [
                sum(0.9**n * error for n, error in enumerate(errors[t:]))
                for t in range(len(response))
            ]
            plain += advantages
            expected += [a + v for a, v in zip(advantages, values[:-1], strict=True)]
        real = sample.response_mask.bool()
        assert experience.returns[real].tolist() == pytest.approx(expected, abs=1e-4)
        wide = torch.tensor(plain)
        whitened = (wide - wide.mean()) / wide.std()
        assert torch.allclose(experience.advantages[real], whitened, atol=1e-3)


def rewards_whitened_to_mean_0(patch: pytest.MonkeyPatch) -> None:
    """Rewards that all were good become half bad, and a long response earns less."""
    patch.setattr(ppo, "masked_whiten", lambda x, mask, shift_mean=True: masked_whiten(x, mask))


@kinds
@put_back(rewards_whitened_to_mean_0)
def test_trap_17_whitening_rewards_leaves_their_mean(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = torch.rand(len(PROMPTS)) + 1
    sample = replace(rollout_of(make_model(kind)), rewards=rewards)
    value = learner_of(make_model(kind, head="score"))
    config = PPOConfig(kl_coef=0.0, gae_lambda=1.0, reward_normalization="batch")
    with holds_unless(mistake, monkeypatch):
        returns = experience_of(sample, value, config).returns
        # the first return is the sum of a response's rewards
        assert returns[:, 0].sum().item() == pytest.approx(rewards.sum().item(), rel=1e-4)
        assert returns[:, 0].std() > 1.2 * rewards.std(), "nothing was scaled"


# ------------------------------------------------------------------------- 18: groups that agree


def divided_by_the_bare_deviation(patch: pytest.MonkeyPatch) -> None:
    """0 / 0 in every group that agrees."""

    def bare(rewards: Tensor, size: int, scale: str = "group") -> Tensor:
        groups = rewards.view(-1, size)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / groups.std(1, keepdim=True)).view(-1)

    patch.setattr(grpo, "group_advantages", bare)


def rounding_taken_for_signal(patch: pytest.MonkeyPatch) -> None:
    """A mean of equal numbers is off by rounding, which a tiny epsilon makes a signal of."""

    def scaled(rewards: Tensor, size: int, scale: str = "group") -> Tensor:
        groups = rewards.view(-1, size)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-8)).view(-1)

    patch.setattr(grpo, "group_advantages", scaled)


@kinds
@put_back(divided_by_the_bare_deviation, rounding_taken_for_signal)
def test_trap_18_a_group_that_agrees_gives_no_gradient_and_is_counted(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreeing, differing = [5.3] * 7, [0.0, 1.0, 2.0, 0.5, 0.1, 3.0, 1.5]
    assert torch.tensor(agreeing).mean() != torch.tensor(5.3), "rounding is what this is about"
    learner = learner_of(make_model(kind))
    config = GRPOConfig(group_size=7, iterations=1, kl_reward_coef=0.0)
    given = numbers(grpo.make_advantages, config)
    whole = rollout_of(learner.model, PROMPTS * 2, RESPONSES * 2)
    whole = replace(whole, rewards=torch.tensor(agreeing + differing))
    half = replace(rollout_of(learner.model), rewards=torch.tensor(agreeing))
    with holds_unless(mistake, monkeypatch):
        compared, advantages = grpo.make_advantages(whole, **given)
        assert advantages[:7].tolist() == [0] * 7
        assert advantages[7:].abs().min() > 0.01
        metrics = grpo.rollout_metrics(whole, compared, advantages, 7)
        assert metrics["frac_reward_zero_std"] == 0.5
        _, advantages = grpo.make_advantages(half, **given)
        learnt = numbers(grpo.update, config)
        metrics = grpo.update(learner, half, advantages, **learnt, constant=8)
        assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)


# ----------------------------------------------------------------------------- 20: sums, not means


def logprobs_averaged_over_length(patch: pytest.MonkeyPatch) -> None:
    """What is called the log-probability of a reply is that of one of its tokens."""

    def averaged(
        model: PreTrainedModel, prompts: Tokens, chosen: Tokens, rejected: Tokens
    ) -> tuple[Tensor, Tensor]:
        one, other = paired_logprobs(model, prompts, chosen, rejected)
        return one / torch.tensor([*map(len, chosen)]), other / torch.tensor([*map(len, rejected)])

    patch.setattr(dpo, "paired_logprobs", averaged)


def another_loss_under_the_name_of_dpo(patch: pytest.MonkeyPatch) -> None:
    """The length-normalised variant is what DPO means by default."""
    asked = dpo.preference_loss
    patch.setattr(
        dpo, "preference_loss", lambda config: asked(replace(config, loss="dpo_normalised"))
    )


@kinds
@put_back(logprobs_averaged_over_length, another_loss_under_the_name_of_dpo)
def test_trap_20_dpo_sums_over_the_response_and_a_mean_has_its_own_name(
    kind: str, mistake: Mistake | None, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = make_model(kind), other_model(make_model, kind)
    rows = list(zip(PROMPTS, RESPONSES, RESPONSES[::-1], strict=True))
    lengths = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in rows])

    def sums(m: PreTrainedModel) -> Tensor:
        return torch.tensor([[plain_logprobs(m, p, r).sum().item() for r in rs] for p, *rs in rows])

    own, others = sums(model), sums(reference)
    with holds_unless(mistake, monkeypatch):
        table = dpo.reference_logprobs(reference, pairs_of(), 3)
        assert torch.allclose(table, others, atol=1e-4)
        for name, ratios in (("dpo", own - others), ("dpo_normalised", (own - others) / lengths)):
            loss = dpo.preference_loss(DPOConfig(beta=0.3, loss=name))
            metrics = dpo.update(learner_of(model), pairs_of(), table, loss, micro_batch_size=3)
            assert metrics["logps/chosen"] == pytest.approx(own[:, 0].mean().item(), rel=1e-5)
            expected = -F.logsigmoid(0.3 * (ratios[:, 0] - ratios[:, 1])).mean().item()
            assert metrics["loss"] == pytest.approx(expected, rel=1e-4), name
