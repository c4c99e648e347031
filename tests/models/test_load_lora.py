"""Adapters: no effect at the start, the reference when they are off, plain weights when saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.load import (
    adapters_off,
    add_lora,
    load_policy,
    load_reward_model,
    load_tokenizer,
    merge_lora,
    trainable,
)
from rlhf_lib.models.logprobs import response_logprobs, sequence_scores
from rlhf_lib.settings import ModelConfig
from tests.conftest import train_stage

LORA = ("model.lora_rank=2",)
PROMPTS, RESPONSES = [[5, 6], [7, 20, 9]], [[3, 1, 4], [5, 1]]


def logprobs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return response_logprobs(model, PROMPTS, RESPONSES)[0]


def disturb(model: PreTrainedModel) -> None:
    """Give every adapter an effect, as training would."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_starts_without_effect_and_leaves_when_off(
    kind: str, make_model: Callable
) -> None:
    model = make_model(kind)
    start = logprobs(model)
    add_lora(model, 2, 16.0)
    assert torch.equal(logprobs(model), start)
    disturb(model)
    assert (logprobs(model) - start).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logprobs(model), start)
    assert (logprobs(model) - start).abs().max() > 0.1
    assert any(p.requires_grad for p in model.parameters()), "switching off froze them"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_only_adapters_are_trained_one_beside_each_linear_layer(
    kind: str, make_model: Callable
) -> None:
    plain = make_model(kind)
    model = trainable(make_model(kind), ModelConfig(lora_rank=2))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    layers = {"gpt2": 2 * 4, "llama": 2 * 7}[kind]  # attention and MLP of two blocks
    assert len(names) == 2 * layers
    assert not any("lm_head" in name or "wte" in name for name in names)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count < sum(p.numel() for p in plain.parameters()) / 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_is_the_same_function_in_an_ordinary_model(kind: str, make_model: Callable) -> None:
    names = make_model(kind).state_dict().keys()
    model = make_model(kind)
    add_lora(model, 2, 16.0)
    disturb(model)
    before = logprobs(model)
    merge_lora(model)
    assert torch.allclose(logprobs(model), before, atol=1e-5)
    assert model.state_dict().keys() == names


def test_the_scale_is_alpha_over_rank(make_model: Callable) -> None:
    model = make_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.weight.detach().clone()
    add_lora(model, 2, 6.0)
    disturb(model)
    adapted = model.model.layers[0].self_attn.q_proj
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    merge_lora(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(merged, weight + 3.0 * b @ a, atol=1e-6)


def test_without_a_rank_nothing_is_added(make_model: Callable) -> None:
    model = trainable(make_model("gpt2"), ModelConfig())
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == make_model("gpt2").state_dict().keys()


def test_the_policy_without_adapters_is_the_reference(
    make_run: Callable,
    finished: Any,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample, seen = Sampler.sample, []

    def watch(sampler: Sampler, policy: PreTrainedModel, *rest: Any, **settings: Any) -> Rollout:
        assert sampler.reference is policy, "a second copy was loaded"
        disturb(policy)
        seen.append(sample(sampler, policy, *rest, **settings))
        return seen[-1]

    monkeypatch.setattr(Sampler, "sample", watch)
    train_stage(make_run(tmp_path, *LORA, "grpo.updates=1"), "grpo", tiny_data, finished)
    (rollout,), path = seen, finished.sft.model_path
    expected, mask = response_logprobs(load_policy(path), rollout.prompts, rollout.responses)
    assert torch.allclose(rollout.ref_logprobs, expected * mask, atol=1e-6)
    assert rollout.kl.abs().max() > 0.01


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_every_method_trains_adapters_and_saves_a_plain_model(
    method: str, make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, *LORA, f"{method}.learning_rate=1e-2")
    stage = train_stage(run, method, tiny_data, finished)
    start = load_policy(finished.sft.model_path).state_dict()
    trained = load_policy(stage.model_path).state_dict()  # complains of anything missing
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed, "nothing was learnt"
    assert all(name.endswith("weight") and ".h." in name for name in changed)
    assert not any("ln_" in name for name in changed), "only linear layers have adapters"
    first = stage.metrics()[0]
    if method == "dpo":
        assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # the policy is its reference
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-5)


def test_reward_model_and_sft_train_adapters_too(
    make_run: Callable, tiny_data: Any, tiny_base: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, *LORA, "sft.learning_rate=1e-2", "reward_model.learning_rate=1e-2")
    start = load_policy(tiny_base).state_dict()
    trained = load_policy(train_stage(run, "sft", tiny_data).model_path).state_dict()
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    assert torch.equal(start["transformer.wte.weight"], trained["transformer.wte.weight"])

    stage = train_stage(run, "reward_model", tiny_data)
    tokenizer = load_tokenizer(stage.model_path)
    model, _ = load_reward_model(stage.model_path, tokenizer, seed=0)
    untrained, _ = load_reward_model(str(tiny_base), tokenizer, seed=run.seed)
    assert not torch.equal(model.score.weight, untrained.score.weight), "the head was frozen"
    pair, row = tiny_data.pairs["test"][0], stage.samples()[0]
    score = sequence_scores(model, [pair.prompt], [pair.chosen]).item()
    assert score == pytest.approx(row["chosen_score"], abs=1e-5)


def test_killed_and_resumed_ends_like_never_killed(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    def train(run: Any) -> Any:
        model = replace(run.profile.model, lora_rank=2)
        run = replace(run, profile=replace(run.profile, model=model))
        return train_stage(run, "grpo", tiny_data, finished)

    check_resume(train)
