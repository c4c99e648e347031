"""The learning curve: nested subsets, one training for each, and what the stage keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_lib.data.pairs import draw_pairs
from rlhf_lib.methods import reward_model
from rlhf_lib.methods.learner import Learner
from rlhf_lib.models.load import load_reward_model, load_tokenizer
from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.runs import Stage, Work
from rlhf_lib.settings import content_hash
from rlhf_lib.study.training import curve_sizes
from tests.conftest import train_stage


@pytest.mark.parametrize(
    ("total", "points", "expected"),
    [(4000, 3, [148, 444, 1333]), (128, 2, [14, 42]), (1000, 0, []), (5, 3, [1])],
)
def test_each_size_is_a_third_of_the_next(total: int, points: int, expected: list[int]) -> None:
    assert curve_sizes(total, points) == expected


def test_all_points_together_train_on_less_than_half_of_the_pairs() -> None:
    for profile in map(load_profile, PROFILES):
        total, points = profile.data.train_pairs, profile.reward_model.curve_points
        assert points >= 1
        assert sum(curve_sizes(total, points)) < total / 2


@pytest.fixture(scope="module")
def curve(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, tiny_data: Any, finished: Any
) -> Any:
    run = make_run(tmp_path_factory.mktemp("curve"))
    return train_stage(run, "reward_model_curve", tiny_data, finished)


def test_the_points_are_what_training_on_the_subset_gives(
    curve: Any, make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    assert curve.result()["sizes"] == [2, 8]
    pairs = draw_pairs(tiny_data.pairs["train"], 8, seed=3)
    data = replace(tiny_data, pairs={**tiny_data.pairs, "train": pairs}, hash="eight")
    alone = train_stage(make_run(tmp_path), "reward_model", data)
    rows = [row for row in curve.samples() if row["train_pairs"] == 8]
    assert [row["chosen_score"] for row in rows] == [r["chosen_score"] for r in alone.samples()]
    assert [row["rejected_score"] for row in rows] == [r["rejected_score"] for r in alone.samples()]
    assert {row["split"] for row in rows} == {"test"}
    assert curve.result()["num_tokens"] > alone.result()["num_tokens"], "both points count"


def test_the_full_model_scores_the_validation_pairs(
    curve: Any, finished: Any, tiny_data: Any
) -> None:
    path = finished.reward_model.model_path
    model, _ = load_reward_model(path, load_tokenizer(path), seed=0)
    chosen, _ = reward_model.score_pairs(model, tiny_data.pairs["validation"])
    rows = [row for row in curve.samples() if row["split"] == "validation"]
    assert [row["pair"] for row in rows] == list(range(8))
    assert [row["chosen_score"] for row in rows] == pytest.approx(chosen.tolist(), abs=1e-6)
    assert {row["train_pairs"] for row in rows} == {24}


def test_no_weights_are_kept(curve: Any) -> None:
    names = {path.name for path in curve.path.iterdir()}
    assert names == {"DONE", "config.json", "env.json", "result.json", "samples.jsonl"}


def test_without_smaller_models_only_the_validation_scores_remain(
    make_run: Callable, tiny_data: Any, finished: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, "reward_model.curve_points=0")
    stage = train_stage(run, "reward_model_curve", tiny_data, finished)
    assert {row["split"] for row in stage.samples()} == {"validation"}
    assert stage.result()["sizes"] == []


def test_a_killed_curve_keeps_the_points_that_it_has(
    make_run: Callable,
    tiny_data: Any,
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    curve: Any,
) -> None:
    run, train, trained = make_run(tmp_path), reward_model.train, []

    def watch(learner: Learner, pairs: list, *rest: Any, **named: Any) -> dict:
        trained.append(len(pairs))
        if len(trained) == 2:
            raise KeyboardInterrupt  # before this one has cost anything
        return train(learner, pairs, *rest, **named)

    monkeypatch.setattr(reward_model, "train", watch)
    with pytest.raises(KeyboardInterrupt):
        train_stage(run, "reward_model_curve", tiny_data, finished)
    assert len(list(tmp_path.glob("**/reward_model_2-*/DONE"))) == 1
    stage = train_stage(run, "reward_model_curve", tiny_data, finished)
    assert trained == [2, 8, 8], "the first point was trained again"
    assert stage.samples() == curve.samples()
    for key in ("spent", "num_tokens"):
        assert stage.result()[key] == curve.result()[key], "what the first point cost counts"


@pytest.mark.parametrize("moment", ["in a step", "when it was done and not yet kept"])
def test_what_a_point_had_cost_before_it_was_killed_counts(
    moment: str,
    make_run: Callable,
    tiny_data: Any,
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    curve: Any,
) -> None:
    """The second point, of two steps, is killed: it goes on from what it has saved itself."""
    run = make_run(tmp_path, "checkpoint_minutes=0")  # saves its state after every step
    log, samples = Work.log, Stage.samples

    def dying(work: Work, step: int, *rest: Any) -> None:
        if moment == "in a step" and (work.stage.name, step) == ("reward_model_8", 1):
            raise KeyboardInterrupt
        log(work, step, *rest)

    def read(stage: Stage) -> list[dict]:
        if moment != "in a step" and stage.name == "reward_model_8":
            raise KeyboardInterrupt
        return samples(stage)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "log", dying)
        patch.setattr(Stage, "samples", read)
        with pytest.raises(KeyboardInterrupt):
            train_stage(run, "reward_model_curve", tiny_data, finished)
    name = "checkpoint-a/progress.json" if moment == "in a step" else "result.json"
    (saved,) = tmp_path.glob(f"**/reward_model_8-*/{name}")
    before = json.loads(saved.read_text())
    changed = before | {"seconds": 1e6, "peak_memory_gb": 99.0}
    if changed.pop("hash", None):  # a state has one of itself
        changed["hash"] = content_hash(changed)
    saved.write_text(json.dumps(changed))

    result = train_stage(run, "reward_model_curve", tiny_data, finished).result()
    for key in ("spent", "num_tokens"):
        assert result[key] == curve.result()[key]
    assert 1e6 < sum(result["training_seconds"].values()) < result["seconds"] < 1e6 + 1e3
    assert result["peak_memory_gb"] == 99.0
    assert result["phases"]["update"] > before["phases"]["update"]
