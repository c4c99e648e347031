"""Tables of what a study cost: time by phase, and what a minute and a million tokens bought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from rlhf_lib.display import NAMES, interval
from rlhf_lib.policy_summary import CANDIDATES

PHASE_CAPTION = (
    "Minutes of each stage by what was going on, a mean over its seeds; other: all that no phase "
    "counts, such as reading data, statistics and writing metrics."
)
PRICE_CAPTION = (
    "What training bought: {judge} gain over SFT for each minute of a method's own stage, and for "
    "each million tokens in it (sampled, scored or learnt from). 95 % intervals of the gain, "
    "divided by the mean cost; the reward model's own training is not in it."
)

UPDATE_CAPTION = (
    "One update of each method: tokens, and passes over them. Forward: sampling (token by token), "
    "reward model, log-probabilities under policy and reference, values, and those that gradients "
    "flow back through. Tokens are a mean over the stage, and include what is sampled to measure "
    "it (DPO) or scored at its end (reward model)."
)
MEMORY_CAPTION = (
    "Peak memory of each stage by part, in MB. Counted from {weights:,} weights a model: weights, "
    "gradients and AdamW's two moments of what is learnt, in fp32, and models that are only read, "
    "in {precision}. The rest is the measured peak less these: activations, data, and the program "
    "itself, which weighs more than a small model."
)


# what a comparison of the methods cannot do without; the other stages say how far to trust it
CORE = ("dataset", "judge", "reward_model", "sft", "ppo", "grpo", "dpo", "evaluate")


class Parts(NamedTuple):
    """What a method holds and does: models, and passes over the tokens of one update."""

    learnt: int  # models with gradients
    read: int  # frozen ones
    forward: int
    backward: int


def cost_table(results: Mapping) -> pd.DataFrame:
    """Minutes, peak memory and tokens of each stage, per seed."""
    return pd.DataFrame([
        {
            "stage": NAMES.get(name, name.upper()),
            "minutes": f"{cost['seconds']['mean'] / 60:.2f}",
            "peak memory (GB)": f"{cost['peak_memory_gb']['mean']:.2f}",
            "tokens (thousands)": f"{cost['num_tokens']['mean'] / 1000:.0f}",
        }
        for name, cost in results["cost"].items()
    ])  # fmt: skip


def phase_table(results: Mapping) -> pd.DataFrame:
    """Minutes of each stage by phase; phases that no stage spent time in are left out."""
    rows = []
    for name, cost in results["cost"].items():
        phases = {phase: seconds / 60 for phase, seconds in cost["phases"].items()}
        total = cost["seconds"]["mean"] / 60
        other = total - sum(phases.values())
        rows.append({"stage": NAMES.get(name, name), **phases, "other": other, "all": total})
    frame = pd.DataFrame(rows).fillna(0.0)
    order = ["stage", *sorted(set(frame) - {"stage", "other", "all"}), "other", "all"]
    frame = frame[order]
    sums = frame.drop(columns="stage").sum()
    frame.loc[len(frame)] = {"stage": "sum", **sums}
    return frame.map(lambda x: x if isinstance(x, str) else f"{max(x, 0.0):.2f}")


def parts(settings: Mapping) -> dict[str, Parts]:
    """Models in memory and passes of each method, as these settings have them."""
    ppo, grpo = settings["ppo"], settings["grpo"]
    values = 1 if ppo["value_model"] == "separate" else 0
    copies = 1 if settings["model"]["lora_rank"] else 2  # adapters off: the policy is the reference
    each = ppo["epochs"] * (1 + values)
    return {
        "reward_model": Parts(1, 0, 1, 1),
        "sft": Parts(1, 0, 1, 1),
        # sampled, scored, log-probs of policy and reference, values
        "ppo": Parts(1 + values, copies, 4 + 1 + each, each),
        "grpo": Parts(1, copies, 4 + grpo["iterations"], grpo["iterations"]),
        "dpo": Parts(1, 2, 1, 1),  # the reference's log-probs are taken once, before training
    }


def total_sentence(results: Mapping) -> str:
    """Minutes of all stages of all seeds, and of one seed's methods with their evaluation."""
    cost = results["cost"]
    everything = sum(sum(stage["seconds"]["per_seed"]) for stage in cost.values()) / 60
    core = sum(cost[name]["seconds"]["mean"] for name in CORE if name in cost) / 60
    judge = ", held-out judge" if "judge" in cost else ""
    return (
        f"Time in stages, added up over all jobs: {everything:.1f} minutes. One seed's reward "
        f"model, SFT, PPO, GRPO, DPO{judge} and evaluation take {core:.1f} of them."
    )


def update_table(results: Mapping, updates: Mapping[str, int]) -> pd.DataFrame:
    """Tokens and passes of one update; `updates`: how many each stage made."""
    return pd.DataFrame([
        {
            "stage": NAMES[name],
            "updates": updates[name],
            "tokens an update": round(results["cost"][name]["num_tokens"]["mean"] / updates[name]),
            "forward passes": part.forward,
            "backward passes": part.backward,
        }
        for name, part in parts(results["settings"]).items()
    ])  # fmt: skip


def memory_table(results: Mapping, weights: int, learnt: int, read_bytes: int) -> pd.DataFrame:
    """Peak memory by part. `weights` of one model, `learnt` ones among them (fewer with adapters);
    `read_bytes`: of a weight that is only read.
    """
    rows = []
    for name, part in parts(results["settings"]).items():
        counted = {
            "weights learnt": 4 * weights * part.learnt,
            "gradients": 4 * learnt * part.learnt,
            "moments": 8 * learnt * part.learnt,
            "models read": read_bytes * weights * part.read,
        }
        peak = 1e9 * results["cost"][name]["peak_memory_gb"]["mean"]
        counted |= {"the rest": peak - sum(counted.values()), "peak": peak}
        megabytes = {key: f"{value / 1e6:,.0f}" for key, value in counted.items()}
        rows.append({"stage": NAMES[name], **megabytes})
    return pd.DataFrame(rows)


def price_table(results: Mapping) -> pd.DataFrame:
    """Gain over SFT per minute and per million tokens of each trained policy's stage."""
    judge, rows = results["judge"], []
    for name in (c for c in CANDIDATES if c in results["policies"]):
        gain, cost = results["policies"][name][f"{judge}_gain"], results["cost"][name]
        rows.append({
            "policy": NAMES[name],
            "gain a minute": interval(_divided(gain, cost["seconds"]["mean"] / 60)),
            "gain a million tokens": interval(_divided(gain, cost["num_tokens"]["mean"] / 1e6)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _divided(estimate: Mapping, by: float) -> dict:
    parts = {key: estimate[key] for key in ("mean", "low", "high")}
    return {key: None if value is None else value / by for key, value in parts.items()}
