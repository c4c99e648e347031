"""From the stages of all seeds to one `results.json`: every number that the report states.

runs/<profile>/evaluation-<hash12>/   results.json frontier.csv samples/ DONE
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import pandas as pd

from rlhf_lib import catalogue, files
from rlhf_lib.code_hash import source_hash
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.data.truth import Truth, unit_of
from rlhf_lib.files import read_jsonl, write_json, write_jsonl
from rlhf_lib.kernel import without_folders
from rlhf_lib.measure import endpoint
from rlhf_lib.measure.statistics import over_seeds
from rlhf_lib.results import best_of_n
from rlhf_lib.results.frontier import early_stops, frontier
from rlhf_lib.results.policies import Samples, needs, overoptimisation, policies, read_samples
from rlhf_lib.results.probes import probe_table
from rlhf_lib.results.rankings import reward_model_summary, second_opinion
from rlhf_lib.results.requests import attribution, gains_by_request
from rlhf_lib.runs import Run, Stage, training_minutes
from rlhf_lib.runtime import environment
from rlhf_lib.settings import as_dict, content_hash, deciding

Stages = Mapping[str, Stage]
FORMAT = 4  # of results.json: raise it when a number in it gets another meaning


def summarise(runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData) -> Path:
    """Collect the finished stages of all seeds; returns the published evaluation folder."""
    profile = runs[0].profile
    hashes = [[stage.hash for stage in seed.values()] for seed in stages]
    # all settings that a reader of results compares: no stage's hash has, for instance, `extras`
    key = content_hash([*hashes, source_hash(__name__), deciding(as_dict(profile))])
    folder = runs[0].root / profile.name / f"evaluation-{key[:12]}"
    # a second process waits, and takes what the first has made
    with files.locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "DONE").exists():
            _publish(folder, key, runs, stages, data)
        (folder / "DONE").touch()  # now the newest: what was asked for last is what is reported
    return folder


def _publish(
    folder: Path, key: str, runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData
) -> None:
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "samples").mkdir(parents=True)
    samples = _load_samples(stages, data.truth)
    for name in samples.rows:
        parts = samples.of(name).items()
        tagged = [{"seed": runs[place].seed, **row} for place, part in parts for row in part]
        write_jsonl(work / "samples" / f"{name}.jsonl", tagged)
    frontier(runs, stages).to_csv(work / "frontier.csv", index=False)
    write_json(work / "results.json", _results(runs, stages, data, samples))
    (work / "DONE").write_text(key + "\n")
    files.publish(work, folder, last="DONE")


def load_results(folder: Path) -> dict:
    """What `summarise` found, from its folder."""
    return json.loads((folder / "results.json").read_text())


def _load_samples(stages: Sequence[Stages], truth: Truth | None) -> Samples:
    folders = [seed["evaluate"].path for seed in stages]
    return Samples(
        rows=read_samples(folders),
        chosen=[read_jsonl(path / "chosen.jsonl") for path in folders],
        heldout=[read_jsonl(path / "heldout.jsonl") for path in folders],
        unit=unit_of(truth),
    )


def _results(
    runs: Sequence[Run], stages: Sequence[Stages], data: PreferenceData, samples: Samples
) -> dict:
    profile, resamples = runs[0].profile, runs[0].profile.evaluation.bootstrap_samples
    picked, prices = best_of_n.read_curves(stages), _prices(stages)
    flop, unit = _flop_unit(prices)
    asked = needs(
        samples,
        {name: price["flops"] / unit for name, price in prices.items()},
        {name: price["minutes"] for name, price in prices.items()},
    )
    results = {
        "format": FORMAT,
        "profile": profile.name,
        "seeds": [run.seed for run in runs],
        "settings": as_dict(profile),
        "source": without_folders(profile.data.source),
        "model": without_folders(profile.model.name),
        "deciding": samples.deciding,
        "data": data.audit,
        "reward_model": reward_model_summary(stages, data, resamples),
        "policies": policies(samples),
        "comparisons": asked["reward"]["comparisons"],
        "requests": gains_by_request(samples, data.truth),
        "attribution": attribution(stages, samples.unit),
        "needs": asked,
        "prices": prices,
        "flop": flop,
        "heldout": {
            "what": stages[0]["evaluate"].result()["heldout"],
            "texts": len(samples.heldout[0]),
            "chosen_prompts": len(samples.chosen[0]),
        },
        "overoptimisation": overoptimisation(samples),
        "early_stops": early_stops(runs, stages),
        "second_opinion": second_opinion(stages, samples.unit),
        "best_of_n": best_of_n.curves(picked, samples.unit),
        "best_of_n_peak": best_of_n.peak(picked, samples),
        "probes": probe_table(stages, data.truth),
        "cost": _cost(stages),
        "environment": environment(),
        "stages": {
            str(run.seed): {name: stage.hash for name, stage in seed.items()}
            for run, seed in zip(runs, stages, strict=True)
        },
    }
    if profile.endpoint.url:  # asked once a reply: the cache beside the runs keeps what it said
        rows = {name: samples.of(name)[0] for name in samples.rows}
        cache = runs[0].root / "endpoint-cache"
        results["endpoint"] = endpoint.win_rates(profile.endpoint, rows, cache) | {
            "trust": endpoint.trust(profile.endpoint, data.pairs["test"], data.truth, cache)
        }
    return results


def _prices(stages: Sequence[Stages]) -> dict[str, dict[str, float]]:
    """What each candidate's training takes, a mean over the seeds: FLOPs, tokens that it generates,
    and minutes, which are this machine's, under its load.

    What learns from rewards pays for the reward model. Measuring is in none of them.
    """
    prices = {}
    for name in (name for name in catalogue.candidates() if name in stages[0]):
        paid = (name, "reward_model") if catalogue.record(name).rewarded else (name,)
        results = [seed[part].result() for seed in stages for part in paid]
        prices[name] = {
            **{k: sum(r["spent"].get(k, 0.0) for r in results) for k in ("flops", "generated")},
            "minutes": sum(map(training_minutes, results)),
        }
    return {
        name: {key: total / len(stages) for key, total in price.items()}
        for name, price in prices.items()
    }


def _flop_unit(prices: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """The unit in which the dearest candidate's FLOPs lie between 0.1 and 100, and its size."""
    most = max(price["flops"] for price in prices.values())
    units = {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}
    return max(
        (item for item in units.items() if item[1] <= 10 * most),
        key=itemgetter(1), default=("GFLOP", 1e9),
    )  # fmt: skip


def _cost(stages: Sequence[Stages]) -> dict:
    """Wall-clock seconds, peak memory and tokens of each stage, over the seeds that have it."""
    cost = {}
    for name in stages[0]:
        results = [seed[name].result() for seed in stages if name in seed]
        cost[name] = {
            key: over_seeds([float(r[key]) for r in results])
            for key in ("seconds", "peak_memory_gb", "num_tokens")
        }
        flops = [r["spent"].get("flops", 0.0) for r in results]
        cost[name]["flops"] = over_seeds(flops)
        phases = pd.DataFrame([r["phases"] for r in results]).fillna(0)
        cost[name]["phases"] = phases.mean().to_dict()
    return cost
