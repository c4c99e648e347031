"""From the stages of all seeds to one `results.json`: every number that the report states.

runs/<profile>/evaluation-<hash12>/   results.json frontier.csv samples/ failure_modes.json DONE
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_lib import judges
from rlhf_lib.config import as_dict, content_hash
from rlhf_lib.data import PreferenceData
from rlhf_lib.intervals import estimate, over_seeds, verdict
from rlhf_lib.probes import failure_modes
from rlhf_lib.runs import Run, Stage, read_jsonl, source_hash, write_json, write_jsonl
from rlhf_lib.runtime import environment

METHODS = ("ppo", "grpo", "dpo")
BASELINE = "rejection_sft"  # same samples and reward model, no policy gradient
COMPARED = (("ppo", "grpo"), ("ppo", "dpo"), ("grpo", "dpo"), *((m, BASELINE) for m in METHODS))
Stages = Mapping[str, Stage]


def summarise(runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData) -> Path:
    """Collect the finished stages of all seeds; returns the published evaluation folder."""
    profile = runs[0].profile
    key = content_hash([[s.hash for s in seed.values()] for seed in stages] + [
        source_hash("summary"), as_dict(profile.evaluation)
    ])  # fmt: skip
    folder = runs[0].root / profile.name / f"evaluation-{key[:12]}"
    if (folder / "DONE").exists():
        return folder
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "samples").mkdir(parents=True)
    rows = _load_samples(stages)
    for name, per_seed in rows.items():
        parts = zip(runs, per_seed, strict=True)
        tagged = [{"seed": run.seed, **row} for run, part in parts for row in part]
        write_jsonl(work / "samples" / f"{name}.jsonl", tagged)
    modes = _failure_modes(rows, profile.data.source, profile.evaluation.bootstrap_samples)
    write_json(work / "failure_modes.json", modes)
    frontier = _frontier(runs, stages)
    frontier.to_csv(work / "frontier.csv", index=False)
    write_json(work / "results.json", _results(runs, stages, data, rows, modes))
    (work / "DONE").write_text(key + "\n")
    if folder.exists():  # a folder that lost its DONE: whatever it holds is not whole
        shutil.rmtree(folder)
    work.rename(folder)
    return folder


def _load_samples(stages: Sequence[Stages]) -> dict[str, list[list[dict]]]:
    """policy -> one list of rows for each seed."""
    folders = [seed["evaluate"].path / "samples" for seed in stages]
    names = sorted(path.stem for path in folders[0].glob("*.jsonl"))
    return {name: [read_jsonl(folder / f"{name}.jsonl") for folder in folders] for name in names}


def _column(per_seed: list[list[dict]], key: str) -> list[np.ndarray]:
    return [np.array([row[key] for row in rows], dtype=float) for rows in per_seed]


def _results(
    runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData,
    rows: dict[str, list[list[dict]]], modes: dict,
) -> dict:  # fmt: skip
    profile = runs[0].profile
    source, samples = profile.data.source, profile.evaluation.bootstrap_samples
    judge = "gold" if source.startswith("bundled") else "proxy"
    policies = {name: _policy(rows, name, judge, samples) for name in rows}
    comparisons = {}
    for one, other in COMPARED:
        difference = [
            a - b
            for a, b in zip(_column(rows[one], judge), _column(rows[other], judge), strict=True)
        ]
        comparisons[f"{one}_minus_{other}"] = estimate(difference, samples)
    for record in comparisons.values():
        record["verdict"] = verdict(record)
    return {
        "profile": profile.name,
        "seeds": [run.seed for run in runs],
        "settings": as_dict(profile),
        "source": source.split(":")[0] + ":" + Path(source).name if ":" in source else source,
        "model": profile.model.name,
        "judge": judge,
        "data": data.audit,
        "reward_model": _reward_model(stages, data, source, samples),
        "policies": policies,
        "comparisons": comparisons,
        "overoptimisation": _overoptimisation(rows, judge, samples),
        "best_of_n": _best_of_n(stages),
        "failure_modes": modes,
        "cost": _cost(stages),
        "environment": environment(),
        "stages": {
            str(run.seed): {name: stage.hash for name, stage in seed.items()}
            for run, seed in zip(runs, stages, strict=True)
        },
    }


def _policy(rows: dict, name: str, judge: str, samples: int) -> dict:
    """All measures of one policy; differences and wins are paired by prompt, a tie half a win."""
    own = rows[name]
    record = {
        key: estimate(_column(own, key), samples)
        for key in ("proxy", "gold", "kl", "length", "finished")
        if key in own[0][0]
    }
    for other in ("sft", "base"):
        pairs = list(zip(_column(own, judge), _column(rows[other], judge), strict=True))
        if name != other:
            wins = [judges.wins(a - b) for a, b in pairs]
            record[f"win_rate_vs_{other}"] = estimate(wins, samples)
    for key in ("proxy", judge):
        gains = [a - b for a, b in zip(_column(own, key), _column(rows["sft"], key), strict=True)]
        record[f"{key}_gain"] = estimate(gains, samples)
        record[f"{key}_gain"]["verdict"] = verdict(record[f"{key}_gain"])
    return record


def _overoptimisation(rows: dict, judge: str, samples: int) -> dict | None:
    """The under-regularised PPO run minus the default one, in proxy and (if known) gold reward."""
    if "ppo_low_kl" not in rows:
        return None
    record = {}
    for key in dict.fromkeys(("proxy", judge)):
        pairs = zip(_column(rows["ppo_low_kl"], key), _column(rows["ppo"], key), strict=True)
        record[key] = estimate([a - b for a, b in pairs], samples)
        record[key]["verdict"] = verdict(record[key])
    return record


def _reward_model(
    stages: Sequence[Stages], data: PreferenceData, source: str, samples: int
) -> dict:
    test = data.pairs["test"]
    preferences = []
    for seed in stages:
        scored = seed["reward_model"].samples()
        preferences.append(np.array([r["chosen_score"] - r["rejected_score"] for r in scored]))
    wrong = judges.errors(test, preferences[0], source)
    counts = pd.Series([e["category"] for e in wrong]).value_counts().to_dict()
    record = {
        "accuracy": judges.accuracies(data.pairs["train"], test, preferences, source, samples),
        "calibration": judges.calibration(preferences[0]),
        "errors": {"count": len(wrong), "by_category": counts, "first": wrong[:24]},
        "training": [seed["reward_model"].result() for seed in stages],
    }
    kinds = np.array([judges.request_kind(p.prompt_text, source) for p in test])
    won = np.mean([judges.wins(p) for p in preferences], axis=0)
    record["by_kind"] = {
        kind: estimate([won[kinds == kind]], samples) for kind in sorted(set(kinds))
    }
    if source.startswith("bundled"):
        record["ceiling"] = judges.ceiling(test, source == "bundled:control")
    if "reward_model_control" in stages[0]:
        accuracies = [seed["reward_model_control"].result()["accuracy"] for seed in stages]
        record["control_accuracy"] = _over(accuracies)
    return record


def _over(values: Sequence[float]) -> dict:
    """Over seeds where there are several; a single number has no interval."""
    if len(values) > 1:
        return over_seeds(values)
    return {"mean": values[0], "low": None, "high": None, "n": 1, "per_seed": list(values)}


def _failure_modes(rows: dict, source: str, samples: int) -> dict:
    table = {}
    for name, per_seed in rows.items():
        parts = [failure_modes(part, source) for part in per_seed]
        modes = [mode for mode in parts[0] if parts[0][mode]]  # some prompt is of its kind
        table[name] = {mode: estimate([p[mode] for p in parts], samples) for mode in modes}
    return table


def _best_of_n(stages: Sequence[Stages]) -> dict:
    curves = [seed["evaluate"].result()["best_of_n"] for seed in stages]
    table: dict[str, list[dict]] = {}
    for kind in curves[0]:
        table[kind] = []
        for points in zip(*(curve[kind] for curve in curves), strict=True):
            row = {"n": points[0]["n"], "kl": points[0]["kl"]}
            for key in ("proxy", "gold"):
                if key in points[0]:
                    row[key] = _over([point[key] for point in points])
            table[kind].append(row)
    return table


def _cost(stages: Sequence[Stages]) -> dict:
    """Wall-clock seconds, peak memory and tokens of each stage."""
    cost = {}
    for name in stages[0]:
        results = [seed[name].result() for seed in stages]
        cost[name] = {
            key: _over([float(r[key]) for r in results])
            for key in ("seconds", "peak_memory_gb", "num_tokens")
        }
    return cost


def _frontier(runs: Sequence[Run], stages: Sequence[Stages]) -> pd.DataFrame:
    """Reward against KL: final policies, best-of-n, and the way there (k1 in training)."""
    rows = []
    for run, seed in zip(runs, stages, strict=True):
        evaluated = seed["evaluate"].result()
        for name, means in evaluated["policies"].items():
            rows.append({
                "seed": run.seed, "policy": name, "kind": "final", "step": None, "kl": means["kl"],
                "proxy": means["reward"], "gold": means.get("gold"),
            })  # fmt: skip
        for kind, curve in evaluated["best_of_n"].items():
            rows += [
                {"seed": run.seed, "policy": f"best_of_n_{kind}", "kind": "best_of_n",
                 "step": p["n"], "kl": p["kl"], "proxy": p["proxy"], "gold": p.get("gold")}
                for p in curve
            ]  # fmt: skip
        for name in seed:
            if name.startswith(METHODS):
                rows += [
                    {"seed": run.seed, "policy": name, "kind": "training", "step": m["step"],
                     "kl": m["kl"], "proxy": m["reward"], "gold": m.get("gold")}
                    for m in seed[name].metrics() if "kl" in m
                ]  # fmt: skip
    return pd.DataFrame(rows)
