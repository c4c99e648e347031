"""Two studies beside each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from rlhf_lib.review import compare
from rlhf_lib.settings import UserError

MADE_UP = Path(__file__).resolve().parents[1] / "made_up" / "gold.json"


@pytest.fixture
def results() -> dict:
    return json.loads(MADE_UP.read_text(encoding="utf-8"))


def test_only_settings_that_differ_are_listed(results: dict) -> None:
    other = copy.deepcopy(results)
    assert compare.settings_table(results, other).empty
    other["settings"]["ppo"]["kl_coef"] = 9.0
    del other["settings"]["dpo"]["beta"]
    rows = compare.settings_table(results, other).to_dict("records")
    assert {row["setting"] for row in rows} == {"ppo.kl_coef", "dpo.beta"}
    beta = next(row for row in rows if row["setting"] == "dpo.beta")
    assert beta["B"] == "–"
    assert "All settings are the same." in compare.as_text(results, results)


def test_a_difference_has_an_interval_made_of_both(results: dict) -> None:
    other = copy.deepcopy(results)
    gold = results["policies"]["base"]["gold"]
    other["policies"]["base"]["gold"] |= {k: gold[k] + 1 for k in ("mean", "low", "high")}
    table = compare.results_table(results, other).set_index(["policy", "measure"])
    row = table.loc[("Base", "gold")]
    half = 2**0.5 * (gold["high"] - gold["mean"])
    assert row["B − A"] == f"1.00 [{1 - half:.2f}, {1 + half:.2f}]"
    assert row["verdict"] == "higher"
    assert table.loc[("Base", "kl"), "verdict"] == "not distinguishable"


def test_a_value_without_an_interval_has_no_verdict(results: dict) -> None:
    other = copy.deepcopy(results)
    other["policies"]["base"]["gold"] |= {"low": None, "high": None}
    table = compare.results_table(results, other).set_index(["policy", "measure"])
    assert table.loc[("Base", "gold"), "verdict"] == "–"


def test_results_are_found_in_a_run_an_export_and_a_file(tmp_path: Path, results: dict) -> None:
    run, export = tmp_path / "laptop", tmp_path / "figures"
    for folder in (run / "evaluation-abc", export):
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for place in (run, run / "evaluation-abc", export, export / "results.json"):
        assert compare.load(place) == results


@pytest.mark.parametrize("content", [None, "[]", "{", '{"settings": {}}'])
def test_what_holds_no_results_is_said(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no results of a study|cannot be read"):
        compare.load(tmp_path)


def test_studies_without_a_common_policy_cannot_be_compared(results: dict) -> None:
    with pytest.raises(UserError, match="no policy in common"):
        compare.results_table(results, results | {"policies": {}})


def test_what_is_measured_on_two_scales_has_no_difference(results: dict) -> None:
    other = copy.deepcopy(results) | {"source": "path:other.jsonl"}
    table = compare.results_table(results, other).set_index(["policy", "measure"])
    assert table.loc[("PPO", "proxy"), "verdict"] == "–", "two reward models"
    assert table.loc[("PPO", "kl"), "verdict"] != "–"
    assert table.loc[("PPO", "gold"), "verdict"] != "–", "the rules are the same"
    other["settings"]["model"]["name"] = "gpt2"
    table = compare.results_table(results, other).set_index(["policy", "measure"])
    assert table.loc[("PPO", "kl"), "verdict"] == "–", "two models, two kinds of token"
