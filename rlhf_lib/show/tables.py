"""Tables of a study's results: gains, wins, measures, comparisons, and the needs of the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from rlhf_lib.results.choices import ASKED
from rlhf_lib.results.policies import CANDIDATES
from rlhf_lib.show.display import GAINERS, NAMES, POLICIES, interval

GAIN_CAPTION = (
    "Gains over SFT, paired by prompt, with 95 % intervals. p is corrected for the number of "
    "trained policies (Holm); smallest seen: the true gain that a study like this one would call "
    "one in 80 of 100 repetitions; verdict: what the corrected p allows to say."
)
PAIR_CAPTION = (
    "Methods against each other in {judge} reward, paired by prompt: 95 % intervals, p corrected "
    "for all of these comparisons (Holm), and the smallest true difference that would be seen in "
    "80 of 100 repetitions."
)
WIN_CAPTION = (
    "Win rates in {judge} reward, a tie is half a win: as counted, and as a regression gives them "
    "where both replies have the same length (LC)."
)
DISTANCE_CAPTION = (
    "Distance from SFT and what it cost: KL in nats a reply, exact over the vocabulary (± its "
    "standard error) and by two sampled estimators; entropy in nats a token; perplexity of "
    "held-out texts, and the nats a token that they cost more than under SFT."
)
REPLY_CAPTION = (
    "The replies themselves: length in tokens, share that ended, distinct words and word pairs "
    "among sixteen replies, and the share of its four-word runs that a reply repeats."
)
OPINION_CAPTION = (
    "Gain over SFT in the eyes of the reward model that the policy was trained on and of another "
    "seed's, in standard deviations of demonstrations; what the first sees more, p corrected for "
    "the number of policies (Holm); and how often the two disagree on which reply is better."
)
ENDPOINT_CAPTION = (
    "Wins over SFT as {model} judges them: each pair asked in both orders, a tie is half a win. "
    "All questions together cost {cost[dollars]:.2f} dollars."
)
NEED_CAPTION = "What the verdict chooses by, for each candidate: 95 % intervals."


def gain_table(results: Mapping) -> pd.DataFrame:
    """Gain over SFT of each policy, paired by prompt, every seed's value, and what may be said.

    A study from before there was a correction has neither the corrected p nor the smallest gain
    that it could have seen.
    """
    judge, rows = results["judge"], []
    for name in (p for p in GAINERS if p in results["policies"]):
        policy = results["policies"][name]
        gain = policy[f"{judge}_gain"]
        row = {
            "policy": NAMES[name],
            f"{judge} gain over SFT": interval(gain),
            "each seed": ", ".join(f"{value:.2f}" for value in gain["per_seed"]),
            **_corrected(gain),
            "verdict": gain["verdict"],
        }
        if judge != "proxy":
            row["proxy gain"] = interval(policy["proxy_gain"])
        rows.append(row)
    return pd.DataFrame(rows)


def pair_table(results: Mapping) -> pd.DataFrame:
    """Each two of the compared methods: difference of the judged reward, and what may be said."""
    rows = []
    for key, record in results["comparisons"].items():
        row = {"comparison": pair_name(key), "difference": interval(record)}
        rows.append(row | _corrected(record) | {"verdict": record["verdict"]})
    return pd.DataFrame(rows)


def pair_name(key: str) -> str:
    """`ppo_minus_dpo` as readers know it."""
    return " − ".join(NAMES[name] for name in key.split("_minus_"))


def _corrected(difference: Mapping) -> dict[str, str]:
    """Corrected p and smallest detectable difference; nothing for a study that has none."""
    if "p_adjusted" not in difference:
        return {}
    p, smallest = difference["p_adjusted"], difference["detectable"]
    return {
        "p (Holm)": "<0.001" if p < 0.001 else f"{p:.3f}",
        "smallest seen": "–" if smallest is None else f"{smallest:.2f}",
    }


def win_table(results: Mapping) -> pd.DataFrame:
    """Wins against SFT, base and the dataset's chosen reply, raw and at equal length."""
    others = {"sft": "SFT", "base": "base", "chosen": "chosen reply"}
    return pd.DataFrame([
        {"policy": NAMES[name]}
        | {
            f"vs {label}{suffix}": interval(
                results["policies"][name].get(f"{key}_vs_{other}"), 0, percent=True
            )
            for other, label in others.items()
            for key, suffix in (("win_rate", ""), ("length_controlled", " (LC)"))
        }
        for name in _measured(results)
    ])  # fmt: skip


def distance_table(results: Mapping) -> pd.DataFrame:
    """KL by three estimators, entropy, and perplexity of held-out texts."""
    rows = []
    for name in _measured(results):
        policy = results["policies"][name]
        row = {
            "policy": NAMES[name],
            "KL ± SE": f"{policy['kl']['mean']:.2f} ± {policy['kl']['se']:.2f}",
            "k1": interval(policy["kl_k1"]),
            "k3": interval(policy["kl_k3"]),
            "entropy": interval(policy["entropy"]),
        }
        if "perplexity" in policy:
            row["perplexity"] = interval(policy["perplexity"])
            row["more than SFT (nats)"] = interval(policy.get("forgetting"), 3)
        rows.append(row)
    return pd.DataFrame(rows)


def reply_table(results: Mapping) -> pd.DataFrame:
    """Length, endings, variety and repetition of each policy's replies."""
    columns = {"length": ("length", 1, False), "finished": ("ended", 1, True),
               "distinct_1": ("distinct-1", 2, False), "distinct_2": ("distinct-2", 2, False),
               "repetition": ("repeated", 1, True)}  # fmt: skip
    return pd.DataFrame([
        {"policy": NAMES[name]}
        | {
            label: interval(results["policies"][name][key], digits, percent)
            for key, (label, digits, percent) in columns.items()
        }
        for name in _measured(results)
    ])  # fmt: skip


def opinion_table(results: Mapping) -> pd.DataFrame:
    """What two reward models say of each policy, where there were two (`second_opinion`)."""
    return pd.DataFrame([
        {
            "policy": NAMES[name],
            "its own": interval(record["own"]),
            "another seed's": interval(record["other"]),
            "own less other": interval(record["excess"]),
            **_corrected(record["excess"]),
            "verdict": record["excess"]["verdict"],
            "disagree": interval(record["opposite"], 0, percent=True),
        }
        for name, record in results["second_opinion"].items()
    ])  # fmt: skip


def endpoint_table(results: Mapping) -> pd.DataFrame:
    """What a judge behind an endpoint said, where one was asked (`endpoint_judge`)."""
    return pd.DataFrame([
        {
            "policy": NAMES[name],
            "wins over SFT": interval(record.get("win_rate_vs_sft"), 0, percent=True),
            "same in both orders": f"{record['same_in_both_orders']:.0%}"
            if "same_in_both_orders" in record else "–",
            "no clear answer": record["unclear"],
        }
        for name, record in results["endpoint_judge"]["policies"].items()
    ])  # fmt: skip


def need_table(results: Mapping) -> pd.DataFrame:
    """The candidates in what a user may ask for: one row a candidate, one column a need."""
    needs = {key: record for key, record in results["needs"].items() if key in ASKED}
    titles = {key: ASKED[key][0].format(judge=results["judge"]) for key in needs}
    return pd.DataFrame([
        {"candidate": NAMES[name]}
        | {
            titles[key]: interval(record["policies"][name], ASKED[key][2])
            for key, record in needs.items()
        }
        for name in CANDIDATES
    ])  # fmt: skip


def _measured(results: Mapping) -> list[str]:
    """Policies in the order of all tables."""
    return [name for name in POLICIES if name in results["policies"]]


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
