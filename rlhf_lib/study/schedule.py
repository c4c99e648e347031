"""Running a whole study: the notebooks in order, and further seeds, side by side."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path

import psutil
import torch
from traitlets.config import Config

from rlhf_lib import catalogue
from rlhf_lib.runtime import progress
from rlhf_lib.settings import Profile, UserError, load_profile, of_settings, unknown
from rlhf_lib.study.stages import Study, next_seed

NOTEBOOK_FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


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
    chapters = catalogue.notebooks()
    last = list(chapters)[-1]
    home = {
        stage: notebook
        for notebook, stages in chapters.items()
        if notebook != last
        for stage in stages
    }

    def key(stage: str, seed: int) -> str:
        return f"{stage if seed else home.get(stage, stage)}/{seed}"

    before: dict[str, set[str]] = {}  # of each job, in the order in which jobs are listed
    for seed in range(profile.seeds):
        for stage in catalogue.stages(profile, seed):
            needs = {key(need, seed) for need in catalogue.needs(profile, stage.name, seed)}
            if stage.name == "second_opinion":
                needs.add(key("reward_model", next_seed(profile, seed)))
            mine = key(stage.name, seed)
            before.setdefault(mine, set()).update(needs - {mine})
    jobs = [
        Job(name, int(seed), f"{name}/{seed}" in {f"{n}/0" for n in home.values()}, needs)
        for (name, seed), needs in ((k.split("/"), tuple(sorted(n))) for k, n in before.items())
    ]
    jobs.sort(key=lambda job: job.name == "second_opinion")  # other seeds come before it
    return [*jobs, Job(last, 0, True, tuple(job.key for job in jobs))]


def run_study(
    profile: Profile, run_dir: Path, overrides: Sequence[str], only: str | None = None
) -> list[Path]:
    """Run the notebooks (all, or `only` one) and every further seed; returns their executed copies.

    On a CPU up to `profile.jobs` jobs run side by side. Whatever is done already is not run again.
    """
    if only is not None and only not in catalogue.notebooks():
        raise unknown("notebook", only, catalogue.notebooks())
    jobs = plan(profile)
    if only is not None:
        jobs = [replace(job, needs=()) for job in jobs if job.key == f"{only}/0"]
    with worker_pool(profile) as (pool, workers):
        _run_jobs(pool, workers, jobs, profile.name, run_dir, overrides)
    return [notebook_path(profile, run_dir, job.name) for job in jobs if job.notebook]


@contextmanager
def worker_pool(profile: Profile) -> Iterator[tuple[ProcessPoolExecutor, int]]:
    """Processes that work side by side, and how many: on a CPU `profile.jobs` or its cores."""
    cores = psutil.cpu_count(logical=False) or 1
    workers = 1 if torch.cuda.is_available() else max(1, min(profile.jobs, cores))
    # workers and kernels inherit both: no progress bars in there, and where the user's files are
    os.environ |= {"RLHF_BATCH": "1", "RLHF_FOLDER": str(Path.cwd())}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield pool, workers


def _run_jobs(
    pool: ProcessPoolExecutor,
    workers: int,
    jobs: list[Job],
    profile: str,
    run_dir: Path,
    overrides: Sequence[str],
) -> None:
    by_key, running = {job.key: job for job in jobs}, {}
    order = TopologicalSorter({job.key: job.needs for job in jobs})
    order.prepare()
    print(f"{len(jobs)} jobs, {workers} at once; each says when it has ended", flush=True)
    bar = progress(range(len(jobs)), "study", total=len(jobs))
    next(bar)
    ready: list[str] = []
    ended = 0
    while order.is_active():
        ready += order.get_ready()
        ready.sort(key=list(by_key).index)  # of those that may start, the first in the plan
        while ready and len(running) < workers:
            job = by_key[ready.pop(0)]
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
            order.done(job.key)
            ended += 1
            count = f"{ended:3}/{len(jobs)}"
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


def notebook_path(profile: Profile, run_dir: str | Path, name: str) -> Path:
    """Where the executed notebook lies: those of other settings have a folder of their own."""
    return Path(run_dir) / profile.name / of_settings("notebooks", profile) / f"{name}.ipynb"


def run_notebook(
    name: str, profile: str, seed: int, run_dir: str, overrides: Sequence[str]
) -> Path:
    """Execute one notebook headless with papermill; returns the executed copy."""
    import papermill

    source = NOTEBOOK_FOLDER / f"{name}.ipynb"
    target = notebook_path(load_profile(profile, overrides), run_dir, name)
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
