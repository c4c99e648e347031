"""Stopping early: when it looks, what it keeps, when it ends, and that a killed run goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lib import catalogue
from rlhf_lib.methods.learner import DivergedError
from rlhf_lib.profiles import load_profile
from rlhf_lib.settings import SettingsError
from rlhf_lib.study.offer import Best, Offer
from tests.conftest import train_stage


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], list[dict]]:
    """`said(rewards)`: what validation says, look by look. It returns the weights at each look."""
    weights: list[dict] = []

    def script(rewards: list[float]) -> list[dict]:
        values: Iterator[float] = iter(rewards)

        def raters(offer: Offer) -> dict:
            def rate(prompts: list, replies: list) -> torch.Tensor:
                state = offer.policy.model.state_dict()
                weights.append({name: value.clone() for name, value in state.items()})
                return torch.full((len(replies),), next(values))

            return {"gold": rate}

        monkeypatch.setattr(Offer, "raters", property(raters))
        return weights

    return script


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_the_policy_is_what_it_was_at_its_best(
    method: str, said: Callable, make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    weights = said([0.1, 0.5, 0.4, 0.3])
    stage = train_stage(make_run(tmp_path), method, tiny_data, finished, patience=3)
    assert len(weights) == 4, "four steps, a look after each"
    result = stage.result()
    assert (result["best_step"], result["best_reward"]) == (2, pytest.approx(0.5))
    saved = load_file(stage.model_path / "model.safetensors")
    best, last = weights[1], weights[3]
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)
    assert not list(stage.path.rglob("best*")), "nothing of it is left"


def test_it_ends_where_it_was_no_better_for_so_many_looks(
    said: Callable, make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    weights = said([0.5, 0.5, float("nan"), 9.0])
    stage = train_stage(make_run(tmp_path), "ppo", tiny_data, finished, patience=2)
    assert len(weights) == len(stage.metrics()) == 3, "as good is no better, and no number is not"
    assert stage.result()["best_step"] == 1
    assert stage.result()["updates"] == 3
    assert stage.result()["samples"] == 3 * 8


def test_where_no_look_gives_a_number_it_says_so(
    said: Callable, make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    said([float("nan")] * 4)
    with pytest.raises(DivergedError, match="no reply to a validation prompt had a reward"):
        train_stage(make_run(tmp_path), "ppo", tiny_data, finished, patience=9)


def test_the_best_and_how_often_it_was_missed_are_of_one_moment() -> None:
    """A killed run goes on from the state of its checkpoint, whatever it had found since."""
    model: Any = torch.nn.Linear(2, 2)
    best = Best()
    assert best.beaten(1, 0.5, model)
    kept = {name: weight.clone() for name, weight in best.weights.items()}
    checkpoint = copy.deepcopy(best.state_dict())
    with torch.no_grad():
        model.weight.add_(1.0)
    assert best.beaten(2, 0.7, model)
    again = Best()
    again.load_state_dict(checkpoint)
    again.give_back(model)
    assert (again.step, again.reward, again.waited) == (1, 0.5, 0)
    assert all(torch.equal(dict(model.named_parameters())[name], w) for name, w in kept.items())


def test_dpo_counts_the_pairs_that_it_saw(
    said: Callable, make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    said([0.5, 0.4])
    stage = train_stage(make_run(tmp_path), "dpo", tiny_data, finished, patience=1)
    assert stage.result()["train_pairs"] == 2 * 6
    said([0.5, 0.4])
    without = train_stage(make_run(tmp_path), "dpo", tiny_data, finished, "all")
    assert without.result()["train_pairs"] == 24


def test_killed_and_resumed_it_ends_like_never_killed(
    monkeypatch: pytest.MonkeyPatch, check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    def rate(prompts: list, replies: list) -> torch.Tensor:
        return torch.tensor([float(sum(reply.ids)) for reply in replies])

    monkeypatch.setattr(Offer, "raters", property(lambda offer: {"gold": rate}))
    check_resume(lambda run: train_stage(run, "ppo", tiny_data, finished, patience=2))


def test_without_a_look_nothing_is_other_than_before(
    said: Callable, make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    weights = said([])
    stage = train_stage(make_run(tmp_path), "ppo", tiny_data, finished)
    assert not weights
    assert "best_step" not in stage.result()


def test_somebody_has_to_know_what_is_better(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"ppo\.patience: nobody knows .*data\.judge_pairs"):
        train_stage(make_run(tmp_path), "ppo", tiny_data, finished, patience=1)
    profile = load_profile("offline", "ppo.patience=2")
    assert "judge" in catalogue.needs(profile, "ppo")
    assert "judge" not in catalogue.needs(profile, "grpo")
    assert "judge" not in catalogue.needs(load_profile("laptop", "ppo.patience=2"), "ppo")
    untold = replace(profile, ppo=replace(profile.ppo, patience=0))
    assert "judge" not in catalogue.needs(untold, "ppo")
