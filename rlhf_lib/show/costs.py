"""What the stages of a study cost, as tables: time, memory, tokens, FLOPs, and what they bought."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.catalogue import CATALOGUE, label
from rlhf_lib.measure.statistics import interval, listed
from rlhf_lib.show.tables import Cell, Column, named, spent, table_of


def cost_table(results: Mapping) -> pd.DataFrame:
    """Minutes, peak memory and tokens of each stage, per seed."""
    columns = [
        ("stage", named),
        ("minutes", spent("seconds", 60, 2)),
        ("peak memory (GB)", spent("peak_memory_gb", 1, 2)),
        ("tokens (thousands)", spent("num_tokens", 1000, 0)),
        ("TFLOP", spent("flops", 1e12, 2)),
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
        f"Time in stages, added up over all jobs: {everything:.1f} minutes. A seed's "
        f"{listed([label(name) for name in core])} take {theirs / 60:.1f} of them on average."
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
        ("minutes", lambda n: f"{prices[n]['minutes']:.1f}"),
        *(gain(need, *how) for need, how in bought.items() if need in needs),
    ]
    return table_of(prices, columns)
