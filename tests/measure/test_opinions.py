"""The second opinion: whose reward model sees how much of a gain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_lib.measure import opinions
from rlhf_lib.measure.opinions import WATCHED
from rlhf_lib.runs import Run, write_jsonl
from rlhf_lib.settings import load_profile
from tests.made_up_study import PROMPTS, stages_of


def made_up(root: Path, seeds: int) -> dict | None:
    profile = load_profile("smoke", [f"seeds={seeds}"])
    stages = [stages_of(Run(profile, seed, root), "bundled") for seed in range(seeds)]
    return opinions.summarise(stages, 100)


def test_what_the_other_model_does_not_see_is_the_excess(tmp_path: Path) -> None:
    table = made_up(tmp_path, 3)
    assert table is not None
    low_kl = table["ppo_low_kl"]
    assert low_kl["own"]["mean"] == pytest.approx(3.0 + 0.1)  # seeds shift it by 0, 0.1 and 0.2
    assert low_kl["other"]["mean"] == pytest.approx(1.5 + 0.1)
    assert low_kl["excess"]["mean"] == pytest.approx(1.5)
    assert low_kl["excess"]["verdict"] == "higher"
    assert table["dpo"]["excess"]["mean"] == 0
    assert table["dpo"]["excess"]["verdict"] == "not distinguishable"
    assert low_kl["own"]["units"] == PROMPTS


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
            for policy in WATCHED
            for i in range(8)
        ]
        write_jsonl(seed["second_opinion"].path / "samples.jsonl", rows)
    table = opinions.summarise(stages, 100)
    assert table is not None
    assert table["ppo"]["opposite"]["mean"] == 0.25
    assert table["grpo"]["opposite"]["mean"] == 0


def test_one_seed_has_no_second_opinion(tmp_path: Path) -> None:
    assert made_up(tmp_path, 1) is None


def test_replies_are_scored_by_both_models(
    tmp_path: Path, make_run: Callable, finished: SimpleNamespace
) -> None:
    """The stage itself: with one model in both roles the two columns are equal, row by row."""
    run = make_run(tmp_path, "evaluation.samples_per_prompt=2")
    rows = [
        {"prompt": f"\n\nHuman: Question {i % 3}?\n\nAssistant:", "response": reply}
        for i, reply in enumerate([" Yes.", " No, sorry.", " Bring a coat and water."] * 2)
    ]
    evaluated = SimpleNamespace(path=tmp_path, hash="evaluated")
    (tmp_path / "samples").mkdir()
    for policy in WATCHED:
        write_jsonl(tmp_path / "samples" / f"{policy}.jsonl", rows)
    model = finished.reward_model
    stage = opinions.measure(run, evaluated, model, model)  # type: ignore[arg-type]
    scored = stage.samples()
    assert len(scored) == len(WATCHED) * 3, "one reply a prompt"
    assert [row["own"] for row in scored] == [row["other"] for row in scored]
    assert [row["prompt"] for row in scored[:3]] == [row["prompt"] for row in rows[:3]]
    assert len({row["own"] for row in scored}) > 1, "different replies, different scores"
    assert stage.result()["num_tokens"] > 0
