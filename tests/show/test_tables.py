"""Tables of a study's results: every cell looked up; old studies do without what is new."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf_lib.catalogue import CATALOGUE, candidates, label, policies
from rlhf_lib.measure.statistics import interval
from rlhf_lib.runtime import MEASURING
from rlhf_lib.show import costs, figures, tables

MADE_UP = Path(__file__).parents[1] / "made_up"


@pytest.fixture(params=["gold", "proxy"])
def results(request: pytest.FixtureRequest) -> dict:
    return json.loads((MADE_UP / f"{request.param}.json").read_text())


def test_a_table_has_a_line_a_row_and_a_title_a_column() -> None:
    table = tables.table_of(range(2), [("number", str), ("twice", lambda n: 2 * n)])
    assert table.to_dict("list") == {"number": ["0", "1"], "twice": [0, 2]}
    assert list(tables.table_of([], [("number", str)])) == ["number"]


def without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, list) else value


def test_the_comparison_table_has_a_row_a_policy(results: dict) -> None:
    table = tables.comparison_table(results).set_index("policy")
    assert list(table.index) == [label(name) for name in policies()]
    assert ("gold" in table.columns) == (results["deciding"] == "gold")
    assert "judge" not in table.columns
    ppo = results["policies"]["ppo"]
    assert table.loc["PPO", "proxy"] == interval(ppo["proxy"])
    assert table.loc["PPO", "KL"] == interval(ppo["kl"], 1)
    assert table.loc["SFT", "wins vs SFT"] == "–"
    assert table.loc["Base", "own minutes"] == "–", "nobody trained the base"
    assert table.loc["Base", "memory"] == "–"
    seconds = results["cost"]["ppo"]["seconds"]["mean"]
    assert table.loc["PPO", "own minutes"] == f"{seconds / 60:.1f}"


def test_single_replies_have_a_standard_deviation() -> None:
    replies = pd.DataFrame(
        {"proxy": [1.0, 3.0, None], "gold": [0.0, 4.0, 2.0], "kl": [1.0, 1.0, 1.0]}
    )
    (row,) = tables.spread_table({"ppo": replies}, "gold").to_dict("records")
    assert row == {
        "policy": "PPO", "proxy reward": "2.00 ± 1.41", "gold reward": "2.00 ± 2.00",
        "KL": "1.00 ± 0.00",
    }  # fmt: skip
    assert list(tables.spread_table({"ppo": replies}, "proxy")) == ["policy", "proxy reward", "KL"]
    (alone,) = tables.spread_table({"ppo": replies.head(1)}, "proxy").to_dict("records")
    assert alone["KL"] == "–", "one reply has no spread"


def test_minutes_of_training_leave_out_what_was_measured() -> None:
    cost = {"seconds": {"mean": 600.0}, "phases": {"update": 400.0, MEASURING: 120.0}}
    assert tables.trained_for(cost) == "8.0"
    assert tables.trained_for(cost | {"phases": {"update": 400.0}}) == "10.0"


def test_kinds_of_request_are_said_to_gain_or_to_lose() -> None:
    gains = {
        "help": {"mean": 0.5, "low": 0.25, "high": 0.75},
        "harm": {"mean": -0.5, "low": -0.75, "high": -0.25},
        "edge": {"mean": 0.5, "low": -0.25, "high": 1.25},
    }
    said = tables.moved(gains)
    assert said == "more in help (0.50 [0.25, 0.75]), less in harm (-0.50 [-0.75, -0.25])"
    assert tables.moved({"edge": gains["edge"]}).startswith("no kind in which")


def test_beside_a_gain_by_kind_stands_how_often_the_reward_model_is_right_there() -> None:
    results = json.loads((MADE_UP / "gold.json").read_text())
    table = tables.request_table(results, "kind").set_index(["policy", "kind"])
    for kind in ("edge", "help"):
        right = interval(results["reward_model"]["by_kind"][kind], 0, percent=True)
        assert table.loc[("PPO", kind), "reward model right"] == right
    found = table.loc[("PPO", "edge")]
    gain = results["requests"]["kind"]["edge"]["policies"]["ppo"]["gain"]
    assert found["gain there"] == interval(gain)
    assert "reward model right" not in tables.request_table(results, "held_out")


def test_the_headline_table_has_the_deciding_reward_first(results: dict) -> None:
    table = tables.headline_table(results).set_index("policy")
    rewards = list(dict.fromkeys((results["deciding"], "proxy")))
    assert list(table.columns) == [*rewards, "KL", *tables.WINS]
    ppo = results["policies"]["ppo"]
    assert table.loc["PPO", rewards[0]] == interval(ppo[rewards[0]])


def test_the_gain_table_has_every_seed_and_what_may_be_said(results: dict) -> None:
    deciding = results["deciding"]
    table = tables.gain_table(results).set_index("policy")
    assert list(table.index) == [
        label(name) for name in policies(*tables.COMPARED) if name in results["policies"]
    ]
    for name in ("sft_again", "dpo"):
        gain, row = results["policies"][name][f"{deciding}_gain"], table.loc[label(name)]
        assert row[f"{deciding} gain over SFT"] == interval(gain)
        assert row["verdict"] == gain["verdict"]
        assert row["detectable"] == f"{gain['detectable']:.2f}"
        seeds = row["each seed"].split(", ")
        assert [float(s) for s in seeds] == pytest.approx(gain["per_seed"], abs=0.005)
    assert ("proxy gain" in table.columns) == (deciding != "proxy"), "or it would stand there twice"


def test_the_pair_table_names_both_sides(results: dict) -> None:
    table = tables.pair_table(results).set_index("comparison")
    assert len(table) == 6
    record = results["comparisons"]["grpo_minus_rejection_sft"]
    row = table.loc["GRPO − Best-of-n SFT"]
    assert (row["difference"], row["verdict"]) == (interval(record), record["verdict"])
    assert row["p (Holm)"] in ("<0.001", f"{record['p_adjusted']:.3f}")


def test_the_second_opinion_has_a_row_for_each_policy_or_there_is_none(results: dict) -> None:
    if results["deciding"] == "proxy":  # one seed
        assert results["second_opinion"] is None
        return
    table = tables.opinion_table(results).set_index("policy")
    record, row = results["second_opinion"]["ppo_low_kl"], table.loc["PPO, weak penalty"]
    assert row["its own"] == interval(record["own"])
    assert row["another seed's"] == interval(record["other"])
    assert row["verdict"] == record["excess"]["verdict"] == "higher"


def test_an_outside_judges_table_says_where_it_gave_no_answer() -> None:
    win = {"mean": 0.75, "low": 0.5, "high": 1.0}
    asked = {
        "ppo": {"win_rate_vs_sft": win, "same_in_both_orders": 0.9, "unclear": 1},
        "dpo": {"unclear": 3},
    }
    table = tables.endpoint_table({"endpoint": {"policies": asked}})
    assert table.to_numpy().tolist() == [
        ["PPO", "75% [50, 100]", "90%", 1],
        ["DPO", "–", "–", 3],
    ]


def test_tiny_and_unknown_numbers_are_written_as_such(results: dict) -> None:
    record = results["comparisons"]["ppo_minus_grpo"]
    record |= {"p_adjusted": 0.0004, "detectable": None}
    row = tables.pair_table(results).set_index("comparison").loc["PPO − GRPO"]
    assert (row["p (Holm)"], row["detectable"]) == ("<0.001", "–")


def test_wins_stand_beside_their_length_controlled_twin(results: dict) -> None:
    table = tables.win_table(results).set_index("policy")
    ppo = results["policies"]["ppo"]
    for other, title in (("sft", "SFT"), ("base", "base"), ("chosen", "chosen reply")):
        raw, controlled = (ppo[f"{key}_vs_{other}"] for key in ("win_rate", "length_controlled"))
        assert table.loc["PPO", f"vs {title}"] == interval(raw, 0, percent=True)
        assert table.loc["PPO", f"vs {title} (LC)"] == interval(controlled, 0, percent=True)
    assert table.loc["SFT", "vs SFT"] == "–"


def test_the_distance_table_has_the_standard_error_of_the_kl(results: dict) -> None:
    table = tables.distance_table(results).set_index("policy")
    kl = results["policies"]["dpo"]["kl"]
    assert table.loc["DPO", "exact KL ± SE"] == f"{kl['mean']:.2f} ± {kl['se']:.2f}"
    assert {"KL by k1", "KL by k3"} < set(table), "an estimator has its name"
    assert table.loc["SFT", "more than SFT (nats)"] == "–"
    without_texts = without(results, ("perplexity", "forgetting"))
    assert "perplexity" not in tables.distance_table(without_texts).columns


def test_the_reply_table_has_a_row_a_policy(results: dict) -> None:
    table = tables.reply_table(results)
    assert list(table["policy"]) == [
        label(name) for name in policies() if name in results["policies"]
    ]
    assert not table.isin(["–"]).any(axis=None)


def test_the_need_table_has_a_column_for_each_need(results: dict) -> None:
    table = costs.need_table(results).set_index("candidate")
    assert list(table.index) == [label(name) for name in candidates()]
    per_minute = results["needs"]["per_minute"]["policies"]["grpo"]
    column = f"Most {results['deciding']} reward per minute, on this machine (gain a minute)"
    assert table.loc["GRPO", column] == interval(per_minute)
    assert len(table.columns) == len(results["needs"])


def test_a_method_of_ones_own_stands_in_every_table_and_in_the_main_figure(
    results: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = replace(CATALOGUE["grpo"], name="toy", label="Toy", notebook="")
    monkeypatch.setitem(CATALOGUE, "toy", toy)
    for place in (results["policies"], results["cost"], results["prices"]):
        place["toy"] = place["grpo"]
    for need in results["needs"].values():
        need["policies"]["toy"] = need["policies"]["grpo"]
    made = [tables.comparison_table, tables.gain_table, tables.win_table, tables.distance_table]
    made += [tables.reply_table, costs.need_table, costs.cost_table, costs.price_table]
    for table in (make(results) for make in made):
        assert (table.iloc[:, 0] == "Toy").sum() == 1
    rows = figures.gains(results).axes[0].get_yticklabels()
    assert "Toy" in [row.get_text() for row in rows]


TABLES = (
    tables.gain_table,
    tables.pair_table,
    tables.win_table,
    tables.distance_table,
    tables.reply_table,
    costs.need_table,
)


@pytest.mark.parametrize("table", TABLES)
def test_a_number_that_was_not_measured_fails(results: dict, table: Callable) -> None:
    """A policy whose measures are gone is no empty row."""
    broken = copy.deepcopy(results)
    for record in (broken["policies"]["ppo"], broken["needs"]["kl"]["policies"]):
        for key in [k for k in record if not k.startswith(("win", "length_c"))]:
            del record[key]
    broken["comparisons"]["ppo_minus_dpo"].clear()
    if table is tables.win_table:  # a dash is right there: nobody plays against itself
        assert isinstance(table(broken), pd.DataFrame)
    else:
        with pytest.raises(KeyError):
            table(broken)
