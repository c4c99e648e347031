"""How the library's cost grows: one quantity changes, everything else stays, on a small model.

Seconds of one round are the least of several (what disturbs a round only ever adds). The growth is
the slope of log seconds over log quantity: 1 is proportional, 0 costs nothing more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import GPT2Config

from benchmarks import library_worker
from benchmarks.job import Job
from benchmarks.prepare import fixed_job
from benchmarks.protocol import timed
from rlhf_lib.runtime import environment


@dataclass(frozen=True)
class Case:
    """What one point measures; its defaults are where the other axes stay."""

    stage: str = "dpo"
    pairs: int = 32
    reply_tokens: int = 32
    batch_size: int = 8
    vocabulary: int = 4096
    group_size: int = 4


PROMPTS_PER_STEP = 4  # of GRPO
AXES: dict[str, list[Case]] = {
    "pairs": [Case(pairs=n) for n in (8, 16, 32, 64, 128)],
    "reply_tokens": [Case(reply_tokens=n) for n in (8, 16, 32, 64, 128)],
    "group_size": [Case("grpo", group_size=n) for n in (2, 4, 8, 16, 32)],
    "batch_size": [Case(batch_size=n) for n in (2, 4, 8, 16, 32)],
    "vocabulary": [Case(vocabulary=n) for n in (1024, 4096, 16384, 65536)],
}
LABELS = {
    "pairs": "pairs (DPO)",
    "reply_tokens": "tokens in a reply (DPO)",
    "group_size": "samples to a prompt (GRPO)",
    "batch_size": "pairs in a batch (DPO)",
    "vocabulary": "words in the vocabulary (DPO)",
}


def measure(repeats: int, say: Callable[[str], None]) -> dict:
    """`{"axes": {axis: {"values", "seconds", "slope"}}, "environment", ...}`."""
    axes = {}
    for axis, cases in AXES.items():
        values = [getattr(case, axis) for case in cases]
        seconds = [time_case(case, repeats) for case in cases]
        axes[axis] = {"values": values, "seconds": seconds, "slope": slope(values, seconds)}
        timed = [f"{v}: {s:.2f} s" for v, s in zip(values, seconds, strict=True)]
        say(f"{LABELS[axis]}: {', '.join(timed)}")
    return {"environment": environment(), "repeats": repeats, "axes": axes}


def slope(values: list[int], seconds: list[float]) -> float:
    """Of the straight line through log seconds over log values."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def time_case(case: Case, repeats: int) -> float:
    """Seconds of one round, the least of `repeats`; one more is run before them."""
    with tempfile.TemporaryDirectory() as folder:
        run = library_worker.load(case.stage, make_case(Path(folder), case))
        times = [timed(run, number)[0] for number in range(repeats + 1)]
    return min(times[1:])


def make_case(folder: Path, case: Case) -> Job:
    config = GPT2Config(
        vocab_size=case.vocabulary,
        n_positions=512,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    job = fixed_job(folder, config, case.pairs, prompt=64, reply=case.reply_tokens)
    samples = PROMPTS_PER_STEP * case.group_size
    return replace(
        job,
        batch_size=case.batch_size,
        group_size=case.group_size,
        samples=samples,
        samples_per_step=samples,
    )


def draw(results: Mapping) -> Figure:
    """One panel for each axis, on logarithmic scales, with its slope."""
    import rlhf_lib.show.figures  # noqa: F401  the style that all figures share

    axes = results["axes"]
    figure = Figure(figsize=(2.4 * len(axes), 2.6), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, (axis, found) in zip(panels, axes.items(), strict=True):
        panel.loglog(found["values"], found["seconds"], marker="o", color="#0072b2")
        panel.set(title=f"slope {found['slope']:.2f}", xlabel=LABELS[axis])
        panel.set_xticks(found["values"], [str(value) for value in found["values"]])
        panel.minorticks_off()
    figure.axes[0].set_ylabel("seconds")
    return figure
