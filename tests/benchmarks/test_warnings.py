"""What a warning is worth: planted falls, a signal that comes before them, and noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import alarms, warnings
from rlhf_lib.data.encoding import Prompt

STEPS = 40


COEFFICIENTS = {0.0: True, 0.02: True, 0.4: False, 1.6: False}  # and whether such runs fall


def run_of(
    seed: int, falls: bool, rng: np.random.Generator, coefficient: float = 0.0
) -> dict[str, Any]:
    """Gold rises, and falls from step 25 on, or does not; `kl` moves from step 12 on where it will
    fall, `entropy` only once it has fallen, `length` is noise.
    """
    step, noise = np.arange(STEPS), lambda: 0.02 * rng.standard_normal(STEPS)
    gold = 0.02 * np.minimum(step, 20) - (0.05 * np.maximum(step - 25, 0) if falls else 0)
    columns = {
        "gold": gold + noise(),
        "kl": (0.1 * np.maximum(step - 12, 0) if falls else 0) + noise(),
        "entropy": -(0.1 * np.maximum(step - 36, 0) if falls else 0) + noise(),
        "length": rng.standard_normal(STEPS),
        "second_gap": noise(), "spread": noise(), "distance": noise(), "reward": noise(),
    }  # fmt: skip
    steps = [{k: float(v[i]) for k, v in columns.items()} for i in range(STEPS)]
    return {"seed": seed, "coefficient": coefficient, "steps": steps}


def made_up(seeds: int = 6, rng: Any = None) -> list[dict]:
    rng = rng or np.random.default_rng(3)
    cells = [(seed, *cell) for seed in range(seeds) for cell in COEFFICIENTS.items()]
    return [run_of(seed, falls, rng, coefficient) for seed, coefficient, falls in cells]


def test_a_fall_comes_where_gold_is_so_far_below_its_best() -> None:
    rising = [0.1 * i for i in range(10)]
    assert alarms.fall(rising) is None
    assert alarms.fall([*rising, 0.9, 0.9, 0.9]) is None
    fallen = [1.0] * 10 + [0.1] * 10
    # means of five: 0.82, 0.64, and 0.46 at the thirteenth update
    assert alarms.fall(fallen) == 12
    assert alarms.fall([1.0] * 10 + [0.5] * 5 + [1.0] * 10) is None, "it came back"


def test_an_alarm_is_in_time_or_late_or_false() -> None:
    change = alarms.moved([0.0] * 6 + [1.0] * 10, 1)
    assert alarms.first_alarm(change, 0.5) == 8
    assert alarms.first_alarm(change, 1.0) is None
    assert alarms.outcome(change, 0.5, 12) == (True, 4)
    assert alarms.outcome(change, 0.5, 8) == (False, 0), "not before the fall"
    assert alarms.outcome(change, 0.5, None) == (True, 0)
    assert alarms.moved([0.0] * 5 + [-1.0] * 5, 0).max() == 1, "either way"
    assert alarms.moved([0.0] * 5 + [-1.0] * 5, 1).max() == 0


def test_a_signal_that_comes_before_the_fall_is_told_from_noise_and_from_one_that_comes_late() -> (
    None
):
    found = alarms.score(made_up())
    assert (found["falls"], found["quiet"]) == (12, 12)
    kl, late, noise = (found["signals"][key] for key in ("kl", "entropy", "length"))
    assert kl["warned"]["mean"] == 1
    assert kl["false"]["mean"] == 0
    assert len(kl["leads"]) == 12
    assert all(3 <= lead <= 20 for lead in kl["leads"])
    for signal in (late, noise, found["signals"]["spread"]):
        assert signal["warned"]["mean"] - signal["false"]["mean"] < 0.5, signal["name"]


def test_a_signal_that_knows_the_coefficient_again_warns_of_nothing() -> None:
    """Runs of one coefficient all fall or none does: that alone is no warning."""
    runs = made_up()
    for run in runs:
        for number, step in enumerate(run["steps"]):
            step["kl"] = number * {0.0: 5.0, 0.02: 1.0, 0.4: 4.0, 1.6: 2.0}[run["coefficient"]]
    kl = alarms.score(runs)["signals"]["kl"]
    assert kl["warned"]["mean"] - kl["false"]["mean"] <= 0


def test_noise_alone_seldom_falls() -> None:
    rng = np.random.default_rng(1)
    fell = [alarms.fall(0.15 * rng.standard_normal(50)) is not None for _ in range(2000)]  # type: ignore[arg-type]
    assert np.mean(fell) < 0.02


def test_no_run_is_judged_by_a_threshold_that_it_chose() -> None:
    """With noise alone, thresholds that saw the run itself would look better than chance."""
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(40):
        noise = alarms.score(made_up(3, rng))["signals"]["length"]
        gaps.append(noise["warned"]["mean"] - noise["false"]["mean"])
    # what is left out chose against itself, so the mean is a little below 0
    assert np.mean(gaps) < 3 * np.std(gaps) / np.sqrt(len(gaps)), "better than chance"


def test_numbers_table_and_figure_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs = {(run["seed"], run["coefficient"]): run["steps"] for run in made_up(3)}

    def train(profile: str, seed: int, run_dir: str, overrides: list[str], *name: str) -> list:
        if name:
            return []
        assert overrides[:2] == ["ppo.updates=40", "methods=benchmarks.warnings:WATCHED"]
        return runs[seed, float(overrides[-1].removeprefix("ppo.kl_coef="))]

    def pool(profile: Any) -> Any:
        from concurrent.futures import ThreadPoolExecutor
        from contextlib import nullcontext

        return nullcontext((ThreadPoolExecutor(1), 1))

    monkeypatch.setattr(warnings, "train", train)
    monkeypatch.setattr(warnings, "worker_pool", pool)
    out = tmp_path / "warnings.json"
    warnings.main(3, "0,0.02,0.4,1.6", 40, run_dir=tmp_path, out=out)
    found = json.loads(out.read_text())
    assert len(found["runs"]) == 12
    assert found["warnings"] == json.loads(json.dumps(alarms.score(found["runs"])))
    said = capsys.readouterr().out
    assert "3 seeds and kl_coef 0, 0.02, 0.4, 1.6. The gold reward ended 0.4 or more" in said
    assert "below its best in 6 of 12 runs" in said
    assert "| KL to SFT | 100% [" in said
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".svg", ".png"}


def test_signals_are_what_they_are_called(tiny_tokenizer: Any, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"]
    prompts = [Prompt("", pair.prompt) for pair in pairs[:4]]
    responses = [pair.chosen for pair in pairs[:4]]
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rollout = SimpleNamespace(responses=responses, scores=scores)
    sampler: Any = SimpleNamespace(tokenizer=tiny_tokenizer)
    members: list[Callable] = [lambda p, r: scores - 0.5, lambda p, r: scores + 1.0]
    look = warnings.watcher(sampler, pairs, members)
    seen = look(prompts, rollout)  # type: ignore[arg-type]
    assert seen["second_gap"] == pytest.approx(0.5)
    assert seen["spread"] == pytest.approx(float(torch.tensor([0.0, -0.5, 1.0]).std()))
    near = seen["distance"]  # they stand in the pairs, but for an end token's name
    rollout.responses = [[31, 31, 31]] * 4
    assert look(prompts, rollout)["distance"] > near + 0.2  # type: ignore[arg-type]
