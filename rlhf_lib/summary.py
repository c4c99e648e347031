"""From the stages of all seeds to one `results.json`: every number that the report states.

runs/<profile>/evaluation-<hash12>/   results.json frontier.csv samples/ failure_modes.json DONE
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_lib import judges, openai_judge
from rlhf_lib.config import as_dict, content_hash
from rlhf_lib.data import PreferenceData
from rlhf_lib.intervals import estimate, over_seeds
from rlhf_lib.policy_summary import (
    CANDIDATES,
    METHODS,
    SHARE,
    Rows,
    Samples,
    comparisons,
    needs,
    overoptimisation,
    policies,
)
from rlhf_lib.probes import failure_modes
from rlhf_lib.runs import Run, Stage, read_jsonl, source_hash, write_json, write_jsonl
from rlhf_lib.runtime import environment

Stages = Mapping[str, Stage]


def summarise(runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData) -> Path:
    """Collect the finished stages of all seeds; returns the published evaluation folder."""
    profile = runs[0].profile
    key = content_hash([[s.hash for s in seed.values()] for seed in stages] + [
        source_hash("summary"), as_dict(profile.evaluation), as_dict(profile.judge)
    ])  # fmt: skip
    folder = runs[0].root / profile.name / f"evaluation-{key[:12]}"
    if (folder / "DONE").exists():
        return folder
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "samples").mkdir(parents=True)
    samples = _load_samples(stages, profile.evaluation.bootstrap_samples)
    for name, per_seed in samples.rows.items():
        parts = zip(runs, per_seed, strict=True)
        tagged = [{"seed": run.seed, **row} for run, part in parts for row in part]
        write_jsonl(work / "samples" / f"{name}.jsonl", tagged)
    modes = _failure_modes(samples.rows, profile.data.source, samples.bootstrap)
    write_json(work / "failure_modes.json", modes)
    frontier = _frontier(runs, stages)
    frontier.to_csv(work / "frontier.csv", index=False)
    write_json(work / "results.json", _results(runs, stages, data, samples, modes))
    (work / "DONE").write_text(key + "\n")
    if folder.exists():  # a folder that lost its DONE: whatever it holds is not whole
        shutil.rmtree(folder)
    work.rename(folder)
    return folder


def _load_samples(stages: Sequence[Stages], resamples: int) -> Samples:
    folders = [seed["evaluate"].path for seed in stages]
    names = sorted(path.stem for path in (folders[0] / "samples").glob("*.jsonl"))
    return Samples(
        rows={n: [read_jsonl(path / "samples" / f"{n}.jsonl") for path in folders] for n in names},
        chosen=[read_jsonl(path / "chosen.jsonl") for path in folders],
        heldout=[read_jsonl(path / "heldout.jsonl") for path in folders],
        bootstrap=resamples,
    )


def _results(
    runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData, samples: Samples,
    modes: dict,
) -> dict:  # fmt: skip
    profile = runs[0].profile
    source, resamples = profile.data.source, profile.evaluation.bootstrap_samples
    results = {
        "profile": profile.name,
        "seeds": [run.seed for run in runs],
        "settings": as_dict(profile),
        "source": source.split(":")[0] + ":" + Path(source).name if ":" in source else source,
        "model": profile.model.name,
        "judge": samples.judge,
        "data": data.audit,
        "reward_model": _reward_model(stages, data, source, resamples),
        "policies": policies(samples),
        "comparisons": comparisons(samples, samples.judge),
        "needs": needs(samples, _minutes(stages)),
        "heldout": {
            "what": stages[0]["evaluate"].result()["heldout"],
            "texts": len(samples.heldout[0]),
            "chosen_prompts": len(samples.chosen[0]),
        },
        "overoptimisation": overoptimisation(samples),
        "best_of_n": _best_of_n(stages),
        "failure_modes": modes,
        "cost": _cost(stages),
        "environment": environment(),
        "stages": {
            str(run.seed): {name: stage.hash for name, stage in seed.items()}
            for run, seed in zip(runs, stages, strict=True)
        },
    }
    if profile.judge.url:  # asked once a reply: the cache beside the runs keeps what it said
        results["endpoint_judge"] = openai_judge.judge_policies(
            profile.judge, {name: rows[0] for name, rows in samples.rows.items()},
            runs[0].root / "judge-cache", resamples,
        )  # fmt: skip
    return results


def _minutes(stages: Sequence[Stages]) -> dict[str, list[float]]:
    """Minutes that each candidate trains in each seed; what learns from rewards pays for them."""
    paid = {"dpo": ("dpo",)}
    return {
        name: [
            sum(seed[part].result()["seconds"] for part in paid.get(name, (name, "reward_model")))
            / 60
            for seed in stages
        ]
        for name in CANDIDATES
    }


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


def _failure_modes(rows: Mapping[str, Rows], source: str, samples: int) -> dict:
    table = {}
    for name, per_seed in rows.items():
        parts = [failure_modes(part, source) for part in per_seed]
        modes = [mode for mode in parts[0] if parts[0][mode]]  # some prompt is of its kind
        table[name] = {
            mode: estimate([p[mode] for p in parts], samples, bounds=SHARE) for mode in modes
        }
    return table


def _best_of_n(stages: Sequence[Stages]) -> dict:
    curves = [seed["evaluate"].result()["best_of_n"] for seed in stages]
    table: dict[str, list[dict]] = {}
    for kind in curves[0]:
        table[kind] = []
        for points in zip(*(curve[kind] for curve in curves), strict=True):
            row = {"n": points[0]["n"], "kl": points[0]["kl"]}
            for key in ("proxy", "gold", "judge"):
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
        points = [(name, "final", None, means) for name, means in evaluated["policies"].items()]
        for kind, curve in evaluated["best_of_n"].items():
            points += [(f"best_of_n_{kind}", "best_of_n", point["n"], point) for point in curve]
        for name in seed:
            if name.startswith(METHODS):
                logged = [m for m in seed[name].metrics() if "kl" in m]
                points += [(name, "training", m["step"], m) for m in logged]
        rows += [
            {"seed": run.seed, "policy": name, "kind": kind, "step": step, "kl": point["kl"],
             "proxy": point.get("reward", point.get("proxy")), "gold": point.get("gold"),
             "judge": point.get("judge")}
            for name, kind, step, point in points
        ]  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame if frame["judge"].notna().any() else frame.drop(columns="judge")
