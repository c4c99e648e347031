"""Growth of a whole study: what is run, and the time and memory of all its processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import studies
from benchmarks.text import summary


def parent_of(megabytes: int) -> list[str]:
    """A command whose child holds so much for half a second."""
    held = f"import time; held = bytearray({megabytes * 1_000_000}); time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    return [sys.executable, "-c", parent]


def test_memory_is_that_of_all_processes() -> None:
    _, interpreters = studies.watched(parent_of(0))  # how much those hold hangs on the machine
    seconds, peak = studies.watched(parent_of(300))
    assert 0.5 < seconds < 20
    assert peak - interpreters == pytest.approx(0.3, abs=0.02)
    with pytest.raises(SystemExit, match="ended with 3"):
        studies.watched([sys.executable, "-c", "raise SystemExit(3)"])


def test_every_case_is_the_command_that_people_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[list[str]] = []

    def watched(command: list[str]) -> tuple[float, float]:
        asked.append(command)
        return 60.0 * len(asked), 0.5

    monkeypatch.setattr(studies, "watched", watched)
    out = tmp_path / "studies.json"
    studies.main(seeds="1,2", jobs="1,2", overrides="ppo.updates=1", out=out)
    settings = [[part for part in command if "=" in part] for command in asked]
    assert settings == [
        ["ppo.updates=1", f"seeds={seeds}", f"jobs={jobs}"] for seeds in (1, 2) for jobs in (1, 2)
    ]
    assert all(command[1:6] == ["-m", "rlhf_lib", "run", "--profile", "smoke"] for command in asked)
    assert len({command[-1] for command in asked}) == 4, "a folder of its own"
    found = json.loads(out.read_text())
    assert [case["seconds"] for case in found["studies"]] == [60.0, 120.0, 180.0, 240.0]
    assert "| 2 | 1 | 3.0 | 0.5 |" in summary(found)
    assert "| 2 | 1 | 3.0 | 0.5 |" in capsys.readouterr().out
