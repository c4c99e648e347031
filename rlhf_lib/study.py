"""The whole study: which stage needs which, the notebooks in order, several seeds side by side."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil
import torch
from traitlets.config import Config

from rlhf_lib import dpo, evaluation, grpo, ppo, reward_model, sft, summary
from rlhf_lib.config import DataConfig, Profile, UserError, unknown
from rlhf_lib.data import PreferenceData, load_data
from rlhf_lib.models import fingerprint, load_tokenizer
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import progress, set_up_process

NOTEBOOK_FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
# what each notebook trains; notebook 07 reads the stages of all seeds
NOTEBOOKS = {
    "01_dataset": ("dataset",),
    "02_reward_model": ("reward_model", "reward_model_control"),
    "03_sft": ("sft", "rejection_sft"),
    "04_ppo": ("ppo", "ppo_low_kl"),
    "05_grpo": ("grpo",),
    "06_dpo": ("dpo",),
    "07_evaluation": ("evaluate",),
}
POLICIES = ("sft", "rejection_sft", "ppo", "ppo_low_kl", "grpo", "dpo")
NEEDS = {
    "dataset": (),
    "reward_model": (),
    "reward_model_control": (),
    "sft": (),
    "rejection_sft": ("sft", "reward_model"),
    "ppo": ("sft", "reward_model"),
    "ppo_low_kl": ("sft", "reward_model"),
    "grpo": ("sft", "reward_model"),
    "dpo": ("sft", "reward_model"),
}


def stage_names(profile: Profile) -> list[str]:
    """The stages of one seed in order. The control exists where its unbiased labels do."""
    names = [name for name in NEEDS if name != "reward_model_control" or has_control(profile)]
    return [*names, "evaluate"]


def has_control(profile: Profile) -> bool:
    return profile.data.source == "bundled"


class Study:
    """One seed of a study; a stage is run when it is first asked for, what it needs before it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        set_up_process(run.profile.threads)

    @classmethod
    def open(
        cls, profile: str, seed: int = 0, run_dir: str | Path = "runs",
        overrides: str | Sequence[str] = (),
    ) -> Study:  # fmt: skip
        return cls(Run.open(profile, seed, run_dir, overrides))

    @cached_property
    def data(self) -> PreferenceData:
        return self._load(self.run.profile.data)

    @cached_property
    def control_data(self) -> PreferenceData:
        """The same pairs, labelled without bias (bundled world)."""
        return self._load(replace(self.run.profile.data, source="bundled:control"))

    def _load(self, config: DataConfig) -> PreferenceData:
        return load_data(config, load_tokenizer(self.run.profile.model.name))

    def stage(self, name: str) -> Stage:
        """The finished stage `name`; missing ones are run first, in the order of their needs."""
        if name not in stage_names(self.run.profile):
            raise unknown("stage", name, stage_names(self.run.profile))
        if name == "evaluate":
            return self._evaluate()
        needed = {other: self.stage(other) for other in NEEDS[name]}
        run, data = self.run, self.data
        if name == "dataset":
            return self._dataset()
        if name == "reward_model":
            return reward_model.train(run, data)
        if name == "reward_model_control":
            return reward_model.train(run, self.control_data, name)
        if name == "sft":
            return sft.train(run, data)
        if name == "rejection_sft":
            return sft.train_on_best(run, data, **needed)
        if name == "ppo_low_kl":
            low = run.profile.ppo.low_kl_coef
            return ppo.train(run, data, **needed, stage_name=name, kl_coef=low)
        return {"ppo": ppo, "grpo": grpo, "dpo": dpo}[name].train(run, data, **needed)

    def _dataset(self) -> Stage:
        upstream = {"data": self.data.hash}
        stage = self.run.stage("dataset", self.run.profile.data, upstream, "data")

        def build(work: Work) -> dict:
            return self.data.audit

        return stage.ensure(build)

    def _evaluate(self) -> Stage:
        stages = {name: self.stage(name) for name in POLICIES}
        reward = self.stage("reward_model")
        control = self.stage("reward_model_control") if has_control(self.run.profile) else None
        folders = {name: str(stage.model_path) for name, stage in stages.items()}
        upstream = {name: stage.hash for name, stage in stages.items()}
        upstream |= {"data": self.data.hash, "reward_model": reward.hash}
        upstream |= {"model": fingerprint(self.run.profile.model.name)}
        if control:
            upstream["control"] = control.hash
        policies = {"base": self.run.profile.model.name, **folders}
        return evaluation.evaluate(self.run, self.data, policies, reward, upstream, control)

    def stages(self) -> dict[str, Stage]:
        """All stages of this seed, run if missing."""
        return {name: self.stage(name) for name in stage_names(self.run.profile)}


def summarise(profile: Profile, run_dir: Path) -> Path:
    """The evaluation folder over all seeds of the profile; stages that are missing are run."""
    studies = [Study(Run(profile, seed, Path(run_dir))) for seed in range(profile.seeds)]
    stages = [study.stages() for study in studies]
    return summary.summarise([study.run for study in studies], stages, studies[0].data)


# ------------------------------------------------------------------------------ running all of it


@dataclass(frozen=True)
class Job:
    """A notebook of seed 0 or a stage of another seed, and the jobs that come before it."""

    name: str
    seed: int
    notebook: bool
    needs: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.name}/{self.seed}"


def plan(profile: Profile) -> list[Job]:
    """Seed 0 trains in notebooks, further seeds in bare stages; notebook 07 comes last."""
    *chapters, last = NOTEBOOKS
    home = {stage: notebook for notebook in chapters for stage in NOTEBOOKS[notebook]}
    jobs = []
    for notebook in chapters:
        needs = {home[need] for stage in NOTEBOOKS[notebook] for need in NEEDS[stage]}
        needs -= {notebook}
        jobs.append(Job(notebook, 0, True, tuple(f"{need}/0" for need in sorted(needs))))
    jobs.append(Job("evaluate", 0, False, tuple(job.key for job in jobs)))
    *trained, evaluate = stage_names(profile)
    for seed in range(1, profile.seeds):
        for name in trained:
            jobs.append(Job(name, seed, False, tuple(f"{need}/{seed}" for need in NEEDS[name])))
        jobs.append(Job(evaluate, seed, False, tuple(f"{name}/{seed}" for name in trained)))
    return [*jobs, Job(last, 0, True, tuple(job.key for job in jobs))]


def run_study(
    profile: Profile, run_dir: Path, overrides: Sequence[str], only: str | None = None
) -> list[Path]:
    """Run the notebooks (all, or `only` one) and every further seed; returns their executed copies.

    On a CPU up to `profile.jobs` jobs run side by side. Whatever is done already is not run again.
    """
    if only is not None and only not in NOTEBOOKS:
        raise unknown("notebook", only, NOTEBOOKS)
    jobs = plan(profile)
    if only is not None:
        jobs = [replace(job, needs=()) for job in jobs if job.key == f"{only}/0"]
    cores = psutil.cpu_count(logical=False) or 1
    workers = 1 if torch.cuda.is_available() else max(1, min(profile.jobs, cores))
    os.environ["RLHF_BATCH"] = "1"  # workers and kernels inherit it: no progress bars in there
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        _run_jobs(pool, workers, jobs, profile.name, run_dir, overrides)
    return [notebook_path(profile, run_dir, job.name) for job in jobs if job.notebook]


def _run_jobs(
    pool: ProcessPoolExecutor, workers: int, jobs: list[Job], profile: str, run_dir: Path,
    overrides: Sequence[str],
) -> None:  # fmt: skip
    waiting, running, ended = list(jobs), {}, set()
    bar = progress(range(len(jobs)), "study", total=len(jobs))
    next(bar)
    while waiting or running:
        ready = [job for job in waiting if set(job.needs) <= ended]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            arguments = (job, profile, str(run_dir), list(overrides))
            running[pool.submit(_run_job, *arguments)] = job
        done: set[Future] = wait(running, return_when=FIRST_COMPLETED).done
        for future in done:
            job = running.pop(future)
            try:
                seconds = future.result()
            except Exception as error:
                pool.shutdown(wait=False, cancel_futures=True)
                raise StudyError(
                    f"{job.name} (seed {job.seed}) failed: {error}\n"
                    "What was finished is kept: the same command goes on from here."
                ) from error
            ended.add(job.key)
            count = f"{len(ended):3}/{len(jobs)}"
            print(f"{count}  seed {job.seed}  {job.name:<22} {seconds:7.1f} s", flush=True)
            next(bar, None)


class StudyError(UserError):
    """A notebook or stage of the study failed; the message says which and why."""


def _run_job(job: Job, profile: str, run_dir: str, overrides: list[str]) -> float:
    started = time.perf_counter()
    if job.notebook:
        run_notebook(job.name, profile, job.seed, run_dir, overrides)
    else:
        Study.open(profile, job.seed, run_dir, overrides).stage(job.name)
    return time.perf_counter() - started


def notebook_path(profile: Profile, run_dir: Path, name: str) -> Path:
    return Path(run_dir) / profile.name / "notebooks" / f"{name}.ipynb"


def run_notebook(
    name: str, profile: str, seed: int, run_dir: str, overrides: Sequence[str]
) -> Path:
    """Execute one notebook headless with papermill; returns the executed copy."""
    import papermill

    source = NOTEBOOK_FOLDER / f"{name}.ipynb"
    target = Path(run_dir) / profile / "notebooks" / f"{name}.ipynb"
    parameters = {
        "PROFILE": profile,
        "SEED": seed,
        "RUN_DIR": str(Path(run_dir).resolve()),
        "OVERRIDES": shlex.join(overrides),
    }
    # papermill only logs a parameter that the notebook does not know
    missing = set(parameters) - set(papermill.inspect_notebook(str(source)))
    if missing:
        raise StudyError(f"{source.name} has no parameter {', '.join(sorted(missing))}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source), str(target), parameters=parameters, progress_bar=False,
            coalesce_streams=True, cwd=str(NOTEBOOK_FOLDER.parent), execution_timeout=24 * 3600,
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise StudyError(f"{error.ename}: {error.evalue} (where: see {target})") from error
    return target
