"""Where a gain comes from: kinds of request, requests that training never saw, and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf_lib import catalogue
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure.attribution import CONTROLS, DOSED
from rlhf_lib.measure.statistics import compare, estimate
from rlhf_lib.results.policies import Samples
from rlhf_lib.runs import Stage

LEARNT = {"polite words": "polite", "words": "words", "gold reward": "gold"}


def gains_by_request(samples: Samples, truth: Truth | None) -> dict | None:
    """Gains over SFT in the deciding reward by groups of prompts; None for real data.

    `{"kind" | "held_out": {group: {"prompts", "policies": {name: {"gain", "part"}}}}}`. `gain`: the
    mean over the group's prompts. `part`: what the group adds to the gain over all prompts, so that
    a policy's parts add up to it. Each interval is for its number alone, without a correction.
    """
    if truth is None:
        return None
    prompts, all_units = samples.prompts(samples.deciding), samples.units(samples.deciding)
    gains = {
        name: samples.difference(name, "sft", samples.deciding)
        for name in samples.measured(catalogue.candidates())
    }

    def split(groups: Sequence[str]) -> dict[str, dict]:
        names, found = np.asarray(groups), {}
        for group in sorted(set(groups)):
            inside = names == group
            units = [all_units[inside]] * len(gains[next(iter(gains))])
            found[group] = {
                "prompts": int(inside.sum()),
                "policies": {
                    name: {
                        "gain": estimate([gain[inside] for gain in per_seed], units),
                        "part": samples.estimate([gain * inside for gain in per_seed]),
                    }
                    for name, per_seed in gains.items()
                },
            }
        return found

    return {
        "kind": split([truth.kind(prompt) for prompt in prompts]),
        "held_out": split([truth.held_out(prompt) for prompt in prompts]),
    }


def attribution(
    stages: Sequence[Mapping[str, Stage]], unit: Callable[[str], str] = str
) -> dict | None:
    """What methods learn from labels with and without the annotator's bias, in the first seed.

    `policies`: polite words, words and gold reward of each policy's replies. `differences`: of each
    of these, a method on unbiased labels less the same on the annotator's; all are one family.
    `slopes`: of each, how much it grows where the taste grows by once the annotator's own; another.
    None where the stage `attribution` is missing.
    """
    if "attribution" not in stages[0]:
        return None
    rows = stages[0]["attribution"].samples()
    names = dict.fromkeys(row["policy"] for row in rows)
    parts = {name: [[row for row in rows if row["policy"] == name]] for name in names}
    samples = Samples(parts, [], [], unit)
    gaps = {
        (control, what): samples.estimate(samples.difference(control, method, key), key=key)
        for method, control in CONTROLS.items()
        for what, key in LEARNT.items()
    }
    judged = compare(gaps)  # type: ignore[arg-type]
    rising = {
        (method, what): samples.estimate(slopes(samples, runs, key), key=key)
        for method, runs in DOSED.items()
        for what, key in LEARNT.items()
    }
    trends = compare(rising)  # type: ignore[arg-type]
    return {
        "policies": {
            name: {
                what: samples.estimate(samples.column(name, key), key=key)
                for what, key in LEARNT.items()
            }
            for name in names
        },
        "differences": {
            control: {what: judged[control, what] for what in LEARNT}  # type: ignore[index]
            for control in CONTROLS.values()
        },
        "slopes": {
            method: {what: trends[method, what] for what in LEARNT}  # type: ignore[index]
            for method in DOSED
        },
    }


def rewarded(stage: Stage, unit: Callable[[str], str] = str) -> dict[str, dict]:
    """What one GRPO becomes with another reward each time: gold reward and words of SFT's replies
    and each policy's, and gold reward less that of GRPO with the reward model, as one family.
    """
    rows = stage.samples()
    names = dict.fromkeys(row["policy"] for row in rows)
    parts = {name: [[row for row in rows if row["policy"] == name]] for name in names}
    samples = Samples(parts, [], [], unit)
    gaps = {
        name: samples.estimate(samples.difference(name, "grpo", "gold"), key="gold")
        for name in names
        if name not in ("sft", "grpo")
    }
    judged = compare(gaps)
    return {
        name: {
            "gold": samples.estimate(samples.column(name, "gold"), key="gold"),
            "words": samples.estimate(samples.column(name, "words"), key="words"),
            "gap": judged.get(name),
        }
        for name in names
    }


def slopes(samples: Samples, runs: Mapping[float, str], key: str) -> list[np.ndarray]:
    """Of each prompt, the slope of the least-squares line through a quantity over the dose."""
    centred = np.array(list(runs)) - np.mean(list(runs))
    columns = [samples.column(name, key) for name in runs.values()]
    found = []
    for of_seed in zip(*columns, strict=True):
        values = np.array(of_seed)  # (doses, prompts)
        # centred as well, so that what does not change has a slope of 0 and not of rounding
        found.append(centred @ (values - values.mean(0)) / (centred @ centred))
    return found
