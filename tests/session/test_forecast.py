"""How long a study takes: counted work at measured rates, laid out as the schedule does."""

from __future__ import annotations

import pytest

from rlhf_lib import catalogue
from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.session import forecast
from rlhf_lib.session.counted import Lengths, parts, uncounted
from rlhf_lib.session.forecast import Forecast, Rate
from rlhf_lib.session.work import Sizes
from rlhf_lib.study.schedule import Job, plan

SIZES, LENGTHS = Sizes(1000, 100), Lengths(20.0, 10.0)
KINDS = ("sft", "reward_model", "ppo", "grpo", "dpo", "generation")


def of(start: float = 0.0, per_flop: float = 0.0, per_measured: float = 0.0) -> Forecast:
    rates = {kind: Rate(start, per_flop, per_measured) for kind in KINDS}
    return Forecast(rates, SIZES, LENGTHS, chapter=0.0)


@pytest.mark.parametrize("name", PROFILES)
def test_every_stage_of_every_profile_has_its_seconds(name: str) -> None:
    profile = load_profile(name)
    for seed in range(profile.seeds):
        stages = of(1.0).stages(profile, seed)
        assert stages.keys() == {record.name for record in catalogue.stages(profile, seed)}
        assert all(seconds >= 1 for stage, seconds in stages.items() if stage != "dataset")


def test_seconds_are_work_at_its_rate_and_what_is_measured() -> None:
    profile = load_profile("laptop")
    work = {part.name: part.work.flops for part in parts(profile, SIZES, LENGTHS)}
    assert of(per_flop=1e-6).stages(profile, 0)["ppo"] == pytest.approx(1e-6 * work["ppo"])
    both = work["rejection_sft: samples"] + work["rejection_sft: training"]
    assert of(per_flop=1e-6).stages(profile, 0)["rejection_sft"] == pytest.approx(1e-6 * both)
    assert of(start=2.0).stages(profile, 0)["rejection_sft"] == 2.0, "a stage starts once"
    seen = of(per_measured=1.0).stages(profile, 0)
    assert seen["reward_model"] == profile.data.test_pairs + profile.data.validation_pairs
    assert seen["dpo"] == profile.dpo.probes * profile.dpo.probe_prompts
    assert seen["sft"] == 0


def test_rows_that_a_source_does_not_have_take_no_time() -> None:
    profile = load_profile("laptop")
    few = of(per_flop=1e-6)._replace(held={"train_pairs": 40, "demonstrations": 40})
    asked = load_profile("laptop", "data.train_pairs=40 data.demonstrations=40")
    assert few.stages(profile, 0) == of(per_flop=1e-6).stages(asked, 0)


def test_looks_at_validation_take_their_time() -> None:
    plain, patient = (
        of(per_flop=1e-6).stages(load_profile("laptop", setting), 0)["grpo"]
        for setting in ("grpo.patience=0", "grpo.patience=2")
    )
    assert patient > plain


def test_a_stage_of_the_user_s_own_is_named_and_left_out() -> None:
    own = "methods=tests/study/own_stage.py:RECORD"
    profile = catalogue.load("smoke", own)
    try:
        assert uncounted(profile) == ["mine"]
        assert of(1.0).stages(profile, 0).get("mine", 0.0) == 0.0
        assert of(1.0).minutes(profile) > 0
    finally:
        catalogue.load("smoke")


def test_jobs_are_laid_out_over_workers() -> None:
    jobs = [
        Job("stage", "sft"),
        Job("stage", "reward_model"),
        Job("stage", "ppo", needs=("seed 0: sft", "seed 0: reward_model")),
        Job("stage", "dpo", needs=("seed 0: sft",)),
    ]
    seconds = {"sft": 2.0, "reward_model": 5.0, "ppo": 4.0, "dpo": 3.0}

    def each(job: Job) -> float:
        return seconds[job.name]

    assert forecast._laid_out(jobs, each, 1) == 14
    # dpo runs beside the reward model, ppo after it
    assert forecast._laid_out(jobs, each, 2) == 9


def test_twice_the_seeds_take_longer_and_two_workers_less() -> None:
    def minutes(workers: int, *overrides: str) -> float:
        found = of(10.0, 1e-9)._replace(chapter=5.0, workers=workers)
        return found.minutes(load_profile("laptop", overrides))

    assert minutes(1) > minutes(2) > minutes(2, "extras=false") > minutes(2, "seeds=2")
    profile = load_profile("laptop")
    alone = of()._replace(chapter=1.0)
    chapters = sum(job.kind == "notebook" for job in plan(profile))
    assert alone.minutes(profile) * 60 > chapters, "pages take their time as well"
