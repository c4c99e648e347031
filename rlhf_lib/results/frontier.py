"""Reward against KL: final policies, best-of-n, the way there, and runs at other coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.results.policies import rewards
from rlhf_lib.runs import Run, Stage, training_minutes

END = 0.25  # share of training steps whose mean is a run's end
SMOOTH = 5  # steps that a moving mean takes together


def frontier(runs: Sequence[Run], stages: Sequence[Mapping[str, Stage]]) -> pd.DataFrame:
    """One row a point: seed, policy, kind, step, kl, proxy, gold, coefficient.

    kind: "final" (all evaluation prompts, exact KL), "best_of_n" (`step` is n, analytic KL) or
    "training" (one batch of training prompts, sampled KL).
    """
    rows, coefficients = [], catalogue.coefficients()
    for run, seed in zip(runs, stages, strict=True):
        evaluated = seed["evaluate"].result()
        points = [(name, "final", None, means) for name, means in evaluated["policies"].items()]
        for kind, curve in evaluated["best_of_n"].items():
            points += [(f"best_of_n_{kind}", "best_of_n", point["n"], point) for point in curve]
        # training as a path from SFT: of the methods, and of their runs at other settings
        for name, stage in seed.items():
            if name in coefficients or name in catalogue.policies("method", "variant"):
                logged = [m for m in stage.metrics() if "kl" in m]
                points += [(name, "training", m["step"], m) for m in logged]
        for name, kind, step, point in points:
            row = {"seed": run.seed, "policy": name, "kind": kind, "step": step, "kl": point["kl"]}
            row["proxy"] = point.get("reward", point.get("proxy"))
            row |= {key: point.get(key) for key in ("gold", "judge")}
            setting = coefficients.get(name)
            row["coefficient"] = seed[name].config["settings"][setting] if setting else None
            rows.append(row)
    frame = pd.DataFrame(rows)
    return frame if frame["judge"].notna().any() else frame.drop(columns="judge")


def method(name: str) -> str:
    """`ppo` of `ppo_low_kl`; its own name for what is no further run of a method."""
    found = catalogue.CATALOGUE.get(name)
    return found.variant_of or name if found else name


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


def logged(ends: pd.DataFrame, deciding: str) -> list[str]:
    """Of the proxy and the deciding reward, those that training logged: a held-out judge is asked
    at the end alone.
    """
    return [r for r in rewards(deciding) if r in ends and ends[r].notna().all()]


def moving(steps: pd.DataFrame) -> pd.DataFrame:
    """Means over each step and those before it, SMOOTH in all: what was known by then."""
    return pd.DataFrame(steps.rolling(SMOOTH, min_periods=1).mean())


def spent(stage: Stage, reward_model: Stage, reward: str) -> pd.DataFrame:
    """What one run had used up at each step that sampled, and at its end: TFLOPs, minutes.

    What is paid outside of the steps stands before the first: models loaded, the reference's
    log-probs, and the reward model where the method learns from it. So the last row is the price of
    this seed. `reward` ("proxy" or "gold") and kl (k1) are `moving` means over steps that sampled;
    at the end those of the last one that did.
    """
    rewarded = catalogue.record(stage.name).rewarded
    paid = [part.result() for part in ([stage, reward_model] if rewarded else [stage])]
    flops = sum(result["spent"].get("flops", 0.0) for result in paid)
    minutes = sum(map(training_minutes, paid))
    steps = pd.DataFrame(stage.metrics())
    taken = steps["step_time"].cumsum() / 60
    last = len(steps) - 1
    used = {
        "TFLOPs": (flops - (steps["flops"][last] - steps["flops"])) / 1e12,
        "minutes": minutes - (taken[last] - taken),
    }
    seen = {reward: steps["reward" if reward == "proxy" else reward], "kl": steps["kl"]}
    known = moving(pd.DataFrame(seen).dropna())
    frame = pd.DataFrame(used).join(known)
    return frame.loc[known.index.union([last])].ffill().reset_index(drop=True)


def at_equal_budget(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Where each of the runs (`spent`) stood when it had used what the thriftiest used in all.

    Two budgets, TFLOPs and minutes; columns: budget, amount, method, reward and kl there, and
    `share`: the amount as a part of the run's own price. Reward and kl are not known of a run that
    had made no step by then.
    """
    rows = []
    for budget in ("TFLOPs", "minutes"):
        amount = min(float(run[budget].max()) for run in runs.values())
        for name, run in runs.items():
            within = run[run[budget] <= amount].drop(columns=["TFLOPs", "minutes"])
            there = within.iloc[-1].to_dict() if len(within) else dict.fromkeys(within, np.nan)
            share = amount / float(run[budget].max())
            rows.append(
                {"budget": budget, "amount": amount, "method": name, **there, "share": share}
            )
    return pd.DataFrame(rows)


def early_stops(runs: Sequence[Run], stages: Sequence[Mapping[str, Stage]]) -> list[dict] | None:
    """Where gold would have stopped under-regularised PPO in each seed that has it, and what was
    seen there.

    The step with the highest gold reward, a `moving` mean of SMOOTH steps (of fewer only where the
    run is shorter); what the same means of proxy, gold, KL (k1) and length were there and at the
    end. None where no gold is known.
    """
    names = {"proxy": "reward", "gold": "gold", "kl": "kl", "length": "completions/mean_length"}
    rows = []
    for run, seed in zip(runs, stages, strict=True):
        if "ppo_low_kl" not in seed:
            continue
        steps = pd.DataFrame(seed["ppo_low_kl"].metrics())
        if "gold" not in steps:
            return None
        seen = pd.DataFrame({name: steps[logged] for name, logged in names.items()})
        smooth = moving(seen)
        first = min(SMOOTH, len(seen)) - 1  # before it a mean of few steps: a lucky batch would win
        best = first + int(np.argmax(smooth["gold"][first:]))
        row = {"seed": run.seed, "step": best, "steps": len(steps)}
        for where, step in (("there", best), ("at_end", -1)):
            row |= {f"{name}_{where}": float(smooth[name].tolist()[step]) for name in names}
        rows.append(row)
    return rows
