"""What a study cost: phases of a stage add up to it, and gains are divided by what they cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from rlhf_lib.catalogue import label
from rlhf_lib.measure.statistics import interval
from rlhf_lib.profiles import load_profile
from rlhf_lib.settings import as_dict
from rlhf_lib.show.costs import (
    budget_table,
    cost_table,
    held,
    memory_table,
    phase_table,
    price_table,
    sampled_sentence,
    sweep_table,
    total_sentence,
    update_table,
)
from rlhf_lib.show.tables import comparison_table, short, trained_for

MADE_UP = Path(__file__).parents[1] / "made_up"


def cost(minutes: float, tokens: float, phases: dict[str, float]) -> dict:
    seconds = {name: 60 * spent for name, spent in phases.items()}
    return {"seconds": {"mean": 60 * minutes}, "num_tokens": {"mean": tokens}, "phases": seconds}


@pytest.fixture
def results() -> dict:
    gain = {"mean": 1.0, "low": 0.5, "high": 1.5}
    return {
        "deciding": "gold",
        "policies": {"ppo": {"gold_gain": gain}, "dpo": {"gold_gain": gain | {"low": None}}},
        "cost": {
            "ppo": cost(4, 2e6, {"generation": 2, "update": 1}),
            "dpo": cost(0.5, 5e5, {"update": 0.25}),
        },
    }


def test_phases_and_the_rest_add_up_to_all(results: dict) -> None:
    frame = phase_table(results)
    assert list(frame) == ["stage", "generation", "update", "other", "all"]
    numbers = frame.set_index("stage").astype(float)
    assert list(numbers.index) == ["PPO", "DPO", "sum"]
    parts = numbers.drop(columns="all").sum(axis=1)
    assert parts.tolist() == pytest.approx(numbers["all"].tolist()) == [4.0, 0.5, 4.5]
    assert numbers.loc["DPO"].tolist() == [0.0, 0.25, 0.25, 0.5]
    assert numbers.loc["sum"].tolist() == [2.0, 1.25, 1.25, 4.5]


def test_all_seeds_count_in_the_sum_and_one_in_the_methods() -> None:
    def stage(*minutes: float) -> dict:
        spent = [60 * each for each in minutes]
        return {"seconds": {"mean": sum(spent) / len(spent), "per_seed": spent}}

    cost = {
        "sft": stage(2, 4),
        "dpo": stage(1, 1),
        "dpo_strong": stage(10),
        "evaluate": stage(5, 5),
    }
    assert total_sentence({"cost": cost}) == (
        "Time in stages, added up over all jobs: 28.0 minutes. A seed's reward model, SFT, PPO, "
        "GRPO, DPO and evaluation take 9.0 of them on average."
    )
    judged = total_sentence({"cost": cost | {"judge": stage(3)}})
    assert "DPO, held-out judge and evaluation take 12.0" in judged


def test_what_training_bought_is_what_the_needs_say() -> None:
    results = json.loads((MADE_UP / "gold.json").read_text())
    table = price_table(results).set_index("policy")
    for key, column, digits in (("per_minute", "a minute", 2), ("per_flop", "a GFLOP", 3)):
        found = results["needs"][key]["policies"]
        for name in ("ppo", "rejection_sft"):
            assert table.loc[label(name), f"gain {column}"] == interval(found[name], digits)
    assert table.loc["PPO", "GFLOP"] == "5"  # 3 of its own and 2 of the reward model's
    assert table.loc["DPO", "tokens generated"] == "0"
    del results["needs"]["per_flop"]  # a method that nobody counted
    assert "gain a GFLOP" not in price_table(results)


def test_the_cost_table_counts_in_minutes_gigabytes_and_thousands() -> None:
    made_up = json.loads((MADE_UP / "gold.json").read_text())
    table = cost_table(made_up).set_index("stage")
    assert len(table) == len(made_up["cost"])
    assert table.loc["PPO", "minutes"] == "2.5"
    assert table.loc["PPO", "peak memory"] == "1.2 GB"
    assert table.loc["PPO", "tokens (thousands)"] == "400"


def test_little_time_and_memory_do_not_read_as_none() -> None:
    seconds = {"mean": 2.0, "per_seed": [2.0]}
    little = {"seconds": seconds, "phases": {}, "peak_memory_gb": {"mean": 0.063}}
    little |= {"num_tokens": {"mean": 100.0}, "flops": {"mean": 4e9}}
    results = json.loads((MADE_UP / "gold.json").read_text())
    results["cost"] |= {"ppo": little}
    results["prices"]["ppo"]["minutes"] = 0.0333
    row = cost_table(results).set_index("stage").loc["PPO"]
    assert row[["minutes", "peak memory", "TFLOP"]].tolist() == [
        "0.033", "63 MB", "0.0040",
    ]  # fmt: skip
    row = comparison_table(results).set_index("policy").loc["PPO"]
    assert row[["own minutes", "memory"]].tolist() == ["0.033", "63 MB"]
    row = price_table(results).set_index("policy").loc["PPO"]
    assert row["minutes, reward model included"] == "0.033"
    assert "all jobs: 0.033 minutes" in total_sentence({"cost": {"sft": little}})
    assert [short(x) for x in (0.0, 0.0523, 0.996, 1.04, 12.34)] == [
        "0.0", "0.052", "1.0", "1.0", "12.3",
    ]  # fmt: skip


def test_who_sampled_how_much_is_counted_and_not_taken_from_the_settings() -> None:
    equal = sampled_sentence({"rejection_sft": 96, "ppo": 96, "grpo": 96, "dpo": 0})
    assert equal == (
        "Equal: Best-of-n SFT, PPO and GRPO each sampled and scored 96 replies in training."
    )
    unequal = sampled_sentence({"rejection_sft": 96, "ppo": 96, "grpo": 1192, "dpo": 0})
    assert unequal.startswith("Not equal: replies sampled and scored in training are ")
    assert "96 (Best-of-n SFT), 96 (PPO) and 1,192 (GRPO)" in unequal
    assert "DPO" not in equal + unequal, "it samples none"


def test_the_sweep_names_its_estimator_and_whose_minutes_it_counts() -> None:
    results = json.loads((MADE_UP / "gold.json").read_text())
    ends = pd.DataFrame(
        {"method": name, "policy": name, "coefficient": 0.00625, "kl": -0.02, "proxy": 1.0}
        for name in ("ppo", "dpo")
    )
    samples = {"ppo": 1500, "dpo": 0}
    table = sweep_table(ends.assign(gold=None), results, samples).set_index("method")
    assert list(table.index) == ["PPO", "DPO"]
    assert table["coefficient"].tolist() == ["0.00625"] * 2
    assert table["KL, k1 (nats a reply)"].tolist() == ["-0.02"] * 2
    assert table["replies sampled"].tolist() == ["1,500", "–"]
    assert table.loc["PPO", "own minutes"] == trained_for(results["cost"]["ppo"])
    assert "proxy" in table
    assert "gold" not in table, "it is not known of every run"


def test_a_run_that_had_not_begun_has_no_reward() -> None:
    equal = pd.DataFrame(
        [
            ["minutes", 0.0312, "dpo", 0.5, -0.01, 1.0],
            ["minutes", 0.0312, "ppo", math.nan, math.nan, 0.25],
        ],
        columns=["budget", "amount", "method", "gold", "kl", "share"],
    )
    assert budget_table(equal).to_dict("list") == {
        "budget": ["minutes"] * 2,
        "amount": ["0.031"] * 2,
        "method": ["DPO", "PPO"],
        "gold reward": ["0.50", "not begun"],
        "KL, k1 (nats a reply)": ["-0.01", "not begun"],
        "share of its own price": ["100%", "25%"],
    }


def settings(*overrides: str) -> dict:
    return as_dict(load_profile("smoke", overrides))


def test_models_in_memory_follow_the_settings() -> None:
    plain = held(settings())
    assert (plain["ppo"], plain["grpo"], plain["sft"]) == ((2, 2), (1, 2), (1, 0))
    shared = held(settings("ppo.value_model=shared", "model.lora_rank=4"))
    assert shared["ppo"] == (1, 1), "one trunk, and no copy for a reference"


def test_memory_by_part_adds_up_to_the_peak() -> None:
    names = held(settings())
    spent = {"peak_memory_gb": 1.0, "num_tokens": 1000, "flops": 4e9}
    costs = {name: {key: {"mean": mean} for key, mean in spent.items()} for name in names}
    results = {"settings": settings(), "cost": costs}
    table = memory_table(results, weights=1_000_000, learnt=500_000, read_bytes=2)
    rows = table.set_index("stage").astype(str).replace(",", "", regex=True).astype(int)
    # PPO: two models of 4 MB, gradients and moments of half of each, two read models of 2 MB
    assert rows.loc["PPO"].tolist() == [8, 4, 8, 4, 976, 1000]
    assert rows.loc["SFT"].tolist() == [4, 2, 4, 0, 990, 1000]
    tokens = update_table(results, dict.fromkeys(names, 8)).set_index("stage")
    assert tokens.loc["PPO"].tolist() == [8, "125", "0.5"]


@pytest.mark.parametrize("kind", ["gold", "proxy"])
def test_the_tables_of_a_made_up_study(kind: str) -> None:
    made_up = json.loads((MADE_UP / f"{kind}.json").read_text())
    assert len(phase_table(made_up)) == len(made_up["cost"]) + 1
    assert {"PPO", "GRPO", "DPO"} <= set(price_table(made_up)["policy"])
