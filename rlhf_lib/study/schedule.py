"""Running a whole study: the notebooks in order, and further seeds, side by side."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal

from traitlets.config import Config

from rlhf_lib import catalogue, processes
from rlhf_lib.pools import GOES_ON, Pool, worker_pool
from rlhf_lib.report import exporters
from rlhf_lib.runtime import no_gpu, progress, shipped
from rlhf_lib.settings import Profile, unknown
from rlhf_lib.study import book
from rlhf_lib.study.stages import Study, StudyError, notebook_path, read_data, rival

NOTEBOOK_FOLDER = shipped("notebooks")


@dataclass(frozen=True)
class Job:
    """A stage of a seed, a notebook of seed 0 or a report, and the jobs that come before it.

    `tier`: how many seeds a notebook or report speaks of; 0 for all, with what seed 0 has besides.
    """

    kind: Literal["stage", "notebook", "report"]
    name: str
    seed: int = 0
    tier: int = 0
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        place = f"seed {self.seed}" if self.kind == "stage" else tier_name(self.tier)
        return f"{place}: {self.name}"

    @property
    def overrides(self) -> list[str]:
        """The settings of what it speaks of; the hashes of stages are those of the whole study."""
        return [f"seeds={self.tier}", "extras=false"] if self.tier else []


def tier_name(tier: int) -> str:
    if not tier:
        return "whole study"
    return f"{tier} seed{'s' if tier > 1 else ''} so far"


def plan(profile: Profile) -> list[Job]:
    """All jobs, those that matter first: seed 0 and a report of it, each further seed and a report
    of all so far, what seed 0 runs beside the comparison, and the report of the whole study.
    """
    jobs: list[Job] = []
    chapters = catalogue.notebooks()
    last = list(chapters)[-1]
    opinion = {"second_opinion"}
    everything = {record.name for record in catalogue.stages(profile)}
    core = {record.name for record in catalogue.stages(replace(profile, extras=False))}

    def add_stages(seed: int, wanted: set[str]) -> None:
        for record in catalogue.stages(profile, seed):
            if record.name in wanted:
                needs = [f"seed {seed}: {n}" for n in catalogue.needs(profile, record.name, seed)]
                if record.name in opinion:
                    needs.append(f"seed {rival(seed)}: reward_model")
                jobs.append(Job("stage", record.name, seed, needs=tuple(needs)))

    def add_report(tier: int, names: Iterable[str]) -> None:
        stages = {job.key for job in jobs if job.kind == "stage"}
        written, reported = [], earlier("report")
        for name in names:
            own = {f"seed 0: {stage}" for stage in chapters[name]} & stages
            needs = stages if name == last else own
            # a report that is being written reads all notebooks: none may change under it
            before = {*needs, *earlier(name), *reported}
            jobs.append(Job("notebook", name, tier=tier, needs=tuple(sorted(before))))
            written.append(jobs[-1].key)
        jobs.append(Job("report", "report", tier=tier, needs=(*written, *reported)))

    def earlier(name: str) -> list[str]:
        """The job that wrote the same file last."""
        return [job.key for job in jobs if job.name == name][-1:]

    for seed in range(profile.seeds):
        add_stages(seed, core if seed else core - opinion)
        if seed == 1:  # only now there is a reward model for it
            add_stages(0, opinion)
        if profile.seeds > 1:
            add_report(seed + 1, [last] if seed else chapters)
    add_stages(0, everything - core)
    add_report(0, chapters)
    return jobs


def run_study(
    profile: Profile, run_dir: Path, overrides: Sequence[str], only: str | None = None
) -> list[Path]:
    """Run every stage, the notebooks and the report; returns the executed notebooks.

    `only` one notebook runs what it needs itself, and writes no report. On a CPU up to
    `profile.jobs` jobs run side by side. Whatever is done already is not run again.
    """
    if only is not None and only not in catalogue.notebooks():
        raise unknown("notebook", only, catalogue.notebooks())
    jobs = plan(profile) if only is None else [Job("notebook", only)]
    if only is None and (missing := exporters.missing_tools()):
        print(f"There will be no report: {missing}", flush=True)
        jobs = without_reports(jobs)
    if profile.name in ("t4", "full") and (missing := no_gpu()):
        print(missing, flush=True)
    with worker_pool(profile) as (pool, workers):
        _run_jobs(pool, workers, jobs, profile.name, run_dir, overrides)
    notebooks = (job for job in jobs if job.kind == "notebook" and not job.tier)
    return [notebook_path(profile, run_dir, job.name) for job in notebooks]


def without_reports(jobs: Sequence[Job]) -> list[Job]:
    kept = [job for job in jobs if job.kind != "report"]
    keys = {job.key for job in kept}
    return [replace(job, needs=tuple(need for need in job.needs if need in keys)) for job in kept]


def _run_jobs(
    pool: Pool,
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
                raise StudyError(f"{job.key} failed: {error}\n{GOES_ON}") from error
            order.done(job.key)
            ended += 1
            count = f"{ended:3}/{len(jobs)}"
            print(f"{count}  {job.key:<36} {seconds:7.1f} s", flush=True)
            next(bar, None)


_read_once = lru_cache(maxsize=4)(read_data)  # in this process: all jobs of a study read the same


def _run_job(job: Job, profile: str, run_dir: str, overrides: list[str]) -> float:
    started = time.perf_counter()
    if job.kind == "stage":
        study = Study.open(profile, job.seed, run_dir, overrides)
        study.read = _read_once
        study.stage(job.name)
    elif processes.first():
        with processes.alone():  # of processes that were started together one writes
            _write_pages(job, profile, run_dir, overrides)
    return time.perf_counter() - started


def _write_pages(job: Job, profile: str, run_dir: str, overrides: list[str]) -> None:
    """A notebook, executed, or a report."""
    whole = catalogue.load(profile, overrides)
    if job.kind == "notebook":
        target = notebook_path(whole, run_dir, job.name)
        run_notebook(job.name, profile, run_dir, [*overrides, *job.overrides], target)
        return
    spoken_of = catalogue.load(profile, [*overrides, *job.overrides])
    page, _ = book.write_report(spoken_of, Path(run_dir), whole)
    if job.tier:
        print(f"report, {tier_name(job.tier)}: {page.resolve()}", flush=True)


def run_notebook(
    name: str, profile: str, run_dir: str, overrides: Sequence[str], target: Path
) -> Path:
    """Execute one notebook of seed 0 headless with papermill; returns the executed copy."""
    import papermill

    source = NOTEBOOK_FOLDER / f"{name}.ipynb"
    parameters = {
        "PROFILE": profile,
        "SEED": 0,
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
            coalesce_streams=True, cwd=str(Path.cwd()), execution_timeout=24 * 3600,
            kernel_name="python3",  # this Python, whatever kernel a notebook was last saved with
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise StudyError(f"{error.ename}: {error.evalue} (where: see {target})") from error
    return target
