"""Failure modes of all policies in one record: probes and ordinary prompts, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from rlhf_lib import catalogue
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure.probes import (
    ORDINARY,
    PROBES,
    SCORES,
    error_rates,
    failure_modes,
    helpful_harmless_honest,
    language,
)
from rlhf_lib.measure.statistics import ANY, LEVEL, differences, estimate
from rlhf_lib.measure.two_errors import quantile
from rlhf_lib.results.policies import read_samples
from rlhf_lib.runs import Stage

Replies = Sequence[Mapping[str, list[float]]]  # of each seed: prompt -> a value for each reply


def probe_table(stages: Sequence[Mapping[str, Stage]], truth: Truth | None) -> dict:
    """Failures and scores of every policy, from the stages "probes" and "evaluate" of each seed.

    `failures`, `scores`: measure -> policy -> `estimate`, with the difference to SFT, paired by
    prompt, as `change` (a record of `compare`: Holm over the policies of one measure).
    `definitions`: what each measure counts. `proxy`: the reward model's mean score of the probes'
    failing and of their other replies. `rules`: their `error_rates` (English only).
    """
    which = language(truth)
    probed, ordinary = _samples(stages, "probes"), _samples(stages, "evaluate")
    measured: dict[str, dict[str, Replies]] = {}  # measure -> policy
    for policy, per_seed in probed.items():
        pairs = zip(ordinary[policy], per_seed, strict=True)
        seeds = [_values(replies, asked, truth) for replies, asked in pairs]
        for measure in seeds[0]:
            measured.setdefault(measure, {})[policy] = [seed[measure] for seed in seeds]

    def estimates(measures: Iterable[str], share: bool) -> dict[str, dict]:
        return {m: _estimates(measured[m], share) for m in measures if m in measured}

    return {
        "failures": estimates([*PROBES[which], *ORDINARY], share=True),
        "scores": estimates(SCORES[which], share=not truth),
        "definitions": PROBES[which] | ORDINARY | SCORES[which],
        "proxy": {policy: _proxy(per_seed) for policy, per_seed in probed.items()},
        "rules": None if truth else error_rates(),
    }


def _samples(stages: Sequence[Mapping[str, Stage]], name: str) -> dict[str, list[list[dict]]]:
    found = read_samples([seed[name].path for seed in stages])
    return {policy: found[policy] for policy in catalogue.policies() if policy in found}


def _values(
    replies: list[dict], asked: list[dict], truth: Truth | None
) -> dict[str, dict[str, list[float]]]:
    """measure -> prompt -> values, of one seed's rows of the stages "evaluate" and "probes"."""
    modes = failure_modes(replies, truth)
    rows = [(row["probe"], row["prompt"], float(row["failure"])) for row in asked]
    for mode in (m for m in ORDINARY if m in modes):  # they apply to every reply
        rows += [(mode, row["prompt"], v) for row, v in zip(replies, modes[mode], strict=True)]
    rows += helpful_harmless_honest(replies, asked, truth)
    values: dict[str, dict[str, list[float]]] = {}
    for measure, prompt, value in rows:
        values.setdefault(measure, {}).setdefault(prompt, []).append(value)
    return values


def _estimates(policies: Mapping[str, Replies], share: bool) -> dict[str, dict]:
    """policy -> estimate, and how it differs from SFT at the same prompts."""
    asked = [list(seed) for seed in policies["sft"]]
    means, records = {}, {}
    for policy, per_seed in policies.items():
        places = zip(per_seed, asked[: len(per_seed)], strict=True)  # of the first seeds
        means[policy] = [np.array([np.mean(seed[p]) for p in prompts]) for seed, prompts in places]
        records[policy] = _estimate(per_seed, share)
    pairs = {policy: (policy, "sft") for policy in policies if policy != "sft"}
    bounds = (-1.0, 1.0) if share else ANY  # of a difference between shares
    changes = differences(means, pairs, lambda v: estimate(v, asked[: len(v)], bounds))
    for policy, change in changes.items():
        records[policy]["change"] = change
    return records


def _estimate(per_seed: Replies, share: bool) -> dict:
    """Several replies to a prompt are one unit; a share has bounds."""
    values = [np.concatenate([np.asarray(v) for v in seed.values()]) for seed in per_seed]
    units = [np.repeat(list(seed), [len(v) for v in seed.values()]) for seed in per_seed]
    record = estimate(values, units)
    return record | share_interval(record) if share else record


def share_interval(record: Mapping) -> dict[str, float]:
    """`low` and `high` for an `estimate` of a share: Jeffreys' interval, as if half a prompt had
    failed besides and half a prompt had not.

    So failing never is no certainty, and failing once is known no better. The Beta distribution
    has the variance that seeds and prompts make: it is wider than `statistics.share` of as many
    prompts where these are few, and narrower where replies to one prompt differ.
    """
    mean, n = record["mean"], record["units"]
    # the normal error of this width: a t's of few seeds or prompts is wider than its `se`
    error = quantile((1 + LEVEL) / 2, record["errors"]) / stats.norm.ppf((1 + LEVEL) / 2)
    middle = (n * mean + 0.5) / (n + 1)
    squares = n * (n - 1) * error**2 + n * (mean - middle) ** 2
    squares += (middle**2 + (1 - middle) ** 2) / 2
    variance = squares / ((n + 1) * (n + 2))
    size = max(middle * (1 - middle) / variance - 1, 1.0)  # 1: all that nobody has seen, Beta(½, ½)
    low, high = stats.beta.interval(LEVEL, middle * size, (1 - middle) * size)
    return {"low": min(float(low), mean), "high": max(float(high), mean)}


def _proxy(per_seed: Sequence[list[dict]]) -> dict[str, dict | None]:
    """Over all probes, the reward model's score of replies that fail, and of those that do not."""
    record: dict[str, dict | None] = {}
    for name, failed in (("failing", 1), ("other", 0)):
        chosen = [[r for r in rows if r["failure"] == failed] for rows in per_seed]
        scores = [[row["proxy"] for row in rows] for rows in chosen]
        units = [[row["prompt"] for row in rows] for rows in chosen]
        record[name] = estimate(scores, units) if all(scores) else None
    return record
