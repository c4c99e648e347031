"""What two reward models say of the same replies, over all seeds (`measure.opinions`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_lib.measure.statistics import SHARE, compare, minus
from rlhf_lib.results.policies import Samples
from rlhf_lib.runs import Stage


def second_opinion(stages: Sequence[Mapping[str, Stage]]) -> dict | None:
    """What each policy gained over SFT by both reward models; None for one seed.

    `own`, `other`: gains over SFT's reply to the same prompt, in standard deviations of
    demonstrations; `excess`: own less other, corrected for the number of policies (Holm);
    `opposite`: share of prompts at which one model sees a gain and the other does not.
    """
    if "second_opinion" not in stages[0]:
        return None
    seeds = [seed["second_opinion"].samples() for seed in stages]
    policies = list(dict.fromkeys(row["policy"] for row in seeds[0]))
    rows = {p: [[row for row in seed if row["policy"] == p] for seed in seeds] for p in policies}
    samples = Samples(rows, [], [])
    table = {}
    for policy in (p for p in policies if p != "sft"):
        own, other = (samples.difference(policy, "sft", key) for key in ("own", "other"))
        opposite = [np.sign(a) != np.sign(b) for a, b in zip(own, other, strict=True)]
        table[policy] = {
            "own": samples.estimate(own, key="own"),
            "other": samples.estimate(other, key="own"),
            "opposite": samples.estimate(opposite, SHARE, "own"),
            "excess": samples.estimate(minus(own, other), key="own"),
        }
    excess = compare({policy: record["excess"] for policy, record in table.items()})
    return {policy: record | {"excess": excess[policy]} for policy, record in table.items()}
