"""The whole study: jobs in order and side by side, failures by name, and one notebook of it."""

from __future__ import annotations

import ast
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from rlhf_lib import catalogue, pools
from rlhf_lib.profiles import load_profile
from rlhf_lib.records import MEMBERS, REWARDED
from rlhf_lib.settings import Profile, SettingsError
from rlhf_lib.study import book, schedule
from rlhf_lib.study.schedule import Job, plan, run_study
from rlhf_lib.study.stages import Study, StudyError, notebook_path

# further runs at other coefficients, in the first seed; PPO at a low one has a notebook
SWEPT = {"ppo_strong", "rloo"}
SWEPT |= {f"{name}_{how}" for name in ("grpo", "rloo", "dpo") for how in ("weak", "strong")}
# on other labels, in the first seed
UNBIASED = {f"{of}_{labels}" for of in ("ppo", "dpo") for labels in ("control", "half", "double")}
UNBIASED |= {"reward_model_half", "reward_model_double"}

# -------------------------------------------------------------------------------------- the plan


def keys(profile: Profile) -> list[str]:
    return [job.key for job in plan(profile)]


@pytest.mark.parametrize("profile", ["smoke", "laptop", "offline", "t4", "full"])
def test_the_plan_is_an_order_that_works_and_has_every_stage_once(profile: str) -> None:
    chosen, ended = load_profile(profile), set()
    jobs = plan(chosen)
    for job in jobs:
        assert set(job.needs) <= ended, job.key
        ended.add(job.key)
    assert len(ended) == len(jobs), "no job twice"
    wanted = {
        (seed, record.name)
        for seed in range(chosen.seeds)
        for record in catalogue.stages(chosen, seed)
    }
    assert {(job.seed, job.name) for job in jobs if job.kind == "stage"} == wanted


def test_one_seed_has_one_report_of_all_notebooks() -> None:
    jobs = plan(load_profile("smoke"))
    shown = [job for job in jobs if job.kind != "stage"]
    assert [job.name for job in shown] == [*catalogue.notebooks(), "report"]
    assert not any(job.tier for job in jobs)
    by_name = {job.name: job for job in jobs}
    assert by_name["03_sft"].needs == ("seed 0: rejection_sft", "seed 0: sft")
    stages = {job.key for job in jobs if job.kind == "stage"}
    assert set(by_name["07_evaluation"].needs) == stages
    assert jobs[-1].needs == tuple(f"whole study: {name}" for name in catalogue.notebooks())


def test_seed_0_comes_first_then_each_seed_and_what_seed_0_has_besides_at_the_end() -> None:
    profile = load_profile("laptop", ["seeds=3"])
    order = keys(profile)
    places = [order.index(f"{n} so far: report") for n in ("1 seed", "2 seeds", "3 seeds")]
    before = [order[start:end] for start, end in pairwise([-1, *places, len(order)])]
    for seed, part in enumerate(before[:3]):
        seeds = {key.partition(":")[0] for key in part if key.startswith("seed ")}
        assert seeds <= {f"seed {seed}", "seed 0"}
    lone = {"attribution", "rewards_compared", *SWEPT, *UNBIASED, *MEMBERS}
    lone |= {f"grpo_{name}" for name in REWARDED}
    extras = {key for key in before[3] if key.startswith("seed ")}
    assert extras == {f"seed 0: {name}" for name in lone}
    assert [key for key in before[1] if key.startswith("seed 0")] == ["seed 0: second_opinion"]
    jobs = {job.key: job for job in plan(profile)}
    assert "seed 0: grpo_strong" not in jobs["seed 0: evaluate"].needs, "it is not evaluated"
    needs = jobs["seed 2: second_opinion"].needs
    assert set(needs) == {"seed 2: evaluate", "seed 2: reward_model", "seed 1: reward_model"}


def test_no_notebook_changes_while_a_report_reads_it() -> None:
    written: dict[str, str] = {}
    jobs = plan(load_profile("laptop", ["seeds=2"]))
    above = {job.key: set(job.needs) for job in jobs}
    for job in jobs:  # all that comes before it, however far
        above[job.key] = above[job.key].union(*(above[need] for need in job.needs))
    for job in jobs:
        if job.kind == "notebook" and job.name in written:
            assert written[job.name] in above[job.key]
        written |= {job.name: job.key} if job.kind == "notebook" else {}
    reports = [job.key for job in jobs if job.kind == "report"]
    for one, other in pairwise(reports):
        shown = [job for job in jobs if job.kind == "notebook" and job.key in above[other]]
        later = [job.key for job in shown if job.key not in above[one]]
        assert all(one in above[key] for key in later), "they wait until it has been written"


def test_a_part_of_a_study_has_the_stages_of_the_whole() -> None:
    """Settings of a part change which stages there are, and nothing of any of them."""
    whole = load_profile("laptop")
    part = load_profile("laptop", Job("report", "report", tier=2).overrides)
    assert part.seeds == 2
    for record in catalogue.stages(part, 0):
        assert record.config(part) == record.config(whole)
        assert catalogue.needs(part, record.name) == catalogue.needs(whole, record.name)


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
        pools, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(pools.psutil, "cpu_count", lambda logical: 2)
    monkeypatch.setattr(pools.torch.cuda, "is_available", lambda: False)
    return state


def test_jobs_run_side_by_side_but_never_before_what_they_need(
    threads: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    profile = load_profile("laptop", ["seeds=2", "jobs=3"])
    notebooks = run_study(profile, tmp_path, ["seeds=2"])
    assert threads.ended == set(keys(profile))
    assert threads.most == 2, "as many as there are cores"
    assert threads.arguments == ("laptop", str(tmp_path), ["seeds=2"])
    names = catalogue.notebooks()
    assert notebooks == [notebook_path(profile, tmp_path, name) for name in names]
    assert notebooks[0] != notebook_path(load_profile("laptop"), tmp_path, "01_dataset")
    assert "whole study: report" in capsys.readouterr().out.splitlines()[-1]


def test_a_failure_is_reported_by_name_and_what_needs_it_is_not_started(
    threads: SimpleNamespace, tmp_path: Path
) -> None:
    threads.fails = "seed 0: sft"
    with pytest.raises(StudyError) as error:
        run_study(load_profile("laptop", ["seeds=2"]), tmp_path, ["seeds=2"])
    assert str(error.value).startswith("seed 0: sft failed: the disk is full\n")
    assert "the same command goes on from here" in str(error.value)
    assert not {"seed 0: ppo", "1 seed so far: 07_evaluation"} & set(threads.started)


def test_what_waits_is_cancelled_when_the_user_stops(
    threads: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C: what runs ends, and what has not begun does not begin."""
    running, last = threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            if wait:  # on the way out, when what was to be cancelled has been
                last.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(pools, "ProcessPoolExecutor", lambda workers, **_: Pool(workers))
    begun: list[str] = []

    def work(name: str) -> None:
        begun.append(name)
        running.set()
        last.wait()

    futures = []

    def stopped() -> None:
        with pools.worker_pool(load_profile("laptop", ["jobs=1"])) as (pool, _):
            futures.extend(pool.submit(work, name) for name in ("first", "second", "third"))
            running.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert begun == ["first"]
    assert [future.cancelled() for future in futures] == [False, True, True]
    assert "Stopping. What was finished is kept" in capsys.readouterr().out


def test_only_one_notebook(threads: SimpleNamespace, tmp_path: Path) -> None:
    (notebook,) = run_study(load_profile("smoke"), tmp_path, [], only="06_dpo")
    assert notebook.name == "06_dpo.ipynb"
    assert threads.started == ["whole study: 06_dpo"], "its stages are run inside it"
    with pytest.raises(SettingsError, match="unknown notebook '6_dpo': did you mean '06_dpo'"):
        run_study(load_profile("smoke"), tmp_path, [], only="6_dpo")
    assert threads.started == ["whole study: 06_dpo"]


def test_each_job_does_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's notebooks and report are given its settings, and stand in the whole's folder."""
    done: list[tuple] = []

    class Opened:
        def __init__(self, *asked: object) -> None:
            self.asked = asked

        def stage(self, name: str) -> None:
            done.append((*self.asked, name))

    monkeypatch.setattr(schedule.Study, "open", Opened)
    monkeypatch.setattr(schedule, "run_notebook", lambda *asked: done.append(asked))
    written = tmp_path / "index.html", tmp_path / "report.pdf"
    monkeypatch.setattr(book, "write_report", lambda *asked: done.append(asked) or written)
    given, run_dir = ["seeds=3"], str(tmp_path)
    part = Job("stage", "ppo", 2), Job("notebook", "04_ppo", tier=1), Job("report", "r", tier=1)
    for job in part:
        assert schedule._run_job(job, "laptop", run_dir, given) >= 0
    stage, notebook, report = done
    whole = load_profile("laptop", given)
    assert stage == ("laptop", 2, run_dir, given, "ppo")
    of_part = [*given, "seeds=1", "extras=false"]
    target = notebook_path(whole, tmp_path, "04_ppo")
    assert notebook == ("04_ppo", "laptop", run_dir, of_part, target)
    assert report == (load_profile("laptop", of_part), tmp_path, whole)


def test_without_what_renders_it_a_study_runs_and_says_how_to_get_a_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[list[Job]] = []
    monkeypatch.setattr(schedule, "_run_jobs", lambda *asked: planned.append(asked[2]))
    monkeypatch.setattr(schedule.exporters, "TOOLS", ("json", "no_such_package"))
    run_study(load_profile("laptop"), tmp_path, [])
    said = capsys.readouterr().out
    assert "no report: the report needs no_such_package: pip install 'rlhf-lib[report]'" in said
    (jobs,) = planned
    assert {job.kind for job in jobs} == {"stage", "notebook"}
    ended: set[str] = set()
    for job in jobs:
        assert set(job.needs) <= ended, job.key
        ended.add(job.key)


# ------------------------------------------------------------------------------------ one notebook


def store(folder: Path, parameters: str, *cells: str) -> None:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    # saved by somebody whose kernel has another name
    nb.metadata.kernelspec = {"name": "elsewhere", "display_name": "Mine", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / "04_ppo.ipynb")


PARAMETERS = 'PROFILE = "laptop"\nSEED = 0\nRUN_DIR = "runs"\nOVERRIDES = ""'


def test_parameters_that_a_notebook_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    store(tmp_path / "notebooks", 'PROFIL = "laptop"\nSEED = 0\nRUN_DIR = "runs"')
    with pytest.raises(StudyError, match=r"04_ppo\.ipynb has no parameter OVERRIDES, PROFILE"):
        schedule.run_notebook("04_ppo", "smoke", str(tmp_path / "runs"), [], tmp_path / "n.ipynb")
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
    target = tmp_path / "runs" / "executed.ipynb"
    with pytest.raises(StudyError, match=r"^ValueError: no more ink") as error:
        schedule.run_notebook("04_ppo", "smoke", "runs", overrides, target)
    assert str(target) in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "no more ink" in target.read_text(), "the executed copy shows where it broke"
    # papermill puts a cell of the given parameters behind that of the defaults
    nb = nbformat.read(target, as_version=4)
    told = "".join(o.get("text", "") for cell in nb.cells for o in cell.get("outputs", []))
    profile, seed, run_dir, given = ast.literal_eval(told.strip())
    assert (profile, seed, run_dir) == ("smoke", 0, str(tmp_path / "runs"))
    assert load_profile("smoke", given).data.source == "path:two words.jsonl"


def test_a_worker_reads_the_pairs_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[tuple] = []

    def reading(*asked: object) -> str:
        read.append(asked)
        return "pairs"

    monkeypatch.setattr(schedule, "_read_once", lru_cache(2)(reading))
    monkeypatch.setattr(Study, "stage", lambda study, name: study.data)
    for seed in (0, 1):
        schedule._run_job(Job("stage", "sft", seed), "smoke", str(tmp_path), [])
    assert len(read) == 1
    schedule._run_job(Job("stage", "sft"), "smoke", str(tmp_path), ["data.train_pairs=64"])
    assert len(read) == 2, "other data is other data"


def test_a_pool_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe may be asked for in a notebook, whose widgets live on."""
    monkeypatch.delenv("RLHF_BATCH", raising=False)
    before = dict(os.environ)
    with pools.worker_pool(load_profile("smoke")):
        assert os.environ["RLHF_BATCH"] == "1"
    assert dict(os.environ) == before
