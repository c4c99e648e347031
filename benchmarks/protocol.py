"""A worker is a process that loads once and computes one round each time it is asked.

Driver and worker exchange lines of JSON over stdin and stdout. Whatever else a worker's libraries
print goes to its stderr. Only the worker that was asked computes; the other waits for a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import psutil
import torch

from rlhf_lib.session.work import Work

Round = Callable[[int], Work]  # takes the number of the round, tells what was done
T = TypeVar("T")


def timed(function: Callable[..., T], *args: object) -> tuple[float, T]:
    """Seconds until the device has done it as well, and what came out."""
    started = time.perf_counter()
    found = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def serve(load: Callable[[], Round]) -> None:
    """The worker's side: load, say so, then answer each line with one timed round."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: Mapping) -> None:
        print(json.dumps(message), file=channel, flush=True)

    run = load()
    say({"ready": True})
    for line in sys.stdin:
        seconds, work = timed(run, json.loads(line)["round"])
        say({"seconds": seconds, **work._asdict(), "peak_memory_gb": peak_memory_gb()})


def peak_memory_gb() -> float:
    """Peak of this process since it began, in GB (10^9 bytes): on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resident_peak_gb()


def resident_peak_gb() -> float:
    """Peak of this process's resident memory since it began, in GB."""
    try:
        # not getrusage: its peak is inherited from the process that started this one
        with open("/proc/self/status") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        return int(kilobytes) * 1024 / 1e9
    except OSError:  # no Linux: what is resident now is the nearest there is
        return psutil.Process().memory_info().rss / 1e9


class WorkerError(RuntimeError):
    """A worker ended before it answered; the message has the end of what it printed."""


class Worker:
    """The driver's side of one worker process. Use as a context manager: leaving ends it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed where the process ends
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Worker:
        self._answer()  # ready
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, number: int) -> dict:
        """One round's record. Raises WorkerError where the worker ended instead."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"round": number}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()
        return self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        status = self._process.wait()
        self._log.seek(0)
        raise WorkerError(f"a worker ended with status {status}:\n{self._log.read()[-2000:]}")
