"""Traps 3, 4 and 6: what responses are samples of, and whether training sees the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rlhf_lib import profiles
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods import dpo, grpo, ppo, rollout
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models import agreement, generation, load
from rlhf_lib.models.generation import draw_tokens
from rlhf_lib.models.logprobs import output_logits
from rlhf_lib.objectives.kl import k1
from rlhf_lib.settings import DPOConfig, GRPOConfig, PPOConfig, SettingsError, numbers
from tests.traps.test_traps import (
    EOS,
    PROMPTS,
    Mistake,
    holds_unless,
    kinds,
    learner_of,
    pairs_of,
    plain_logprobs,
    put_back,
    sampler_of,
    write_models,
)

ASKED = [Prompt("", ids) for ids in PROMPTS]


def first_ratios(
    policy: PreTrainedModel, judge: PreTrainedModel, sample: Rollout, temperature: float
) -> list[float]:
    """Mean of PPO's ratio before anything is learnt, its variance, and the mean of GRPO's."""
    learner, whole = learner_of(policy), len(sample.prompts)
    config = PPOConfig(epochs=1, minibatch_size=whole, micro_batch_size=3, temperature=temperature)
    zeros = torch.zeros_like(sample.logprobs)
    experience = ppo.Experience(sample, zeros, zeros + 1, zeros)
    metrics = ppo.update(learner, learner_of(judge), experience, **numbers(ppo.update, config))
    group = GRPOConfig(iterations=1, micro_batch_size=3, temperature=temperature)
    compared = numbers(grpo.update, group)
    other = grpo.update(learner, sample, torch.ones(whole), **compared, constant=8)
    return [metrics["val/ratio"], metrics["val/ratio_var"], other["val/ratio"]]


# ---------------------------------------------------------------------------------- 3: temperature


def _at_one(patch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    function = getattr(module, name)
    patch.setattr(
        module, name, lambda model, prompts, responses, *_: function(model, prompts, responses)
    )


def training_scores_at_one(patch: pytest.MonkeyPatch) -> None:
    """The ratio compares the policy at 1 with the policy that sampled."""
    _at_one(patch, ppo, "response_logprobs")
    _at_one(patch, grpo, "response_logprobs")


def sampling_scores_at_one(patch: pytest.MonkeyPatch) -> None:
    """The old log-probabilities are not those the tokens were drawn with."""
    patch.setattr(rollout, "output_logits", lambda model, hidden, *_: output_logits(model, hidden))


def everything_scores_at_one(patch: pytest.MonkeyPatch) -> None:
    """The ratio is 1 again, of a policy that did not sample."""
    training_scores_at_one(patch)
    sampling_scores_at_one(patch)


@kinds
@put_back(training_scores_at_one, sampling_scores_at_one, everything_scores_at_one)
def test_trap_03_sampled_at_one_temperature_scored_at_another(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path, kind, make_model, tiny_tokenizer)
    sampler, policy = sampler_of(made), load.load_policy(made.sft.model_path)
    with holds_unless(mistake, monkeypatch):
        sample = sampler.sample(policy, ASKED, temperature=0.7, micro_batch_size=3)
        for row, prompt, response in zip(
            sample.logprobs, sample.prompts, sample.responses, strict=True
        ):
            drawn = plain_logprobs(policy, prompt, response, temperature=0.7)
            assert torch.allclose(row[: len(response)], drawn, atol=1e-4)
        ratios = first_ratios(policy, make_model(kind, head="score"), sample, 0.7)
        assert ratios == pytest.approx([1, 0, 1], abs=1e-5)


# -------------------------------------------------------------------------------------- 4: dropout


def dropout_left_on(patch: pytest.MonkeyPatch) -> None:
    """As GPT-2's own config has it: 0.1 wherever a model is trained."""
    patch.setattr(load, "_drop_dropout", lambda config: None)
    patch.setattr(agreement, "_check_training", lambda *given: None)  # else it is refused


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
}


@kinds
@put_back(dropout_left_on)
def test_trap_04_dropout_makes_the_first_ratio_differ_from_one(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path, kind, make_model, tiny_tokenizer, **DROPOUT[kind])
    sampler = sampler_of(made)
    with holds_unless(mistake, monkeypatch):
        policy = load.load_policy(made.sft.model_path)
        sample = sampler.sample(policy.eval(), ASKED, micro_batch_size=3)
        ratios = first_ratios(policy, make_model(kind, head="score"), sample, 1.0)
        assert ratios == pytest.approx([1, 0, 1], abs=1e-5)


@kinds
@put_back(dropout_left_on)
def test_trap_04_dropout_makes_the_first_loss_of_dpo_differ_from_ln_2(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path, kind, make_model, tiny_tokenizer, **DROPOUT[kind])
    pairs = pairs_of()
    table = dpo.reference_logprobs(load.load_reference(made.sft.model_path), pairs, 4)
    with holds_unless(mistake, monkeypatch):
        learner = learner_of(load.load_policy(made.sft.model_path))
        loss = dpo.preference_loss(DPOConfig())
        metrics = dpo.update(learner, pairs, table, loss, micro_batch_size=8)
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ---------------------------------------------------------------------------- 6: filtered sampling


def the_models_own_filter(patch: pytest.MonkeyPatch) -> None:
    """What the model was saved with, top_k=3, is taken for a part of it."""

    def filtered(logits: Tensor, luck: Tensor) -> Tensor:
        hidden = logits < logits.topk(3).values[:, -1:]
        return draw_tokens(logits.masked_fill(hidden, -math.inf), luck)

    patch.setattr(generation, "draw_tokens", filtered)


def a_minimum_length(patch: pytest.MonkeyPatch) -> None:
    """The end token is forbidden at first, and the policy is scored as if it were not."""
    end = torch.tensor([EOS])
    patch.setattr(
        generation, "draw_tokens", lambda x, u: draw_tokens(x.index_fill(1, end, -math.inf), u)
    )


@kinds
@put_back(the_models_own_filter, a_minimum_length)
def test_trap_06_filtered_sampling_and_a_kl_below_0(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, n = make_model(kind), 4000
    model.generation_config.top_k, model.generation_config.top_p = 3, 0.9
    with torch.no_grad():
        logits = model(torch.arange(32)[:, None]).logits[:, 0]
    prompt = int(logits.softmax(-1)[:, EOS].argmax())  # after which an end is likely
    p, q = logits[prompt].softmax(-1), (1.5 * logits[prompt]).softmax(-1)
    assert p[EOS] > 0.02
    log_ratio = k1(p.log(), q.log())
    kl = (p * log_ratio).sum().item()
    error = ((p * log_ratio**2).sum().item() - kl**2) ** 0.5 / n**0.5
    assert kl > 10 * error
    with holds_unless(mistake, monkeypatch):
        responses = generation.generate(model, tiny_tokenizer, [[prompt]] * n, 1, batch_size=n)
        said = torch.tensor(responses)[:, 0]
        # the reference is surer of the likely tokens: without the unlikely ones, KL would be < 0
        assert log_ratio[said].mean().item() == pytest.approx(kl, abs=4.5 * error)
        counts = torch.bincount(said, minlength=32) / n
        assert ((counts - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


def generation_settings_kept(patch: pytest.MonkeyPatch) -> None:
    """What a model was saved with goes on to sample for it, and is saved again."""
    patch.setattr(load, "_unfiltered", lambda old, tokenizer=None: old)


@kinds
@put_back(generation_settings_kept)
def test_trap_06_a_saved_filter_is_neither_loaded_nor_saved(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(kind)
    model.generation_config = GenerationConfig(do_sample=True, top_k=3, top_p=0.5, eos_token_id=EOS)
    model.save_pretrained(tmp_path / "theirs")
    with holds_unless(mistake, monkeypatch):
        policy = load.load_policy(tmp_path / "theirs")
        load.save_model(policy, tiny_tokenizer, tmp_path / "ours")
        saved = GenerationConfig.from_pretrained(tmp_path / "ours")
        for config in (policy.generation_config, saved):
            assert (config.do_sample, config.top_k, config.top_p) == (True, 0, 1.0)


FILTERS = ("top_k", "top_p", "min_p", "typical_p", "min_new_tokens", "min_length")


def a_setting_that_filters(patch: pytest.MonkeyPatch) -> None:
    """PPO is given what every sampler has."""
    config = make_dataclass("Config", [("top_k", int, 50)], bases=(PPOConfig,), frozen=True)
    ppo_with_it = ("ppo", config, field(default_factory=config))
    profile = make_dataclass("Profile", [ppo_with_it], bases=(profiles.Profile,), frozen=True)
    patch.setattr(profiles, "Profile", profile)


@put_back(a_setting_that_filters)
def test_trap_06_a_setting_that_filters_is_refused(
    mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(setting: str) -> str:
        try:
            profiles.load_profile("smoke", f"{setting}=1")
        except SettingsError as error:
            return str(error)
        return "taken"

    with holds_unless(mistake, monkeypatch):
        for setting in (f"{section}.{name}" for section in ("ppo", "grpo") for name in FILTERS):
            assert answer(setting).startswith(f"unknown setting '{setting}'")
