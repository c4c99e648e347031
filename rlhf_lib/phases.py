"""Where time goes: the seconds that this process spent generating, scoring, updating and so on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_seconds: dict[str, float] = defaultdict(float)
_open: list[str] = []
_since = 0.0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time within, or within the function it decorates, under `name`.

    What a phase inside another takes is counted there alone, so phases add up.
    """
    _book()
    _open.append(name)
    try:
        yield
    finally:
        _book()
        _open.pop()


def phase_seconds() -> dict[str, float]:
    """Seconds by phase since the process began."""
    return dict(_seconds)


def _book() -> None:
    """Credit the time since the last call to the phase that was going on, if any."""
    global _since
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was asked of it may not have been done yet
    now = time.perf_counter()
    if _open:
        _seconds[_open[-1]] += now - _since
    _since = now
