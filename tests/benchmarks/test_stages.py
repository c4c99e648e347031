"""CPU-seconds of two codes: each is asked for the same stages, and what is kept as they end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import stages
from benchmarks.text import summary

CODE = """
import time

class Study:
    @classmethod
    def open(cls, profile, seed, folder, overrides):
        assert (profile, seed, overrides) == ("laptop", 1, "a.b=1"), overrides
        return cls()

    def stage(self, name):
        if name == "wrong":
            raise SystemExit(3)
        start = time.process_time()
        while time.process_time() - start < {seconds}:
            pass
"""


def checkout(folder: Path, seconds: float) -> Path:
    """A repository of one module, whose every stage takes so long."""
    (folder / "rlhf_lib" / "study").mkdir(parents=True)
    (folder / "rlhf_lib" / "study" / "stages.py").write_text(CODE.format(seconds=seconds))
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_both_codes_are_asked_and_what_has_ended_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before, after = checkout(tmp_path / "old", 0.6), checkout(tmp_path / "new", 0.2)
    out = tmp_path / "stages.json"
    stages.main(before, after, only="sft,ppo", overrides="a.b=1", out=out)
    found = json.loads(out.read_text())
    old, new = found["cpu_seconds"]
    assert list(old) == list(new) == ["sft", "ppo"]
    assert all(value == pytest.approx(0.6, abs=0.15) for value in old.values())
    assert all(value == pytest.approx(0.2, abs=0.15) for value in new.values())
    assert len(set(found["commits"])) == 2
    assert "| all | 1 | 0 |" in summary(found)
    assert "| sft | 1 | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="wrong ended with 3"):
        stages.main(before, after, only="sft,wrong,ppo", overrides="a.b=1", out=out)
    assert list(json.loads(out.read_text())["cpu_seconds"][0]) == ["sft"]
