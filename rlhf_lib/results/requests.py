"""Where a gain comes from: kinds of request, and requests that training saw in no wording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_lib import catalogue
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure.statistics import estimate
from rlhf_lib.results.policies import Samples


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
