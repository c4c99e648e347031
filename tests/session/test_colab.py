"""A session on Colab: what is chosen, what is asked, what is said; `google.colab` is a stub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from IPython.core.error import StdinNotImplementedError

from rlhf_lib.session import colab, probe
from rlhf_lib.session.counted import Lengths
from rlhf_lib.session.forecast import Forecast, Rate
from rlhf_lib.session.work import Sizes

KINDS = ("sft", "reward_model", "ppo", "grpo", "dpo", "generation")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hosted session without a GPU; `answer`: what the user types."""
    state: dict[str, Any] = {"answer": "y", "asked": [], "mounted": []}

    def mount(place: str) -> None:
        state["mounted"].append(place)
        (Path(place) / "MyDrive").mkdir(parents=True)

    def answer(question: str) -> str:
        state["asked"].append(question)
        if isinstance(state["answer"], BaseException):
            raise state["answer"]
        return state["answer"]

    drive = ModuleType("google.colab.drive")
    drive.mount = mount  # type: ignore[attr-defined]
    for name, module in {
        "google": ModuleType("google"),
        "google.colab": ModuleType("google.colab"),
        "google.colab.drive": drive,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    rates = {kind: Rate(1.0, 0.0, 0.0) for kind in KINDS}
    found = Forecast(rates, Sizes(1, 1), Lengths(1.0, 1.0), 60.0)
    monkeypatch.setattr(probe, "of_machine", lambda profile: found)
    monkeypatch.chdir(tmp_path)
    return state


def begin(notebook: str = "01_dataset", **changes: object) -> tuple[str, str]:
    asked: dict[str, Any] = {"profile": "laptop", "seed": 0, "run_dir": "runs"}
    return colab.begin(notebook, overrides="", **(asked | changes))


def test_runs_go_to_drive_if_the_user_wants_it(
    session: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, folder = begin()
    assert (profile, folder) == ("laptop", str(tmp_path / "drive" / "MyDrive/rlhf_lib/runs"))
    assert session["mounted"] == [str(tmp_path / "drive")]
    said = capsys.readouterr().out
    assert "Runtime, Change runtime type, T4 GPU" in said
    assert f"Runs are kept on your Drive, in {folder}." in said
    assert "This chapter reads the pairs, and trains nothing." in said
    begin()
    assert len(session["asked"]) == 1, "a drive that is mounted is not asked for again"


def test_what_a_chapter_trains_first_is_told_in_minutes(
    session: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin("02_reward_model", profile="smoke")
    assert "has to train first takes a minute or less here." in capsys.readouterr().out
    rates = {kind: Rate(200.0, 0.0, 0.0) for kind in KINDS}
    slow = Forecast(rates, Sizes(1, 1), Lengths(1.0, 1.0), 2.0)
    monkeypatch.setattr(probe, "of_machine", lambda profile: slow)
    begin("02_reward_model", profile="smoke")
    # the reward model, that of unbiased labels, and the curve
    assert "has to train first takes about 10 minutes here." in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["n", "", EOFError(), StdinNotImplementedError("no stdin")])
def test_without_drive_it_says_what_will_be_lost(
    answer: object, session: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    session["answer"] = answer
    assert begin() == ("laptop", "runs")
    assert not session["mounted"]
    assert "no other chapter finds them" in capsys.readouterr().out


def test_a_drive_that_cannot_be_mounted_is_said_and_runs_stay_here(
    session: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(place: str) -> None:
        raise ValueError("mount failed")

    monkeypatch.setattr(sys.modules["google.colab.drive"], "mount", refuse)
    assert begin() == ("laptop", "runs")
    said = capsys.readouterr().out
    assert "Drive could not be mounted: mount failed" in said
    assert "no other chapter finds them" in said


def test_a_drive_that_was_unmounted_is_mounted_again(session: dict, tmp_path: Path) -> None:
    """The cell is run once more: RUN_DIR is what it chose before."""
    folder = begin()[1]
    shutil.rmtree(tmp_path / "drive")
    assert begin(run_dir=folder)[1] == folder
    assert len(session["mounted"]) == 2


def test_a_folder_of_the_user_s_own_is_kept(session: dict, tmp_path: Path) -> None:
    assert begin(run_dir=str(tmp_path / "mine"))[1] == str(tmp_path / "mine")
    assert not session["asked"]


@pytest.mark.parametrize(("asked", "chosen"), [("laptop", "t4"), ("smoke", "smoke")])
def test_a_gpu_means_t4_unless_another_profile_was_chosen(
    asked: str,
    chosen: str,
    session: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(colab.Study, "open", lambda *a: None)
    monkeypatch.setattr(colab, "outlook", lambda study, notebook: "")
    assert begin(profile=asked)[0] == chosen
    assert f"GPU: Tesla T4. PROFILE is '{chosen}'" in capsys.readouterr().out
