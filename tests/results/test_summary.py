"""The summary over seeds: paired differences, costs, the frontier, and one folder per result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Any

import pandas as pd
import pytest

from rlhf_lib.profiles import load_profile
from rlhf_lib.results import summary
from rlhf_lib.runs import Run
from rlhf_lib.runtime import MEASURING, count, phase
from tests.made_up_study import PROMPTS, stages_of, strict, summarise

MADE_UP = Path(__file__).parents[1] / "made_up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return summarise(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(folder: Path) -> dict:
    return strict((folder / "results.json").read_text())


def test_the_folder_holds_what_readers_look_for(folder: Path) -> None:
    assert folder.name.startswith("evaluation-")
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.json", "frontier.csv", "samples", "DONE"}
    rows = pd.read_json(folder / "samples" / "ppo.jsonl", orient="records", lines=True)
    assert rows["seed"].tolist() == [seed for seed in range(3) for _ in range(PROMPTS)]
    assert {"prompt", "response", "proxy", "gold", "kl"} <= set(rows.columns)


def test_a_methods_minutes_hold_the_reward_model_it_learns_from(tmp_path: Path) -> None:
    profile = load_profile("smoke", ["data.source=bundled", "seeds=1"])
    stages = stages_of(Run(profile, 0, tmp_path), "bundled")
    seconds = {"reward_model": 60.0, "ppo": 120.0, "grpo": 30.0, "dpo": 6.0, "rejection_sft": 0.0}
    for name, value in seconds.items():
        file = stages[name].path / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": value}))
    minutes = {n: price["minutes"] for n, price in summary._prices([stages, stages]).items()}
    assert minutes == {"ppo": 3.0, "grpo": 1.5, "dpo": 0.1, "rejection_sft": 1.0}


def test_overoptimisation_is_the_low_kl_run_minus_the_default(results: dict) -> None:
    over = results["overoptimisation"]
    assert list(over) == ["proxy", "gold"], "in this order each time"
    assert (over["proxy"]["mean"], over["proxy"]["verdict"]) == (pytest.approx(2.0), "higher")
    assert (over["gold"]["mean"], over["gold"]["verdict"]) == (pytest.approx(-1.5), "lower")


def test_the_reward_model_is_judged_on_the_test_pairs(results: dict) -> None:
    record = results["reward_model"]
    assert record["accuracy"]["reward_model"]["mean"] == pytest.approx(30 / 40)
    assert record["errors"]["count"] == 10
    assert sum(record["errors"]["by_category"].values()) == 10
    assert record["control_accuracy"]["per_seed"] == pytest.approx([0.7]), "the first seed's"
    assert 0.5 < record["ceiling"] < 1
    assert sum(kind["n"] for kind in record["by_kind"].values()) == 40


def test_best_of_n_and_costs_are_averaged_over_seeds(results: dict) -> None:
    one, two = results["best_of_n"]["default"]
    assert (one["n"], two["n"], two["proxy"]["per_seed"]) == (1, 2, [2, 3, 4])
    assert two["proxy"]["low"] < 3 < two["proxy"]["high"]
    assert two["gold"]["over"] == "seeds and prompts"
    assert results["cost"]["ppo"]["num_tokens"]["mean"] == 1000
    assert results["cost"]["ppo"]["flops"]["mean"] == 3e9
    assert results["cost"]["evaluate"]["seconds"]["mean"] > 0
    lone = {"reward_model_curve", "grpo_strong", "attribution"}
    lone |= {"reward_model_control", "ppo_low_kl"}
    assert results["stages"]["0"].keys() == results["cost"].keys()
    assert results["stages"]["2"].keys() == results["cost"].keys() - lone


def test_what_only_the_first_seed_ran_costs_what_it_cost_there(results: dict) -> None:
    lone = results["cost"]["grpo_strong"]["seconds"]
    assert (lone["n"], lone["low"], lone["per_seed"]) == (1, None, [lone["mean"]])
    assert results["cost"]["grpo"]["seconds"]["n"] == 3
    phases = results["cost"]["grpo"]["phases"]
    assert list(phases) == ["scoring"]
    assert 0 < phases["scoring"] <= results["cost"]["grpo"]["seconds"]["mean"]


def test_a_price_has_the_reward_model_in_it_where_the_method_learns_from_it(results: dict) -> None:
    prices, cost = results["prices"], results["cost"]
    assert {n: price["flops"] for n, price in prices.items()} == {
        "ppo": 5e9, "grpo": 3e9, "dpo": 4e9, "rejection_sft": 3e9,
    }  # fmt: skip
    assert [price["generated"] for price in prices.values()] == [600, 600, 0, 600]
    assert results["flop"] == "GFLOP"
    seconds = cost["ppo"]["seconds"]["mean"] + cost["reward_model"]["seconds"]["mean"]
    assert prices["ppo"]["minutes"] == pytest.approx(seconds / 60)
    gain = results["needs"]["reward"]["policies"]["ppo"]["mean"]
    assert results["needs"]["per_flop"]["policies"]["ppo"]["mean"] == pytest.approx(gain / 5)


def test_measuring_is_in_no_price(tmp_path: Path) -> None:
    run = Run(load_profile("smoke"), 0, tmp_path)

    def build(work: Any) -> dict:
        count(flops=1e12, generated=5)
        with phase(MEASURING):
            count(flops=9e12, generated=9)
            sleep(0.2)
        return {}

    stages = {n: run.stage(n, {}, {}, "config").ensure(build) for n in ("dpo", "reward_model")}
    price = summary._prices([stages])["dpo"]
    assert (price["flops"], price["generated"]) == (1e12, 5)
    assert 60 * price["minutes"] < stages["dpo"].result()["seconds"] - 0.19


@pytest.mark.parametrize(
    ("most", "unit"), [(3e8, "GFLOP"), (9.9e10, "GFLOP"), (2e12, "TFLOP"), (1e14, "PFLOP")]
)
def test_flops_come_in_a_unit_of_their_size(most: float, unit: str) -> None:
    assert summary._flop_unit({"a": {"flops": most}, "b": {"flops": 1.0}})[0] == unit


def test_the_frontier_has_final_points_the_way_there_and_best_of_n(folder: Path) -> None:
    points = pd.read_csv(folder / "frontier.csv")
    columns = ["seed", "policy", "kind", "step", "kl", "proxy", "gold", "coefficient"]
    assert list(points.columns) == columns
    counts = points.groupby("kind").size().to_dict()
    # seven policies, three trained ones of two steps with a KL, a curve of two points; in the
    # first seed one policy, two runs and one curve more
    assert counts == {"final": 3 * 7 + 1, "training": 3 * 3 * 2 + 4, "best_of_n": 3 * 2 + 2}
    final = points[(points["kind"] == "final") & (points["policy"] == "grpo")]
    assert final["kl"].tolist() == [3.0, 3.0, 3.0]


def test_one_seed_speaks_of_prompts_and_leaves_lone_numbers_alone(tmp_path: Path) -> None:
    results = strict((summarise(tmp_path, seeds=1) / "results.json").read_text())
    gain = results["policies"]["ppo"]["gold_gain"]
    assert (gain["over"], gain["units"], len(gain["per_seed"])) == ("prompts", PROMPTS, 1)
    lone = results["best_of_n"]["default"][0]["gold"]
    assert (lone["over"], lone["units"]) == ("prompts", PROMPTS)
    lone = results["cost"]["ppo"]["num_tokens"]
    assert (lone["mean"], lone["low"], lone["n"]) == (1000, None, 1)


def shape(value: Any) -> Any:
    """The keys of nested records; a list is as its first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else None


UNLIKE = ("settings", "environment", "data", "stages")  # their keys are not the summary's business


@pytest.mark.parametrize(
    ("kind", "source", "seeds"), [("gold", "bundled", 3), ("proxy", "path:a b/pairs.jsonl", 1)]
)
def test_the_made_up_results_have_the_shape_of_real_ones(
    tmp_path: Path, kind: str, source: str, seeds: int
) -> None:
    """Verdict, figures, tables and report are tested with them."""
    results = strict((summarise(tmp_path, seeds, source) / "results.json").read_text())
    made_up = json.loads((MADE_UP / f"{kind}.json").read_text())
    assert results["deciding"] == made_up["deciding"] == kind
    for record in (results, made_up):
        assert len(record["stages"]) == len(record["seeds"]) == seeds
        for key in UNLIKE:
            assert record.pop(key)
        for name in ("training", "errors"):  # as the stage and the luck of the draw have it
            assert record["reward_model"].pop(name)
    assert shape(results) == shape(made_up)


def test_a_source_is_named_by_its_file_and_not_by_its_folder(tmp_path: Path) -> None:
    folder = summarise(tmp_path, 1, "path:/home/me/secret/pairs.jsonl.gz")
    assert strict((folder / "results.json").read_text())["source"] == "path:pairs.jsonl.gz"


def times(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_a_finished_summary_is_left_alone_and_a_broken_one_is_not(tmp_path: Path) -> None:
    folder = summarise(tmp_path, 1)
    before = times(tmp_path)
    assert summarise(tmp_path, 1) == folder
    after, done = times(tmp_path), str(folder / "DONE")
    assert {path for path in after if after[path] != before[path]} == {done}, "it is the newest"
    (folder / "DONE").unlink()
    (folder / "results.json").write_text("{")
    assert summarise(tmp_path, 1) == folder
    assert strict((folder / "results.json").read_text())["profile"] == "smoke"
    assert not list(tmp_path.rglob("*.partial"))


def test_rows_carry_the_seed_that_they_are_of(folder: Path) -> None:
    rows = pd.read_json(folder / "samples" / "ppo_low_kl.jsonl", orient="records", lines=True)
    assert rows["seed"].tolist() == [0] * PROMPTS, "a demonstration is of the first seed alone"


def test_results_of_other_seeds_get_a_folder_of_their_own(tmp_path: Path) -> None:
    folders: Sequence[Path] = [summarise(tmp_path, seeds) for seeds in (1, 2)]
    assert folders[0] != folders[1]
    assert all((folder / "DONE").exists() for folder in folders)
