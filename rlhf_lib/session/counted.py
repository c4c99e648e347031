"""What the stages of a study compute, from its settings: FLOPs of each, and what it measures."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.data.truth import truth_of
from rlhf_lib.measure import opinions
from rlhf_lib.measure.probes import load_probes
from rlhf_lib.session.work import Sizes, Work, count
from rlhf_lib.settings import (
    DPOConfig,
    EvaluationConfig,
    GRPOConfig,
    PPOConfig,
    Profile,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
)
from rlhf_lib.study.offer import LOOKS
from rlhf_lib.study.training import curve_sizes


class Part(NamedTuple):
    """One stage of a profile, or a part of one: the probe whose rate it runs at, and its work."""

    name: str
    rate_of: str
    work: Work


class Lengths(NamedTuple):
    prompt: float  # tokens
    reply: float


def held(data: PreferenceData) -> dict[str, int]:
    """How many rows there are of what settings ask for; a source may have fewer."""
    sizes = {f"{split}_pairs": len(pairs) for split, pairs in data.pairs.items()}
    prompts = {"rl_prompts": "train", "evaluation_prompts": "evaluation"}
    sizes |= {key: len(data.prompts[split]) for key, split in prompts.items()}
    return sizes | {"demonstrations": len(data.demonstrations)}


def lengths_of(data: PreferenceData) -> Lengths:
    """Mean tokens of prompts and of replies, by the first training pairs."""
    pairs = data.pairs["train"][:256]
    replies = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    return Lengths(sum(len(p.prompt) for p in pairs) / len(pairs), replies / (2 * len(pairs)))


def parts(profile: Profile, sizes: Sizes, lengths: Lengths, seed: int = 0) -> list[Part]:
    """Every stage of a seed, each with the FLOPs that its settings ask for."""
    found: list[Part] = []

    def add(
        name: str, stage: str, items: float, prompts: float, replies: float, epochs: int = 1
    ) -> None:
        tokens = round(prompts * lengths.prompt), round(replies * lengths.reply)
        rate_of = {"scored_samples": "generation", "scored": "reward_model"}.get(stage, stage)
        found.append(Part(name, rate_of, count(stage, sizes, round(items), *tokens, epochs)))

    def add_pairs(name: str, stage: str, pairs: int) -> None:
        add(name, stage, pairs, pairs, 2 * pairs)

    def add_samples(name: str, prompts: int, each: int) -> None:
        add(name, "scored_samples", prompts * each, prompts, prompts * each)

    data, stages = profile.data, catalogue.stages(profile, seed)
    truth, trained = truth_of(data.source), set(catalogue.trained())
    asked = len(trained & {record.name for record in stages}) + 1  # and the pretrained model
    for record in stages:
        stage, config = record.name, record.config(profile)
        if stage == "reward_model_curve":
            smaller = sum(curve_sizes(data.train_pairs, config.curve_points))
            add_pairs(stage, "reward_model", smaller * config.epochs)
        elif isinstance(config, RewardModelConfig):
            pairs = data.judge_pairs if record.pairs == "judge" else data.train_pairs
            add_pairs(stage, "reward_model", pairs * config.epochs)
        elif isinstance(config, SFTConfig):
            # real pairs have no demonstrations but their chosen replies
            most = data.demonstrations if truth else min(data.demonstrations, data.train_pairs)
            add(stage, "sft", most * config.epochs, most * config.epochs, most * config.epochs)
        elif isinstance(config, RejectionConfig):
            add_samples(f"{stage}: samples", config.prompts, config.samples)
            shown = config.prompts * config.epochs
            add(f"{stage}: training", "sft", shown, shown, shown)
        elif isinstance(config, PPOConfig):
            samples = config.updates * config.batch_size
            add(stage, "ppo", samples, samples, samples, config.epochs)
        elif isinstance(config, GRPOConfig):
            prompts = config.updates * config.prompts_per_update * config.dynamic_sampling
            samples = prompts * config.group_size
            add(stage, "grpo", samples, prompts, samples, config.iterations)
        elif isinstance(config, DPOConfig):
            add_pairs(stage, "dpo", data.train_pairs * config.epochs)
            if config.online:
                add_samples(f"{stage}: own replies", data.train_pairs * config.epochs, 2)
        elif stage == "probes":
            probes = len(load_probes(truth, config.probe_prompts))
            add_samples(stage, probes, asked * config.probe_samples)
        elif stage == "evaluate":
            each = draws(config, asked)
            add_samples(f"{stage}: answers", data.evaluation_prompts, each)
            add_samples(f"{stage}: best of n", config.best_of_n_prompts, config.best_of_n)
        elif stage in ("attribution", "rewards_compared"):
            answering = sum(not need.startswith("reward_model") for need in record.needs)
            add_samples(stage, config.measured_prompts, answering * config.measured_samples)
        elif stage == "second_opinion":
            scores = 2 * len(opinions.watched()) * data.evaluation_prompts
            add(stage, "scored", scores, scores, scores)
        elif stage in catalogue.LIBRARY and stage != "dataset":
            raise ValueError(f"stage {stage!r} is not counted: say in `parts` what it computes")
        if getattr(config, "patience", 0):
            add_samples(f"{stage}: looks", data.validation_pairs, LOOKS)
    return found


def uncounted(profile: Profile) -> list[str]:
    """Stages of the user's own: nobody knows what they compute."""
    known = {part.name.partition(":")[0] for part in parts(profile, Sizes(1, 1), Lengths(1, 1))}
    stages = (record.name for record in catalogue.stages(profile))
    return [name for name in stages if name not in known and name != "dataset"]


def draws(config: EvaluationConfig, asked: int) -> int:
    """Replies to a prompt of so many policies; SFT draws more, and a second time."""
    samples = max(config.baseline_samples, config.samples_per_prompt)
    return asked * config.samples_per_prompt + samples


def measured(record: Record, profile: Profile) -> int:
    """How much a stage measures beside what it learns from: pairs or prompts."""
    config = record.config(profile)
    if record.name == "reward_model_curve":
        points = len(curve_sizes(profile.data.train_pairs, config.curve_points))
        return points * profile.data.test_pairs + profile.data.validation_pairs
    if isinstance(config, RewardModelConfig):
        return profile.data.test_pairs + profile.data.validation_pairs
    return config.probes * config.probe_prompts if isinstance(config, DPOConfig) else 0
