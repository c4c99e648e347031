"""Profiles: full sets of stage settings by name, and how a single setting is overridden.

The same way everywhere: `--set ppo.kl_coef=0.02` on the command line, the `OVERRIDES` string of a
notebook, or `papermill -p OVERRIDES "ppo.kl_coef=0.02"`.
"""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing

from rlhf_lib.config import (
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    GRPOConfig,
    ModelConfig,
    PPOConfig,
    Profile,
    RejectionConfig,
    RewardModelConfig,
    SettingsError,
    SFTConfig,
    unknown,
)


def _real_pairs(name: str, source: str, model: str, **changes: dict) -> Profile:
    """Settings to start from with real pairs and a model of 124-135 M parameters, with changes."""
    start = {
        "data": dict(source=source, max_prompt_tokens=192, max_response_tokens=64),
        "model": dict(name=model),
        "reward_model": dict(epochs=1, learning_rate=2e-5, weight_decay=0.01),
        "sft": dict(epochs=1, batch_size=32, learning_rate=2e-5),
        "rejection": dict(epochs=1, learning_rate=1e-5),
        "ppo": dict(learning_rate=1e-5, value_learning_rate=1e-5, kl_coef=0.05, low_kl_coef=0.0),
        "grpo": dict(learning_rate=1e-5, kl_reward_coef=0.05),
        "dpo": dict(epochs=1, batch_size=32, learning_rate=5e-6),
        "sweep": {},
        "evaluation": {},
    }
    kinds = typing.get_type_hints(Profile)
    sections = {
        key: kinds[key](**{**values, **changes.get(key, {})}) for key, values in start.items()
    }
    return Profile(name=name, **sections)


HH = "hub:Anthropic/hh-rlhf"

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            threads=1,
            data=DataConfig(
                train_pairs=128, validation_pairs=64, test_pairs=128, demonstrations=256,
                rl_prompts=128, evaluation_prompts=32,
            ),
            model=ModelConfig(precision="fp32"),
            reward_model=RewardModelConfig(epochs=1, curve_points=2),
            sft=SFTConfig(epochs=1),
            rejection=RejectionConfig(prompts=64, samples=4, epochs=1),
            ppo=PPOConfig(updates=3, batch_size=32, micro_batch_size=16, minibatch_size=16),
            grpo=GRPOConfig(updates=3, prompts_per_update=4, group_size=4, micro_batch_size=16),
            dpo=DPOConfig(epochs=1, probes=2, probe_prompts=16),
            evaluation=EvaluationConfig(
                best_of_n=8, best_of_n_prompts=32, heldout_texts=64, bootstrap_samples=200,
                probe_prompts=8, probe_samples=1,
            ),
        ),
        # the tiny model's matrices are too small for two threads, or for bf16, to pay
        Profile(name="laptop", seeds=3, jobs=3, threads=1, model=ModelConfig(precision="fp32")),
        _real_pairs(
            "offline",
            "path:pairs.jsonl.gz",
            "smollm2-135m",
            data=dict(
                max_prompt_tokens=128, train_pairs=1000, validation_pairs=100, test_pairs=500,
                demonstrations=1000, rl_prompts=1000, evaluation_prompts=48, judge_pairs=600,
            ),
            reward_model=dict(batch_size=16, micro_batch_size=8, curve_points=1),
            sft=dict(micro_batch_size=8),
            rejection=dict(prompts=96, samples=8),
            ppo=dict(updates=8, batch_size=32, minibatch_size=16, micro_batch_size=8),
            grpo=dict(updates=8, prompts_per_update=4, group_size=8, micro_batch_size=8),
            dpo=dict(micro_batch_size=8, probes=4, probe_prompts=16),
            sweep=dict(stronger=0.0),
            evaluation=dict(batch_size=16, best_of_n=8, best_of_n_prompts=24, heldout_texts=96,
                            probe_prompts=12, probe_samples=1),
        ),
        _real_pairs(
            "t4",
            HH,
            "gpt2",
            data=dict(train_pairs=10000, test_pairs=2000, demonstrations=10000,
                      evaluation_prompts=128, judge_pairs=10000),
            reward_model=dict(micro_batch_size=16),
            sft=dict(micro_batch_size=16),
            ppo=dict(updates=60, minibatch_size=32, micro_batch_size=16),
            grpo=dict(updates=60, micro_batch_size=16),
            dpo=dict(micro_batch_size=16),
            sweep=dict(stronger=0.0),
            evaluation=dict(best_of_n=16, best_of_n_prompts=64, batch_size=64),
        ),
        _real_pairs(
            "full",
            HH,
            "gpt2",
            data=dict(train_pairs=120000, validation_pairs=1000, test_pairs=8000,
                      demonstrations=120000, rl_prompts=50000, judge_pairs=40000),
            ppo=dict(updates=150, micro_batch_size=64),
            grpo=dict(updates=150, micro_batch_size=64),
        ),
    )
}  # fmt: skip


def load_profile(name: str, overrides: str | typing.Sequence[str] = ()) -> Profile:
    """The profile `name` with overrides applied.

    `overrides`: strings like `ppo.kl_coef=0.02`, or one string of them separated by spaces.
    Raises SettingsError for an unknown profile, section, setting, or a value of the wrong type.
    """
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    profile = PROFILES[name]
    items = shlex.split(overrides) if isinstance(overrides, str) else overrides
    for item in items:
        profile = _override(profile, item)
    return profile


def _override(profile: Profile, item: str) -> Profile:
    path, equals, text = item.partition("=")
    if not equals:
        raise SettingsError(f"override {item!r} has no '=': write it like ppo.kl_coef=0.02")
    section_name, dot, key = path.strip().partition(".")
    known = [f.name for f in dataclasses.fields(profile) if f.name != "name"]
    if section_name not in known:
        raise unknown("setting", path, _all_paths())
    section = getattr(profile, section_name)
    if not dataclasses.is_dataclass(section):
        if dot:
            raise unknown("setting", path, _all_paths())
        return dataclasses.replace(
            profile, **{section_name: _parse(Profile, section_name, path, text)}
        )
    if key not in {f.name for f in dataclasses.fields(section)}:
        raise unknown("setting", path, _all_paths())
    value = _parse(type(section), key, path, text)
    changed = dataclasses.replace(section, **{key: value})  # type: ignore[type-var]
    return dataclasses.replace(profile, **{section_name: changed})


def _all_paths() -> list[str]:
    paths = []
    for outer in dataclasses.fields(Profile):
        default = getattr(PROFILES["laptop"], outer.name)
        if dataclasses.is_dataclass(default):
            paths += [f"{outer.name}.{inner.name}" for inner in dataclasses.fields(default)]
        elif outer.name != "name":
            paths.append(outer.name)
    return paths


def _parse(owner: type, key: str, path: str, text: str) -> object:
    kind = typing.get_type_hints(owner)[key]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        if text.strip() not in typing.get_args(kind):
            raise unknown(f"{path} =", text.strip(), typing.get_args(kind))
        return text.strip()
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        return kind(text.strip())
    except (KeyError, ValueError):
        raise SettingsError(f"{path}={text!r}: expected a value of type {kind.__name__}") from None
