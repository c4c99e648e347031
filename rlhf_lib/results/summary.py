"""From the stages of all seeds to one `results.json`: every number that the report states.

runs/<profile>/evaluation-<hash12>/   results.json frontier.csv samples/ DONE
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from rlhf_lib import catalogue
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.measure import endpoint
from rlhf_lib.measure.statistics import over_seeds
from rlhf_lib.results.frontier import early_stops, frontier
from rlhf_lib.results.opinions import second_opinion
from rlhf_lib.results.policies import Samples, compared, needs, overoptimisation, policies
from rlhf_lib.results.probes import probe_table
from rlhf_lib.results.rankings import reward_model_summary
from rlhf_lib.runs import Run, Stage, read_jsonl, source_hash, write_json, write_jsonl
from rlhf_lib.runtime import environment
from rlhf_lib.settings import as_dict, content_hash

Stages = Mapping[str, Stage]


def summarise(runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData) -> Path:
    """Collect the finished stages of all seeds; returns the published evaluation folder."""
    profile = runs[0].profile
    hashes = [[stage.hash for stage in seed.values()] for seed in stages]
    settings = as_dict(profile.evaluation), as_dict(profile.endpoint)
    key = content_hash([*hashes, source_hash(__name__), *settings])
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
    frontier(runs, stages).to_csv(work / "frontier.csv", index=False)
    write_json(work / "results.json", _results(runs, stages, data, samples))
    (work / "DONE").write_text(key + "\n")
    if folder.exists():  # a folder that lost its DONE: whatever it holds is not whole
        shutil.rmtree(folder)
    return work.rename(folder)


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
    runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData, samples: Samples
) -> dict:
    profile, resamples = runs[0].profile, samples.bootstrap
    pairs = compared(samples.measured(catalogue.candidates()))  # all are one family
    kind, colon, place = profile.data.source.partition(":")
    results = {
        "profile": profile.name,
        "seeds": [run.seed for run in runs],
        "settings": as_dict(profile),
        "source": kind + colon + Path(place).name,
        "model": profile.model.name,
        "deciding": samples.deciding,
        "data": data.audit,
        "reward_model": reward_model_summary(stages, data, resamples),
        "policies": policies(samples),
        "comparisons": samples.compare(pairs, samples.deciding),
        "needs": needs(samples, _minutes(stages)),
        "heldout": {
            "what": stages[0]["evaluate"].result()["heldout"],
            "texts": len(samples.heldout[0]),
            "chosen_prompts": len(samples.chosen[0]),
        },
        "overoptimisation": overoptimisation(samples),
        "early_stops": early_stops(runs, stages),
        "second_opinion": second_opinion(stages, resamples),
        "best_of_n": _best_of_n(stages),
        "probes": probe_table(stages, data.truth, resamples),
        "cost": _cost(stages),
        "environment": environment(),
        "stages": {
            str(run.seed): {name: stage.hash for name, stage in seed.items()}
            for run, seed in zip(runs, stages, strict=True)
        },
    }
    if profile.endpoint.url:  # asked once a reply: the cache beside the runs keeps what it said
        rows = {name: per_seed[0] for name, per_seed in samples.rows.items()}
        cache = runs[0].root / "judge-cache"
        results["endpoint"] = endpoint.win_rates(profile.endpoint, rows, cache, resamples)
    return results


def _minutes(stages: Sequence[Stages]) -> dict[str, list[float]]:
    """Minutes that each candidate trains in each seed; what learns from rewards pays for them."""
    minutes = {}
    for name in (name for name in catalogue.candidates() if name in stages[0]):
        paid = (name, "reward_model") if catalogue.record(name).rewarded else (name,)
        seconds = [sum(seed[part].result()["seconds"] for part in paid) for seed in stages]
        minutes[name] = [value / 60 for value in seconds]
    return minutes


def _best_of_n(stages: Sequence[Stages]) -> dict:
    curves = [seed["evaluate"].result()["best_of_n"] for seed in stages]
    table: dict[str, list[dict]] = {kind: [] for kind in curves[0]}
    for kind, rows in table.items():
        for points in zip(*(curve[kind] for curve in curves), strict=True):
            measured = [key for key in ("proxy", "gold", "judge") if key in points[0]]
            rewards = {key: over_seeds([point[key] for point in points]) for key in measured}
            rows.append({"n": points[0]["n"], "kl": points[0]["kl"]} | rewards)
    return table


def _cost(stages: Sequence[Stages]) -> dict:
    """Wall-clock seconds, peak memory and tokens of each stage, over the seeds that have it."""
    cost = {}
    for name in stages[0]:
        results = [seed[name].result() for seed in stages if name in seed]
        cost[name] = {
            key: over_seeds([float(r[key]) for r in results])
            for key in ("seconds", "peak_memory_gb", "num_tokens")
        }
        phases = pd.DataFrame([r["phases"] for r in results]).fillna(0)
        cost[name]["phases"] = phases.mean().to_dict()
    return cost
