"""The whole study: jobs in order and side by side, failures by name, and one notebook of it."""

from __future__ import annotations

import ast
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from rlhf_lib import catalogue
from rlhf_lib.settings import SettingsError, load_profile
from rlhf_lib.study import schedule
from rlhf_lib.study.schedule import Job, StudyError, plan, run_study

# further runs at other coefficients, in the first seed; PPO at a low one has a notebook
SWEPT = {"ppo_strong", "rloo"}
SWEPT |= {f"{name}_{how}" for name in ("grpo", "rloo", "dpo") for how in ("weak", "strong")}
MEASURED = ("probes", "evaluate", "second_opinion")  # of all policies of a seed
UNBIASED = {"ppo_control", "dpo_control"}  # on other labels, in the first seed

# -------------------------------------------------------------------------------------- the plan


def test_one_seed_is_seven_notebooks_in_order() -> None:
    jobs = {job.name: job for job in plan(load_profile("smoke"))}
    assert [name for name, job in jobs.items() if job.notebook] == list(catalogue.notebooks())
    bare = {name for name, job in jobs.items() if not job.notebook}
    assert bare == {"evaluate", "probes", "attribution", *SWEPT, *UNBIASED}
    assert all(job.seed == 0 for job in jobs.values())
    assert (jobs["01_dataset"].needs, jobs["03_sft"].needs) == ((), ("02_reward_model/0",))
    for name in ("04_ppo", "05_grpo", "06_dpo", *SWEPT):
        assert jobs[name].needs == ("02_reward_model/0", "03_sft/0")
    for name in UNBIASED:  # the second notebook trains the reward model of these labels
        assert jobs[name].needs == ("02_reward_model/0", "03_sft/0")
    assert set(jobs["07_evaluation"].needs) == {f"{n}/0" for n in jobs} - {"07_evaluation/0"}


def test_further_seeds_are_bare_stages_and_the_last_notebook_waits_for_all_of_them() -> None:
    profile = load_profile("laptop", ["seeds=3"])
    jobs = plan(profile)
    keys = [job.key for job in jobs]
    further = {record.name for record in catalogue.stages(profile, 1)}
    lone = {"attribution", *SWEPT, *UNBIASED}
    assert not {"reward_model_curve", *lone} & further, "of the first seed"
    assert len(set(keys)) == len(keys) == 7 + len(lone) + len(MEASURED) + 2 * len(further)
    assert jobs[-1].name == "07_evaluation"
    assert set(jobs[-1].needs) == set(keys[:-1])
    ended: set[str] = set()
    for job in jobs:  # the order of the list is an order that works
        assert set(job.needs) <= ended
        ended.add(job.key)
    bare = {job.key: job for job in jobs if not job.notebook}
    assert set(bare["dpo/2"].needs) == {"sft/2", "reward_model/2"}, "seeds wait for themselves only"
    assert "grpo_strong/0" not in bare["evaluate/0"].needs, "the sweep is not evaluated"
    rival = {"evaluate/2", "reward_model/2", "02_reward_model/0"}
    assert set(bare["second_opinion/2"].needs) == rival, "the last seed asks the first"


# ------------------------------------------------------------------------------------ side by side


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Jobs run in threads and do nothing but look around; `fails`: the one that goes wrong."""
    state = SimpleNamespace(started=[], ended=set(), running=0, most=0, fails=None, arguments=None)
    lock = threading.Lock()

    def run_job(job: Job, *arguments: Any) -> float:
        with lock:
            state.arguments = arguments
            state.started.append(job.key)
            assert set(job.needs) <= state.ended, f"{job.key} started too early"
            state.running += 1
            state.most = max(state.most, state.running)
        threading.Event().wait(0.02)
        with lock:
            state.running -= 1
            if job.key == state.fails:
                raise RuntimeError("the disk is full")
            state.ended.add(job.key)
        return 1.0

    monkeypatch.setenv("RLHF_BATCH", "1")  # run_study sets it: put back after the test
    monkeypatch.setattr(schedule, "_run_job", run_job)
    monkeypatch.setattr(
        schedule, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(schedule.psutil, "cpu_count", lambda logical: 2)
    monkeypatch.setattr(schedule.torch.cuda, "is_available", lambda: False)
    return state


def test_jobs_run_side_by_side_but_never_before_what_they_need(
    threads: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    profile = load_profile("laptop", ["seeds=2", "jobs=3"])
    notebooks = run_study(profile, tmp_path, ["seeds=2"])
    assert threads.ended == {job.key for job in plan(profile)}
    assert threads.most == 2, "as many as there are cores"
    assert threads.arguments == ("laptop", str(tmp_path), ["seeds=2"])
    names = catalogue.notebooks()
    assert notebooks == [schedule.notebook_path(profile, tmp_path, name) for name in names]
    assert notebooks[0] != schedule.notebook_path(load_profile("laptop"), tmp_path, "01_dataset")
    assert "seed 0  07_evaluation" in capsys.readouterr().out.splitlines()[-1]


def test_a_failure_is_reported_by_name_and_what_needs_it_is_not_started(
    threads: SimpleNamespace, tmp_path: Path
) -> None:
    threads.fails = "03_sft/0"
    with pytest.raises(StudyError) as error:
        run_study(load_profile("laptop", ["seeds=2"]), tmp_path, ["seeds=2"])
    assert str(error.value).startswith("03_sft (seed 0) failed: the disk is full\n")
    assert "the same command goes on from here" in str(error.value)
    assert not {"04_ppo/0", "07_evaluation/0"} & set(threads.started)


def test_only_one_notebook(threads: SimpleNamespace, tmp_path: Path) -> None:
    (notebook,) = run_study(load_profile("smoke"), tmp_path, [], only="06_dpo")
    assert notebook.name == "06_dpo.ipynb"
    assert threads.started == ["06_dpo/0"], "its stages are run inside it"
    with pytest.raises(SettingsError, match="unknown notebook '6_dpo': did you mean '06_dpo'"):
        run_study(load_profile("smoke"), tmp_path, [], only="6_dpo")
    assert threads.started == ["06_dpo/0"]


# ------------------------------------------------------------------------------------ one notebook


def store(folder: Path, parameters: str, *cells: str) -> None:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / "04_ppo.ipynb")


PARAMETERS = 'PROFILE = "laptop"\nSEED = 0\nRUN_DIR = "runs"\nOVERRIDES = ""'


def test_parameters_that_a_notebook_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    store(tmp_path / "notebooks", 'PROFIL = "laptop"\nSEED = 0\nRUN_DIR = "runs"')
    with pytest.raises(StudyError, match=r"04_ppo\.ipynb has no parameter OVERRIDES, PROFILE"):
        schedule.run_notebook("04_ppo", "smoke", 0, str(tmp_path / "runs"), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_failing_cell_is_told_in_a_line_with_the_place_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    tell = "print((PROFILE, SEED, RUN_DIR, OVERRIDES))"
    store(tmp_path / "notebooks", PARAMETERS, tell, "raise ValueError('no more ink')")
    monkeypatch.chdir(tmp_path)
    overrides = ["data.source=path:two words.jsonl", "seeds=1"]
    with pytest.raises(StudyError, match=r"^ValueError: no more ink") as error:
        schedule.run_notebook("04_ppo", "smoke", 3, "runs", overrides)
    target = schedule.notebook_path(load_profile("smoke", overrides), "runs", "04_ppo")
    assert str(target) in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "no more ink" in target.read_text(), "the executed copy shows where it broke"
    # papermill puts a cell of the given parameters behind that of the defaults
    nb = nbformat.read(target, as_version=4)
    told = "".join(o.get("text", "") for cell in nb.cells for o in cell.get("outputs", []))
    profile, seed, run_dir, given = ast.literal_eval(told.strip())
    assert (profile, seed, run_dir) == ("smoke", 3, str(tmp_path / "runs"))
    assert load_profile("smoke", given).data.source == "path:two words.jsonl"
