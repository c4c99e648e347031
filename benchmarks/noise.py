"""How much of a comparison's error is luck that a study need not have.

    python -m benchmarks.noise [--profile laptop] [--seeds 5] [--out benchmarks/results/noise.json]

The same trained policies are asked twice: each with random numbers of its own and measured from one
draw of SFT (two replies to 512 prompts), and as a study asks them (common random numbers, more
replies and prompts, SFT's mean as the baseline). Variances of the mean difference, and the smallest
true difference that each way would see: before Holm's correction, and as the first of its family;
and with how many seeds a study would see the wanted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy import stats

from benchmarks.text import noise_summary
from rlhf_lib import catalogue
from rlhf_lib.data.truth import truth_of, unit_of
from rlhf_lib.files import read_jsonl, write_json
from rlhf_lib.measure.evaluate import random_numbers, read_policy
from rlhf_lib.measure.statistics import detectable, estimate, minus
from rlhf_lib.measure.two_errors import total
from rlhf_lib.profiles import load_profile
from rlhf_lib.results.policies import Samples, compared
from rlhf_lib.runtime import environment
from rlhf_lib.study.stages import Study

PROMPTS, REPLIES = 512, 2  # of the plain way
WANTED = {"among": 0.12, "baseline": 0.15}  # of a family's differences, before the correction
LEAVE_OUT = ("sweep.stronger=0", "reward_model.curve_points=0")  # what no comparison reads


def main(
    profile: str = "laptop",
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    jobs: int = 2,
    run_dir: Path = Path("runs/noise"),
    out: Path = Path("benchmarks/results/noise.json"),
) -> None:
    """Train the seeds, ask every policy both ways, and write what the comparisons would see."""
    with get_context("spawn").Pool(jobs) as pool:
        tasks = [(profile, seed, str(run_dir)) for seed in range(seeds)]
        found = pool.starmap(ask_seed, tasks, chunksize=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    pairs = both_ways(found, unit_of(truth_of(load_profile(profile).data.source)))
    write_json(
        out, {"profile": profile, "seeds": seeds, "environment": environment(), "pairs": pairs}
    )
    print(noise_summary(json.loads(out.read_text(encoding="utf-8"))))


def both_ways(found: Sequence[tuple[dict, dict]], unit: Callable[[str], str]) -> list[dict]:
    """Each comparison, of what `ask_seed` found for the seeds; `unit`: what a prompt counts as."""
    names = [*catalogue.candidates(), "sft"]
    plain = {name: [np.array(plain[name]) for plain, _ in found] for name in names}
    study = Samples({name: [rows[name] for _, rows in found] for name in names}, [], [], unit)
    units = [study.unit(row["prompt"]) for row in study.rows["sft"][0]][:PROMPTS]
    rows = []
    for one, other in combinations(names, 2):
        gaps = [gap.mean(0) for gap in minus(plain[one], plain[other])]
        ways = {
            "plain": estimate(gaps, [units] * len(found)),
            "study": study.compare({"x": (one, other)}, "gold")["x"],
        }
        rows.append({
            "pair": f"{one}_minus_{other}", **seen(one, other, ways["study"]),
            "times_less": times_less(ways["plain"], ways["study"]),
        } | {
            way: {"mean": r["mean"], "variance": r["se"] ** 2, "errors": r["errors"],
                  "detectable": detectable(r)} for way, r in ways.items()
        })  # fmt: skip
    return rows


def times_less(plain: Mapping, study: Mapping) -> dict[str, float] | None:
    """How many times the one variance is the other, with a 95 % interval; None where one is 0.

    As of two independent estimates that know no more than the seeds' spread does, which has the
    fewest degrees of freedom: F's quantiles. Where prompts make most of an error it is too wide.
    """
    if not plain["se"] or not study["se"]:
        return None
    ratio = (plain["se"] / study["se"]) ** 2
    freedoms = [min(df for _, df in record["errors"]) for record in (plain, study)]
    low, high = (ratio / stats.f.ppf(p, *freedoms) for p in (0.975, 0.025))
    return {"mean": ratio, "low": float(low), "high": float(high)}


def seen(one: str, other: str, record: Mapping) -> dict:
    """What a comparison would see as the first of its family, and the seeds for what is wanted.

    The seeds by its own p, and by the corrected one, which a verdict goes by. More seeds make the
    error of seeds smaller, and it is known with more degrees of freedom; that of prompts stays.
    None where no number of seeds up to 50 is enough.
    """
    families = compared(catalogue.candidates())
    name = next((n for n, family in families.items() if (one, other) in family.values()), "sft")
    size = len(families.get(name, catalogue.candidates()))
    found: dict = {"family": name, "corrected": detectable(record, size)}
    if name not in WANTED:
        return found
    return found | {
        "seeds": seeds_for(WANTED[name], record["errors"]),
        "seeds_corrected": seeds_for(WANTED[name], record["errors"], size),
    }


def seeds_for(wanted: float, errors: Sequence, comparisons: int = 1) -> int | None:
    """With how many seeds a study of these errors would see a difference of this size."""
    (between, df), *rest = errors
    for seeds in range(2, 51):
        scaled = [[between * ((df + 1) / seeds) ** 0.5, seeds - 1], *rest]
        smallest = detectable({"errors": scaled, "se": total(scaled)}, comparisons)
        if smallest is not None and smallest <= wanted:
            return seeds
    return None


def ask_seed(profile: str, seed: int, run_dir: str) -> tuple[dict, dict]:
    """Gold rewards (replies, prompts) of each policy asked plainly; rows of `evaluate`."""
    study = Study.open(profile, seed, run_dir, LEAVE_OUT)
    evaluated, offer = study.stage("evaluate"), study.offer("evaluate")
    gold = offer.raters["gold"]
    prompts = study.data.prompts["evaluation"][:PROMPTS]
    plain, rows = {}, {}
    for name in (*catalogue.candidates(), "sft"):
        shape = REPLIES, len(prompts), offer.sampler.max_new_tokens
        luck = random_numbers(seed, f"noise {name}", shape).reshape(-1, shape[-1])
        policy = read_policy(offer.policies[name], offer.accelerator)
        asked = list(prompts) * REPLIES
        replies = offer.sampler.draw(policy, asked, 1.0, luck)
        plain[name] = torch.as_tensor(gold(asked, replies)).reshape(REPLIES, -1).tolist()
        rows[name] = read_jsonl(evaluated.path / "samples" / f"{name}.jsonl")
    return json.loads(json.dumps(plain)), rows


if __name__ == "__main__":
    typer.run(main)
