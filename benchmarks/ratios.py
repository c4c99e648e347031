"""What several rounds of two sides say: medians with their range, and a ratio with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range over rounds."""
    found = {"median": np.median(values), "min": min(values), "max": max(values)}
    return {name: float(value) for name, value in found.items()}


def ratio(
    ours: Sequence[float], theirs: Sequence[float], processes: Sequence[int]
) -> dict[str, float]:
    """Median, range and Student's t interval of ours / theirs, over pairs of processes.

    `processes`: which pair each round was of; its rounds count as one, their mean. The interval is
    of the geometric mean: log-ratios are averaged, because a ratio and its inverse have to be
    judged alike. Raises ValueError for fewer than two pairs of processes.
    """
    rounds = np.log(np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float))
    logs = np.array([rounds[np.asarray(processes) == p].mean() for p in sorted(set(processes))])
    if len(logs) < 2:
        raise ValueError("one pair of processes says nothing of their spread: run two at least")
    half = stats.sem(logs) * stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1)
    low, high = np.exp([logs.mean() - half, logs.mean() + half])
    mean = float(np.exp(logs.mean()))
    return {**spread(np.exp(logs).tolist()), "mean": mean, "low": float(low), "high": float(high)}


def summarise(rounds: Sequence[Mapping[str, float]], roof: float) -> dict:
    """Of one side's rounds: items and tokens a second, share of the roof, peak memory."""
    per_second = {
        f"{unit}_per_second": spread([r[unit] / r["seconds"] for r in rounds])
        for unit in ("items", "tokens", "flops")
    }
    return {
        **per_second,
        "seconds": spread([r["seconds"] for r in rounds]),
        "roof_share": spread([r["flops"] / r["seconds"] / roof for r in rounds]),
        "peak_memory_gb": max(r["peak_memory_gb"] for r in rounds),
        "tokens_per_item": sum(r["tokens"] for r in rounds) / sum(r["items"] for r in rounds),
    }


def compare(
    library: Sequence[Mapping[str, float]], peer: Sequence[Mapping[str, float]], roof: float
) -> dict:
    """The record of one stage: both sides, the ratio of items a second, and of memory."""
    ours_rate, their_rate = ([r["items"] / r["seconds"] for r in side] for side in (library, peer))
    ours, theirs = summarise(library, roof), summarise(peer, roof)
    return {
        "library": ours,
        "peer": theirs,
        "ratio": ratio(ours_rate, their_rate, [int(r["process"]) for r in library]),
        "memory_ratio": ours["peak_memory_gb"] / theirs["peak_memory_gb"],
        "rounds": {"library": list(library), "peer": list(peer)},
    }
