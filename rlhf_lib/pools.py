"""Who does the jobs of a study: processes of this machine, or the workers of a Ray cluster.

A job is a function and its arguments; what it finds lies in files that all of them see. A worker
that dies takes nothing with it: its job is given to another, which goes on from the last state that
was saved.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch

from rlhf_lib import processes
from rlhf_lib.settings import Profile, plain_warnings

GOES_ON = "What was finished is kept: the same command goes on from here."
RETRIES = 3  # of a job whose worker died
T = TypeVar("T")


class Pool(Protocol):
    """What does jobs: a `concurrent.futures` executor, or what is used as one."""

    def submit(self, run: Callable[..., T], /, *arguments: Any) -> Future[T]: ...


@contextmanager
def worker_pool(profile: Profile) -> Iterator[tuple[Pool, int]]:
    """What works side by side, and how many at once.

    On a CPU `profile.jobs` processes or its cores; on Ray as many as its cluster has room for, or
    in one of its own as many as there would be processes. Where this process was started together
    with others, they go through all jobs together.
    """
    # workers and kernels inherit both: no progress bars in there, and where the user's files are
    before = os.environ.copy()
    os.environ |= {"RLHF_BATCH": "1", "RLHF_FOLDER": str(Path.cwd())}
    with ExitStack() as stack:
        stack.callback(_restore, before)  # this may be a notebook, which is live again then
        try:
            yield stack.enter_context(_chosen(profile))
        except KeyboardInterrupt:
            print(f"Stopping. {GOES_ON}", flush=True)
            raise


@contextmanager
def _chosen(profile: Profile) -> Iterator[tuple[Pool, int]]:
    cores = psutil.cpu_count(logical=False) or 1
    workers = 1 if torch.cuda.is_available() else max(1, min(profile.jobs, cores))
    if processes.count() > 1:
        yield Together(), 1
        return
    if profile.engine == "ray" and find_spec("ray") is not None:
        with OnRay.started(workers, max(1, profile.threads)) as cluster:
            yield cluster, cluster.places
        return
    if profile.engine == "ray":
        print("Ray is not installed (pip install 'rlhf-lib[ray]'): this machine does the jobs")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=plain_warnings) as pool:
        try:
            yield pool, workers
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has not begun does not begin
            raise


def _restore(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class Together:
    """Processes that were started together: all work on a stage, the first on what is written."""

    def submit(self, run: Callable[..., T], /, *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(run(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class OnRay:
    """The workers of a Ray cluster: of the one that RAY_ADDRESS names, or of one on this machine.

    All of its machines have to see the folders at the same place. `places`: jobs at once, each with
    a GPU where there are any, else with as many processors as it has threads.
    """

    def __init__(self, threads: int) -> None:
        import ray

        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self.places = gpus or max(1, int(found["CPU"]) // threads)
        needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": threads}
        self._start = ray.remote(max_retries=RETRIES, **needs)(_there).remote

    @classmethod
    @contextmanager
    def started(cls, workers: int, threads: int) -> Iterator[OnRay]:
        """Its cluster, for as long as it is needed."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report to its makers
        import ray

        own: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads}
        passed = {name: os.environ[name] for name in ("RLHF_BATCH", "RLHF_FOLDER")}
        ray.init(
            **own, runtime_env={"env_vars": passed}, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
        try:
            yield cls(threads)
        finally:
            ray.shutdown()

    def submit(self, run: Callable[..., T], /, *arguments: Any) -> Future[T]:
        future: Future[T] = Future()

        def hand_on(ended: Future) -> None:
            error = ended.exception()
            if error is None:
                future.set_result(ended.result())
            else:  # the job's own error, where Ray wraps it
                future.set_exception(getattr(error, "cause", None) or error)

        self._start(run, *arguments).future().add_done_callback(hand_on)
        return future


def _there(run: Callable[..., T], *arguments: Any) -> T:
    """A job on a worker: relative folders are those of who asked for it."""
    os.chdir(os.environ["RLHF_FOLDER"])
    plain_warnings()
    return run(*arguments)
