"""Tuning: one rule for all methods, trials that outlive a killed run, defaults that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_lib import catalogue
from rlhf_lib.methods.learner import DivergedError
from rlhf_lib.profiles import load_profile
from rlhf_lib.review.trials import as_text, best, load, of, ranked
from rlhf_lib.settings import Profile, SettingsError
from rlhf_lib.show import figures
from rlhf_lib.study import tuning
from rlhf_lib.study.stages import Study
from rlhf_lib.study.tuning import at_budget, next_values

ROOT = Path(__file__).parents[2]
START = {"ppo.kl_coef": 0.2, "ppo.learning_rate": 4e-5}
STARTS = "ppo.kl_coef=0.2", "ppo.learning_rate=4e-5", "dpo.beta=0.1", "dpo.learning_rate=5e-5"


def trial(mean: float | None, coefficient: float = 0.2, rate: float = 4e-5, **more: Any) -> dict:
    values = {"ppo.kl_coef": coefficient, "ppo.learning_rate": rate}
    edges = {} if mean is None else {"low": mean - 0.1, "high": mean + 0.1}
    return {"method": "ppo", "values": values, "mean": mean, "rater": "gold"} | edges | more


def trials_of(path: Path, profile: Profile) -> list:
    return load(path, tuning._fixed(profile))


# ------------------------------------------------------------------------------------- the rule


def test_the_search_begins_where_the_profile_stands_and_climbs() -> None:
    assert next_values([], START) == START
    done = [trial(0.5)]
    assert next_values(done, START) == {"ppo.kl_coef": 0.8, "ppo.learning_rate": 4e-5}
    done.append(trial(0.6, 0.8))  # better: its neighbours come next
    assert next_values(done, START) == {"ppo.kl_coef": 3.2, "ppo.learning_rate": 4e-5}
    done.append(trial(0.4, 3.2))  # worse: the best one's next neighbour, which is not the start
    assert next_values(done, START) == {"ppo.kl_coef": 0.8, "ppo.learning_rate": 8e-5}
    done.append(trial(None, 0.8, 8e-5))  # diverged: worse than all
    assert next_values(done, START) == {"ppo.kl_coef": 0.8, "ppo.learning_rate": 2e-5}
    assert best(done, "ppo")["values"]["ppo.kl_coef"] == 0.8


def test_two_that_diverged_are_ranked_as_well() -> None:
    done = [trial(None), trial(None, 0.8), trial(-1.0, 3.2)]
    assert ranked(done)[0]["mean"] == -1.0


def test_whole_numbers_stay_whole_and_positive() -> None:
    near = list(tuning.neighbours({"rejection.learning_rate": 1e-4, "rejection.epochs": 1}))
    assert [values["rejection.learning_rate"] for values in near] == [4e-4, 2.5e-5, 1e-4]
    assert [values["rejection.epochs"] for values in near] == [1, 1, 2]
    assert all(isinstance(values["rejection.epochs"], int) for values in near)


def test_every_tuned_method_has_a_coefficient_and_a_rate_of_its_own() -> None:
    profile = load_profile("laptop")
    keys = [tuning.settings_of(name, profile) for name in catalogue.tuned()]
    assert {"ppo", "grpo", "rloo", "dpo", "rejection_sft"} == set(catalogue.tuned())
    assert all(len(own) == len(tuning.FACTORS) for own in keys)
    assert len({key for own in keys for key in own}) == 2 * len(keys), "none is shared"
    for name in ("ppo", "grpo", "rloo", "dpo"):
        record = catalogue.record(name)
        values = tuning.settings_of(name, profile)
        config = record.config(profile)
        assert list(values.values()) == [getattr(config, record.coefficient), config.learning_rate]


# ----------------------------------------------------------------------------- the whole search


@contextmanager
def threads(profile: Any) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool, 1


class Cut(Exception):
    """What a killed run looks like from inside."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Methods that are best at a known point; `tried` lists what was asked, `alive` cuts a run."""
    state = SimpleNamespace(tried=[], before=[], alive=math.inf)

    def score(study: Any, method: str, values: Mapping[str, float]) -> dict:
        if len(state.tried) >= state.alive:
            raise Cut
        state.tried.append((method, dict(values)))
        start = tuning.settings_of(method, load_profile("smoke", STARTS)).values()
        steps = zip(values.values(), start, tuning.FACTORS, strict=True)
        away = [math.log(value / first, factor) for value, first, factor in steps]
        mean = -abs(away[0] - 1) - abs(away[1] + 1)  # a step up, and a step down
        found = {"mean": mean, "low": mean - 1, "high": mean + 1, "rater": "gold"}
        return {"method": method, "values": dict(values)} | found

    monkeypatch.setattr(tuning, "worker_pool", threads)
    monkeypatch.setattr(tuning, "try_values", score)
    monkeypatch.setattr(tuning, "train", lambda study, name: state.before.append(name))
    return state


def search(folder: Path, *overrides: str, methods: tuple[str, ...] = ("ppo", "dpo")) -> Path:
    overrides = *STARTS, "tuning.trials=6", *overrides
    profile = load_profile("smoke", overrides)
    return tuning.tune(profile, folder / "runs", overrides, folder, methods)


def test_each_method_gets_as_many_trials_and_finds_its_best(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    path = search(tmp_path)
    trials = load(path)
    assert path.name == "smoke.json", "how it was tuned is no setting of a result"
    assert [len(of(trials, name)) for name in ("ppo", "dpo")] == [6, 6]
    assert world.before == ["reward_model", "sft"]
    assert best(trials, "ppo")["values"] == {"ppo.kl_coef": 0.8, "ppo.learning_rate": 2e-5}
    assert best(trials, "dpo")["values"] == {"dpo.beta": 0.4, "dpo.learning_rate": 2.5e-5}


def test_a_killed_search_goes_on_from_its_file(world: SimpleNamespace, tmp_path: Path) -> None:
    whole = load(search(tmp_path / "whole"))
    world.tried.clear()
    world.alive = 5
    with pytest.raises(Cut):
        search(tmp_path)
    assert len(load(tmp_path / "smoke.json")) == 5, "each is kept as it ends"
    world.alive = math.inf
    again = load(search(tmp_path))
    assert [of(again, name) for name in ("ppo", "dpo")] == [of(whole, n) for n in ("ppo", "dpo")]
    assert len(world.tried) == len(whole), "none was run twice"
    world.before.clear()
    search(tmp_path)
    assert not world.before, "where nothing is missing nothing is started"


def test_a_file_of_other_settings_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    path = search(tmp_path)
    tuned = load_profile("smoke", "ppo.kl_coef=0.8 dpo.learning_rate=1e-5 tuning.trials=9")
    assert trials_of(path, tuned), "what is tuned may move"
    for other in ("data.train_pairs=64", "ppo.updates=7", "tuning.replies=1", "seeds=3"):
        with pytest.raises(SettingsError, match=r"other settings .* move it away"):
            trials_of(path, load_profile("smoke", other))
    with pytest.raises(SettingsError, match="move it away"):
        trials_of(path, load_profile("smoke", "evaluation.temperature=0.2"))
    path.write_text("[]")
    with pytest.raises(SettingsError, match=r"smoke\.json is no file of trials"):
        load(path)


def test_no_trials_are_no_search(world: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        search(tmp_path, "tuning.trials=0")


def test_without_a_judge_nothing_is_tuned(world: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"set data\.judge_pairs"):
        search(tmp_path, "data.source=path:pairs.jsonl")
    search(tmp_path, "data.source=path:pairs.jsonl", "data.judge_pairs=50")
    assert world.before == ["reward_model", "sft", "judge"]


# ------------------------------------------------------------------------------------ one trial


def test_half_a_budget_is_half_the_updates_prompts_or_pairs(tiny_data: Any) -> None:
    profile = load_profile("smoke", "tuning.budget=0.5 ppo.updates=8 rejection.prompts=24")
    ppo, data = at_budget(catalogue.record("ppo"), profile, tiny_data, 0)
    assert (ppo.config(profile).updates, data) == (4, tiny_data)
    rejection, _ = at_budget(catalogue.record("rejection_sft"), profile, tiny_data, 0)
    assert rejection.config(profile).prompts == 12
    rloo, _ = at_budget(catalogue.record("rloo"), profile, tiny_data, 0)
    assert rloo.config(profile).advantage == "leave_one_out", "what it was before stays"
    dpo, fewer = at_budget(catalogue.record("dpo"), profile, tiny_data, 0)
    pairs = tiny_data.pairs["train"]
    assert dpo is catalogue.record("dpo")
    assert len(fewer.pairs["train"]) == round(len(pairs) / 2)
    assert all(pair in pairs for pair in fewer.pairs["train"])
    assert fewer.hash != tiny_data.hash
    whole = load_profile("smoke")
    assert at_budget(catalogue.record("dpo"), whole, tiny_data, 0)[1] is tiny_data


@pytest.fixture
def opened(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path, monkeypatch: Any
) -> Study:
    """A study of made-up pairs whose first stages are done, and whose judge is its reward model."""
    study = Study(make_run(tmp_path, "data.judge_pairs=4"))
    monkeypatch.setattr(Study, "data", tiny_data)
    done = {"sft": finished.sft, "reward_model": finished.reward_model}
    monkeypatch.setattr(Study, "needed", lambda self, name: dict(done))
    monkeypatch.setattr(Study, "stage", lambda self, name: finished.reward_model)
    monkeypatch.setattr(Study, "open", lambda *asked: study)
    return study


def test_a_trial_is_judged_on_validation_prompts(opened: Study, finished: Any) -> None:
    asked = ("smoke", 3, "runs", [])
    found = tuning.try_values(asked, "ppo", START)
    assert (found["rater"], found["seed"], found["values"]) == ("judge", 3, START)
    assert found["low"] < found["mean"] < found["high"]
    assert found["seconds"] > 0
    again = tuning.try_values(asked, "ppo", START)
    assert again["mean"] == found["mean"], "the same luck each time"
    sft = tuning._judged(opened, "ppo", finished.sft)
    assert sft["mean"] != found["mean"], "PPO has learnt something"


def test_a_trial_that_diverges_is_a_result(opened: Study, monkeypatch: Any) -> None:
    def diverge(*_: Any) -> None:
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(tuning, "run_stage", diverge)
    found = tuning.try_values(("smoke", 3, "runs", []), "ppo", START)
    assert (found["mean"], found["diverged"]) == (None, "the loss is nan")
    assert as_text(found).endswith("diverged")


# --------------------------------------------------------------------------- what comes out of it


def test_the_figure_rings_the_best_of_each_method(tmp_path: Path) -> None:
    trials = [trial(0.5), trial(0.7, 0.8), trial(0.6, 0.8, 8e-5), trial(None, 3.2)]
    trials.append(trial(0.1) | {"method": "dpo", "values": {"dpo.beta": 0.1, "dpo.rate": 1.0}})
    ppo, dpo = figures.tuning(trials).axes[:2]
    assert (ppo.get_title(), dpo.get_title()) == ("PPO", "DPO")
    (ring,) = (line for line in ppo.lines if line.get_markersize() == 11)
    assert (ring.get_xdata(), ring.get_ydata()) == ([0.8], [0.7])
    assert [text.get_text() for text in ppo.get_legend().get_texts()] == ["4e-05", "8e-05"]
    assert [text.get_text() for text in ppo.get_xticklabels()] == ["0.2", "0.8"]
    path = tmp_path / "smoke.json"
    path.write_text(json.dumps({"settings": "", "trials": trials}))
    assert [p.name for p in tuning.draw(path)] == ["smoke.svg", "smoke.png"]
    assert all(p.stat().st_size > 1000 for p in tuning.draw(path))
    said = tuning.found(path, load_profile("smoke", STARTS))
    assert [line.split()[:2] for line in said] == [
        ["ppo", "best"], ["ppo", "profile"], ["dpo", "best"],
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "figures" / "tuning").glob("*.json")), ids=str)
def test_a_profiles_settings_are_the_best_that_were_found(path: Path) -> None:
    profile = load_profile(path.stem)
    trials = trials_of(path, profile)
    methods = {trial["method"] for trial in trials}
    for method in methods:
        assert best(trials, method)["values"] == tuning.settings_of(method, profile), method
    counts = {len(of(trials, method)) for method in methods}
    assert counts == {profile.tuning.trials}, "as many values for each"


def test_a_method_that_always_diverged_is_said_to_have(tmp_path: Path) -> None:
    path = tmp_path / "smoke.json"
    path.write_text(json.dumps({"settings": "", "trials": [trial(None), trial(None, 0.8)]}))
    (said,) = tuning.found(path, load_profile("smoke", STARTS))
    assert said.split() == ["ppo", "diverged", "with", "each", "of", "the", "values", "tried"]
    assert tuning.draw(path) == []
