"""Device errors, found without a device: all methods on one that is pretended."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import train_stage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def given(tiny_data: Any) -> Any:
    asked = {"evaluation": tiny_data.prompts["validation"][:3]}
    return replace(tiny_data, prompts=tiny_data.prompts | asked)


@pytest.fixture(scope="module")
def elsewhere(
    given: Any, make_run: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "given.pickle").write_bytes(pickle.dumps((make_run(folder), given)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.elsewhere", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_method_runs_there_and_learns_the_same(
    elsewhere: dict, given: Any, make_run: Callable, tmp_path: Path
) -> None:
    names = {"sft", "reward_model", "dpo", "dpo_kto", "ppo", "ppo_shared", "grpo", "grpo_kl"}
    assert elsewhere["losses"].keys() == names | {"rejection_sft"}
    run = make_run(tmp_path)
    for name in ("sft", "reward_model"):
        here = [row["loss"] for row in train_stage(run, name, given).metrics()]
        assert elsewhere["losses"][name] == pytest.approx(here, abs=1e-5)
    steps = {name: len(losses) for name, losses in elsewhere["losses"].items()}
    assert all(count >= 2 or name == "rejection_sft" for name, count in steps.items()), steps


def test_what_somebody_forgot_to_move_is_found(elsewhere: dict) -> None:
    unseen = [name for name, raised in elsewhere["raised"].items() if "pretend" not in raised]
    assert not unseen, {name: elsewhere["raised"][name] for name in unseen}
    assert len(elsewhere["raised"]) >= 10
