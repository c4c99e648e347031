"""The second opinion over all seeds: whose reward model sees how much of a gain."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lib.files import write_jsonl
from rlhf_lib.measure.opinions import watched
from rlhf_lib.profiles import load_profile
from rlhf_lib.results.rankings import second_opinion
from rlhf_lib.runs import Run
from tests.made_up_study import PROMPTS, stages_of


def made_up(root: Path, seeds: int) -> dict | None:
    profile = load_profile("smoke", [f"seeds={seeds}"])
    stages = [stages_of(Run(profile, seed, root), "bundled") for seed in range(seeds)]
    return second_opinion(stages)


def test_what_the_other_model_does_not_see_is_the_excess(tmp_path: Path) -> None:
    table = made_up(tmp_path, 3)
    assert table is not None
    ppo = table["ppo"]
    assert ppo["own"]["mean"] == pytest.approx(1.0 + 0.1)  # seeds shift it by 0, 0.1 and 0.2
    assert ppo["other"]["mean"] == pytest.approx(0.5 + 0.1)
    assert ppo["excess"]["mean"] == pytest.approx(0.5)
    assert ppo["excess"]["verdict"] == "higher"
    low_kl = table["ppo_low_kl"]  # of the first seed alone
    assert low_kl["own"]["mean"] == pytest.approx(3.0)
    assert (low_kl["excess"]["mean"], low_kl["excess"]["over"]) == (pytest.approx(1.5), "prompts")
    assert table["dpo"]["excess"]["mean"] == 0
    assert table["dpo"]["excess"]["verdict"] == "not distinguishable"
    assert ppo["own"]["units"] == PROMPTS


def test_models_disagree_where_one_sees_a_gain_and_the_other_a_loss(tmp_path: Path) -> None:
    stages = [
        stages_of(Run(load_profile("smoke", ["seeds=2"]), s, tmp_path), "bundled") for s in (0, 1)
    ]
    for seed in stages:
        rows = [
            {
                "policy": policy,
                "prompt": f"prompt {i}",
                "own": float(policy != "sft"),
                "other": -1.0 if policy == "ppo" and i % 4 == 0 else float(policy != "sft"),
            }
            for policy in watched()
            for i in range(8)
        ]
        write_jsonl(seed["second_opinion"].path / "samples.jsonl", rows)
    table = second_opinion(stages)
    assert table is not None
    assert table["ppo"]["opposite"]["mean"] == 0.25
    assert table["grpo"]["opposite"]["mean"] == 0


def test_one_seed_has_no_second_opinion(tmp_path: Path) -> None:
    assert made_up(tmp_path, 1) is None
