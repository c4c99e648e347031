"""Reward against KL: final policies, best-of-n, the way there, and runs at other coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rlhf_lib.results.policies import rewards
from rlhf_lib.runs import Run, Stage

# which setting of a method holds its policy near SFT
COEFFICIENTS = {"ppo": "kl_coef", "grpo": "kl_reward_coef", "rloo": "kl_reward_coef", "dpo": "beta"}
TRAINED = tuple(COEFFICIENTS)
END = 0.25  # share of training steps whose mean is a run's end
SMOOTH = 5  # steps that a moving mean takes together


def frontier(runs: Sequence[Run], stages: Sequence[Mapping[str, Stage]]) -> pd.DataFrame:
    """One row a point: seed, policy, kind, step, kl, proxy, gold, coefficient.

    kind: "final" (all evaluation prompts, exact KL), "best_of_n" (`step` is n, analytic KL) or
    "training" (one batch of training prompts, sampled KL).
    """
    rows = []
    for run, seed in zip(runs, stages, strict=True):
        evaluated = seed["evaluate"].result()
        points = [(name, "final", None, means) for name, means in evaluated["policies"].items()]
        for kind, curve in evaluated["best_of_n"].items():
            points += [(f"best_of_n_{kind}", "best_of_n", point["n"], point) for point in curve]
        for name in seed:
            if name.startswith(TRAINED):
                logged = [m for m in seed[name].metrics() if "kl" in m]
                points += [(name, "training", m["step"], m) for m in logged]
        rows += [
            {"seed": run.seed, "policy": name, "kind": kind, "step": step, "kl": point["kl"],
             "proxy": point.get("reward", point.get("proxy")), "gold": point.get("gold"),
             "judge": point.get("judge"), "coefficient": _coefficient(seed, name)}
            for name, kind, step, point in points
        ]  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame if frame["judge"].notna().any() else frame.drop(columns="judge")


def _coefficient(seed: Mapping[str, Stage], name: str) -> float | None:
    if not name.startswith(TRAINED):
        return None
    return seed[name].config["settings"][COEFFICIENTS[method(name)]]


def method(stage_name: str) -> str:
    """`ppo` of `ppo_low_kl`."""
    return stage_name.split("_")[0]


def swept(points: pd.DataFrame) -> pd.DataFrame:
    """Where each run of the first seed ends: means over the last quarter of its logged steps.

    Columns: method, policy, coefficient, kl, proxy, gold, steps. Steps are batches of training
    prompts: a run's end is known no better than these few batches allow.
    """
    training = points.query("kind == 'training' and seed == seed.min()")
    rows = []
    for name, run in training.groupby("policy", sort=False):
        end = run.sort_values("step").tail(max(1, round(END * len(run))))
        means = end[["kl", "proxy", "gold"]].astype(float).mean()
        row = {"method": method(str(name)), "policy": name, **means, "steps": len(end)}
        rows.append(row | {"coefficient": run["coefficient"].tolist()[0]})
    return pd.DataFrame(rows).sort_values(by=["method", "coefficient"], ignore_index=True)


def logged(ends: pd.DataFrame, judge: str) -> list[str]:
    """Of the proxy and the deciding reward, those that training logged: a held-out judge is asked
    at the end alone.
    """
    return [r for r in rewards(judge) if r in ends and ends[r].notna().all()]


def spent(metrics: Sequence[Mapping], reward: str) -> pd.DataFrame:
    """What one run had used up at each step that sampled: tokens in thousands, minutes.

    `reward` ("proxy" or "gold") and kl are moving means over SMOOTH of those steps, so that one
    lucky batch of prompts decides nothing.
    """
    steps = pd.DataFrame(list(metrics))
    frame = pd.DataFrame({
        "tokens": steps["num_tokens"] / 1000,
        "minutes": steps["step_time"].cumsum() / 60,
        reward: steps["reward" if reward == "proxy" else reward],
        "kl": steps["kl"],
    }).dropna(ignore_index=True)  # fmt: skip
    frame[[reward, "kl"]] = frame[[reward, "kl"]].rolling(SMOOTH, min_periods=1).mean()
    return frame


def at_equal_budget(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Where each of the runs (`spent`) stood when it had used what the thriftiest used in all.

    Two budgets, tokens and minutes; columns: budget, amount, method, reward and kl there, and the
    share of the run that this was.
    """
    rows = []
    for budget in ("tokens", "minutes"):
        amount = min(float(run[budget].max()) for run in runs.values())
        for name, run in runs.items():
            within = run[run[budget] <= amount]
            there = run.iloc[max(len(within) - 1, 0)]
            rows.append(
                {"budget": budget, "amount": amount, "method": name}
                | there.drop(["tokens", "minutes"]).to_dict()
                | {"share": amount / float(run[budget].max())}
            )
    return pd.DataFrame(rows)


def early_stops(
    runs: Sequence[Run], stages: Sequence[Mapping[str, Stage]], name: str = "ppo_low_kl"
) -> list[dict] | None:
    """Where gold would have stopped each seed's run, and what else had been seen there.

    The step with the highest gold reward, smoothed over SMOOTH steps; what proxy, gold, KL and
    length were there and at the end. None where no gold is known.
    """
    rows = []
    for run, seed in zip(runs, stages, strict=True):
        steps = pd.DataFrame(seed[name].metrics())
        if "gold" not in steps:
            return None
        seen = {"proxy": "reward", "gold": "gold", "kl": "kl", "length": "completions/mean_length"}
        smooth = steps[list(seen.values())].rolling(SMOOTH, min_periods=1, center=True).mean()
        best = int(np.argmax(smooth["gold"]))
        rows.append(
            {"seed": run.seed, "step": best, "steps": len(steps)}
            | {f"{k}_there": float(smooth[c].tolist()[best]) for k, c in seen.items()}
            | {f"{k}_at_end": float(smooth[c].tolist()[-1]) for k, c in seen.items()}
        )
    return rows
