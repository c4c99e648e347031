"""The study: what needs what, further runs of each method, and all of it in miniature."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.profiles import load_profile
from rlhf_lib.records import MEMBERS, REWARDED
from rlhf_lib.runs import Run
from rlhf_lib.settings import Profile, SettingsError
from rlhf_lib.study import stages
from rlhf_lib.world.rewards import DOSES

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = Path(__file__).parents[1] / "made_up"


def stage_names(profile: Profile, seed: int = 0) -> list[str]:
    return [record.name for record in catalogue.stages(profile, seed)]


# ---------------------------------------------------------------------------------- what needs what


def test_the_control_is_trained_where_its_labels_are() -> None:
    for source, known in (("bundled", True), ("bundled:control", False), ("path:x.jsonl", False)):
        names = stage_names(load_profile("smoke", [f"data.source={source}"]))
        of_world = {f"{of}_{labels}" for of in ("reward_model", "ppo", "dpo") for labels in DOSES}
        of_world |= {"attribution", "rewards_compared", *MEMBERS}
        of_world |= {f"grpo_{name}" for name in REWARDED}
        assert of_world & set(names) == (of_world if known else set())
        assert names[-1] == ("rewards_compared" if known else "evaluate")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Every stage that is run: its seed, name and data, and what it reads. Nothing is computed."""
    seen: list[tuple] = []

    def run_stage(run: Run, record: Record, data: Any, needed: dict) -> str:
        seen.append((run.seed, record.name, data, needed))
        return f"<{record.name}/{run.seed}>"

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(stages, "load_tokenizer", lambda name: name)
    monkeypatch.setattr(stages, "load_data", lambda config, tokenizer: config.source)
    monkeypatch.setattr(stages, "set_up_process", lambda threads: None)
    return seen


def test_a_stage_is_run_after_what_it_needs_and_reads_it(calls: list, tmp_path: Path) -> None:
    assert stages.Study.open("smoke", 0, tmp_path).stage("ppo_low_kl") == "<ppo_low_kl/0>"
    trained = {"sft": "<sft/0>", "reward_model": "<reward_model/0>"}
    assert calls == [
        (0, "sft", "bundled", {}),
        (0, "reward_model", "bundled", {}),
        (0, "ppo_low_kl", "bundled", trained),
    ]


@pytest.mark.parametrize(("own", "other"), [(0, 1), (1, 0), (2, 1)])
def test_a_second_opinion_reads_the_reward_model_of_another_seed(
    calls: list, tmp_path: Path, own: int, other: int
) -> None:
    stages.Study.open("smoke", own, tmp_path, ["seeds=3"]).stage("second_opinion")
    *_, rival, (seed, name, _, needed) = calls
    assert rival == (other, "reward_model", "bundled", {}), "whatever the number of seeds"
    assert (seed, name) == (own, "second_opinion")
    expected = {name: f"<{name}/{own}>" for name in ("evaluate", "reward_model")}
    assert needed == expected | {"rival": f"<reward_model/{other}>"}


@pytest.mark.parametrize(
    ("method", "setting", "names"),
    [
        ("ppo", "kl_coef", ("ppo_low_kl", "ppo", "ppo_strong")),
        ("grpo", "kl_reward_coef", ("grpo_weak", "grpo", "grpo_strong")),
        ("grpo", "kl_reward_coef", ("rloo_weak", "rloo", "rloo_strong")),
        ("dpo", "beta", ("dpo_weak", "dpo", "dpo_strong")),
    ],
)
def test_each_method_runs_at_three_coefficients(
    method: str, setting: str, names: tuple[str, ...]
) -> None:
    profile = load_profile("laptop")
    tuned_apart = {"rloo": profile.sweep.rloo_kl_reward_coef}
    default = tuned_apart.get(names[1], getattr(getattr(profile, method), setting))
    found = []
    for name in names:
        record, config = catalogue.record(name), catalogue.record(name).config(profile)
        assert record.runs == f"rlhf_lib.methods.{method}:train"
        assert record.coefficient == setting
        leaves_one_out = getattr(config, "advantage", "") == "leave_one_out"
        assert leaves_one_out is name.startswith("rloo")
        found.append(getattr(config, setting))
    assert found[0] < found[1] == default < found[2]
    assert set(names) <= set(stage_names(profile))


def test_without_a_sweep_only_ppo_runs_twice() -> None:
    profile = load_profile("laptop", ["sweep.stronger=0"])
    assert [r.name for r in catalogue.stages(profile) if r.variant_of] == ["ppo_low_kl"]
    assert not {"rloo", "dpo_weak", "ppo_strong"} & set(stage_names(profile))


def test_the_judge_is_trained_where_pairs_are_kept_for_it() -> None:
    assert "judge" not in stage_names(load_profile("laptop"))
    assert "judge" in stage_names(load_profile("laptop", ["data.judge_pairs=10"]), 1)


def test_the_control_reads_its_own_labels(calls: list, tmp_path: Path) -> None:
    stages.Study.open("smoke", 0, tmp_path).stage("reward_model_control")
    assert calls == [(0, "reward_model_control", "bundled:control", {})]
    calls.clear()
    stages.Study.open("smoke", 0, tmp_path).stage("dpo_half")
    assert [(name, data) for _, name, data, _ in calls] == [
        ("sft", "bundled"), ("reward_model_half", "bundled:half"), ("dpo_half", "bundled:half"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "nearest"),
    [("pppo", "bundled", "ppo"), ("reward_model_control", "path:x.jsonl", "reward_model_curve")],
)
def test_an_unknown_stage_names_the_nearest(
    calls: list, tmp_path: Path, name: str, source: str, nearest: str
) -> None:
    opened = stages.Study.open("smoke", 0, tmp_path, [f"data.source={source}"])
    with pytest.raises(SettingsError, match=f"unknown stage '{name}': did you mean '{nearest}'"):
        opened.stage(name)
    assert not calls


# -------------------------------------------------------------------- a notebook that is opened


def test_the_outlook_says_what_is_done_and_what_has_to_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the hashes that running would give them, and without running anything."""
    planned: list[str] = []

    def stage_of(run: Run, record: Record, data: Any, needed: dict) -> Any:
        planned.append(record.name)
        assert set(needed) <= set(planned) | {"rival"}
        return SimpleNamespace(done=record.name in ("sft", "dataset"), name=record.name)

    def refuse(*_: Any) -> None:
        raise AssertionError("the outlook ran a stage")

    monkeypatch.delenv("RLHF_BATCH", raising=False)
    monkeypatch.setattr(stages, "stage_of", stage_of)
    monkeypatch.setattr(stages, "run_stage", refuse)
    monkeypatch.setattr(stages, "set_up_process", lambda threads: None)
    monkeypatch.setattr(stages, "load_tokenizer", lambda name: name)
    monkeypatch.setattr(stages, "load_data", lambda config, tokenizer: config.source)
    study = stages.Study.open("smoke", 0, tmp_path)
    said = study.outlook("04_ppo")
    assert said.startswith(f"{tmp_path.resolve() / 'smoke'}, seed 0: 1 of 4 stages are done")
    assert said.endswith("to be run first, when they are asked for: reward_model, ppo, ppo_low_kl.")
    assert study.outlook("01_dataset").endswith(
        "1 of 1 stages are done: nothing has to be trained."
    )
    two = stages.Study.open("smoke", 0, tmp_path, ["seeds=2"])
    assert "second_opinion" in two.outlook("07_evaluation")
    monkeypatch.setenv("RLHF_BATCH", "1")
    assert not two.outlook("07_evaluation"), "a study's own workers read nothing for it"


def test_a_planned_stage_has_the_hash_of_the_one_that_is_run(
    tmp_path: Path, tiny_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLHF_BATCH", raising=False)
    monkeypatch.setattr(stages, "read_data", lambda config, model: tiny_data)
    study = stages.Study.open("smoke", 0, tmp_path)
    study.read = stages.read_data
    before = study.outlook("01_dataset")
    done = study.stage("dataset")
    assert "to be run first, when they are asked for: dataset." in before
    assert "nothing has to be trained" in study.outlook("01_dataset")
    assert done.path.parent.parent.name == "smoke"
