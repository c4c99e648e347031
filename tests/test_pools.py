"""Who does the jobs: two workers of Ray, of which one is killed, do what processes here do."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlhf_lib import pools, processes
from rlhf_lib.__main__ import app
from rlhf_lib.files import read_jsonl
from rlhf_lib.profiles import load_profile
from rlhf_lib.settings import Profile, SettingsError, as_dict, deciding
from rlhf_lib.study import schedule
from rlhf_lib.study.schedule import Job

SETTINGS = ["checkpoint_minutes=0", "jobs=2", "ppo.updates=6"]
STAGES = {"reward_model": (), "sft": (), "ppo": ("reward_model", "sft"), "dpo": ("sft",)}
JOBS = [
    Job("stage", name, needs=tuple(f"seed 0: {need}" for need in needs))
    for name, needs in STAGES.items()
]


def study(folder: Path, engine: str) -> None:
    profile = load_profile("smoke", [*SETTINGS, f"engine={engine}"])
    with pools.worker_pool(profile) as (pool, workers):
        assert workers == (2 if engine == "ray" else min(2, psutil.cpu_count(logical=False) or 1))
        schedule._run_jobs(pool, workers, JOBS, "smoke", folder, SETTINGS)


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study of four stages finds without Ray."""
    folder = tmp_path_factory.mktemp("in-order")
    study(folder, "processes")
    return folder / "smoke" / "seed-0"


class Killer(threading.Thread):
    """Kills whoever trains PPO, once, when it has logged a few steps."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.killed = folder, 0

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.02)
            for path in self.folder.glob("smoke/seed-0/ppo-*.partial/metrics.jsonl"):
                holder = next(path.parent.parent.glob("ppo-*.holder")).read_text()
                if len(path.read_text().splitlines()) >= 2:
                    self.killed = int(holder.split()[1])
                    os.kill(self.killed, signal.SIGKILL)


def test_a_worker_that_is_killed_loses_nothing_and_does_nothing_twice(
    in_order: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    killer = Killer(tmp_path)
    killer.start()
    study(tmp_path, "ray")
    assert killer.killed not in (0, os.getpid())
    found = tmp_path / "smoke" / "seed-0"
    names = sorted(path.name for path in in_order.iterdir() if path.is_dir())
    assert sorted(path.name for path in found.iterdir() if path.is_dir()) == names
    assert len(names) == len(STAGES)
    for name in names:
        one, other = (read_jsonl(folder / name / "metrics.jsonl") for folder in (in_order, found))
        assert [row["step"] for row in other] == list(range(len(one))), "each step stands once"
        for row, expected in zip(other, one, strict=True):
            for timing in ("step_time", "tokens_per_second", "peak_memory_gb"):
                row.pop(timing), expected.pop(timing)
            assert row == expected
        weights, others = (
            load_file(folder / name / "model" / "model.safetensors") for folder in (in_order, found)
        )
        assert all(bool((weights[key] == others[key]).all()) for key in weights)
    said = capsys.readouterr().out
    assert said.startswith("4 jobs, 2 at once")
    assert re.findall(r"^ +(\d)/4", said, re.MULTILINE) == ["1", "2", "3", "4"]


def test_a_job_s_own_error_comes_back_from_ray() -> None:
    def failing(word: str) -> None:
        raise ValueError(f"no {word}")

    with pools.worker_pool(load_profile("smoke", ["engine=ray"])) as (pool, workers):
        assert workers == 1
        error = pool.submit(failing, "way").exception(timeout=60)
    assert type(error) is ValueError
    assert str(error) == "no way"


def test_a_job_that_fails_for_all_is_told_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pools.worker_pool(load_profile("smoke")) as (pool, workers):
        assert workers == 1
        assert type(pool.submit(divmod, 1, 0).exception()) is ZeroDivisionError


def test_without_ray_this_machine_does_the_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(pools, "find_spec", lambda name: None)
    with pools.worker_pool(load_profile("smoke", ["engine=ray"])) as (pool, _):
        assert pool.submit(divmod, 7, 2).result() == (3, 1)
    assert capsys.readouterr().out.startswith("Ray is not installed (pip install 'rlhf-lib[ray]')")


def test_the_command_line_says_who_does_the_jobs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def run_study(profile: Profile, run_dir: Path, overrides: list[str], only: object) -> list:
        asked.append(profile.engine)
        return []

    monkeypatch.setattr(schedule, "run_study", run_study)
    run = ["run", "--profile", "smoke", "--run-dir", str(tmp_path)]
    for given in ([], ["--engine", "ray"]):
        CliRunner().invoke(app, [*run, *given], catch_exceptions=False)
    assert asked == ["processes", "ray"]
    with pytest.raises(SettingsError, match="engine"):
        CliRunner().invoke(app, [*run, "--engine", "dask"], catch_exceptions=False)


def test_who_does_the_jobs_is_not_in_the_hash_of_what_is_found() -> None:
    settings = [as_dict(load_profile("smoke", [f"engine={e}"])) for e in ("processes", "ray")]
    assert settings[0] != settings[1]
    assert deciding(settings[0]) == deciding(settings[1])
