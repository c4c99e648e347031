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
from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.data.truth import truth_of
from rlhf_lib.measure import opinions
from rlhf_lib.measure.probes import load_probes
from rlhf_lib.settings import Profile
from rlhf_lib.study.training import curve_sizes


class Part(NamedTuple):
    """One stage of a profile: its name, the benchmark whose rate it runs at, its work."""

    name: str
    rate_of: str
    work: Work


class Lengths(NamedTuple):
    prompt: float  # tokens
    reply: float


class Asked(NamedTuple):
    """What a stage, or a part of it, goes through; `kind` names its passes in `work.PASSES`."""

    kind: str
    items: int
    prompts: int
    replies: int
    epochs: int = 1
    name: str = ""  # of a part


RATE_OF = {"scored_samples": "generation", "scored": "reward_model"}  # where it is no benchmark


def gpt2_sizes() -> Sizes:
    """Of GPT-2 small, from its shape alone."""
    with torch.device("meta"):
        return sizes_of(AutoModelForCausalLM.from_config(GPT2Config()))


def parts(profile: Profile, sizes: Sizes, lengths: Lengths) -> list[Part]:
    """Every stage of the first seed, each with the FLOPs that its settings ask for."""
    found = []
    for record in catalogue.stages(profile):
        for part in asked(record, profile):
            name = f"{record.name}: {part.name}" if part.name else record.name
            prompts = round(part.prompts * lengths.prompt)
            replies = round(part.replies * lengths.reply)
            work = count(part.kind, sizes, part.items, prompts, replies, part.epochs)
            found.append(Part(name, RATE_OF.get(part.kind, part.kind), work))
    return found


def asked(record: Record, profile: Profile) -> list[Asked]:
    """What the parts of a stage go through, from its settings."""
    config, data = record.config(profile), profile.data
    policies = len(catalogue.policies())  # the pretrained model is asked as well
    match record.runs.rpartition(".")[2]:
        case "training:dataset":
            return []
        case "training:reward_model":
            pairs = data.judge_pairs if record.pairs == "judge" else data.train_pairs
            return [_pairs("reward_model", pairs * config.epochs)]
        case "training:reward_model_curve":
            smaller = sum(curve_sizes(data.train_pairs, config.curve_points))
            return [_pairs("reward_model", smaller * config.epochs)]
        case "sft:train":
            shown = min(data.demonstrations, data.train_pairs) * config.epochs
            return [Asked("sft", shown, shown, shown)]
        case "training:rejection_sft":
            shown = config.prompts * config.epochs
            sampled = _samples("samples", config.prompts, config.samples)
            return [sampled, Asked("sft", shown, shown, shown, name="training")]
        case "ppo:train":
            samples = config.updates * config.batch_size
            return [Asked("ppo", samples, samples, samples, config.epochs)]
        case "grpo:train":
            prompts = config.updates * config.prompts_per_update * config.dynamic_sampling
            samples = prompts * config.group_size
            return [Asked("grpo", samples, prompts, samples, config.iterations)]
        case "dpo:train":
            return [_pairs("dpo", data.train_pairs * config.epochs)]
        case "ask:measure":
            probes = len(load_probes(truth_of(data.source), config.probe_prompts))
            return [_samples("", probes, policies * config.probe_samples)]
        case "evaluate:measure":
            answers = policies * config.samples_per_prompt
            return [
                _samples("answers", data.evaluation_prompts, answers),
                _samples("best of n", config.best_of_n_prompts, config.best_of_n),
            ]
        case "opinions:measure":
            scores = 2 * len(opinions.watched()) * data.evaluation_prompts
            return [Asked("scored", scores, scores, scores)]
    raise ValueError(f"stage {record.name!r} is not counted: say in `asked` what it goes through")


def _pairs(kind: str, pairs: int) -> Asked:
    return Asked(kind, pairs, pairs, 2 * pairs)


def _samples(name: str, prompts: int, each: int) -> Asked:
    return Asked("scored_samples", prompts * each, prompts, prompts * each, name=name)


def predict(measured: Mapping, profile_name: str = "full") -> dict:
    """FLOPs and, where the stage's rate was measured, hours of each stage on that device."""
    profile = catalogue.load(profile_name)
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
