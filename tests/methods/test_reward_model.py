"""Reward model: the loss of a batch, accumulation, what is saved with it, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods import reward_model
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rewards import Reply, of_model
from rlhf_lib.models.load import load_reward_model, load_tokenizer
from rlhf_lib.models.logprobs import sequence_scores
from rlhf_lib.runtime import make_accelerator
from tests.conftest import learner_of, train_stage


def scores_of(model: Any, pairs: list) -> list[tuple[float, float]]:
    """Raw scores, one sequence at a time."""
    return [
        tuple(sequence_scores(model, [p.prompt], [r]).item() for r in (p.chosen, p.rejected))
        for p in pairs
    ]


def test_the_loss_and_metrics_of_a_batch(make_model: Callable, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"][:5]
    pairs[1:3] = [replace(pairs[1], margin=0.7), replace(pairs[2], margin=0.0)]
    model = make_model("llama", head="score")
    scores = scores_of(model, pairs)
    margins = [0.3, 0.7, 0.0, 0.3, 0.3]  # a pair's own margin goes before the common one
    terms = [
        math.log1p(math.exp(-(c - r - m))) + 0.01 * (c + r) ** 2
        for (c, r), m in zip(scores, margins, strict=True)
    ]
    metrics = reward_model.update(learner_of(model), pairs, 2, margin=0.3, center_coef=0.01)
    flat = [s for pair in scores for s in pair]
    expected = {
        "loss": sum(terms) / 5,
        "accuracy": sum(c > r for c, r in scores) / 5,
        "margin": sum(c - r for c, r in scores) / 5,
        "min_reward": min(flat),
        "mean_reward": sum(flat) / 10,
        "max_reward": max(flat),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name


def test_accumulated_equals_one_big_batch(make_model: Callable, tiny_data: Any) -> None:
    results = []
    for micro_batch_size in (5, 2, 1):
        learner = learner_of(make_model("gpt2", head="score"), rate=1.0)
        metrics = reward_model.update(
            learner, tiny_data.pairs["train"][:5], micro_batch_size, 0.1, 0.01
        )
        results.append((metrics, learner.model.state_dict()))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-4)
        assert max((weights[k] - other[k]).abs().max().item() for k in weights) < 1e-6


def test_scoring_in_batches_equals_one_at_a_time(make_model: Callable, tiny_data: Any) -> None:
    model, pairs = make_model("llama", head="score"), tiny_data.pairs["test"]
    chosen, rejected = reward_model.score_pairs(model, pairs, batch_size=3)
    for c, r, expected in zip(chosen, rejected, scores_of(model, pairs), strict=True):
        assert (c.item(), r.item()) == pytest.approx(expected, abs=1e-5)


def test_the_scale_is_that_of_the_demonstrations(
    make_model: Callable, tiny_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2", head="score")
    raw = torch.tensor(
        [sequence_scores(model, [d.prompt], [d.response]).item() for d in tiny_data.demonstrations]
    )
    demonstrations = tiny_data.demonstrations
    assert reward_model.measure_scale(model, demonstrations, batch_size=5) == pytest.approx(
        (raw.mean().item(), raw.std().item()), abs=1e-5
    )
    monkeypatch.setattr(reward_model, "NORMALISATION_SAMPLE", 7)
    assert reward_model.measure_scale(model, demonstrations)[0] == pytest.approx(
        raw[:7].mean().item(), abs=1e-5
    )


def test_the_stage_saves_a_classifier_with_its_scale(finished: Any, tiny_data: Any) -> None:
    stage = finished.reward_model
    tokenizer = load_tokenizer(stage.model_path)
    model, _ = load_reward_model(stage.model_path, tokenizer, seed=99)  # its head is not drawn anew
    result, samples = stage.result(), stage.samples()
    for row, (chosen, rejected) in zip(
        samples, scores_of(model, tiny_data.pairs["test"]), strict=True
    ):
        assert row["chosen_score"] == pytest.approx(chosen, abs=1e-6)
        assert row["rejected_score"] == pytest.approx(rejected, abs=1e-6)
    right = sum(row["chosen_score"] > row["rejected_score"] for row in samples)
    assert result["accuracy"] == pytest.approx(right / 10)
    assert result["test_pairs"] == 10
    validation = scores_of(model, tiny_data.pairs["validation"])
    assert result["validation_accuracy"] == pytest.approx(sum(c > r for c, r in validation) / 8)

    asked = [Prompt("", d.prompt) for d in tiny_data.demonstrations]
    replies = [Reply("", d.response, True) for d in tiny_data.demonstrations]
    normalised = of_model(model, make_accelerator("fp32"))(asked, replies)
    assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.std().item() == pytest.approx(1, abs=1e-5)


def test_transformers_loads_it_and_agrees_on_a_padded_batch(finished: Any, tiny_data: Any) -> None:
    stage = finished.reward_model
    tokenizer = load_tokenizer(stage.model_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(stage.model_path).eval()
    rows = [{"input_ids": [*p.prompt, *p.chosen]} for p in tiny_data.pairs["test"]]
    assert len({len(row["input_ids"]) for row in rows}) > 3
    batch = tokenizer.pad(rows, return_tensors="pt")
    theirs = classifier(**batch).logits[:, 0].tolist()
    ours = [row["chosen_score"] for row in stage.samples()]
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_it_learns_an_easy_preference(make_run: Callable, tiny_data: Any, tmp_path: Path) -> None:
    def easy(pair: Any) -> Any:  # whoever says token 7 wins
        return replace(pair, chosen=[7, 7, *pair.chosen], rejected=[8, 8, *pair.rejected])

    data = replace(
        tiny_data,
        pairs={split: [easy(p) for p in pairs] for split, pairs in tiny_data.pairs.items()},
        hash="easy",
    )
    overrides = "reward_model.epochs=12", "reward_model.learning_rate=2e-2"
    stage = train_stage(make_run(tmp_path, *overrides), "reward_model", data)
    assert stage.result()["accuracy"] >= 0.85
    rows = stage.metrics()
    assert len(rows) == 12 * 4
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_the_control_is_a_stage_of_its_own(
    make_run: Callable, tiny_data: Any, finished: Any, tmp_path: Path
) -> None:
    stage = train_stage(make_run(tmp_path), "reward_model_control", tiny_data)
    assert stage.name == "reward_model_control"
    assert stage.hash != finished.reward_model.hash


def test_the_judge_learns_from_its_own_pairs_for_twice_as_long(
    make_run: Callable, tiny_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [replace(p, conversation=f"kept {i}") for i, p in enumerate(tiny_data.pairs["test"][:6])]
    data = replace(tiny_data, pairs=tiny_data.pairs | {"judge": kept}, hash="with a judge")
    seen, update = [], reward_model.update

    def watch(learner: Learner, batch: Any, *rest: Any) -> dict[str, float]:
        seen.extend(pair.conversation for pair in batch)
        return update(learner, batch, *rest)

    monkeypatch.setattr(reward_model, "update", watch)
    stage = train_stage(make_run(tmp_path), "judge", data)
    assert (stage.name, stage.result()["train_pairs"]) == ("judge", 6)
    assert sorted(seen) == sorted(2 * [f"kept {i}" for i in range(6)]), "twice its one epoch"


def test_killed_and_resumed_ends_like_never_killed(check_resume: Callable, tiny_data: Any) -> None:
    check_resume(lambda run: train_stage(run, "reward_model", tiny_data))
