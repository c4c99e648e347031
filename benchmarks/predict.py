"""How long a profile takes on one device: its FLOPs, counted, over the rates that were measured.

Rates are of the library's rounds in a benchmark's JSON, stage by stage, on the device named there;
none is assumed. Token lengths are the means of that benchmark's rows, cut at the profile's limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_lib.flops import sizes_of
from rlhf_lib.profiles import load_profile
from rlhf_lib.session.counted import Lengths, parts
from rlhf_lib.session.work import Sizes


def gpt2_sizes() -> Sizes:
    """Of GPT-2 small, from its shape alone."""
    with torch.device("meta"):
        return Sizes(*sizes_of(AutoModelForCausalLM.from_config(GPT2Config())))


def predict(measured: Mapping, profile_name: str = "full", overrides: Sequence[str] = ()) -> dict:
    """FLOPs and, where the stage's rate was measured, hours of each stage on that device."""
    profile = load_profile(profile_name, list(overrides))
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
