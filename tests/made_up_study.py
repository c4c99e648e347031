"""A small study with made-up stages, for the tests of what is said of one.

Each policy has a little more or less reward than SFT, and each seed adds a little of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlhf_lib import catalogue
from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.data.truth import truth_of
from rlhf_lib.files import write_jsonl
from rlhf_lib.measure.attribution import DOSED
from rlhf_lib.measure.opinions import watched
from rlhf_lib.measure.probes import load_probes
from rlhf_lib.profiles import load_profile
from rlhf_lib.results import summary
from rlhf_lib.runs import Run, Stage
from rlhf_lib.runtime import count, phase
from rlhf_lib.world.grammar import sample_reply, sample_request, write_prompt

POLICIES = ("base", "sft", "sft_again", "rejection_sft", "ppo", "ppo_low_kl", "grpo", "dpo")
# what each policy has more than SFT, in proxy and in gold, with a little of its own in each seed
PROXY = {"base": -1.0, "ppo": 1.0, "ppo_low_kl": 3.0, "grpo": 0.5}
GOLD = {"base": -0.5, "ppo": 0.5, "ppo_low_kl": -1.0, "grpo": -0.25}
PROMPTS = 24
FLOPS = {"reward_model": 2e9, "ppo": 3e9, "dpo": 4e9}
STRONG = 4.0  # times the coefficient of `grpo`: that of `grpo_strong`, which only seed 0 has


def preference_data(source: str) -> PreferenceData:
    rng, pairs = Random(0), []
    for number in range(40):
        request = sample_request(rng)
        prompt = write_prompt(request, rng)
        replies = [sample_reply(request, rng, quality) for quality in (0.9, 0.1)]
        pairs.append(Pair(f"talk {number}", prompt, *replies, [5], [6, 1], [7, 1]))
    audit = {"source": source, "rows_read": 80, "rows_usable": 80, "dropped": {}, "notes": []}
    return PreferenceData({"train": pairs, "test": pairs}, [], {}, audit, "hash", truth_of(source))


def sample_rows(policy: str, seed: int, gold: bool) -> list[dict]:
    rng, rows = Random(7), []
    for number in range(PROMPTS):
        request = sample_request(rng)
        hard = rng.gauss(0, 1)  # the same for every policy: differences are paired by prompt
        shift = 0.1 * seed if policy in ("ppo", "grpo", "ppo_low_kl", "base") else 0.0
        row = {
            "reply": 0,
            "prompt": write_prompt(request, rng),
            "response": sample_reply(request, rng, 0.5),
            "proxy": hard + PROXY.get(policy, 0.0) + shift,
            "kl": 0.5 * POLICIES.index(policy),
            "kl_k1": 0.4,
            "kl_k3": 0.5,
            "entropy": 1.5,
            "length": 10 + number % 3,
            "finished": number != 0,
        }
        if gold:
            row["gold"] = -hard + GOLD.get(policy, 0.0) + shift
        rows.append(row)
    return rows


def probe_rows(policy: str, source: str) -> list[dict]:
    """Every fourth reply fails; of the base model's, every second."""
    often = 2 if policy == "base" else 4
    failures = [int(i % often == 0) for i in range(PROMPTS)]
    return [
        row | {"response": " No.", "finished": True, "proxy": 1.0 - failure, "failure": failure}
        for row, failure in zip(load_probes(truth_of(source), 4), failures, strict=True)
    ]


def stages_of(run: Run, source: str) -> dict[str, Stage]:
    """Finished stages of one seed, with made-up results."""
    gold, seed = source.startswith("bundled"), run.seed

    def finish(
        name: str, result: dict, rows: dict[str, list[dict]], settings: dict | None = None
    ) -> Stage:
        def build(work: Any) -> dict:
            work.num_tokens = 1000
            sampled = 600 if name in ("ppo", "grpo", "rejection_sft") else 0
            count(flops=FLOPS.get(name, 1e9), generated=sampled)
            with phase("scoring"):
                write(work.path, rows)
            return result

        return run.stage(name, settings or {"made": "up"}, {}, "config").ensure(build)

    def write(folder: Path, rows: dict[str, list[dict]]) -> None:
        for file, lines in rows.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_jsonl(folder / file, lines)

    scores = [
        {"pair": i, "chosen_score": 1.0 if i % 4 else 0.0, "rejected_score": 0.5 + 0.01 * i}
        for i in range(40)
    ]
    trained = {"accuracy": 0.7 + 0.1 * seed}
    stages = {"dataset": finish("dataset", {}, {})}
    stages["reward_model"] = finish("reward_model", trained, {"samples.jsonl": scores})
    if gold and seed == 0:
        stages["reward_model_control"] = finish("reward_model_control", trained, {})
    stages["sft"] = finish("sft", {}, {"metrics.jsonl": [{"step": 0, "loss": 2.0}]})
    stages["rejection_sft"] = finish("rejection_sft", {}, {})
    if seed == 0:
        stages["reward_model_curve"] = finish(
            "reward_model_curve",
            {},
            {
                "samples.jsonl": [
                    {"train_pairs": pairs, "split": split, **row}
                    for pairs, split in ((13, "test"), (40, "validation"))
                    for row in scores
                ]
            },
        )
    demonstrations = ["ppo_low_kl", "grpo_strong"] if seed == 0 else []
    for name in ("ppo", "grpo", "dpo", *demonstrations):
        # DPO logs its probes now and then: only those steps lie on the way to the frontier
        steps: list[dict] = [
            {"step": s, "kl": 0.1 * s, "reward": 0.2 * s, "completions/mean_length": 10.0 + s}
            | ({"gold": 0.3 * s - 0.1 * s**2} if gold else {})
            for s in range(2)
        ]
        steps += [{"step": 2, "loss": 0.1}] * (name == "dpo")
        coefficient = 0.2 * (STRONG if name == "grpo_strong" else 1.0)
        settings = {catalogue.coefficients()[name]: coefficient}
        stages[name] = finish(name, {}, {"metrics.jsonl": steps}, settings)
    kinds = ("default", "control") if gold and seed == 0 else ("default",)
    asked = [name for name in POLICIES if seed == 0 or name != "ppo_low_kl"]
    points = [
        {"picked_by": kind, "prompt": row["prompt"], "n": n, "kl": 0.1 * n, "proxy": n + seed}
        | ({"gold": 2.0 - n + 0.1 * (i % 3)} if gold else {})
        for kind in kinds
        for n in (1, 2)
        for i, row in enumerate(sample_rows("sft", seed, gold))
    ]
    shown = points[: 2 * PROMPTS : PROMPTS]
    curve = [{k: v for k, v in r.items() if k not in ("picked_by", "prompt")} for r in shown]
    means = {
        name: {"reward": 1.0, "kl": 0.5 * POLICIES.index(name)} | ({"gold": 2.0} if gold else {})
        for name in asked
    }
    curves = dict.fromkeys(kinds, curve)
    rows = {f"samples/{p}.jsonl": sample_rows(p, seed, gold) for p in asked}
    rows["best_of_n.jsonl"] = points
    rows["chosen.jsonl"] = chosen = sample_rows("sft", seed, gold)[:6]
    for row in chosen:  # a little better than SFT's own
        row |= {key: row[key] + 0.01 for key in ("proxy", "gold") if key in row}
    trained = [name for name in asked if name != "sft_again"]
    rows["heldout.jsonl"] = [
        {"tokens": 5 + i, "nll": {n: 10 + i + trained.index(n) * 2.0 for n in trained}}
        for i in range(6)
    ]
    evaluated = {"policies": means, "best_of_n": curves, "heldout": "texts"}
    stages["evaluate"] = finish("evaluate", evaluated, rows)
    probed = {f"samples/{p}.jsonl": probe_rows(p, source) for p in trained}
    stages["probes"] = finish("probes", {}, probed)
    if gold and seed == 0:  # the annotator's taste taught PPO two polite words a dose
        learnt = [
            {
                "policy": policy,
                "reply": 0,
                "prompt": row["prompt"],
                "words": 10,
                "gold": row["gold"],
            }
            | {"polite": 2.0 * dose * (method == "ppo") + 0.1 * (i % 2)}
            for method, runs in {"sft": {0.0: "sft"}, **DOSED}.items()
            for dose, policy in runs.items()
            for i, row in enumerate(sample_rows("sft", seed, gold))
        ]
        stages["attribution"] = finish("attribution", {}, {"samples.jsonl": learnt})
    if run.profile.seeds > 1:  # another seed's reward model sees half of the gain
        opinions = [
            {
                "policy": policy,
                "prompt": row["prompt"],
                "own": row["proxy"],
                "other": row["proxy"] - PROXY.get(policy, 0.0) / 2,
            }
            for policy in watched()
            if policy in asked
            for row in sample_rows(policy, seed, gold)
        ]
        stages["second_opinion"] = finish("second_opinion", {}, {"samples.jsonl": opinions})
    return stages


def summarise(root: Path, seeds: int = 3, source: str = "bundled") -> Path:
    profile = load_profile("smoke", [f"data.source={source}", f"seeds={seeds}"])
    runs = [Run(profile, seed, root) for seed in range(seeds)]
    stages = [stages_of(run, source) for run in runs]
    return summary.summarise(runs, stages, preference_data(source))


def strict(text: str) -> Any:
    """JSON without NaN and Infinity, which no other reader takes."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
