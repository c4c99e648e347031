"""Evaluation: best-of-n by hand, rows that add up, and one small evaluation of real policies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lib import evaluation
from rlhf_lib.data import Prompt
from rlhf_lib.rollout import Rollout
from rlhf_lib.runs import Stage, read_jsonl

# ------------------------------------------------------------------------------------ best of n

PROXY = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, -1.0, 6.0]])
GOLD = np.array([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]])


def test_best_of_n_takes_the_winner_of_each_block() -> None:
    one, two, four = evaluation.best_of_n(PROXY, GOLD)
    assert [one["n"], two["n"], four["n"]] == [1, 2, 4]
    assert (one["proxy"], one["gold"]) == (PROXY.mean(), GOLD.mean())
    assert two["proxy"] == (3 + 2 + 5 + 6) / 4
    assert two["gold"] == (20 + 40 + 50 + 80) / 4, "the gold reward of the proxy's pick"
    assert (four["proxy"], four["gold"]) == ((3 + 6) / 2, (20 + 80) / 2)


def test_best_of_n_has_the_analytic_kl() -> None:
    for row in evaluation.best_of_n(np.random.default_rng(0).normal(size=(3, 16)), None):
        assert row["kl"] == pytest.approx(math.log(row["n"]) - (row["n"] - 1) / row["n"])
        assert "gold" not in row
    assert row["n"] == 16
    assert row["kl"] == pytest.approx(1.8351, abs=1e-4)


def test_best_of_n_of_normal_scores_is_the_expected_maximum() -> None:
    rows = evaluation.best_of_n(np.random.default_rng(1).normal(size=(4000, 4)), None)
    # expected maxima of 1, 2 and 4 standard normals
    assert [row["proxy"] for row in rows] == pytest.approx([0, 0.5642, 1.0294], abs=0.04)


# ----------------------------------------------------------------------------------------- rows


def made_up_rollout(**changes: Any) -> Rollout:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    values: dict[str, Any] = {
        "prompts": [[5, 6], [7]], "responses": [[8, 9, 10], [1]], "response_mask": mask,
        "logprobs": torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -2.5, -3.5], [-0.25, 0.0, 0.0]]),
        "finished": torch.tensor([False, True]), "scores": torch.tensor([0.5, -1.0]),
        "rewards": torch.tensor([0.5, -1.0]), "entropies": mask, "gold": [2.0, 1.0],
        "exact_kl": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]),
    }  # fmt: skip
    return Rollout(**values | changes)


PROMPTS = [Prompt("first", [5, 6]), Prompt("second", [7])]


def test_a_row_holds_what_was_measured_of_its_reply() -> None:
    first, second = evaluation.records(made_up_rollout(), PROMPTS, [" a b c", ""])
    assert first == {
        "prompt": "first", "response": " a b c", "proxy": 0.5, "kl": pytest.approx(0.6),
        "kl_k1": pytest.approx(1.5), "length": 3, "finished": False, "gold": 2.0,
    }  # fmt: skip
    assert second["kl"] == pytest.approx(0.4)
    assert second["kl_k1"] == pytest.approx(-0.25), "the sampled estimate may be negative"
    assert (second["length"], second["finished"]) == (1, True)


def test_rows_of_real_data_have_no_gold_and_rows_without_exact_kl_are_refused() -> None:
    rows = evaluation.records(made_up_rollout(gold=None), PROMPTS, ["", ""])
    assert all("gold" not in row for row in rows)
    with pytest.raises(AssertionError, match="exact_kl=True"):
        evaluation.records(made_up_rollout(exact_kl=None), PROMPTS, ["", ""])


# ------------------------------------------------------------------------- policies of one seed


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, tiny_data: Any,
    tiny_base: Path, finished: Any,
) -> SimpleNamespace:  # fmt: skip
    """Base and SFT on sixteen prompts; the reward model stands in for its control as well."""
    prompts = tiny_data.prompts["train"]
    data = replace(tiny_data, prompts=tiny_data.prompts | {"evaluation": prompts})
    small = ("evaluation.best_of_n=4", "evaluation.best_of_n_prompts=3", "evaluation.batch_size=5")
    run = make_run(tmp_path_factory.mktemp("evaluated"), *small)
    policies = {"base": str(tiny_base), "sft": str(finished.sft.model_path)}

    def evaluate(upstream: dict, control: Any = None) -> Stage:
        return evaluation.evaluate(run, data, policies, finished.reward_model, upstream, control)

    stage = evaluate({"data": "x"}, finished.reward_model)
    return SimpleNamespace(evaluate=evaluate, stage=stage, prompts=prompts)


def samples(stage: Stage, policy: str) -> list[dict]:
    return read_jsonl(stage.path / "samples" / f"{policy}.jsonl")


def test_every_policy_answers_every_prompt_and_sft_twice(evaluated: SimpleNamespace) -> None:
    files = sorted(path.stem for path in (evaluated.stage.path / "samples").iterdir())
    assert files == ["base", "sft", "sft_again"]
    for name in files:
        rows = samples(evaluated.stage, name)
        assert [row["prompt"] for row in rows] == [prompt.text for prompt in evaluated.prompts]
        assert all(0 < row["length"] <= 8 for row in rows)
        assert all("gold" not in row for row in rows)
    first, second = (samples(evaluated.stage, name) for name in ("sft", "sft_again"))
    assert first != second, "the second draw is the first one again"


def test_the_reference_is_at_no_distance_from_itself_and_the_base_is(
    evaluated: SimpleNamespace,
) -> None:
    for name in ("sft", "sft_again"):
        for row in samples(evaluated.stage, name):
            assert row["kl"] == pytest.approx(0, abs=1e-5)
            assert row["kl_k1"] == pytest.approx(0, abs=1e-5)
    base = [row["kl"] for row in samples(evaluated.stage, "base")]
    assert min(base) > 1e-4, "an exact KL is positive for every reply"


def test_the_means_are_those_of_the_rows(evaluated: SimpleNamespace) -> None:
    for name, means in evaluated.stage.result()["policies"].items():
        rows = samples(evaluated.stage, name)
        for mean, key in (
            ("reward", "proxy"), ("kl", "kl"), ("completions/mean_length", "length"),
        ):  # fmt: skip
            assert means[mean] == pytest.approx(np.mean([r[key] for r in rows]), abs=1e-5), key
        unfinished = np.mean([not row["finished"] for row in rows])
        assert means["completions/clipped_ratio"] == pytest.approx(unfinished)


def test_best_of_n_curves_rise_and_a_control_has_its_own(evaluated: SimpleNamespace) -> None:
    curves = evaluated.stage.result()["best_of_n"]
    assert curves.keys() == {"default", "control"}
    for curve in curves.values():
        assert [row["n"] for row in curve] == [1, 2, 4]
        proxy = [row["proxy"] for row in curve]
        assert proxy == sorted(proxy)
        assert proxy[0] < proxy[-1]
    assert curves["default"] == curves["control"], "the same model on the same samples"


def test_a_finished_evaluation_is_not_run_again(
    evaluated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "Sampler", lambda *_, **__: pytest.fail("sampled again"))
    again = evaluated.evaluate({"data": "x"})
    assert again.path == evaluated.stage.path
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        evaluated.evaluate({"data": "changed"})
