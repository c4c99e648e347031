"""Trackers: the metrics of a stage in their files as well, and nothing that asks or leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking

from rlhf_lib import trackers
from rlhf_lib.catalogue import load
from rlhf_lib.runs import Stage, Work
from rlhf_lib.settings import SettingsError

has_tensorboard = importlib.util.find_spec("tensorboard") is not None


def stage(folder: Path, tracker: str) -> Stage:
    config = {"seed": 3, "settings": {"learning_rate": 0.1}, "profile": "smoke"}
    return Stage("sft", folder / "smoke" / "seed-3", config, tracker=tracker)


def train(work: Work) -> dict:
    for step, loss in enumerate((2.0, 1.0, float("nan"))):
        work.log(step, 10, {"loss": loss, "kl": 0.5})
    return {}


@pytest.mark.skipif(not has_tensorboard, reason="tensorboard is not installed")
def test_the_files_of_tensorboard_hold_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = stage(tmp_path, "tensorboard").ensure(train)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert events.parent == tmp_path / "smoke" / "tensorboard" / f"seed-3-{done.path.name}"
    found = EventAccumulator(str(events.parent)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(0, 2.0), (1, 1.0)]
    assert [e.value for e in found.Scalars("kl")] == [0.5] * 3
    assert [row["loss"] for row in done.metrics()] == [2.0, 1.0, None]


def test_off_by_default_nothing_is_written(tmp_path: Path) -> None:
    stage(tmp_path, trackers.OFF).ensure(train)
    assert [path.name for path in (tmp_path / "smoke").iterdir()] == ["seed-3"]
    assert load("smoke").tracker == trackers.OFF


@pytest.mark.parametrize(("key", "mode"), [("", "offline"), ("secret", "online")])
def test_without_a_key_wandb_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    begun: list[dict[str, Any]] = []

    class Stand:
        def __init__(self, project: str, **named: Any) -> None:
            begun.append({"project": project, **named})

        def start(self) -> None: ...
        def log(self, values: dict, step: int) -> None:
            begun.append({"step": step, **values})

        def finish(self) -> None:
            begun.append({"finished": True})

    monkeypatch.setattr(trackers, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Stand)
    stage(tmp_path, "wandb").ensure(train)
    assert (begun[0]["project"], begun[0]["mode"]) == ("rlhf_lib", mode)
    assert begun[0]["config"] == {"learning_rate": 0.1}
    assert begun[1]["loss"] == 2.0
    assert "loss" not in begun[3], "it was no number"
    assert begun[-1] == {"finished": True}


def test_a_tracker_that_is_not_there_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"tracker=trackio: .*pip install trackio"):
        load("smoke", ["tracker=trackio"])
    with pytest.raises(SettingsError, match="tracker"):
        load("smoke", ["tracker=mlflow"])
