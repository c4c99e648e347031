"""What `status` and `run --dry-run` say of a study: done, running, stopped, stale, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_lib.profiles import load_profile
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.session import status
from rlhf_lib.settings import Profile
from rlhf_lib.study.stages import Study

CHEAP = "data.train_pairs=32 data.demonstrations=32 data.test_pairs=8 data.rl_prompts=8"


@pytest.fixture
def profile() -> Profile:
    return load_profile("smoke", CHEAP)


@pytest.fixture
def stages(profile: Profile, tmp_path: Path) -> dict[str, Stage]:
    """The study's stages as planned, nothing run."""
    return Study(Run(profile, 0, tmp_path)).planned()


def row(profile: Profile, root: Path, stage: str) -> status.Row:
    (found,) = [row for row in status.rows(profile, root) if row.stage == stage]
    return found


def test_done_missing_and_stopped_are_told_apart(
    profile: Profile, stages: dict[str, Stage], tmp_path: Path
) -> None:
    stages["sft"].ensure(lambda work: {})
    work = Work(stages["dpo"])
    for step in range(3):
        work.log(step, 1, {})
    done = row(profile, tmp_path, "sft")
    assert (done.place, done.state, done.why) == ("seed-0", "done", "")
    assert done.seconds is not None
    assert row(profile, tmp_path, "ppo").state == "missing"
    said = "step 3; its last saved state is of step"
    assert row(profile, tmp_path, "dpo")[2:] == ("stopped", f"{said} 0", None)
    slot = work.path / "checkpoint-b"
    slot.mkdir()
    (slot / "progress.json").write_text(json.dumps({"step": 2, "files": {}}))
    assert row(profile, tmp_path, "dpo").why == f"{said} 2"
    assert "dpo" in status.as_text(row(profile, tmp_path, "dpo"))
    for damaged in ("", "[]", '{"step": "x"}', "{"):
        (slot / "progress.json").write_text(damaged)
        assert row(profile, tmp_path, "dpo").why == f"{said} 0"
    (work.path / "DONE").write_text("")
    assert row(profile, tmp_path, "dpo").why == "has ended, and is published by the next run"


def test_whatever_a_damaged_folder_holds_it_is_listed(
    profile: Profile, stages: dict[str, Stage], tmp_path: Path
) -> None:
    stages["sft"].ensure(lambda work: {})
    other = stages["sft"].path.with_name("sft-000000000000")
    shutil.copytree(stages["sft"].path, other)
    for text in ("[]", "null", '{"seconds": "x", "settings": null, "upstream": null}', "\udcff"):
        for folder in (stages["sft"].path, other):
            for name in ("result.json", "config.json"):
                (folder / name).write_text(text, errors="surrogateescape")
        found = {r.state: r for r in status.rows(profile, tmp_path) if r.stage == "sft"}
        assert set(found) == {"done", "stale"}
        assert found["done"].seconds is None


def test_one_that_runs_says_who_runs_it(
    profile: Profile, stages: dict[str, Stage], tmp_path: Path
) -> None:
    seen = []

    def build(work: Work) -> dict:
        work.log(0, 1, {})
        seen.append(row(profile, tmp_path, "grpo"))
        return {}

    stages["grpo"].ensure(build)
    assert seen[0].state == "running"
    assert seen[0].why.startswith("step 1, by process ")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ("sft.learning_rate=0.1", "learning_rate was 0.1, is "),
        ("data.max_response_tokens=20", "other lengths of prompts or replies"),
        ("model.lora_rank=2", "other settings of the model"),
        ("data.demonstrations=16", "read before it, and others now: data"),
    ],
)
def test_a_stale_folder_says_what_is_another_now(
    overrides: str, why: str, profile: Profile, tmp_path: Path
) -> None:
    other = load_profile("smoke", f"{CHEAP} {overrides}")
    Study(Run(other, 0, tmp_path)).planned()["sft"].ensure(lambda work: {})
    (stale,) = [row for row in status.rows(profile, tmp_path) if row.state == "stale"]
    assert stale.stage == "sft"
    assert why in stale.why


def test_code_that_changed_a_trial_and_a_stranger_are_named(
    profile: Profile, stages: dict[str, Stage], tmp_path: Path
) -> None:
    config = stages["sft"].config
    Stage("sft", stages["sft"].path.parent, config | {"source": "old"}).ensure(lambda work: {})
    Stage("mine", stages["sft"].path.parent, config).ensure(lambda work: {})
    trial = Run(profile, profile.seeds, tmp_path).stage("ppo", {}, {}, "rlhf_lib.methods.ppo")
    trial.ensure(lambda work: {})
    broken = stages["sft"].path.with_name("sft-000000000000")
    broken.mkdir()
    said = {(r.stage, r.why) for r in status.rows(profile, tmp_path) if r.state == "stale"}
    assert said == {
        ("sft", "its code has changed"),
        ("mine", "no stage of this study"),
        ("ppo", "a trial of tuning"),
        ("sft", "its config.json cannot be read"),
    }


def test_a_dry_run_lists_what_is_left(
    profile: Profile, stages: dict[str, Stage], tmp_path: Path
) -> None:
    total = len(stages)
    first, *left = status.outlook(profile, tmp_path)
    pages = "8 notebooks and reports"
    assert first == f"done: 0 of {total} stages; to be run: {total} stages, {pages}"
    stages["sft"].ensure(lambda work: {})
    first, *fewer = status.outlook(profile, tmp_path)
    assert first == f"done: 1 of {total} stages; to be run: {total - 1} stages, {pages}"
    assert set(left) - set(fewer) == {"  seed 0: sft"}
    assert fewer[-1] == "  whole study: report"
