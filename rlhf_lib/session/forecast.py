"""How long a study takes: what each stage computes, at the rates of this machine, laid out in time.

The rates come from a probe (`session.probe`), the work from the settings (`session.counted`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rlhf_lib import catalogue
from rlhf_lib.session.counted import Lengths, measured, parts
from rlhf_lib.session.work import Sizes
from rlhf_lib.settings import Profile
from rlhf_lib.study.schedule import Job, plan

# How many times as long as its imports a chapter of a study of one seed takes, each further seed in
# the last one, and a report: of studies that `run --profile laptop` ran on 2 cores
CHAPTERS = {
    "01_dataset": 2.4,
    "02_reward_model": 4.2,
    "03_sft": 4.7,
    "04_ppo": 7.2,
    "05_grpo": 4.3,
    "06_dpo": 3.0,
    "07_evaluation": 5.6,
}
EVALUATION, SEED, REPORT = "07_evaluation", 0.9, 1.9


class Rate(NamedTuple):
    """What a stage takes: before it works, for each FLOP, and for each thing that it measures."""

    start: float  # seconds
    per_flop: float
    per_measured: float


class Forecast(NamedTuple):
    """What a probe has found, and with what it can be told of any study like it."""

    rates: Mapping[str, Rate]
    sizes: Sizes
    lengths: Lengths
    chapter: float  # seconds that a process takes to import what every chapter does
    workers: int = 1  # jobs at once
    held: Mapping[str, int] | None = None  # rows that there are of settings in `data`

    def stages(self, profile: Profile, seed: int) -> dict[str, float]:
        """Seconds of every stage of a seed."""
        held = (self.held or {}).items()
        rows = {name: min(count, getattr(profile.data, name)) for name, count in held}
        profile = replace(profile, data=replace(profile.data, **rows))
        found = {"dataset": self.chapter / 2}
        for part in parts(profile, self.sizes, self.lengths, seed):
            name, rate = part.name.partition(":")[0], self.rates[part.rate_of]
            extra = measured(catalogue.record(name), profile) * rate.per_measured
            begun = rate.start + extra if name not in found else 0.0
            found[name] = found.get(name, 0.0) + begun + rate.per_flop * part.work.flops
        return found

    def minutes(self, profile: Profile) -> float:
        """Of the whole study, with its notebooks and reports."""
        stages = [self.stages(profile, seed) for seed in range(profile.seeds)]

        def seconds(job: Job) -> float:
            if job.kind == "stage":
                return stages[job.seed].get(job.name, 0.0)
            if job.kind == "report":
                return self.chapter * REPORT
            seeds = (job.tier or profile.seeds) - 1
            return self.chapter * (CHAPTERS[job.name] + SEED * seeds * (job.name == EVALUATION))

        return _laid_out(plan(profile), seconds, self.workers) / 60


def _laid_out(jobs: Sequence[Job], seconds: Callable[[Job], float], workers: int) -> float:
    """Seconds until the last job ends, if the first in the plan that may start is started."""
    ends: dict[str, float] = {}
    free, waiting = [0.0] * workers, list(jobs)
    keys = {job.key for job in jobs}
    while waiting:
        free.sort()
        now = free[0]
        ready = [j for j in waiting if all(ends.get(n, 1e18) <= now for n in j.needs if n in keys)]
        if not ready:  # wait for whoever ends next
            free[0] = min(end for end in ends.values() if end > now)
            continue
        waiting.remove(ready[0])
        free[0] = ends[ready[0].key] = now + seconds(ready[0])
    return max(ends.values())
