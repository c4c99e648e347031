"""The run store: what a hash covers, publishing by rename, and picking up where a run died."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.settings import UserError


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


# ------------------------------------------------------------------------------------ publishing


def test_a_stage_is_published_whole(run: Run) -> None:
    stage = stage_of(run)
    looked = []

    def build(work: Work) -> dict:
        work.log(0, 7, {"loss": torch.tensor(2.0)})
        work.write_samples([{"text": "é"}])
        (work.path / "checkpoint-a").mkdir()
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
        UserError, match=r"python -m rlhf_lib stage reward_model --profile smoke --seed 3"
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
