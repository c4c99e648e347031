"""Reward against KL: where a run ends, where gold would have stopped it, and its coefficient."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from rlhf_lib.catalogue import CATALOGUE, Record
from rlhf_lib.profiles import load_profile
from rlhf_lib.results import summary
from rlhf_lib.results.frontier import (
    at_equal_budget,
    early_stops,
    frontier,
    logged,
    method,
    spent,
    swept,
)
from rlhf_lib.runs import Run
from rlhf_lib.runtime import MEASURING
from rlhf_lib.show import figures
from tests.made_up_study import STRONG, stages_of


def steps(policy: str, coefficient: float, seed: int = 0, count: int = 8) -> list[dict]:
    return [
        {
            "seed": seed,
            "policy": policy,
            "kind": "training",
            "step": s,
            "kl": float(s),
            "proxy": 2.0 * s,
            "gold": -1.0 * s,
            "coefficient": coefficient,
        }
        for s in range(count)
    ]


def points() -> pd.DataFrame:
    free = [
        {
            "seed": 0,
            "policy": "best_of_n_default",
            "kind": "best_of_n",
            "step": n,
            "kl": 0.1 * n,
            "proxy": 1.0 * n,
            "gold": 0.5 * n,
            "coefficient": None,
        }
        for n in (1, 2)
    ]
    runs = [*steps("grpo_strong", 0.8), *steps("grpo", 0.2), *steps("ppo", 0.2, count=3)]
    return pd.DataFrame([*runs, *steps("grpo", 0.2, seed=1, count=99), *free])


def test_a_run_ends_with_the_mean_of_its_last_quarter() -> None:
    ends = swept(points())
    assert ends["policy"].tolist() == ["grpo", "grpo_strong", "ppo"], "by method, then coefficient"
    assert ends["coefficient"].tolist() == [0.2, 0.8, 0.2]
    # steps 6 and 7 of eight, step 2 of three; the second seed's 99 steps are not asked
    assert ends["steps"].tolist() == [2, 2, 1]
    assert ends["kl"].tolist() == [6.5, 6.5, 2.0]
    assert ends["proxy"].tolist() == [13.0, 13.0, 4.0]
    assert ends["gold"].tolist() == [-6.5, -6.5, -2.0]


def cost(flops: float, seconds: float, measuring: float = 0.0) -> dict:
    return {"spent": {"flops": flops}, "seconds": seconds, "phases": {MEASURING: measuring}}


def used(name: str, flops: float, seconds: float, once: float = 0.0) -> pd.DataFrame:
    """Of a run of six steps that samples at every other; `once`: seconds beside its steps."""
    steps = [{"flops": flops * (s + 1), "step_time": seconds} for s in range(6)]
    for s in (0, 2, 4):
        steps[s] |= {"reward": 1.0 * s, "kl": 0.5 * s}
    result = cost(6 * flops, 6 * seconds + once + 600.0, measuring=600.0)
    stage: Any = SimpleNamespace(name=name, metrics=lambda: steps, result=lambda: result)
    reward_model: Any = SimpleNamespace(result=lambda: cost(2e12, 90.0, measuring=30.0))
    return spent(stage, reward_model, "proxy")


def test_what_was_spent_counts_steps_that_sampled_nothing() -> None:
    frame = used("dpo", 1e12, 60.0)
    assert frame["TFLOPs"].tolist() == [1.0, 3.0, 5.0, 6.0]
    assert frame["minutes"].tolist() == [1.0, 3.0, 5.0, 6.0]
    # running means of 0, 2, 4; the last step sampled nothing, and the run ends there
    assert frame["proxy"].tolist() == [0.0, 1.0, 2.0, 2.0]
    assert frame["kl"].tolist() == [0.0, 0.5, 1.0, 1.0]


def test_what_is_paid_once_stands_before_the_first_step() -> None:
    frame = used("ppo", 1e12, 60.0, once=30.0)
    assert frame["TFLOPs"].tolist() == [3.0, 5.0, 7.0, 8.0], "2 for the reward model"
    assert frame["minutes"].tolist() == [2.5, 4.5, 6.5, 7.5], "1 for it, and half a one to load"


def test_a_curve_ends_at_the_price(tmp_path: Path) -> None:
    stages = stages_of(Run(load_profile("smoke"), 0, tmp_path), "bundled")
    prices = summary._prices([stages])
    for name in ("ppo", "grpo", "dpo"):
        stage: Any = SimpleNamespace(name=name, result=stages[name].result)
        timed = [m | {"flops": 1e8, "step_time": 0.1} for m in stages[name].metrics()]
        stage.metrics = lambda timed=timed: timed
        end = spent(stage, stages["reward_model"], "gold").iloc[-1]
        assert end["TFLOPs"] == prices[name]["flops"] / 1e12
        assert end["minutes"] == prices[name]["minutes"]


def test_runs_are_read_where_the_thriftiest_ended() -> None:
    runs = {"ppo": used("ppo", 1e12, 60.0), "dpo": used("dpo", 3e12, 30.0)}
    table = at_equal_budget(runs).set_index(["budget", "method"])
    assert table.loc[("TFLOPs", "ppo"), ["amount", "proxy", "share"]].tolist() == [8.0, 2.0, 1.0]
    # 9 TFLOPs after its third step, the next that sampled: only its first is within 8
    assert table.loc[("TFLOPs", "dpo"), ["proxy", "share"]].tolist() == [0.0, 8.0 / 18.0]
    assert table.loc[("minutes", "dpo"), ["amount", "proxy", "share"]].tolist() == [3.0, 2.0, 1.0]
    # a minute of the reward model and one of its first step
    assert table.loc[("minutes", "ppo"), ["proxy", "share"]].tolist() == [0.0, 3.0 / 7.0]
    figure = figures.budgets(runs, "proxy")
    assert [text.get_text() for text in figure.axes[0].texts] == ["PPO", "DPO"]
    assert [axis.lines[0].get_xdata()[0] for axis in figure.axes] == [8.0, 3.0]
    assert [axis.get_xlim()[0] for axis in figure.axes] == [0.0, 0.0], "what is paid once is seen"


def test_nothing_is_known_of_a_run_that_the_budget_does_not_begin() -> None:
    runs = {"ppo": used("ppo", 1e12, 60.0), "dpo": used("dpo", 1e11, 6.0)}
    table = at_equal_budget(runs).set_index(["budget", "method"])
    assert table.loc[("TFLOPs", "ppo"), ["proxy", "kl"]].isna().all()
    assert table.loc[("TFLOPs", "ppo"), "share"] == pytest.approx(0.6 / 8)
    assert table.loc[("minutes", "dpo"), "proxy"] == 2.0


def test_training_logs_no_held_out_judge() -> None:
    ends = swept(points())
    assert logged(ends, "gold") == ["proxy", "gold"]
    assert logged(ends, "judge") == ["proxy"]
    assert logged(ends.assign(gold=None), "gold") == ["proxy"]
    assert logged(ends, "proxy") == ["proxy"]


def run_logging(gold: list[float] | None) -> Any:
    count = 11 if gold is None else len(gold)
    rows: list[dict] = [
        {"reward": float(s), "kl": 2.0 * s, "completions/mean_length": 10.0} for s in range(count)
    ]
    for row, value in zip(rows, gold or [], strict=False):
        row["gold"] = value
    return SimpleNamespace(metrics=lambda: rows)


def test_gold_stops_a_run_at_its_smoothed_best() -> None:
    gold = [6.0, 0, 0, 0, 3, 3, 3, 3, 3, 0, 0]  # a lucky first batch is not the best step
    (stop,) = early_stops([SimpleNamespace(seed=4)], [{"ppo_low_kl": run_logging(gold)}])  # type: ignore
    assert (stop["seed"], stop["step"], stop["steps"]) == (4, 8, 11)
    # means of steps 4 to 8, and of 6 to 10
    assert stop["gold_there"] == pytest.approx(3.0)
    assert (stop["proxy_there"], stop["kl_there"]) == pytest.approx((6.0, 12.0))
    assert (stop["gold_at_end"], stop["proxy_at_end"]) == pytest.approx((1.8, 8.0))
    assert stop["length_at_end"] == pytest.approx(10.0)


def test_a_run_shorter_than_the_moving_mean_stops_at_its_end() -> None:
    (stop,) = early_stops([SimpleNamespace(seed=0)], [{"ppo_low_kl": run_logging([5.0, 1.0])}])  # type: ignore
    assert (stop["step"], stop["steps"]) == (1, 2)
    assert stop["gold_there"] == stop["gold_at_end"] == 3.0


def test_equal_budgets_and_early_stops_take_the_same_means() -> None:
    gold = [0.0, 4.0, 1.0, 3.0, 5.0, 2.0, 0.0, -1.0]
    steps = [
        {"flops": 1e12 * s, "step_time": 60.0, "reward": 0.0, "kl": 0.1 * s, "gold": value}
        for s, value in enumerate(gold)
    ]
    for row in steps:
        row["completions/mean_length"] = 9.0
    run: Any = SimpleNamespace(
        name="ppo_low_kl", metrics=lambda: steps, result=lambda: cost(8e12, 480.0)
    )
    model: Any = SimpleNamespace(result=lambda: cost(0.0, 0.0))
    frame = spent(run, model, "gold")
    (stop,) = early_stops([SimpleNamespace(seed=0)], [{"ppo_low_kl": run}])  # type: ignore[list-item]
    assert stop["gold_there"] == frame["gold"][stop["step"]] == frame["gold"][4:].max()
    assert stop["kl_there"] == frame["kl"][stop["step"]]


def test_without_gold_nothing_says_where_to_stop() -> None:
    run: Any = SimpleNamespace(seed=0)
    assert early_stops([run], [{"ppo_low_kl": run_logging(None)}]) is None  # type: ignore[dict-item]


def test_each_point_has_the_coefficient_of_its_method(tmp_path: Path) -> None:
    run = Run(load_profile("smoke"), 0, tmp_path)
    found = frontier([run], [stages_of(run, "bundled")])
    training = found[found["kind"] == "training"].groupby("policy")["coefficient"].unique()
    assert {name: list(values) for name, values in training.items()} == {
        "ppo": [0.2],
        "ppo_low_kl": [0.2],
        "grpo": [0.2],
        "grpo_strong": [0.2 * STRONG],
        "dpo": [0.2],
    }
    assert found[found["kind"] == "best_of_n"]["coefficient"].isna().all()
    assert (method("rloo_strong"), method("ppo")) == ("rloo", "ppo")
    assert (method("ppo_low_kl"), method("unheard_of")) == ("ppo", "unheard_of")


def test_a_further_method_is_on_the_frontier_and_its_minutes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Record("toy", "Toy", role="method")
    monkeypatch.setitem(CATALOGUE, "toy", toy)
    run = Run(load_profile("smoke"), 0, tmp_path)
    stages = stages_of(run, "bundled")
    stages["toy"] = stages["grpo"]
    found = frontier([run], [stages])
    points = found[(found["policy"] == "toy") & (found["kind"] == "training")]
    assert points["step"].tolist() == [0, 1]
    assert points["coefficient"].isna().all(), "its record names no coefficient"
    prices = summary._prices([stages])
    assert prices["toy"] == prices["grpo"]


def test_the_figure_joins_the_ends_of_each_method() -> None:
    figure = figures.sweep(points(), ["proxy", "gold"])
    proxy, gold = figure.axes
    assert (proxy.get_ylabel(), gold.get_ylabel()) == ("proxy reward", "gold reward")
    lines = {str(line.get_label()): line.get_ydata() for line in proxy.lines}
    assert list(lines) == ["best-of-n", "GRPO", "PPO"]
    assert list(lines["GRPO"]) == [13.0, 13.0]
    assert [text.get_text() for text in proxy.texts] == ["0.2", "0.8", "0.2"]
    figure.canvas.draw()
