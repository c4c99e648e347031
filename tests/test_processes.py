"""Several processes compute what one does: gradients, weights, and what they go on from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_lib import processes
from rlhf_lib.files import read_jsonl
from rlhf_lib.settings import UserError
from tests.three_steps import METHODS

ROOT = Path(__file__).parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node", "2"


def start(together: bool, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """A module of ours as a program, alone or as two processes."""
    how = [sys.executable, *(TORCHRUN if together else ()), "-m", *map(str, arguments)]
    ended = subprocess.run(how, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert not check or ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What one process finds, and what each of two does."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    start(False, "tests.three_steps", one)
    start(True, "tests.three_steps", two)
    return [
        load_file(path / f"{rank}.safetensors") for path, rank in ((one, 0), (two, 0), (two, 1))
    ]


def furthest(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_gradients_of_one(name: str, found: list[dict[str, Tensor]]) -> None:
    alone, *both = found
    for other in both:
        keys = [key for key in alone if key.startswith(f"float64/{name}/gradient/")]
        assert len(keys) == {"ppo": 24, "ppo_shared": 12, "grpo": 6}.get(name, 3)
        assert all(furthest(alone[key], other[key]) < 1e-9 for key in keys)
        first = f"float32/{name}/gradient/0"  # later ones are of weights that have drifted apart
        assert alone[first].abs().max() > 0
        assert furthest(alone[first], other[first]) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_the_same_weights_and_say_the_same(
    name: str, found: list[dict[str, Tensor]]
) -> None:
    alone, one, other = found
    weights, told = f"float64/{name}/weights", f"float64/{name}/told"
    assert (alone[weights] - one[weights]).abs().max() < 1e-6
    assert torch.allclose(alone[told], one[told], rtol=1e-5, atol=1e-9)
    for key in (weights, told, f"float32/{name}/weights"):
        assert torch.equal(one[key], other[key]), "of two, both are one to the last bit"


def test_what_processes_share(found: list[dict[str, Tensor]]) -> None:
    alone, *both = ({k[7:]: v.tolist() for k, v in f.items() if k[:6] == "shared"} for f in found)
    assert alone == {
        "told": [10, 1], "told alone": [0], "gathered": [0], "summed": [1, 0],
        "gradients": [[1, 1], [5, 5]], "dealt": [0, 1, 2, 3, 4, 5, 6],
    }  # fmt: skip
    for rank, shared in enumerate(both):
        assert shared == {
            "told": [10, 1 - rank], "told alone": [0], "gathered": [0, 1], "summed": [2, 1],
            "gradients": [[3, 3], [5, 5]], "dealt": [[0, 1, 2, 6], [3, 4, 5]][rank],
        }  # fmt: skip


def test_nobody_goes_without_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(rows: int, size: int, count: int) -> list[list[int]]:
        monkeypatch.setattr(processes, "count", lambda: count)
        dealt = []
        for rank in range(count):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            parts = processes.dealt(lambda r, s: [r[i : i + s] for i in range(0, len(r), s)],
                                    list(range(rows)), size=size)  # fmt: skip
            dealt.append([row for part in parts for row in part])
        return dealt

    assert shares(8, 64, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for rows, count in ((5, 4), (9, 4), (7, 2), (4, 4)):
        assert all(shares(rows, 64, count)), f"{rows} rows for {count} processes"
    assert shares(3, 64, 4) == [[0], [1], [2], []]
    assert shares(0, 64, 2) == [[], []]
    assert shares(64, 8, 1) == [list(range(64))]


def test_what_one_process_does_is_refused_where_there_are_more() -> None:
    """Each would read standard input, hold the lock of a matrix, or ask a judge that costs."""
    ended = start(True, "rlhf_lib", "matrix", "grid.yaml", check=False)
    assert "error: matrix is done by one process: leave torchrun" in ended.stderr
    ended = start(True, "rlhf_lib", "run", "--fits", "1h", "--profile", "smoke", check=False)
    assert "error: --fits is done by one process" in ended.stderr


def test_random_numbers_that_a_reward_draws_are_the_same_for_all(tmp_path: Path) -> None:
    """One process asks the user's function; what it draws is drawn for both."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef some(prompts, replies):\n    return torch.rand(len(replies))\n"
    )
    asked = "ppo", "--profile", "smoke", "--set", f"ppo.reward={tmp_path}/mine.py:some"
    found = []
    for together in (False, True):
        folder = tmp_path / str(together)
        start(together, "rlhf_lib", *asked, "--run-dir", folder)
        found.append(next(folder.glob("smoke/seed-0/ppo-*/metrics.jsonl")))
    for alone, both in zip(*map(read_jsonl, found), strict=True):
        assert both["reward"] == pytest.approx(alone["reward"], rel=1e-4)
        assert both["num_tokens"] == alone["num_tokens"]
    left = [path.name for path in (tmp_path / "True").rglob("process-*")]
    assert not left, "the second process leaves nothing behind"


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_to_be_shared_out_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"{name}, .* leave --use_{name.lower()} out"):
        processes.begin()


SMOKE = "--profile", "smoke", "--set", "checkpoint_minutes=0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO's stage, run by one process to its end."""
    folder = tmp_path_factory.mktemp("whole")
    start(False, "rlhf_lib", "ppo", *SMOKE, "--run-dir", folder)
    return next(p for p in folder.glob("smoke/seed-0/ppo-*") if p.is_dir())


@pytest.mark.parametrize("together", [True, False])
def test_a_stage_goes_on_with_another_number_of_processes(
    together: bool, whole: Path, tmp_path: Path
) -> None:
    """Begun by two and ended by one, and the other way round."""
    folder = tmp_path / "smoke" / "seed-0"
    folder.mkdir(parents=True)
    for name in ("sft", "reward_model"):
        needed = next(p for p in whole.parent.glob(f"{name}-*") if p.is_dir())
        shutil.copytree(needed, folder / needed.name)
    asked = "ppo", *SMOKE, "--run-dir", tmp_path
    assert start(together, "tests.dying", 1, *asked, check=False).returncode
    (partial,) = folder.glob("ppo-*.partial")
    assert len((partial / "metrics.jsonl").read_text().splitlines()) == 2
    start(not together, "rlhf_lib", *asked)
    (stage,) = (path for path in folder.glob("ppo-*") if path.is_dir())
    assert stage.name == whole.name

    logs = (read_jsonl(path / "metrics.jsonl") for path in (stage, whole))
    for row, expected in zip(*logs, strict=True):
        for key in ("reward", "kl", "entropy", "loss/policy_avg", "grad_norm", "num_tokens"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key
        assert row["flops"] == pytest.approx(expected["flops"], rel=1e-2)
    weights, others = (load_file(p / "model" / "model.safetensors") for p in (stage, whole))
    assert all(furthest(weights[name], others[name]) < 1e-2 for name in weights)
