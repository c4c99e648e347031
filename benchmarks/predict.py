"""How long a profile takes on one device: its FLOPs, counted, over the rates that were measured.

Rates are of the library's rounds in a benchmark's JSON, stage by stage, on the device named there;
none is assumed. Token lengths are the means of that benchmark's rows, cut at the profile's limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.work import Sizes, Work, count
from rlhf_lib import catalogue
from rlhf_lib.data.truth import truth_of
from rlhf_lib.flops import sizes_of
from rlhf_lib.measure import opinions
from rlhf_lib.measure.attribution import CONTROLS
from rlhf_lib.measure.probes import load_probes
from rlhf_lib.profiles import load_profile
from rlhf_lib.settings import (
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    Profile,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
)
from rlhf_lib.study.training import curve_sizes


class Part(NamedTuple):
    """One stage of a profile: its name, the benchmark whose rate it runs at, its work."""

    name: str
    rate_of: str
    work: Work


class Lengths(NamedTuple):
    prompt: float  # tokens
    reply: float


def gpt2_sizes() -> Sizes:
    """Of GPT-2 small, from its shape alone."""
    with torch.device("meta"):
        return Sizes(*sizes_of(AutoModelForCausalLM.from_config(GPT2Config())))


def parts(profile: Profile, sizes: Sizes, lengths: Lengths) -> list[Part]:
    """Every stage of the first seed, each with the FLOPs that its settings ask for."""
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

    data = profile.data
    asked = len(catalogue.trained()) + 1  # all policies and the pretrained model
    for record in catalogue.stages(profile):
        stage, config = record.name, record.config(profile)
        if stage == "reward_model_curve":
            smaller = sum(curve_sizes(data.train_pairs, config.curve_points))
            add_pairs(stage, "reward_model", smaller * config.epochs)
        elif isinstance(config, RewardModelConfig):
            pairs = data.judge_pairs if record.pairs == "judge" else data.train_pairs
            add_pairs(stage, "reward_model", pairs * config.epochs)
        elif isinstance(config, SFTConfig):
            shown = min(data.demonstrations, data.train_pairs) * config.epochs
            add(stage, "sft", shown, shown, shown)
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
        elif stage == "probes":
            probes = len(load_probes(truth_of(data.source), config.probe_prompts))
            add_samples(stage, probes, asked * config.probe_samples)
        elif stage == "evaluate":
            each = asked * config.samples_per_prompt
            add_samples(f"{stage}: answers", data.evaluation_prompts, each)
            add_samples(f"{stage}: best of n", config.best_of_n_prompts, config.best_of_n)
        elif stage == "attribution":
            answering = 1 + 2 * len(CONTROLS)  # SFT, and each method on either labels
            add_samples(stage, config.measured_prompts, answering * config.measured_samples)
        elif stage == "second_opinion":
            scores = 2 * len(opinions.watched()) * data.evaluation_prompts
            add(stage, "scored", scores, scores, scores)
        elif stage != "dataset":
            raise ValueError(f"stage {stage!r} is not counted: say in `parts` what it computes")
    return found


def predict(measured: Mapping, profile_name: str = "full") -> dict:
    """FLOPs and, where the stage's rate was measured, hours of each stage on that device."""
    profile = load_profile(profile_name)
    tokens = measured["settings"]["mean_tokens"]
    lengths = Lengths(
        min(tokens["prompt"], profile.data.max_prompt_tokens),
        min((tokens["chosen"] + tokens["rejected"]) / 2, profile.data.max_response_tokens),
    )
    rates = {
        stage: record["library"]["flops_per_second"]["median"]
        for stage, record in measured["stages"].items()
    }
    env = measured["environment"]
    rows = []
    for part in parts(profile, gpt2_sizes(), lengths):
        rate, flops = rates.get(part.rate_of), part.work.flops
        hours = None if rate is None else flops / rate / 3600
        row = {"stage": part.name, "items": part.work.items, "rate_of": part.rate_of}
        rows.append({**row, "flops": flops, "hours": hours})
    known = [row["hours"] for row in rows if row["hours"] is not None]
    return {
        "profile": profile_name,
        "gpu": env["gpu"],
        "device": env["gpu"] or f"{env['cpu_cores']} CPU cores ({env['threads']} threads)",
        "mean_tokens": lengths._asdict(),
        "stages": rows,
        "flops": sum(row["flops"] for row in rows),
        "hours": sum(known) if len(known) == len(rows) else None,
    }
