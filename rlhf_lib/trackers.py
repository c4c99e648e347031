"""Metrics in the window of a tracker as well, while a stage runs; off unless `tracker` is set.

What a study says rests on its own files. Nothing here asks anything: without WANDB_API_KEY Weights
& Biases keeps to this machine, where `wandb sync` can send it on later.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rlhf_lib.settings import SettingsError

OFF = "none"
PROJECT = "rlhf_lib"


class Tracker(Protocol):
    """What is used of `accelerate.tracking.GeneralTracker`."""

    def log(self, values: dict, step: int) -> None: ...
    def finish(self) -> None: ...


def check(name: str) -> None:
    """Raises SettingsError for a tracker whose package is not installed."""
    if name != OFF and find_spec(name) is None:
        raise SettingsError(f"tracker={name}: its package is not here: pip install {name}")


def begin(name: str, folder: Path, run: str, settings: Mapping[str, Any]) -> Tracker | None:
    """A tracker that has begun, or None where it is off.

    `run`: what it is called there. TensorBoard writes below `folder`, Weights & Biases too.
    """
    if name == OFF:
        return None
    check(name)
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # slow to import, and seldom asked for

    if name == "tensorboard":
        found = LOGGER_TYPE_TO_CLASS[name](run, folder)
    else:
        named = {"name": run, "config": dict(settings)}
        if name == "wandb":
            folder.mkdir(parents=True, exist_ok=True)
            mode = os.environ.get("WANDB_MODE") or (
                "online" if os.environ.get("WANDB_API_KEY") else "offline"
            )
            named |= {"dir": str(folder), "mode": mode}
        found = LOGGER_TYPE_TO_CLASS[name](PROJECT, **named)
    if hasattr(found, "start"):  # in older releases of accelerate it has begun by now
        found.start()
    return found


def shown(row: Mapping[str, float | None]) -> dict[str, float]:
    """Of a line of metrics what a tracker draws: numbers, and not the step they are drawn at."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {n: float(v) for n, v in numbers.items() if n != "step" and math.isfinite(v)}
