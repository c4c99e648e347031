"""Ways of doing a study's jobs: what is measured of them, and what is reckoned on paper."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.predict import gpt2_sizes
from rlhf_lib.profiles import load_profile
from rlhf_lib.study.schedule import Job

GPU = json.loads(Path("benchmarks/results/gpu.json").read_text())


def job(name: str, *needs: str) -> Job:
    return Job("stage", name, needs=tuple(f"seed 0: {need}" for need in needs))


def test_workers_take_what_may_begin_in_the_order_of_the_plan() -> None:
    hours = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.0}
    jobs = [job("a"), job("b"), job("c", "a"), job("d", "a", "b")]
    assert engines.side_by_side(jobs, hours, 1) == 7
    # a | b to 1 and 2, c from 1 to 4, d from 2 to 3
    assert engines.side_by_side(jobs, hours, 2) == 4
    assert engines.side_by_side(jobs, hours, 8) == 4, "no more can be done than the longest chain"
    assert engines.side_by_side([job("x"), job("y", "x")], {"x": 2.0}, 3) == 2


def test_eight_together_divide_the_work_and_add_what_travels() -> None:
    profile = load_profile("full", ["data.train_pairs=160000"])
    steps = profile.dpo.optimizer_steps(160_000)
    bytes_moved = steps * 2 * 7 / 8 * 4 * sum(gpt2_sizes())
    expected = 8.0 / 8 + bytes_moved / engines.LINK / 3600
    assert engines.shared_out(profile, "dpo", {"dpo": 8.0}) == pytest.approx(expected)
    assert engines.shared_out(profile, "evaluate", {"evaluate": 8.0}) == 1.0, "nothing is learnt"


def test_parts_of_a_stage_add_up() -> None:
    rows = [
        {"stage": "rejection_sft: samples", "hours": 1.0},
        {"stage": "rejection_sft: training", "hours": 0.5},
        {"stage": "unknown", "hours": None},
    ]
    assert engines.by_stage(rows) == {"rejection_sft": 1.5, "unknown": 0.0}


def test_the_estimate_is_of_the_gpu_that_was_measured() -> None:
    said = engines.on_paper(GPU)
    assert "rates measured on one NVIDIA H200" in said
    assert "160,000 pairs" in said
    table = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][2:]
    for name, *cells in table:
        one, together, ray = (float(cell.strip().removesuffix(" h")) for cell in cells)
        assert one > ray >= together, name
        assert one / 8 <= together + 0.05


def test_each_way_is_a_command_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[list[str]] = []

    def watched(command: list[str]) -> tuple[float, float]:
        asked.append(list(command))
        return 60.0 * len(asked), 1.5

    monkeypatch.setattr(engines, "watched", watched)
    out = tmp_path / "engines.json"
    monkeypatch.setattr(sys, "argv", ["engines", "--seeds", "3", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        engines.app()
    assert not ended.value.code
    assert [way["seconds"] for way in json.loads(out.read_text())["ways"]] == [
        60,
        120,
        180,
        240,
        300,
    ]
    given = ("jobs=1", "jobs=2", "jobs=1 engine=ray", "jobs=2 engine=ray", "jobs=1")
    assert [command[-1] for command in asked] == [f"seeds=3 {settings}" for settings in given]
    assert "torch.distributed.run" in asked[-1]
    assert len({command[-2] for command in asked}) == 5
    assert "| two processes side by side | 2.0 | 0.50 | 1.5 |" in capsys.readouterr().out
