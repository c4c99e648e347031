"""The probe: a miniature of the very study, small enough, and what is read off it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.session import probe
from rlhf_lib.session.counted import Lengths, draws, parts
from rlhf_lib.session.forecast import Forecast, Rate
from rlhf_lib.session.work import Sizes

GPT2 = Sizes(85_000_000, 38_600_000)
LENGTHS = Lengths(80.0, 45.0)


@pytest.mark.parametrize("name", PROFILES)
def test_a_miniature_has_the_study_s_lengths_and_a_few_steps(name: str) -> None:
    profile = load_profile(name)
    small = load_profile(name, probe.miniature(profile, Sizes(1, 1), LENGTHS, roof=1e12))
    assert small.model == profile.model
    for key in ("max_prompt_tokens", "max_response_tokens", "source"):
        assert getattr(small.data, key) == getattr(profile.data, key)
    assert (small.seeds, small.extras, small.ppo.updates, small.grpo.updates) == (1, False, 6, 6)
    for section in ("sft", "reward_model", "dpo"):
        config = getattr(small, section)
        assert config.batch_size == getattr(profile, section).batch_size
        assert config.micro_batch_size == getattr(profile, section).micro_batch_size
        rows = small.data.demonstrations if section == "sft" else small.data.train_pairs
        assert 2 <= config.optimizer_steps(rows) <= 48
    assert small.ppo.batch_size == profile.ppo.batch_size


def test_with_a_large_model_batches_shrink_until_it_is_short_enough() -> None:
    profile, roof = load_profile("offline"), 2e11
    small = load_profile("offline", probe.miniature(profile, GPT2, LENGTHS, roof))
    assert small.ppo.batch_size < profile.ppo.batch_size
    assert small.ppo.batch_size >= profile.ppo.micro_batch_size
    work = sum(probe._work(name, small, GPT2, LENGTHS) for name in probe.PROBED)
    assert work <= probe.SECONDS * probe.SHARE * roof or small.ppo.batch_size == 8


def test_a_miniature_of_what_was_overridden_is_of_that() -> None:
    given = ["ppo.kl_coef=0.3", "data.max_response_tokens=20", "model.gradient_checkpointing=true"]
    profile = load_profile("laptop", given)
    assert load_profile("laptop", probe._own(profile)) == profile
    again = load_profile("laptop", [*probe._own(profile), *probe._few_steps(profile, 3, 1)])
    assert again.data.max_response_tokens == 20
    assert again.model.gradient_checkpointing is True


def stage(folder: Path, seconds: float, times: list[float], **phases: float) -> Any:
    """A finished stage that took this."""
    folder.mkdir()
    rows = "".join(json.dumps({"step_time": time}) + "\n" for time in times)
    if times:
        (folder / "metrics.jsonl").write_text(rows)
    result = {"seconds": seconds, "phases": {k.replace("_", " "): v for k, v in phases.items()}}
    return SimpleNamespace(path=folder, result=lambda: result)


def test_rates_leave_out_loading_measuring_and_steps_that_were_held_up(tmp_path: Path) -> None:
    profile, sizes = load_profile("smoke", "extras=false"), Sizes(1000, 100)
    work = {part.name: part.work.flops for part in parts(profile, sizes, LENGTHS)}
    stages = {
        "sft": stage(
            tmp_path / "sft",
            20.0,
            [5.0, 2.0, 2.0, 4.0, 2.0],
            loading_models=1.0,
            saving=0.5,
            update=15.0,
        ),
        "reward_model": stage(
            tmp_path / "reward_model", 9.0, [2.0, 2.0], update=4.0, scoring=1.0, measuring=1.92
        ),
        "evaluate": stage(tmp_path / "evaluate", 8.0, [], loading_models=2.0, generation=6.0),
    }
    found = probe.rates_of(stages, profile, sizes, LENGTHS)
    assert found["sft"] == Rate(5.0, pytest.approx(10 / work["sft"]), 0.0), "five steps of two"
    assert found["reward_model"].per_flop == pytest.approx(4.0 / work["reward_model"])
    assert found["reward_model"].start == pytest.approx(9 - 4 - 1.92), "its scale is of so many"
    compared = profile.data.test_pairs + profile.data.validation_pairs
    assert found["reward_model"].per_measured == pytest.approx(1.92 / compared)
    # of the policies it asked the pretrained model and SFT alone
    asked = draws(profile.evaluation, 2) / draws(profile.evaluation, 7)
    flops = asked * work["evaluate: answers"] + work["evaluate: best of n"]
    assert found["generation"].per_flop == pytest.approx(6.0 / flops)


def test_a_machine_is_probed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probed = []
    found = Forecast({"sft": Rate(1.0, 2.0, 3.0)}, Sizes(1, 2), Lengths(3.0, 4.0), 5.0, 2)
    monkeypatch.setattr(probe, "probe", lambda profile: probed.append(1) or found)
    monkeypatch.setattr(probe.tempfile, "gettempdir", lambda: str(tmp_path))
    profile = load_profile("smoke")
    assert probe.of_machine(profile) == probe.of_machine(profile) == found
    probe.of_machine(load_profile("smoke", "data.max_response_tokens=20"))
    assert len(probed) == 2


@pytest.mark.slow
def test_a_probe_of_the_bundled_world_gives_rates_of_every_kind() -> None:
    profile = load_profile("smoke", "model.precision=fp32")
    found = probe._probe("smoke", probe._own(profile))
    assert set(found.rates) == {"sft", "reward_model", "ppo", "grpo", "dpo", "generation"}
    assert all(rate.per_flop > 0 for rate in found.rates.values())
    assert found.rates["reward_model"].per_measured > 0
    assert found.chapter > 0.5
    assert 0.1 < found.minutes(profile) < 60
