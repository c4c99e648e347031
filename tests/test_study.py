"""The study: what needs what, jobs side by side, failures by name, and all of it in miniature."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from rlhf_lib import study
from rlhf_lib.config import SettingsError, as_dict
from rlhf_lib.profiles import load_profile
from rlhf_lib.runs import Run
from rlhf_lib.study import NOTEBOOKS, Job, StudyError, plan, run_study, stage_names

ROOT = Path(__file__).resolve().parent.parent
MADE_UP = Path(__file__).parent / "made_up"

# ---------------------------------------------------------------------------------- what needs what


def test_the_control_is_trained_where_its_labels_are() -> None:
    for source, known in (("bundled", True), ("bundled:control", False), ("path:x.jsonl", False)):
        names = stage_names(load_profile("smoke", [f"data.source={source}"]))
        assert ("reward_model_control" in names) is known
        assert names[-1] == "evaluate"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Every stage that is trained, with what it was given; nothing is computed."""
    seen: list[tuple] = []

    def train(module: str, run: Run, data: Any, *rest: Any, **named: Any) -> str:
        seen.append((module, data, *rest, named) if named else (module, data, *rest))
        return f"<{module}>"

    for module in ("sft", "reward_model", "ppo", "grpo", "dpo"):
        monkeypatch.setattr(getattr(study, module), "train", partial(train, module))
    monkeypatch.setattr(study, "load_tokenizer", lambda name: name)
    monkeypatch.setattr(study, "load_data", lambda config, tokenizer: config.source)
    monkeypatch.setattr(study, "set_up_process", lambda threads: None)
    return seen


def test_a_stage_is_run_after_what_it_needs_and_reads_it(calls: list, tmp_path: Path) -> None:
    opened = study.Study.open("smoke", 0, tmp_path, ["ppo.low_kl_coef=0.03"])
    opened.stage("ppo_low_kl")
    trained = {"sft": "<sft>", "reward_model": "<reward_model>"}
    assert calls == [
        ("sft", "bundled"),
        ("reward_model", "bundled"),
        ("ppo", "bundled", {"kl_coef": 0.03, "stage_name": "ppo_low_kl", **trained}),
    ]


def test_the_control_reads_its_own_labels(calls: list, tmp_path: Path) -> None:
    study.Study.open("smoke", 0, tmp_path).stage("reward_model_control")
    assert calls == [("reward_model", "bundled:control", "reward_model_control")]


@pytest.mark.parametrize(
    ("name", "source", "nearest"),
    [("pppo", "bundled", "ppo"), ("reward_model_control", "path:x.jsonl", "reward_model")],
)
def test_an_unknown_stage_names_the_nearest(
    calls: list, tmp_path: Path, name: str, source: str, nearest: str
) -> None:
    opened = study.Study.open("smoke", 0, tmp_path, [f"data.source={source}"])
    with pytest.raises(SettingsError, match=f"unknown stage '{name}': did you mean '{nearest}'"):
        opened.stage(name)
    assert not calls


# -------------------------------------------------------------------------------------- the plan


def test_one_seed_is_seven_notebooks_in_order() -> None:
    jobs = {job.name: job for job in plan(load_profile("smoke"))}
    assert [name for name, job in jobs.items() if job.notebook] == list(NOTEBOOKS)
    assert {name for name, job in jobs.items() if not job.notebook} == {"evaluate"}
    assert all(job.seed == 0 for job in jobs.values())
    assert (jobs["01_dataset"].needs, jobs["03_sft"].needs) == ((), ("02_reward_model/0",))
    for name in ("04_ppo", "05_grpo", "06_dpo"):
        assert jobs[name].needs == ("02_reward_model/0", "03_sft/0")
    assert set(jobs["07_evaluation"].needs) == {f"{n}/0" for n in jobs} - {"07_evaluation/0"}


def test_further_seeds_are_bare_stages_and_the_last_notebook_waits_for_all_of_them() -> None:
    profile = load_profile("laptop", ["seeds=3"])
    jobs = plan(profile)
    keys = [job.key for job in jobs]
    assert len(set(keys)) == len(keys) == 7 + 1 + 2 * len(stage_names(profile))
    assert jobs[-1].name == "07_evaluation"
    assert set(jobs[-1].needs) == set(keys[:-1])
    ended: set[str] = set()
    for job in jobs:  # the order of the list is an order that works
        assert set(job.needs) <= ended
        ended.add(job.key)
    bare = {job.key: job for job in jobs if not job.notebook}
    assert set(bare["dpo/2"].needs) == {"sft/2", "reward_model/2"}, "seeds wait for themselves only"


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
    monkeypatch.setattr(study, "_run_job", run_job)
    monkeypatch.setattr(
        study, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(study.psutil, "cpu_count", lambda logical: 2)
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: False)
    return state


def test_jobs_run_side_by_side_but_never_before_what_they_need(
    threads: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    profile = load_profile("laptop", ["seeds=2", "jobs=3"])
    notebooks = run_study(profile, tmp_path, ["seeds=2"])
    assert threads.ended == {job.key for job in plan(profile)}
    assert threads.most == 2, "as many as there are cores"
    assert threads.arguments == ("laptop", str(tmp_path), ["seeds=2"])
    assert notebooks == [tmp_path / "laptop" / "notebooks" / f"{n}.ipynb" for n in NOTEBOOKS]
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
    monkeypatch.setattr(study, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    store(tmp_path / "notebooks", 'PROFIL = "laptop"\nSEED = 0\nRUN_DIR = "runs"')
    with pytest.raises(StudyError, match=r"04_ppo\.ipynb has no parameter OVERRIDES, PROFILE"):
        study.run_notebook("04_ppo", "smoke", 0, str(tmp_path / "runs"), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_failing_cell_is_told_in_a_line_with_the_place_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    tell = "print((PROFILE, SEED, RUN_DIR, OVERRIDES))"
    store(tmp_path / "notebooks", PARAMETERS, tell, "raise ValueError('no more ink')")
    monkeypatch.chdir(tmp_path)
    overrides = ["data.source=path:two words.jsonl", "seeds=1"]
    with pytest.raises(StudyError, match=r"^ValueError: no more ink") as error:
        study.run_notebook("04_ppo", "smoke", 3, "runs", overrides)
    target = Path("runs/smoke/notebooks/04_ppo.ipynb")
    assert str(target) in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "no more ink" in target.read_text(), "the executed copy shows where it broke"
    # papermill puts a cell of the given parameters behind that of the defaults
    nb = nbformat.read(target, as_version=4)
    told = "".join(o.get("text", "") for cell in nb.cells for o in cell.get("outputs", []))
    profile, seed, run_dir, given = ast.literal_eval(told.strip())
    assert (profile, seed, run_dir) == ("smoke", 3, str(tmp_path / "runs"))
    assert load_profile("smoke", given).data.source == "path:two words.jsonl"


# --------------------------------------------------------------------------- the whole in miniature


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rlhf_lib", *map(str, arguments)], cwd=ROOT, text=True,
        env=os.environ | {"RLHF_THREADS": "1"}, capture_output=True, timeout=3000, check=False,
    )  # fmt: skip


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*-*/**/*")}


@pytest.mark.slow
def test_the_whole_study_in_miniature(tmp_path: Path) -> None:
    ran = command("run", "--profile", "smoke", "--run-dir", tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    folder, profile = tmp_path / "smoke", load_profile("smoke")
    page, pdf = folder / "report" / "index.html", folder / "report" / "report.pdf"
    assert ran.stdout.splitlines()[-2:] == [f"report: {page}", f"report: {pdf}"]

    assert sorted(path.stem for path in (folder / "notebooks").iterdir()) == list(NOTEBOOKS)
    for path in (folder / "notebooks").iterdir():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and cell.source.strip():
                assert cell.execution_count, f"{path.name}: a cell was not executed"
                assert not [o for o in cell.outputs if o.output_type == "error"], path.name

    text = page.read_text(encoding="utf-8")
    assert "numbers mean nothing" in text
    assert all(f'id="nb-{name}"' in text for name in NOTEBOOKS)
    assert pdf.read_bytes().startswith(b"%PDF")

    (evaluation,) = folder.glob("evaluation-*")
    results = strict((evaluation / "results.json").read_text())
    made_up = json.loads((MADE_UP / "gold.json").read_text())
    assert results.keys() == made_up.keys()
    for section in ("policies", "comparisons", "overoptimisation", "best_of_n", "cost"):
        assert results[section].keys() == made_up[section].keys(), section
    for name, policy in results["policies"].items():
        assert policy.keys() == made_up["policies"][name].keys(), name
    assert results["reward_model"].keys() == made_up["reward_model"].keys()
    assert results["settings"] == as_dict(profile)

    stages = sorted(path for path in (folder / "seed-0").iterdir() if path.is_dir())
    assert {p.name.rsplit("-", 1)[0] for p in stages} == {*stage_names(profile), "ppo_shared"}
    for path in stages:
        files = {file.name for file in path.iterdir()}
        assert {"DONE", "config.json", "env.json", "result.json"} <= files
        strict((path / "result.json").read_text())
    assert not list(folder.rglob("*.partial"))

    # what is done is not done again
    before = times(folder)
    assert study.summarise(profile, tmp_path) == evaluation
    assert times(folder) == before


@pytest.mark.slow
def test_a_failing_notebook_ends_the_command_with_its_name(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "pairs.jsonl"
    ran = command(
        "run", "--profile", "smoke", "--only", "01_dataset", "--data", f"path:{missing}",
        "--run-dir", tmp_path,
    )  # fmt: skip
    assert ran.returncode == 2
    assert f"error: 01_dataset (seed 0) failed: DataError: {missing} does not exist" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.glob("smoke/seed-*"))
