"""Runs that die: in the middle of a step, while saving, twice; they end like one never killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_lib.checkpoints import Checkpoints
from rlhf_lib.methods.learner import Learner
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import UserError, content_hash


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open("smoke", 3, tmp_path)


def stage_of(run: Run) -> Stage:
    return run.stage("sft", {}, {}, "sft")


STEPS = 5


def train_a_little(make_model: Callable, stage: Stage, die_at: int | None = None) -> list[float]:
    """Five steps whose loss needs the model, the optimizer, the schedule and the generator."""
    losses = []

    def build(work: Work) -> dict:
        accelerator = make_accelerator("fp32")
        learner = Learner(accelerator, make_model("gpt2"), learning_rate=1e-2, steps=STEPS)
        for step in work.steps(STEPS, accelerator):
            ids = torch.randint(3, 32, (2, 6))
            loss, _ = learner.step([learner.model(ids, labels=ids).loss])
            losses.append(loss)
            work.log(step, 12, {"loss": loss})
            if step == die_at:
                raise KeyboardInterrupt
        return {}

    if die_at is None:
        stage.ensure(build)
    else:
        with pytest.raises(KeyboardInterrupt):
            stage.ensure(build)
    return losses


@pytest.fixture
def eager(tmp_path: Path) -> Stage:
    """A stage that saves its state after every step."""
    return stage_of(Run.open("smoke", 3, tmp_path / "eager", "checkpoint_minutes=0"))


def test_a_killed_run_ends_like_one_never_killed(
    make_model: Callable, eager: Stage, run: Run
) -> None:
    whole = train_a_little(make_model, stage_of(run))
    assert len(set(whole)) == STEPS
    first = train_a_little(make_model, eager, die_at=1)
    second = train_a_little(make_model, eager, die_at=3)  # killed twice
    third = train_a_little(make_model, eager)
    # the step that was under way is done again
    assert [first, second, third] == [whole[:2], whole[1:4], whole[3:]]
    assert [row["loss"] for row in eager.metrics()] == whole
    assert [row["num_tokens"] for row in eager.metrics()] == [12 * n for n in range(1, STEPS + 1)]
    assert eager.result()["num_tokens"] == 12 * STEPS


def test_without_a_checkpoint_a_killed_run_starts_again(make_model: Callable, run: Run) -> None:
    stage = stage_of(run)  # saves every two minutes: never, here
    killed = train_a_little(make_model, stage, die_at=3)
    whole = train_a_little(make_model, stage)
    assert whole[:4] == killed
    assert [row["loss"] for row in stage.metrics()] == whole


def test_seconds_and_memory_of_earlier_attempts_count(make_model: Callable, eager: Stage) -> None:
    train_a_little(make_model, eager, die_at=2)
    for saved in eager.path.parent.glob("*.partial/checkpoint-?/progress.json"):
        state = json.loads(saved.read_text()) | {"seconds": 1e6, "peak_memory_gb": 99}
        del state["hash"]
        saved.write_text(json.dumps(state | {"hash": content_hash(state)}))
    train_a_little(make_model, eager)
    assert eager.result()["seconds"] > 1e6
    assert eager.result()["peak_memory_gb"] == 99


def newest(stage: Stage) -> Path:
    """The slot of the last state that was saved."""
    slots = stage.path.parent.glob("*.partial/checkpoint-?")
    return max(slots, key=lambda slot: json.loads((slot / "progress.json").read_text())["step"])


@pytest.mark.parametrize("damage", ["half a file", "another file", "no file", "no record"])
def test_a_damaged_state_is_passed_over_for_the_one_before(
    damage: str,
    make_model: Callable,
    eager: Stage,
    run: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed while saving, or what a drive made of it: the other slot is whole."""
    whole = train_a_little(make_model, stage_of(run))
    train_a_little(make_model, eager, die_at=2)  # has saved states after steps 1 and 2
    slot = newest(eager)
    file = slot / ("progress.json" if damage == "no record" else "state.json")
    if damage == "half a file":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "another file":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    assert train_a_little(make_model, eager) == whole[1:], "goes on from the state before"
    assert (f"{slot} is damaged (state.json)" in caplog.text) is (damage != "no record")
    assert [row["loss"] for row in eager.metrics()] == whole
    assert not list(eager.path.glob("checkpoint*"))


def test_with_no_whole_state_a_run_starts_again(
    make_model: Callable, eager: Stage, run: Run
) -> None:
    whole = train_a_little(make_model, stage_of(run))
    train_a_little(make_model, eager, die_at=2)
    for weights in eager.path.parent.glob("*.partial/checkpoint-?/state.safetensors"):
        os.truncate(weights, 100)
    assert train_a_little(make_model, eager) == whole


def test_a_torn_last_line_of_the_metrics_is_cut(
    make_model: Callable, eager: Stage, run: Run
) -> None:
    whole = train_a_little(make_model, stage_of(run))
    train_a_little(make_model, eager, die_at=2)
    (metrics,) = eager.path.parent.glob("*.partial/metrics.jsonl")
    os.truncate(metrics, metrics.stat().st_size - 20)
    train_a_little(make_model, eager)
    assert [row["loss"] for row in eager.metrics()] == whole


def test_the_state_is_saved_at_most_as_often_as_asked(
    make_model: Callable, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *a: (saved.append(a[2]["step"]), save(*a)))
    train_a_little(make_model, stage_of(run))
    assert saved == []
    run = Run.open("smoke", 5, run.root, "checkpoint_minutes=0")
    train_a_little(make_model, stage_of(run))
    assert saved == [1, 2, 3, 4], "after the last step the result is saved, not the state"


def test_what_a_kept_part_cost_counts_after_a_kill(run: Run) -> None:
    """The time of a run that was killed belongs to the stage where its work was taken over."""
    stage, made = stage_of(run), []

    def build(work: Work) -> dict:
        def slow() -> list[int]:
            made.append(1)
            time.sleep(0.3)
            return [1, 2]

        assert work.part("rows", slow) == [1, 2]
        assert torch.equal(work.kept("table", lambda: torch.ones(2)), torch.ones(2))
        if len(killed) == 0:
            killed.append(1)
            raise KeyboardInterrupt
        return {}

    killed: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        stage.ensure(build)
    stage.ensure(build)
    assert made == [1], "taken over"
    assert 0.3 <= stage.result()["seconds"] < 5


@pytest.mark.parametrize("moment", ["the rename fails", "killed before it"])
def test_a_finished_stage_that_could_not_be_published_is_not_run_again(
    moment: str, make_model: Callable, eager: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*asked: object, **how: object) -> None:
        if moment == "killed before it":
            raise KeyboardInterrupt
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_lib.files.publish", fail)
        with pytest.raises((UserError, KeyboardInterrupt)):
            eager.ensure(lambda work: {"answer": 42})

    def never(work: Work) -> dict:
        raise AssertionError("run again")

    assert eager.ensure(never).result()["answer"] == 42
    assert not list(eager.path.parent.glob("*.partial"))


def test_a_copy_that_ends_halfway_is_made_again(
    eager: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rename, and the disk fills up: the target is half there, and without its DONE."""
    copytree, copies = shutil.copytree, []

    def full(source: Path, target: Path, **how: object) -> None:
        copies.append(1)
        if len(copies) == 1:
            Path(target).mkdir()
            (Path(target) / "half").write_text("x")
            raise shutil.Error([(str(source), str(target), "No space left on device")])
        copytree(source, target, **how)

    def refuse(*asked: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(UserError, match="can be written no more"):
        eager.ensure(lambda work: {"answer": 42})
    assert not eager.done
    assert eager.ensure(lambda work: {}).result()["answer"] == 42
    assert not (eager.path / "half").exists()


def test_what_a_killed_save_left_is_no_part_of_the_next_state(
    make_model: Callable, eager: Stage
) -> None:
    train_a_little(make_model, eager, die_at=1)
    for slot in eager.path.parent.glob("*.partial/checkpoint-?"):
        (slot / "progress.json.new").write_text("half of it")
    train_a_little(make_model, eager, die_at=3)
    assert len(train_a_little(make_model, eager)) == 2, "goes on from step 3"


def test_the_state_that_was_gone_on_from_is_overwritten_last(
    make_model: Callable, eager: Stage, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one is damaged, and the next save is killed: the older one has to be there."""
    whole = train_a_little(make_model, stage_of(run))
    train_a_little(make_model, eager, die_at=2)
    os.truncate(newest(eager) / "state.safetensors", 100)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_lib.checkpoints._write", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_a_little(make_model, eager)
    assert train_a_little(make_model, eager) == whole[1:]


def test_metrics_are_cut_by_their_step(eager: Stage) -> None:
    """A stage of one's own may log now and then, or never."""

    def build(work: Work, die: bool) -> dict:
        accelerator = make_accelerator("fp32")
        for step in work.steps(8, accelerator):
            if step % 2 == 0:
                work.log(step, 1, {})
            if die and step == 5:
                raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        eager.ensure(lambda work: build(work, True))
    eager.ensure(lambda work: build(work, False))
    assert [row["step"] for row in eager.metrics()] == [0, 2, 4, 6]


def test_a_stage_that_logs_nothing_resumes(eager: Stage) -> None:
    steps: list[int] = []

    def build(work: Work) -> dict:
        for step in work.steps(4, make_accelerator("fp32")):
            steps.append(step)
            if steps == [0, 1, 2]:
                raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        eager.ensure(build)
    eager.ensure(build)
    assert steps == [0, 1, 2, 2, 3]
