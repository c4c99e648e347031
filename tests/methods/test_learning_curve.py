"""The learning curve: nested subsets, one training for each, and what the stage keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_lib.methods import learning_curve, reward_model
from rlhf_lib.models.load import load_reward_model, load_tokenizer
from rlhf_lib.runs import Run
from rlhf_lib.settings import PROFILES


@pytest.mark.parametrize(
    ("total", "points", "expected"),
    [(4000, 3, [148, 444, 1333]), (128, 2, [14, 42]), (1000, 0, []), (5, 3, [1])],
)
def test_each_size_is_a_third_of_the_next(total: int, points: int, expected: list[int]) -> None:
    assert learning_curve.sizes(total, points) == expected


def test_all_points_together_train_on_less_than_half_of_the_pairs() -> None:
    for profile in PROFILES.values():
        total, points = profile.data.train_pairs, profile.reward_model.curve_points
        assert points >= 1
        assert sum(learning_curve.sizes(total, points)) < total / 2


def test_a_smaller_subset_lies_within_a_larger_one(tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"]
    small, large = (
        [p.conversation for p in learning_curve.subset(pairs, n, seed=1)] for n in (5, 15)
    )
    assert large[:5] == small
    assert len(set(large)) == 15
    assert small != [p.conversation for p in pairs[:5]], "the order of the file means something"
    other = learning_curve.subset(pairs, 5, seed=2)
    assert small != [p.conversation for p in other]


@pytest.fixture(scope="module")
def curve(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, tiny_data: Any, finished: Any
) -> Any:
    run = make_run(tmp_path_factory.mktemp("curve"))
    return learning_curve.train(run, tiny_data, finished.reward_model)


def test_the_points_are_what_training_on_the_subset_gives(
    curve: Any, make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    assert curve.result()["sizes"] == [2, 8]
    subset = learning_curve.subset(tiny_data.pairs["train"], 8, seed=3)
    data = replace(tiny_data, pairs={**tiny_data.pairs, "train": subset}, hash="eight")
    alone = reward_model.train(make_run(tmp_path), data)
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
    stage = learning_curve.train(run, tiny_data, finished.reward_model)
    assert {row["split"] for row in stage.samples()} == {"validation"}
    assert stage.result()["sizes"] == []


def test_a_killed_curve_keeps_the_points_that_it_has(
    make_run: Callable, tiny_data: Any, finished: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, curve: Any,
) -> None:  # fmt: skip
    run, train, sizes = make_run(tmp_path), learning_curve.train_reward_model, []

    def watch(inner: Run, data: Any, name: str) -> Any:
        sizes.append(len(data.pairs["train"]))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return train(inner, data, name)

    monkeypatch.setattr(learning_curve, "train_reward_model", watch)
    with pytest.raises(KeyboardInterrupt):
        learning_curve.train(run, tiny_data, finished.reward_model)
    done = list(tmp_path.glob("**/reward_model_2-*/DONE"))
    assert len(done) == 1
    written = done[0].stat().st_mtime_ns
    seen = []
    monkeypatch.setattr(
        learning_curve, "train_reward_model",
        lambda *given: (train(*given), seen.append(done[0].exists() and done[0].stat()))[0],
    )  # fmt: skip
    stage = learning_curve.train(run, tiny_data, finished.reward_model)
    assert seen[0].st_mtime_ns == written, "the first point was trained again"
    assert stage.samples() == curve.samples()
