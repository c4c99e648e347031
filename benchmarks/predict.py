"""How long a profile takes on one device: its FLOPs, counted, over the rates that were measured.

Rates are of the library's rounds in a benchmark's JSON, stage by stage, on the device named there;
none is assumed. Token lengths are the means of that benchmark's rows, cut at the profile's limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.work import Sizes, Work, count, sizes_of
from rlhf_lib.data.truth import truth_of
from rlhf_lib.measure import opinions
from rlhf_lib.measure.probes import load_probes
from rlhf_lib.methods import learning_curve, reward_model
from rlhf_lib.settings import Profile, load_profile
from rlhf_lib.study.stages import POLICIES, stage_names, variants

ASKED = len(POLICIES) + 1  # all policies and the pretrained model


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
        return sizes_of(AutoModelForCausalLM.from_config(GPT2Config()))


def parts(profile: Profile, sizes: Sizes, lengths: Lengths) -> list[Part]:
    """Every stage of the first seed, each with the FLOPs that its settings ask for."""
    found, methods = [], variants(profile)

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

    data, scored, measured = profile.data, profile.reward_model, profile.evaluation
    for stage in stage_names(profile):
        method, changes = methods.get(stage, (stage, {}))
        if method in ("reward_model", "reward_model_control"):
            add_pairs(stage, "reward_model", data.train_pairs * scored.epochs)
        elif method == "reward_model_curve":
            smaller = sum(learning_curve.sizes(data.train_pairs, scored.curve_points))
            add_pairs(stage, "reward_model", smaller * scored.epochs)
        elif method == "judge":
            epochs = reward_model.JUDGE_EPOCHS * scored.epochs
            add_pairs(stage, "reward_model", data.judge_pairs * epochs)
        elif method == "sft":
            shown = min(data.demonstrations, data.train_pairs) * profile.sft.epochs
            add(stage, "sft", shown, shown, shown)
        elif method == "rejection_sft":
            best = profile.rejection
            add_samples(f"{stage}: samples", best.prompts, best.samples)
            shown = best.prompts * best.epochs
            add(f"{stage}: training", "sft", shown, shown, shown)
        elif method == "ppo":
            samples = profile.ppo.updates * profile.ppo.batch_size
            add(stage, "ppo", samples, samples, samples, profile.ppo.epochs)
        elif method == "grpo":
            grpo = replace(profile.grpo, **changes)
            prompts = grpo.updates * grpo.prompts_per_update * grpo.dynamic_sampling
            samples = prompts * grpo.group_size
            add(stage, "grpo", samples, prompts, samples, grpo.iterations)
        elif method == "dpo":
            add_pairs(stage, "dpo", data.train_pairs * profile.dpo.epochs)
        elif method == "probes":
            probes = len(load_probes(truth_of(data.source), measured.probe_prompts))
            add_samples(stage, probes, ASKED * measured.probe_samples)
        elif method == "evaluate":
            add_samples(f"{stage}: answers", data.evaluation_prompts,
                        ASKED * measured.samples_per_prompt)  # fmt: skip
            add_samples(f"{stage}: best of n", measured.best_of_n_prompts, measured.best_of_n)
        elif method == "second_opinion":
            scores = 2 * len(opinions.WATCHED) * data.evaluation_prompts
            add(stage, "scored", scores, scores, scores)
        elif method != "dataset":
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
        rate = rates.get(part.rate_of)
        hours = None if rate is None else part.work.flops / rate / 3600
        rows.append({"stage": part.name, "items": part.work.items, "rate_of": part.rate_of,
                     "flops": part.work.flops, "hours": hours})  # fmt: skip
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
