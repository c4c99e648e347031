"""Failure modes of all policies in one record: probes and ordinary prompts, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from rlhf_lib import catalogue
from rlhf_lib.measure.probes import (
    DESCRIPTIONS,
    ORDINARY,
    PROBES,
    SCORES,
    error_rates,
    failure_modes,
    helpful_harmless_honest,
    language,
)
from rlhf_lib.measure.statistics import LEVEL, compare, estimate
from rlhf_lib.runs import Stage, read_jsonl

# what one policy did: name of a measure -> a mapping prompt -> values, for each seed
Measured = dict[str, list[dict[str, list[float]]]]


def probe_table(stages: Sequence[Mapping[str, Stage]], source: str, samples: int = 2000) -> dict:
    """Failures and scores of every policy, from the stages "probes" and "evaluate" of each seed.

    `failures`, `scores`: measure -> policy -> `estimate`, with the difference to SFT, paired by
    prompt, as `change` (a record of `compare`: Holm over the policies of one measure).
    `definitions`: what each measure counts. `proxy`: the reward model's mean score of the probes'
    failing and of their other replies. `rules`: their `error_rates` (English only).
    """
    probed = _samples(stages, "probes")
    ordinary = _samples(stages, "evaluate")
    which = language(source)
    failing = {
        policy: {
            **{probe: [_by_prompt(r for r in rows if r["probe"] == probe) for rows in per_seed]
               for probe in PROBES[which]},
            **_ordinary(ordinary[policy], source),
        }
        for policy, per_seed in probed.items()
    }  # fmt: skip
    scored: dict[str, Measured] = {}
    for policy, per_seed in probed.items():
        pairs = zip(ordinary[policy], per_seed, strict=True)
        seeds = [helpful_harmless_honest(rows, asked, source) for rows, asked in pairs]
        scored[policy] = {score: [seed[score] for seed in seeds] for score in SCORES[which]}
    in_bounds = (0.0, 1.0)
    return {
        "failures": _estimates(failing, samples, in_bounds),
        "scores": _estimates(scored, samples, None if which == "bundled" else in_bounds),
        "definitions": {**PROBES[which], **{m: DESCRIPTIONS[m] for m in ORDINARY}, **SCORES[which]},
        "proxy": {policy: _proxy(per_seed, samples) for policy, per_seed in probed.items()},
        "rules": error_rates() if which == "english" else None,
    }


def _samples(stages: Sequence[Mapping[str, Stage]], name: str) -> dict[str, list[list[dict]]]:
    folders = [seed[name].path / "samples" for seed in stages]
    policies = [p for p in catalogue.policies() if (folders[0] / f"{p}.jsonl").exists()]
    return {p: [read_jsonl(folder / f"{p}.jsonl") for folder in folders] for p in policies}


def _by_prompt(rows: Iterable[Mapping]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["prompt"], []).append(float(row["failure"]))
    return values


def _ordinary(per_seed: list[list[dict]], source: str) -> Measured:
    """The modes of ORDINARY that this source has; they apply to every row, so rows line up."""
    measured: Measured = {}
    for rows in per_seed:
        modes = failure_modes(rows, source)
        for mode in (m for m in ORDINARY if m in modes):
            failed = [
                {"prompt": row["prompt"], "failure": value}
                for row, value in zip(rows, modes[mode], strict=True)
            ]
            measured.setdefault(mode, []).append(_by_prompt(failed))
    return measured


def _estimates(
    policies: Mapping[str, Measured], samples: int, bounds: tuple[float, float] | None
) -> dict[str, dict[str, dict]]:
    """measure -> policy -> estimate; shares have bounds, and an interval where none ever failed."""
    table: dict[str, dict[str, dict]] = {}
    for measure in policies["sft"]:
        base = policies["sft"][measure]
        records = {p: _estimate(m[measure], samples, bounds) for p, m in policies.items()}
        changes = {
            p: _estimate(_minus(m[measure], base), samples) for p, m in policies.items()
            if p != "sft"
        }  # fmt: skip
        for policy, change in compare(changes).items():
            records[policy]["change"] = change
        table[measure] = records
    return table


def _estimate(
    per_seed: Sequence[Mapping[str, Sequence[float]]], samples: int,
    bounds: tuple[float, float] | None = None,
) -> dict:  # fmt: skip
    """Several replies to a prompt are one unit; `bounds` are given for shares."""
    values = [np.concatenate([np.asarray(v) for v in seed.values()]) for seed in per_seed]
    units = [np.repeat(list(seed), [len(v) for v in seed.values()]) for seed in per_seed]
    if bounds is None:
        return estimate(values, samples, units)
    record = estimate(values, samples, units, bounds)
    if record["se"] == 0:  # all or none: no spread to resample, yet no certainty (Wilson 1927)
        count = round(record["mean"] * record["units"])
        wilson = stats.binomtest(count, record["units"]).proportion_ci(LEVEL, "wilson")
        record |= {"low": float(wilson.low), "high": float(wilson.high), "over": "prompts"}
    return record


def _minus(
    one: Sequence[Mapping[str, Sequence[float]]], other: Sequence[Mapping[str, Sequence[float]]]
) -> list[dict[str, list[float]]]:
    """Difference of the means at each prompt, for each seed."""
    return [
        {prompt: [float(np.mean(a[prompt]) - np.mean(b[prompt]))] for prompt in a}
        for a, b in zip(one, other, strict=True)
    ]


def _proxy(per_seed: Sequence[list[dict]], samples: int) -> dict[str, dict | None]:
    """Over all probes, the reward model's score of replies that fail, and of those that do not."""
    record: dict[str, dict | None] = {}
    for name, failed in (("failing", 1), ("other", 0)):
        chosen = [[r for r in rows if r["failure"] == failed] for rows in per_seed]
        scores = [[row["proxy"] for row in rows] for rows in chosen]
        units = [[row["prompt"] for row in rows] for rows in chosen]
        record[name] = estimate(scores, samples, units) if all(scores) else None
    return record
