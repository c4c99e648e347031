"""A probe of about a minute: a miniature of the very study, run, and what each of its stages took.

It has the study's model, lengths and batches, and a few steps of each kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch

from rlhf_lib import catalogue
from rlhf_lib.files import read_jsonl, write_json
from rlhf_lib.flops import sizes_of
from rlhf_lib.models.load import load_policy
from rlhf_lib.pools import worker_pool
from rlhf_lib.profiles import load_profile
from rlhf_lib.runs import Stage
from rlhf_lib.runtime import MEASURING, computed_by, environment
from rlhf_lib.session.counted import Lengths, draws, held, lengths_of, measured, parts
from rlhf_lib.session.forecast import Forecast, Rate
from rlhf_lib.session.work import Sizes
from rlhf_lib.settings import Profile, as_dict, content_hash
from rlhf_lib.study.stages import Study
from rlhf_lib.study.training import run_stage

BESIDE = ("loading models", "saving")  # phases of a stage however much it learns
SCALING = ("scoring",)  # of the demonstrations that a reward model's scale comes from: so many
PROBED = ("sft", "reward_model", "ppo", "grpo", "dpo", "evaluate")
EVER_LESS = ((24, 1), (12, 1), (6, 1), (3, 1), (3, 2), (2, 4), (2, 8), (2, 16), (2, 32))
SECONDS, SHARE = 45.0, 0.2  # that a probe may take; of the matrix products' rate, that it reaches


def miniature(profile: Profile, sizes: Sizes, lengths: Lengths, roof: float) -> list[str]:
    """Overrides that leave of a study a few steps of each kind, in its own batches.

    Where these would take longer than a probe may at this `roof` (FLOPs a second of a matrix
    product) there are fewer steps, then smaller batches, down to one micro-batch.
    """
    for steps, shrink in EVER_LESS:
        found = _few_steps(profile, steps, shrink)
        small = load_profile(profile.name, [*_own(profile), *found])
        work = sum(_work(name, small, sizes, lengths) for name in PROBED)
        if work <= SECONDS * SHARE * roof:
            break
    return found


def _few_steps(profile: Profile, steps: int, shrink: int) -> list[str]:
    def batch(section: str, key: str, least: int) -> int:
        whole = getattr(getattr(profile, section), key)
        return max(min(least, whole), whole // shrink)

    data, evaluation = profile.data, profile.evaluation
    pairs = batch("reward_model", "batch_size", profile.reward_model.micro_batch_size)
    shown = batch("sft", "batch_size", profile.sft.micro_batch_size)
    compared = batch("dpo", "batch_size", profile.dpo.micro_batch_size)
    replies = batch("ppo", "batch_size", profile.ppo.micro_batch_size)
    prompts = batch("grpo", "prompts_per_update", 1)
    asked, updates = max(4, 12 * steps // shrink), max(2, steps // 4)
    ratio = evaluation.measured_prompts / max(data.evaluation_prompts, evaluation.measured_prompts)
    return [
        "seeds=1", "extras=false", "methods=", "data.judge_pairs=0", "sft.epochs=1",
        "ppo.patience=0", "grpo.patience=0", "dpo.patience=0",
        f"data.train_pairs={min(data.train_pairs, steps * max(pairs, compared, shown))}",
        f"data.demonstrations={min(data.demonstrations, steps * shown)}",
        f"data.validation_pairs={min(data.validation_pairs, 32)}",
        f"data.test_pairs={min(data.test_pairs, 32)}",
        f"data.rl_prompts={min(data.rl_prompts, updates * max(replies, prompts))}",
        f"data.evaluation_prompts={min(data.evaluation_prompts, asked)}",
        f"reward_model.batch_size={pairs}", "reward_model.epochs=1", "reward_model.curve_points=0",
        f"sft.batch_size={shown}", f"dpo.batch_size={compared}", "dpo.epochs=1", "dpo.probes=1",
        f"dpo.probe_prompts={min(profile.dpo.probe_prompts, 16)}",
        f"ppo.updates={updates}", f"ppo.batch_size={replies}",
        f"ppo.minibatch_size={min(profile.ppo.minibatch_size, replies)}",
        f"grpo.updates={updates}", f"grpo.prompts_per_update={prompts}",
        f"evaluation.measured_prompts={max(1, round(ratio * asked))}",
        "evaluation.best_of_n_prompts=2", "evaluation.heldout_texts=8",
    ]  # fmt: skip


def probe(profile: Profile) -> Forecast:
    """What this machine needs, with as many stages at once as the study will have."""
    print("a probe of about a minute says what this machine needs ...", flush=True)
    with worker_pool(profile) as (pool, workers):
        several = [pool.submit(_probe, profile.name, _own(profile)) for _ in range(workers)]
        found = [one.result() for one in several]
    rates = {
        name: Rate(
            *(sum(column) / workers for column in zip(*(f.rates[name] for f in found), strict=True))
        )
        for name in found[0].rates
    }
    chapter = sum(one.chapter for one in found) / workers
    return found[0]._replace(rates=rates, chapter=chapter, workers=workers)


def _own(profile: Profile) -> list[str]:
    """The overrides that make this profile of the one with its name."""
    usual, found = load_profile(profile.name), []
    for section, value in vars(profile).items():
        before = getattr(usual, section)
        if value == before:
            continue
        if not hasattr(value, "__dataclass_fields__"):
            found.append(f"{section}={value}")
            continue
        changed = {k: v for k, v in vars(value).items() if v != getattr(before, k)}
        found += [f"{section}.{key}={v}" for key, v in changed.items()]
    return found


def _probe(name: str, overrides: list[str]) -> Forecast:
    """Run the miniature in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study.open(name, 0, folder, overrides)
        sizes, lengths = sizes_and_lengths(study)
        asked = [*overrides, *miniature(study.run.profile, sizes, lengths, _roof())]
        small = Study.open(name, 0, folder, asked)
        stages = {stage: small.stage(stage) for stage in PROBED[:-1]}
        before = {stage: stages[stage] for stage in ("sft", "reward_model")}
        # an evaluation of the pretrained model and SFT
        record = catalogue.record("evaluate")
        stages["evaluate"] = run_stage(small.run, record, small.data, before)
        began = time.perf_counter()  # last: what is imported lies in memory by now
        subprocess.run([sys.executable, "-c", "import rlhf_lib.lesson"], check=True)
        chapter = time.perf_counter() - began
        rates = rates_of(stages, small.run.profile, sizes, lengths)
        return Forecast(rates, sizes, lengths, chapter, held=held(study.data))


def rates_of(
    stages: Mapping[str, Stage], profile: Profile, sizes: Sizes, lengths: Lengths
) -> dict[str, Rate]:
    """What each stage of a miniature took, for each FLOP of its work."""
    found = {}
    for name, stage in stages.items():
        result, phases = stage.result(), stage.result()["phases"]
        beside = BESIDE + (SCALING if name == "reward_model" else ())
        seen = phases.get(MEASURING, 0.0)
        busy = sum(phases.values()) - sum(phases.get(phase, 0.0) for phase in beside) - seen
        start = result["seconds"] - busy - seen
        busy -= _held_up(stage)
        kind = "generation" if name == "evaluate" else name
        each = seen / (measured(catalogue.record(name), profile) or 1)
        spoken = result.get("spent", {}).get("generated", 0.0)  # tokens; hardly trained, it rambles
        said = lengths._replace(reply=spoken / _replies(name, profile)) if spoken else lengths
        found[kind] = Rate(start, busy / _work(name, profile, sizes, said), each)
    return found


def _work(name: str, profile: Profile, sizes: Sizes, lengths: Lengths) -> float:
    """FLOPs of a stage of a miniature, whose evaluation asks the pretrained model and SFT alone."""
    total = 0.0
    stages = {record.name for record in catalogue.stages(profile)}
    every = draws(profile.evaluation, len(set(catalogue.trained()) & stages) + 1)
    for part in parts(profile, sizes, lengths):
        if part.name.partition(":")[0] == name:
            few = draws(profile.evaluation, 2) / every if part.name == "evaluate: answers" else 1.0
            total += few * part.work.flops
    return total


def _replies(name: str, profile: Profile) -> int:
    """How many replies a stage of a miniature samples."""
    if name == "ppo":
        return profile.ppo.updates * profile.ppo.batch_size
    if name == "grpo":
        prompts = profile.grpo.prompts_per_update * profile.grpo.dynamic_sampling
        return profile.grpo.updates * prompts * profile.grpo.group_size
    asked = profile.data.evaluation_prompts * draws(profile.evaluation, 2)
    return asked + profile.evaluation.best_of_n_prompts * profile.evaluation.best_of_n


def _held_up(stage: Stage) -> float:
    """Seconds that steps took beyond the usual one: the first warms up, any may be interrupted."""
    metrics = stage.path / "metrics.jsonl"
    times = [row["step_time"] for row in read_jsonl(metrics)] if metrics.exists() else []
    return sum(times) - median(times[1:]) * len(times) if len(times) > 1 else 0.0


def _roof(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOPs a second of a matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = torch.rand(size, size, device=device)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        float((one @ one)[0, 0])
        products += 1
    return 2.0 * size**3 * products / (time.perf_counter() - began)


def sizes_and_lengths(study: Study) -> tuple[Sizes, Lengths]:
    """Of the study's model, and of the first of its pairs."""
    model = load_policy(study.run.profile.model.name)
    return Sizes(*sizes_of(model)), lengths_of(study.data)


def of_machine(profile: Profile) -> Forecast:
    """What a probe finds on this machine, or has found before."""
    key = content_hash([as_dict(profile), computed_by(), environment()])[:12]
    kept = Path(tempfile.gettempdir()) / f"rlhf-probe-{key}.json"
    if kept.exists():
        saved = json.loads(kept.read_text(encoding="utf-8"))
        rates = {name: Rate(*values) for name, values in saved["rates"].items()}
        sizes, lengths = Sizes(*saved["sizes"]), Lengths(*saved["lengths"])
        known = saved["chapter"], saved["workers"], saved["held"]
        return Forecast(rates, sizes, lengths, *known)
    found = probe(profile)
    write_json(kept, found._asdict())
    return found
