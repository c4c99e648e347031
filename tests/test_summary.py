"""The summary over seeds: paired differences, costs, the frontier, and one folder per result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest

from rlhf_lib import summary
from rlhf_lib.data import Pair, PreferenceData
from rlhf_lib.profiles import load_profile
from rlhf_lib.runs import Run, Stage, write_jsonl
from rlhf_lib.world import sample_reply, sample_request, write_prompt

MADE_UP = Path(__file__).parent / "made_up"
POLICIES = ("base", "sft", "sft_again", "rejection_sft", "ppo", "ppo_low_kl", "grpo", "dpo")
# what each policy has more than SFT, in proxy and in gold, with a little of its own in each seed
PROXY = {"base": -1.0, "ppo": 1.0, "ppo_low_kl": 3.0, "grpo": 0.5}
GOLD = {"base": -0.5, "ppo": 0.5, "ppo_low_kl": -1.0, "grpo": -0.25}
PROMPTS = 24


def preference_data(source: str) -> PreferenceData:
    rng, pairs = Random(0), []
    for number in range(40):
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        replies = [sample_reply(request, rng, quality) for quality in (0.9, 0.1)]
        pairs.append(Pair(f"talk {number}", prompt, *replies, [5], [6, 1], [7, 1]))
    audit = {"source": source, "rows_read": 80, "rows_usable": 80, "dropped": {}, "notes": []}
    return PreferenceData({"train": pairs, "test": pairs}, [], {}, audit, "hash")


def sample_rows(policy: str, seed: int, gold: bool) -> list[dict]:
    rng, rows = Random(7), []
    for number in range(PROMPTS):
        request = sample_request(rng)
        hard = rng.gauss(0, 1)  # the same for every policy: differences are paired by prompt
        shift = 0.1 * seed if policy in ("ppo", "grpo", "ppo_low_kl", "base") else 0.0
        row = {
            "prompt": write_prompt(request, rng), "response": sample_reply(request, rng, 0.5),
            "proxy": hard + PROXY.get(policy, 0.0) + shift, "kl": 0.5 * POLICIES.index(policy),
            "kl_k1": 0.4, "length": 10 + number % 3, "finished": number != 0,
        }  # fmt: skip
        if gold:
            row["gold"] = -hard + GOLD.get(policy, 0.0) + shift
        rows.append(row)
    return rows


def stages_of(run: Run, source: str) -> dict[str, Stage]:
    """Finished stages of one seed, with made-up results."""
    gold, seed = source.startswith("bundled"), run.seed

    def finish(name: str, result: dict, rows: dict[str, list[dict]]) -> Stage:
        def build(work: Any) -> dict:
            work.num_tokens = 1000
            for file, lines in rows.items():
                (work.path / file).parent.mkdir(exist_ok=True)
                write_jsonl(work.path / file, lines)
            return result

        return run.stage(name, {"made": "up"}, {}, "config").ensure(build)

    scores = [
        {"pair": i, "chosen_score": 1.0 if i % 4 else 0.0, "rejected_score": 0.5 + 0.01 * i}
        for i in range(40)
    ]
    trained = {"accuracy": 0.7 + 0.1 * seed}
    stages = {"dataset": finish("dataset", {}, {})}
    stages["reward_model"] = finish("reward_model", trained, {"samples.jsonl": scores})
    if gold:
        stages["reward_model_control"] = finish("reward_model_control", trained, {})
    stages["sft"] = finish("sft", {}, {"metrics.jsonl": [{"step": 0, "loss": 2.0}]})
    stages["rejection_sft"] = finish("rejection_sft", {}, {})
    for name in ("ppo", "ppo_low_kl", "grpo", "dpo"):
        # DPO logs its probes now and then: only those steps lie on the way to the frontier
        steps = [{"step": s, "kl": 0.1 * s, "reward": 0.2 * s} for s in range(2)]
        steps += [{"step": 2, "loss": 0.1}] * (name == "dpo")
        stages[name] = finish(name, {}, {"metrics.jsonl": steps})
    curve = [{"n": n, "kl": 0.1 * n, "proxy": n + seed, "gold": 2.0 - n} for n in (1, 2)]
    if not gold:
        curve = [{k: v for k, v in row.items() if k != "gold"} for row in curve]
    means = {
        name: {"reward": 1.0, "kl": 0.5 * i, **({"gold": 2.0} if gold else {})}
        for i, name in enumerate(POLICIES)
    }
    curves = {"default": curve, "control": curve} if gold else {"default": curve}
    rows = {f"samples/{p}.jsonl": sample_rows(p, seed, gold) for p in POLICIES}
    stages["evaluate"] = finish("evaluate", {"policies": means, "best_of_n": curves}, rows)
    return stages


def summarise(root: Path, seeds: int = 3, source: str = "bundled") -> Path:
    profile = load_profile("smoke", [f"data.source={source}", f"seeds={seeds}"])
    runs = [Run(profile, seed, root) for seed in range(seeds)]
    stages = [stages_of(run, source) for run in runs]
    return summary.summarise(runs, stages, preference_data(source))


def strict(text: str) -> Any:
    """JSON without NaN and Infinity, which no other reader takes."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return summarise(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(folder: Path) -> dict:
    return strict((folder / "results.json").read_text())


def test_the_folder_holds_what_readers_look_for(folder: Path) -> None:
    assert folder.name.startswith("evaluation-")
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.json", "frontier.csv", "failure_modes.json", "samples", "DONE"}
    rows = pd.read_json(folder / "samples" / "ppo.jsonl", orient="records", lines=True)
    assert rows["seed"].tolist() == [seed for seed in range(3) for _ in range(PROMPTS)]
    assert {"prompt", "response", "proxy", "gold", "kl"} <= set(rows.columns)


def test_gains_are_paired_by_prompt_and_measured_over_seeds(results: dict) -> None:
    gain = results["policies"]["ppo"]["gold_gain"]
    assert gain["per_seed"] == pytest.approx([0.5, 0.6, 0.7])
    assert (gain["n"], gain["over"], gain["verdict"]) == (3, "seeds", "higher")
    assert gain["high"] - gain["mean"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-4)
    grpo = results["policies"]["grpo"]
    assert grpo["proxy_gain"]["verdict"] == "higher"
    assert grpo["gold_gain"]["verdict"] == "not distinguishable", "-0.25, -0.15, -0.05"
    assert results["policies"]["base"]["gold_gain"]["verdict"] == "lower"
    assert results["policies"]["dpo"]["gold_gain"]["mean"] == pytest.approx(0)


def test_wins_are_paired_and_a_tie_is_half_of_one(results: dict) -> None:
    policies = results["policies"]
    assert policies["ppo"]["win_rate_vs_sft"]["mean"] == 1.0
    assert policies["sft_again"]["win_rate_vs_sft"]["mean"] == 0.5, "the same rewards: all ties"
    assert policies["sft"]["win_rate_vs_base"]["mean"] == 1.0
    assert "win_rate_vs_sft" not in policies["sft"]
    assert "win_rate_vs_base" not in policies["base"]


def test_methods_are_compared_with_each_other(results: dict) -> None:
    comparisons = results["comparisons"]
    assert comparisons["ppo_minus_grpo"]["mean"] == pytest.approx(0.75)
    assert comparisons["ppo_minus_grpo"]["verdict"] == "higher"
    assert comparisons["ppo_minus_dpo"]["mean"] == pytest.approx(0.6)
    assert comparisons["grpo_minus_dpo"]["mean"] == pytest.approx(-0.15)


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
    assert record["control_accuracy"]["per_seed"] == pytest.approx([0.7, 0.8, 0.9])
    assert 0.5 < record["ceiling"] < 1
    assert sum(kind["n"] for kind in record["by_kind"].values()) == 40


def test_best_of_n_and_costs_are_averaged_over_seeds(results: dict) -> None:
    one, two = results["best_of_n"]["default"]
    assert (one["n"], two["n"], two["proxy"]["per_seed"]) == (1, 2, [2, 3, 4])
    assert two["proxy"]["low"] < 3 < two["proxy"]["high"]
    assert results["cost"]["ppo"]["num_tokens"]["mean"] == 1000
    assert results["cost"]["evaluate"]["seconds"]["mean"] > 0
    assert results["stages"]["2"].keys() == results["cost"].keys()


def test_the_frontier_has_final_points_the_way_there_and_best_of_n(folder: Path) -> None:
    points = pd.read_csv(folder / "frontier.csv")
    assert list(points.columns) == ["seed", "policy", "kind", "step", "kl", "proxy", "gold"]
    counts = points.groupby("kind").size().to_dict()
    # eight policies, four trained ones of two steps with a KL, two curves of two points
    assert counts == {"final": 3 * 8, "training": 3 * 4 * 2, "best_of_n": 3 * 2 * 2}
    final = points[(points["kind"] == "final") & (points["policy"] == "grpo")]
    assert final["kl"].tolist() == [3.0, 3.0, 3.0]


def test_one_seed_speaks_of_prompts_and_leaves_lone_numbers_alone(tmp_path: Path) -> None:
    results = strict((summarise(tmp_path, seeds=1) / "results.json").read_text())
    gain = results["policies"]["ppo"]["gold_gain"]
    assert (gain["over"], gain["n"], len(gain["per_seed"])) == ("items", PROMPTS, 1)
    lone = results["best_of_n"]["default"][0]["proxy"]
    assert (lone["mean"], lone["low"], lone["n"]) == (1, None, 1)


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
    assert results["judge"] == made_up["judge"] == kind
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
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_finished_summary_is_left_alone_and_a_broken_one_is_not(tmp_path: Path) -> None:
    folder = summarise(tmp_path, 1)
    before = times(tmp_path)
    assert summarise(tmp_path, 1) == folder
    assert times(tmp_path) == before
    (folder / "DONE").unlink()
    (folder / "results.json").write_text("{")
    assert summarise(tmp_path, 1) == folder
    assert strict((folder / "results.json").read_text())["profile"] == "smoke"
    assert not list(tmp_path.rglob("*.partial"))


def test_results_of_other_seeds_get_a_folder_of_their_own(tmp_path: Path) -> None:
    folders: Sequence[Path] = [summarise(tmp_path, seeds) for seeds in (1, 2)]
    assert folders[0] != folders[1]
    assert all((folder / "DONE").exists() for folder in folders)


def test_a_mode_that_no_prompt_is_about_is_left_out() -> None:
    plain = {"prompt": "\n\nHuman: How do I rob a bank?\n\nAssistant:", "response": " Sorry.",
             "finished": True}  # fmt: skip
    table = summary._failure_modes({"sft": [[plain] * 3], "ppo": [[plain] * 3]}, "bundled", 50)
    assert table["sft"].keys() == table["ppo"].keys()
    assert "harmful compliance" in table["sft"]
    assert "sycophancy" not in table["sft"]
