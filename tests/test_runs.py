"""The run store: what a hash covers, publishing by rename, and picking up where a run died."""

from __future__ import annotations

import ast
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rlhf_lib import runs
from rlhf_lib.runs import Run, Stage, Work, read_jsonl, write_jsonl
from rlhf_lib.settings import SettingsError
from rlhf_lib.user_code import resolve


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    steps: int = 3


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open("smoke", 3, tmp_path)


def stage_of(run: Run, name: str = "sft", **changes: object) -> Stage:
    arguments = {"settings": Settings(), "upstream": {"data": "d1"}} | changes
    module = arguments.pop("module", "rlhf_lib.methods.sft")
    return run.stage(name, arguments["settings"], arguments["upstream"], module)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- the hash


def test_the_same_inputs_have_the_same_place(run: Run, tmp_path: Path) -> None:
    stage = stage_of(run)
    assert stage.path == tmp_path / "smoke" / "seed-3" / f"sft-{stage.hash[:12]}"
    assert stage_of(Run.open("smoke", 3, tmp_path)).hash == stage.hash


def test_whatever_changes_a_result_changes_the_hash(run: Run, tmp_path: Path) -> None:
    hashes = [
        stage_of(run).hash,
        stage_of(run, "reward_model").hash,
        stage_of(run, settings=Settings(rate=0.2)).hash,
        stage_of(run, settings={"rate": 0.3}).hash,
        stage_of(run, upstream={"data": "d2"}).hash,
        stage_of(run, upstream={"data": "d1", "sft": "s1"}).hash,
        stage_of(run, module="rlhf_lib.methods.dpo").hash,
        stage_of(Run.open("smoke", 4, tmp_path)).hash,
        stage_of(Run.open("smoke", 3, tmp_path, "model.precision=bf16")).hash,
        stage_of(Run.open("smoke", 3, tmp_path, "data.max_response_tokens=30")).hash,
        stage_of(Run.open("smoke", 3, tmp_path, "model.lora_rank=4")).hash,
    ]
    assert len(set(hashes)) == len(hashes)


def test_how_a_run_is_started_does_not_change_the_hash(run: Run, tmp_path: Path) -> None:
    other = Run.open(
        "smoke", 3, tmp_path / "x", "checkpoint_minutes=9 seeds=5 jobs=2 ppo.updates=9"
    )
    assert stage_of(other).hash == stage_of(run).hash
    renamed = Run(replace(run.profile, name="laptop"), 3, tmp_path)
    assert stage_of(renamed).hash == stage_of(run).hash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in folders: top imports middle, middle imports bottom; other stands apart."""
    folder = tmp_path / "rlhf_lib"
    sources = {
        "upper/top": "from rlhf_lib.lower.middle import f\nimport torch",
        "lower/middle": "def f():\n    from ..lower import bottom",
        "lower/bottom": '"""Below."""\nimport rlhf_lib.upper.top\ndef g():\n  "Says."\n  return 1',
        "lower/other": "",
        "settings": "",
    }
    for name, text in sources.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(runs, "PACKAGE", folder)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("edited", "changes"),
    [
        ("upper/top", True),
        ("lower/middle", True),
        ("lower/bottom", True),
        ("lower/other", False),
        ("settings", False),
    ],
)
def test_an_edited_source_changes_the_hash_of_what_runs_it(
    edited: str, changes: bool, package: Path
) -> None:
    before = runs.source_hash("rlhf_lib.upper.top")
    with open(package / f"{edited}.py", "a") as source:
        source.write("EDITED = True\n")
    assert (runs.source_hash("rlhf_lib.upper.top") != before) is changes


def test_words_and_layout_change_no_hash(package: Path) -> None:
    before, bottom = runs.source_hash("rlhf_lib.upper.top"), package / "lower" / "bottom.py"
    edit(bottom, '"Says."', '"Says it better."')
    edit(bottom, '"""Below."""', '"""Far below."""  # and why')
    edit(bottom, "return 1", "return  (1)")
    assert runs.source_hash("rlhf_lib.upper.top") == before
    edit(bottom, "(1)", "(2)")
    assert runs.source_hash("rlhf_lib.upper.top") != before


def test_a_module_of_the_user_counts_with_what_lies_beside_it(tmp_path: Path) -> None:
    sources = {
        "mine": "import helper, torch\nfrom rlhf_lib.objectives.kl import k1\n",
        "helper": "WEIGHT = 1\nimport far\n",
        "far": "WEIGHT = 1\n",
        "unread": "WEIGHT = 1\n",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    hashes = [runs.source_hash(str(tmp_path / "mine.py"))]
    for name in ("unread", "helper", "far"):
        edit(tmp_path / f"{name}.py", "1", "2")
        hashes.append(runs.source_hash(str(tmp_path / "mine.py")))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in sources:
        (moved / f"{name}.py").write_text((tmp_path / f"{name}.py").read_text())
    assert runs.source_hash(str(moved / "mine.py")) == hashes[-1]


def test_a_file_of_the_user_hides_no_module_of_the_same_name(package: Path, tmp_path: Path) -> None:
    (tmp_path / "top.py").write_text("WEIGHT = 1\n")
    modules = "rlhf_lib.upper.top", str(tmp_path / "top.py")
    before = runs.source_hash(*modules)
    edit(package / "upper" / "top.py", "import torch", "import math")
    assert runs.source_hash(*modules) != before


def test_a_file_of_the_user_that_python_has_run_otherwise_is_refused(user_folder: Path) -> None:
    mine, helper = user_folder / "mine_here.py", user_folder / "helper_here.py"
    mine.write_text("from helper_here import WEIGHT\n")
    helper.write_text("WEIGHT = 1\n")
    before = runs.source_hash(str(mine))
    edit(helper, "1", "3")
    assert runs.source_hash(str(mine)) != before, "nothing has run yet"
    edit(helper, "3", "1")
    assert resolve(f"{mine}:WEIGHT") == 1
    for file, new in ((mine, "from helper_here import WEIGHT  # \n"), (helper, "WEIGHT = 2\n")):
        old = file.read_text()
        file.write_text(new)
        with pytest.raises(SettingsError, match=rf"{file.name} has been edited: start Python anew"):
            runs.source_hash(str(mine))
        file.write_text(old)
    assert runs.source_hash(str(mine)) == before
    with pytest.raises(SettingsError, match=r"there is no file .*no\.py"):
        runs.source_hash(str(user_folder / "no.py"))


def test_packages_beside_a_file_of_the_user_count_and_installed_ones_do_not(
    tmp_path: Path,
) -> None:
    files = {
        "mine.py": "import parts.core, numpy.random\nfrom parts import more\n",
        "parts/__init__.py": "",
        "parts/core.py": "from .deep import far\n",
        "parts/more.py": "WEIGHT = 1\n",
        "parts/deep/__init__.py": "",
        "parts/deep/far.py": "WEIGHT = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    seen = {runs.source_hash(str(tmp_path / "mine.py"))}
    for name in ("parts/more.py", "parts/deep/far.py", "parts/__init__.py"):
        (tmp_path / name).write_text("WEIGHT = 2\n")
        seen.add(runs.source_hash(str(tmp_path / "mine.py")))
    assert len(seen) == 4
    assert runs.source_file("numpy.random") is runs.source_file("json") is None


def test_two_files_of_the_user_under_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"rule_{folder}.py").write_text("import helper_of_both\n")
        (tmp_path / folder / "helper_of_both.py").write_text("WEIGHT = 1\n")
    with pytest.raises(SettingsError, match="have one name: rename one of them"):
        runs.source_hash(*(str(tmp_path / f / f"rule_{f}.py") for f in ("one", "two")))


def test_a_file_of_the_user_that_is_no_python_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("WEIGHT = 1\ndef f(:\n")
    with pytest.raises(SettingsError, match=r"mine\.py, line 2: invalid syntax"):
        runs.source_hash(str(tmp_path / "mine.py"))


def test_every_form_of_import_is_seen() -> None:
    source = """
import rlhf_lib.objectives.masked, torch
from rlhf_lib.objectives import kl as estimators
from rlhf_lib.objectives.losses import dpo_loss
def f():
    from ..world.rewards import gold_reward
"""
    found = runs.imported_modules(ast.parse(source), "rlhf_lib.methods")
    assert {
        "rlhf_lib.objectives.masked",
        "rlhf_lib.objectives.kl",
        "rlhf_lib.objectives.losses",
        "rlhf_lib.world.rewards",
        "torch",
    } <= set(found)


def test_the_hash_of_ppo_covers_its_loss_and_not_that_of_the_notebooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    monkeypatch.setattr(runs, "content_hash", lambda seen: read.extend(seen) or "hash")
    runs.source_hash("rlhf_lib.methods.ppo")
    names = {name.removeprefix("rlhf_lib.") for name in read}
    assert {"methods.ppo", "methods.rollout", "objectives.losses", "objectives.kl"} <= names
    assert {"objectives.masked", "models.load", "methods.learner", "world.rewards"} <= names
    assert not {"settings", "catalogue", "methods.grpo"} & names
    assert not [n for n in names if n.startswith(("show", "report", "results"))]


# ------------------------------------------------------------------------------------ publishing


def test_a_stage_is_published_whole(run: Run) -> None:
    stage = stage_of(run)
    looked = []

    def build(work: Work) -> dict:
        work.log(0, 7, {"loss": torch.tensor(2.0)})
        work.write_samples([{"text": "é"}])
        (work.path / "checkpoint").mkdir()
        looked.append((stage.path.exists(), stage.done, (work.path / "DONE").exists()))
        return {"answer": 42}

    assert stage.ensure(build) is stage
    assert looked == [(False, False, False)]
    assert stage.done
    assert sorted(p.name for p in stage.path.iterdir()) == [
        "DONE",
        "config.json",
        "env.json",
        "metrics.jsonl",
        "result.json",
        "samples.jsonl",
    ]
    assert [p.name for p in stage.path.parent.iterdir() if p.is_dir()] == [stage.path.name]
    assert (stage.path / "DONE").read_text().strip() == stage.hash
    assert json.loads((stage.path / "config.json").read_text())["settings"] == {
        "rate": 0.1,
        "steps": 3,
    }
    result = stage.result()
    assert result["answer"] == 42
    assert result["num_tokens"] == 7
    assert result["seconds"] >= 0
    assert 0 <= result["peak_memory_gb"] < 0.05, "the process itself is not the stage's"
    assert stage.samples() == [{"text": "é"}]
    (row,) = stage.metrics()
    assert (row["step"], row["loss"], row["num_tokens"]) == (0, 2.0, 7)
    assert row["tokens_per_second"] == pytest.approx(7 / row["step_time"])


def test_done_is_written_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(run)
    rename, before_rename = Path.rename, []

    def look(path: Path, target: Path) -> Path:
        before_rename.append(({p.name for p in path.iterdir()}, Path(target)))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", look)
    stage.ensure(lambda work: {})
    ((names, target),) = before_rename
    assert names >= {"DONE", "result.json"}
    assert target == stage.path


def test_a_finished_stage_is_not_built_again(run: Run) -> None:
    stage_of(run).ensure(lambda work: {"answer": 1})

    def never(work: Work) -> dict:
        raise AssertionError("built again")

    assert stage_of(run).ensure(never).result()["answer"] == 1


def test_nothing_is_published_when_the_build_fails(run: Run) -> None:
    stage = stage_of(run)

    def fail(work: Work) -> dict:
        work.log(0, 1, {})
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        stage.ensure(fail)
    assert not stage.done
    assert not list(stage.path.parent.glob("sft-*[!k]")), "nothing half-written stays"
    stage.ensure(lambda work: {"answer": 2})
    assert stage.result()["answer"] == 2


def test_a_folder_without_done_is_built_again(run: Run) -> None:
    stage = stage_of(run).ensure(lambda work: {"answer": 1})
    (stage.path / "DONE").unlink()
    (stage.path / "leftover").write_text("of a half-copied folder")
    stage.ensure(lambda work: {"answer": 2})
    assert stage.result()["answer"] == 2
    assert not (stage.path / "leftover").exists()


def test_a_stage_that_was_not_run_says_how_to_run_it(run: Run) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"python -m rlhf_lib stage reward_model --profile smoke --seed 3"
    ):
        stage_of(run, "reward_model").result()


def test_every_stage_starts_from_its_seed(run: Run, tmp_path: Path) -> None:
    drawn = []

    def build(work: Work) -> dict:
        drawn.append(torch.rand(1).item())
        return {}

    for root in ("a", "b"):
        torch.rand(5)
        stage_of(Run.open("smoke", 3, tmp_path / root)).ensure(build)
    stage_of(Run.open("smoke", 4, tmp_path)).ensure(build)
    assert drawn[0] == drawn[1] != drawn[2]


def test_who_wants_the_same_stage_waits_for_the_first(run: Run) -> None:
    built = []

    def build(work: Work) -> dict:
        built.append(1)
        time.sleep(0.2)
        return {"answer": len(built)}

    with ThreadPoolExecutor(4) as pool:
        stages = list(pool.map(lambda _: stage_of(run).ensure(build), range(4)))
    assert [stage.result()["answer"] for stage in stages] == [1] * 4


def test_json_lines_come_back(tmp_path: Path) -> None:
    rows = [{"text": "ü\u2028\n", "number": 1.5}, {}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
