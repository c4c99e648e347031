"""How long a profile takes on one device: its FLOPs, counted, over the rates that were measured.

Rates are of the library's rounds in a benchmark's JSON, stage by stage, on the device named there;
none is assumed. Token lengths are the means of that benchmark's rows, cut at the profile's limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.work import Sizes, Work, count, sizes_of
from rlhf_lib.config import Profile
from rlhf_lib.profiles import load_profile

POLICIES = 6  # that an evaluation samples from: base, SFT, PPO twice, GRPO, DPO


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
    """The stages of one seed, each with the FLOPs that its settings ask for."""
    data, per_seed = profile.data, []
    ppo, grpo, best = profile.ppo, profile.grpo, profile.rejection

    def add(
        name: str, stage: str, items: float, prompts: float, replies: float, epochs: int = 1
    ) -> None:
        tokens = round(prompts * lengths.prompt), round(replies * lengths.reply)
        rate_of = "generation" if stage == "scored_samples" else stage
        per_seed.append(Part(name, rate_of, count(stage, sizes, round(items), *tokens, epochs)))

    pairs = data.train_pairs * profile.reward_model.epochs
    add("reward model", "reward_model", pairs, pairs, 2 * pairs)
    shown = min(data.demonstrations, data.train_pairs) * profile.sft.epochs
    add("SFT", "sft", shown, shown, shown)
    drawn = best.prompts * best.samples
    add("best-of-n SFT: samples", "scored_samples", drawn, best.prompts, drawn)
    add("best-of-n SFT: training", "sft", best.prompts, best.prompts * best.epochs,
        best.prompts * best.epochs)  # fmt: skip
    samples = ppo.updates * ppo.batch_size
    for name in ("PPO", "PPO, low KL"):
        add(name, "ppo", samples, samples, samples, ppo.epochs)
    prompts = grpo.updates * grpo.prompts_per_update * grpo.dynamic_sampling
    samples = prompts * grpo.group_size
    add("GRPO", "grpo", samples, prompts, samples, grpo.iterations)
    pairs = data.train_pairs * profile.dpo.epochs
    add("DPO", "dpo", pairs, pairs, 2 * pairs)
    answers = POLICIES * data.evaluation_prompts
    add("evaluation: answers", "scored_samples", answers, answers, answers)
    tried, n = profile.evaluation.best_of_n_prompts, profile.evaluation.best_of_n
    add("evaluation: best of n", "scored_samples", tried * n, tried, tried * n)
    return per_seed


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
