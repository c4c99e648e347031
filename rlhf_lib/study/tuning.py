"""Each method's own best settings, found by one rule: equally many values are tried for each.

The search climbs. From the profile's settings on, the values tried next are the nearest to the best
so far that are still untried: the method's coefficient times 4 or divided by it, its learning rate
times 2 or divided by it. What decides is the reward of replies to the validation prompts, on which
no result is reported, of a policy trained with a seed that is none of the study's.

A finished trial is written to a file at once, and the search goes on from what stands there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.data.pairs import PreferenceData, draw_pairs
from rlhf_lib.data.truth import truth_of, unit_of
from rlhf_lib.files import write_json
from rlhf_lib.measure.evaluate import random_numbers, read_policy
from rlhf_lib.measure.statistics import estimate
from rlhf_lib.methods.learner import DivergedError
from rlhf_lib.pools import worker_pool
from rlhf_lib.profiles import load_profile
from rlhf_lib.review.trials import BEFORE, Trial, as_text, best, load, of, ranked
from rlhf_lib.runs import Stage
from rlhf_lib.runtime import environment, progress
from rlhf_lib.settings import Profile, SettingsError, as_dict, content_hash
from rlhf_lib.show import figures
from rlhf_lib.show.display import write_figure
from rlhf_lib.study.offer import Offer
from rlhf_lib.study.stages import Study
from rlhf_lib.study.training import run_stage

FACTORS = 4.0, 2.0  # between neighbours, of the first and of the second setting
Values = Mapping[str, Any]  # section.key -> value, those of one method


def tune(
    profile: Profile, run_dir: Path, overrides: Sequence[str], folder: Path, methods: Sequence[str]
) -> Path:
    """Try values for each of `methods` until each has had `tuning.trials`; the file of all trials.

    Raises SettingsError where nothing that training has not seen can judge.
    """
    if profile.tuning.trials < 1:
        raise SettingsError("tuning.trials is the number of values for each method: at least 1")
    judge = judges(profile)
    usual = _fixed(profile) == _fixed(load_profile(profile.name))
    path = folder / f"{profile.name if usual else f'{profile.name}-{_fixed(profile)}'}.json"
    trials = load(path, _fixed(profile))
    study = profile.name, trial_seed(profile), str(run_dir), list(overrides)
    missing = sum(max(0, profile.tuning.trials - len(of(trials, name))) for name in methods)
    if not missing:
        return path
    bar = progress(range(missing), "tune", total=missing)
    next(bar)
    with worker_pool(profile) as (pool, _):
        started = [pool.submit(train, study, name) for name in ("reward_model", "sft", *judge)]
        for future in started:  # what every trial begins with
            future.result()
        running: dict[Future[Trial], str] = {}

        def begin(method: str) -> None:
            done = of(trials, method)
            values = next_values(done, settings_of(method, profile))
            if values is not None and len(done) < profile.tuning.trials:
                running[pool.submit(try_values, study, method, values)] = method

        for method in methods:  # one trial of each at a time: the next hangs on how it ends
            begin(method)
        while running:
            done = wait(running, return_when=FIRST_COMPLETED).done
            # those that failed last, so that what ended beside them is kept
            for ended in sorted(done, key=lambda future: future.exception() is not None):
                method = running.pop(ended)
                trials.append(ended.result())
                _write(path, profile, trials)
                print(f"{method:<14} {as_text(trials[-1])}", flush=True)
                next(bar, None)
                begin(method)
    return path


def judges(profile: Profile) -> list[str]:
    """The stages that judge a trial, none where the true reward is known.

    Raises SettingsError where nothing that training has not seen can judge.
    """
    if profile.data.judge_pairs:
        return ["judge"]
    if truth_of(profile.data.source) is None:
        raise SettingsError(
            "trials need a judge that training has not seen: set data.judge_pairs, the number of "
            "pairs for a reward model of its own"
        )
    return []


# ----------------------------------------------------------------------------------- the rule


def trial_seed(profile: Profile) -> int:
    """One that is none of the study's."""
    return profile.seeds


def settings_of(method: str, profile: Profile) -> dict[str, Any]:
    """The profile's values of what is tuned of a method."""
    parts = (key.split(".") for key in catalogue.record(method).tuned)
    return {f"{section}.{key}": getattr(getattr(profile, section), key) for section, key in parts}


def next_values(done: Sequence[Trial], start: Values) -> Values | None:
    """What to try after these trials of one method: the start, then neighbours of the best.

    None where all within reach has been tried.
    """
    if not done:
        return start
    tried = [dict(trial["values"]) for trial in done]
    around = (near for trial in ranked(done) for near in neighbours(trial["values"]))
    return next((values for values in around if values not in tried), None)


def neighbours(values: Values) -> Iterator[dict[str, Any]]:
    """One setting a step up, then down; whole numbers stay whole, and at least 1."""
    for (name, value), factor in zip(values.items(), FACTORS, strict=True):
        for near in (value * factor, value / factor):
            if isinstance(value, int):
                if near >= 1 and near.is_integer():
                    yield {**values, name: int(near)}
            else:
                yield {**values, name: float(f"{near:.3g}")}


# --------------------------------------------------------------------------------- one trial

Asked = tuple[str, int, str, list[str]]  # profile, seed, run folder, overrides


def train(study: Asked, stage: str) -> None:
    Study.open(*study).stage(stage)


def try_values(study: Asked, method: str, values: Values) -> Trial:
    """Train a method with these values, and have its replies to validation prompts judged."""
    name, seed, run_dir, overrides = study
    own = [f"{key}={value}" for key, value in values.items()]
    opened = Study.open(name, seed, run_dir, [*overrides, *own])
    profile = opened.run.profile
    record, data = at_budget(catalogue.record(method), profile, opened.data, seed)
    trial = {"method": method, "values": values, "seed": seed}
    try:
        stage = run_stage(opened.run, record, data, opened.needed(method))
    except DivergedError as error:
        return trial | {"mean": None, "diverged": str(error)}
    machine = {key: environment()[key] for key in ("cpu", "gpu")}
    spent = {"seconds": stage.result()["seconds"], "environment": machine}
    return trial | _judged(opened, method, stage) | spent


def at_budget(
    record: Record, profile: Profile, data: PreferenceData, seed: int
) -> tuple[Record, PreferenceData]:
    """A stage with `tuning.budget` of its updates or prompts, or else of its pairs."""
    share, config = profile.tuning.budget, record.config(profile)
    if share == 1:
        return record, data
    sampled = [name for name in ("updates", "prompts") if hasattr(config, name)]
    if sampled:
        fewer = {name: max(1, round(share * getattr(config, name))) for name in sampled}
        return replace(record, changes=lambda p: record.changes(p) | fewer), data
    size = max(1, round(share * len(data.pairs["train"])))
    pairs = {**data.pairs, "train": draw_pairs(data.pairs["train"], size, seed)}
    return record, replace(data, pairs=pairs, hash=f"{data.hash}/{size}")


def _judged(study: Study, method: str, stage: Stage) -> dict[str, Any]:
    """The mean reward over the validation prompts, by gold where it is known, else by the judge."""
    profile, data = study.run.profile, study.data
    needed = study.needed(method)
    if profile.data.judge_pairs:
        needed["judge"] = study.stage("judge")
    offer = Offer(study.run, catalogue.record("evaluate"), data, needed)
    rater, rate = next(iter(offer.raters.items()))
    prompts, replies = data.prompts["validation"], profile.tuning.replies
    shape = replies * len(prompts), profile.data.max_response_tokens
    asked, luck = list(prompts) * replies, random_numbers(study.run.seed, "tuning", shape)
    policy = read_policy(str(stage.model_path), offer.accelerator)
    said = offer.sampler.draw(policy, asked, profile.evaluation.temperature, luck)
    rewards = torch.as_tensor(rate(asked, said)).reshape(replies, -1).mean(0)
    offer.release()
    unit = unit_of(data.truth)
    found = estimate([rewards.numpy()], [[unit(prompt.text) for prompt in prompts]])
    return {"rater": rater} | {key: found[key] for key in ("mean", "low", "high")}


# ------------------------------------------------------------------------------------ the file


def _write(path: Path, profile: Profile, trials: Sequence[Trial]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"profile": profile.name, "settings": _fixed(profile), "trials": list(trials)}
    write_json(path, content)


def _fixed(profile: Profile) -> str:
    """A hash of the settings that all trials share."""
    tuned = [key.split(".") for name in catalogue.tuned() for key in catalogue.record(name).tuned]
    sections = {*BEFORE, *(section for section, _ in tuned)}
    settings = {name: as_dict(getattr(profile, name)) for name in sections}
    for section, key in tuned:
        settings[section].pop(key)
    tuning, temperature = profile.tuning, profile.evaluation.temperature
    how = tuning.budget, tuning.replies, temperature, trial_seed(profile)
    return content_hash([settings, how])[:12]


def found(path: Path, profile: Profile) -> list[str]:
    """Each method's best values, and what those of the profile came to where they were tried."""
    trials, lines = load(path), []
    for method in dict.fromkeys(trial["method"] for trial in trials):
        top, own = best(trials, method), settings_of(method, profile)
        if top["mean"] is None:
            lines.append(f"{method:<14} diverged with each of the values tried")
            continue
        lines.append(f"{method:<14} best    {as_text(top)}")
        lines += [
            f"{method:<14} profile {as_text(trial)}"
            for trial in of(trials, method)
            if trial["values"] == own and trial != top
        ]
    return lines


def draw(path: Path) -> list[Path]:
    """The figure of a file of trials, beside it; none where all diverged."""
    if all(trial["mean"] is None for trial in load(path)):
        return []
    return write_figure(figures.tuning(load(path)), path.with_suffix(""))
