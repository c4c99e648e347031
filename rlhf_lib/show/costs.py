"""What the stages of a study cost, as tables: time, memory, tokens, FLOPs, and what they bought."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.catalogue import CATALOGUE, label
from rlhf_lib.measure.statistics import interval, listed
from rlhf_lib.results.verdict import ASKED
from rlhf_lib.show.tables import (
    Cell,
    Column,
    named,
    peak_memory,
    short,
    spent,
    table_of,
    trained_for,
)


def cost_table(results: Mapping) -> pd.DataFrame:
    """Minutes, peak memory and tokens of each stage, per seed."""
    columns = [
        ("stage", named),
        ("minutes", lambda row: short(row["seconds"]["mean"] / 60)),
        ("peak memory", peak_memory),
        ("tokens (thousands)", spent("num_tokens", 1000, 0)),
        ("TFLOP", lambda row: short(row["flops"]["mean"] / 1e12)),
    ]
    return table_of([{"name": name, **cost} for name, cost in results["cost"].items()], columns)


def phase_table(results: Mapping) -> pd.DataFrame:
    """Minutes of each stage by phase; phases that no stage spent time in are left out."""
    phases = {name: cost["phases"] for name, cost in results["cost"].items()}
    seconds = pd.DataFrame.from_dict(phases, orient="index").sort_index(axis=1).fillna(0.0)
    everything = pd.Series({n: cost["seconds"]["mean"] for n, cost in results["cost"].items()})
    seconds["other"], seconds["all"] = everything - seconds.sum(axis=1), everything
    seconds.loc["sum"] = seconds.sum()
    frame = (seconds / 60).clip(lower=0.0).map("{:.2f}".format)
    frame.insert(0, "stage", [label(str(name)) for name in frame.index])
    return frame


def total_sentence(results: Mapping) -> str:
    """Minutes of all stages of all seeds, and of one seed's methods with their evaluation."""
    cost = results["cost"]
    everything = sum(sum(stage["seconds"]["per_seed"]) for stage in cost.values()) / 60
    # what a comparison of the methods cannot do without; the other stages say how far to trust it
    core = ["reward_model", "sft", *catalogue.methods(), *({"judge"} & set(cost)), "evaluate"]
    theirs = sum(cost[name]["seconds"]["mean"] for name in ("dataset", *core) if name in cost)
    return (
        f"Time in stages, added up over all jobs: {short(everything)} minutes. A seed's "
        f"{listed([label(name) for name in core])} take {short(theirs / 60)} of them on average."
    )


def update_table(results: Mapping, updates: Mapping[str, int]) -> pd.DataFrame:
    """Tokens and FLOPs of one update; `updates`: how many each stage made."""
    cost = results["cost"]

    def each(key: str, unit: float, digits: int) -> Cell:
        return lambda name: f"{cost[name][key]['mean'] / updates[name] / unit:.{digits}f}"

    columns = [
        ("stage", label),
        ("updates", lambda name: updates[name]),
        ("tokens an update", each("num_tokens", 1, 0)),
        ("GFLOP an update", each("flops", 1e9, 1)),
    ]
    return table_of(updates, columns)


def held(settings: Mapping) -> dict[str, tuple[int, int]]:
    """Models in memory, those that learn and those that are read, of each stage that says so."""
    stages = (stage for stage in CATALOGUE.values() if not stage.variant_of)
    return {stage.name: stage.held(settings) for stage in stages if stage.held}


def memory_table(results: Mapping, weights: int, learnt: int, read_bytes: int) -> pd.DataFrame:
    """Peak memory by part, in MB. `weights` of one model, `learnt` ones among them (fewer with
    adapters); `read_bytes`: of a weight that is only read.
    """
    rows, cost = [], results["cost"]
    for name, (learning, read) in held(results["settings"]).items():
        if name not in cost:
            continue
        counted = {
            "weights learnt": 4 * weights * learning,
            "gradients": 4 * learnt * learning,
            "moments": 8 * learnt * learning,
            "models read": read_bytes * weights * read,
        }
        peak = 1e9 * cost[name]["peak_memory_gb"]["mean"]
        counted |= {"the rest": peak - sum(counted.values()), "peak": peak}
        rows.append({"stage": label(name)} | {k: f"{v / 1e6:,.0f}" for k, v in counted.items()})
    return pd.DataFrame(rows)


def price_table(results: Mapping) -> pd.DataFrame:
    """What each candidate's training takes, and its gain over SFT for that."""
    needs, prices, flop = results["needs"], results["prices"], results["flop"]
    bought = {"per_flop": (f"gain a {flop}", 3), "per_minute": ("gain a minute", 2)}

    def gain(need: str, title: str, digits: int) -> Column:
        return title, lambda name: interval(needs[need]["policies"][name], digits)

    unit = 1e9 * 1000 ** "GTPE".index(flop[0])
    columns = [
        ("policy", label),
        ("tokens generated", lambda n: f"{prices[n]['generated']:,.0f}"),
        (flop, lambda n: f"{prices[n]['flops'] / unit:.3g}"),
        ("minutes, reward model included", lambda n: short(prices[n]["minutes"])),
        *(gain(need, *how) for need, how in bought.items() if need in needs),
    ]
    return table_of(prices, columns)


def sweep_table(ends: pd.DataFrame, results: Mapping, samples: Mapping[str, int]) -> pd.DataFrame:
    """Where the runs of a sweep ended (`frontier.swept`), and what each took by itself.

    `samples`: replies that each run sampled to learn from; 0 where it learns from given ones.
    """
    cost = results["cost"]
    known = [reward for reward in ("proxy", "gold") if ends[reward].notna().all()]
    columns = [
        ("method", lambda row: label(row["method"])),
        ("coefficient", lambda row: f"{c:g}" if (c := row["coefficient"]) == c else "–"),
        ("KL, k1 (nats a reply)", lambda row: f"{row['kl']:.2f}"),
        *((reward, lambda row, reward=reward: f"{row[reward]:.2f}") for reward in known),
        ("replies sampled", lambda row: f"{n:,}" if (n := samples[row["policy"]]) else "–"),
        ("TFLOP", lambda row: short(cost[row["policy"]]["flops"]["mean"] / 1e12)),
        ("own minutes", lambda row: trained_for(cost[row["policy"]])),
    ]
    return table_of(ends.to_dict("records"), columns)


def budget_table(equal: pd.DataFrame) -> pd.DataFrame:
    """The runs at equal budgets (`frontier.at_equal_budget`), in the words of the other tables."""
    reward = equal.columns[3]  # after budget, amount and method

    def number(value: float) -> str:
        return "not begun" if pd.isna(value) else f"{value:.2f}"

    columns = [
        ("budget", itemgetter("budget")),
        ("amount", lambda row: short(row["amount"])),
        ("method", lambda row: label(row["method"])),
        (f"{reward} reward", lambda row: number(row[reward])),
        ("KL, k1 (nats a reply)", lambda row: number(row["kl"])),
        ("share of its own price", lambda row: f"{row['share']:.0%}"),
    ]
    return table_of(equal.to_dict("records"), columns)


def sampled_sentence(samples: Mapping[str, int]) -> str:
    """Whether the methods that sample were given equally many replies; `samples`: of each."""
    counts = {label(name): count for name, count in samples.items() if count}
    if len(set(counts.values())) == 1:
        names, count = listed(list(counts)), next(iter(counts.values()))
        return f"Equal: {names} each sampled and scored {count:,} replies in training."
    each = listed([f"{count:,} ({name})" for name, count in counts.items()])
    return (
        f"Not equal: replies sampled and scored in training are {each}. A method with more of them "
        "had more to learn from, and comparisons at the end of training are not at equal samples."
    )


def need_table(results: Mapping) -> pd.DataFrame:
    """The candidates in what a user may ask for: one row a candidate, one column a need."""

    def need(key: str) -> Column:
        (title, unit, digits), found = ASKED[key], results["needs"][key]["policies"]
        named = f"{title} ({unit})".format(deciding=results["deciding"], flop=results["flop"])
        return named, lambda name: interval(found[name], digits)

    candidates = [name for name in catalogue.candidates() if name in results["policies"]]
    needs = [need(key) for key in results["needs"] if key in ASKED]
    return table_of(candidates, [("candidate", label), *needs])
