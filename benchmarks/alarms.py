"""What a signal is worth as a warning: falls of the gold reward seen before they came, and alarms
where none came.

A run *falls* where its gold reward, a mean over `WINDOW` updates, ends at least `DROP` below its
highest; the fall comes at the first update at which it is so far below. An alarm goes off where a
signal, a mean over as many updates, has moved from where it began by more than a threshold. It is
*in time* before the fall comes. The threshold is chosen on runs of other seeds *and* other
coefficients, where it tells falls from the rest best: a signal that only knows the coefficient
again warns of nothing. The coefficient itself, known before a run begins, is judged beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_lib.measure.statistics import interval, share
from rlhf_lib.show.display import markdown
from rlhf_lib.show.figures import WIDTH

WINDOW = 5
DROP = 0.4  # of noise alone, with a deviation of 0.15 an update, fewer than one run in fifty falls
# column -> what readers call it, and the direction that is feared: up, down, or either (0)
SIGNALS = {
    "kl": ("KL to SFT", 1),
    "length": ("length", 0),
    "entropy": ("entropy", -1),
    "second_gap": ("less liked by a second reward model", 1),
    "spread": ("spread of three reward models", 1),
    "distance": ("distance to the pairs' replies", 1),
}


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over the last `WINDOW` values, from the first that has so many."""
    return np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def fall(gold: Sequence[float]) -> int | None:
    """The update at which the gold reward has fallen, for one that ends low; else None."""
    means = smooth(gold)
    below = np.maximum.accumulate(means) - means
    if below[-1] < DROP:
        return None
    return int(np.argmax(below >= DROP)) + WINDOW - 1


def moved(values: Sequence[float], direction: int) -> np.ndarray:
    """How far a signal has moved from its first mean, in the direction that is feared."""
    change = smooth(values) - smooth(values)[0]
    return np.abs(change) if direction == 0 else direction * change


def first_alarm(change: np.ndarray, threshold: float) -> int | None:
    """The update at which a change is above the threshold for the first time."""
    above = change > threshold
    return int(np.argmax(above)) + WINDOW - 1 if above.any() else None


def outcome(change: np.ndarray, threshold: float, falls: int | None) -> tuple[bool, int]:
    """(whether the alarm is right: in time, or false; updates of lead, 0 without any)."""
    alarm = first_alarm(change, threshold)
    if falls is None:
        return alarm is not None, 0
    early = alarm is not None and alarm < falls
    return early, falls - alarm if early else 0  # type: ignore[operator]


def peak(change: np.ndarray, falls: int | None) -> float:
    """The highest threshold, or just above, at which a run would have its alarm: a right one where
    it falls, a false one where it does not.
    """
    before = change if falls is None else change[: falls - WINDOW + 1]
    return float(before.max(initial=-np.inf))


def best_threshold(peaks: np.ndarray, fell: np.ndarray) -> float:
    """Midway between two peaks, where the share of falls warned of is furthest above that of false
    alarms; of equals the highest. Infinite, which never warns, where no threshold does better.
    """
    best, at = 0.0, np.inf
    levels = np.unique(peaks[np.isfinite(peaks)])[::-1]
    lower = [*levels[1:], levels[-1] - 1.0] if len(levels) else []
    for above, below in zip(levels, lower, strict=True):
        threshold = (above + below) / 2
        warned, false = (
            (peaks[some] > threshold).mean() if some.any() else 0.0 for some in (fell, ~fell)
        )
        if warned - false > best:
            best, at = warned - false, threshold
    return float(at)


def score(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each signal: shares of falls warned of in time and of quiet runs with a false alarm, with
    intervals, and the updates of lead; of the coefficient the shares. `possible`: the updates of
    lead that an alarm at the first moment would have. `runs`: `seed`, `coefficient`, and a record
    for each update.
    """
    falls = [fall([step["gold"] for step in run["steps"]]) for run in runs]
    fell = np.array([when is not None for when in falls])
    seeds, coefficients = (np.array([run[key] for run in runs]) for key in ("seed", "coefficient"))
    found = {}

    def others(i: int) -> np.ndarray:
        return (seeds != seeds[i]) & (coefficients != coefficients[i])

    for key, (name, direction) in SIGNALS.items():
        changes = [moved([step[key] for step in run["steps"]], direction) for run in runs]
        peaks = np.array([peak(*each) for each in zip(changes, falls, strict=True)])
        warned, false, leads = [], [], []
        for i, (change, when) in enumerate(zip(changes, falls, strict=True)):
            threshold = best_threshold(peaks[others(i)], fell[others(i)])
            right, lead = outcome(change, threshold, when)
            (false if when is None else warned).append(right)
            leads += [lead] if lead else []
        found[key] = {
            "name": name,
            "warned": share(np.array(warned)) if warned else None,
            "false": share(np.array(false)) if false else None,
            "leads": leads,
        }
    small = np.array([
        -coefficients[i] > best_threshold(-coefficients[others(i)], fell[others(i)])
        for i in range(len(runs))
    ])  # fmt: skip
    return {
        "falls": int(fell.sum()),
        "quiet": int((~fell).sum()),
        "possible": [when - WINDOW for when in falls if when is not None],
        "coefficient": {
            "warned": share(small[fell]) if fell.any() else None,
            "false": share(small[~fell]) if not fell.all() else None,
        },
        "signals": found,
    }


def table(found: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    known = {
        "name": "kl_coef itself, before anything is trained",
        **found["coefficient"],
        "leads": [],
    }
    for signal in (*found["signals"].values(), known):
        lead = f"{np.median(signal['leads']):.0f}" if signal["leads"] else "–"
        rows.append({
            "watched": signal["name"],
            "falls warned of": interval(signal["warned"], 0, percent=True),
            "false alarms": interval(signal["false"], 0, percent=True),
            "updates of lead (median)": lead,
        })  # fmt: skip
    return pd.DataFrame(rows)


def summary(results: Mapping[str, Any]) -> str:
    """The table with what it is of, as Markdown."""
    settings, found = results["settings"], results["warnings"]
    coefficients = sorted({run["coefficient"] for run in results["runs"]})
    seeds = len({run["seed"] for run in results["runs"]})
    head = (
        f"PPO on the bundled world, profile {settings['profile']}, {settings['updates']} updates, "
        f"{seeds} seeds and kl_coef {', '.join(f'{c:g}' for c in coefficients)}. The gold reward "
        f"ended {DROP} or more below its best in {found['falls']} of {len(results['runs'])} runs; "
        f"a false alarm is one in the other {found['quiet']}. {_possible(found['possible'])}"
        "Thresholds were chosen on runs of other seeds and other coefficients. Intervals (95 %, "
        "Jeffreys) take runs for independent, and runs of a seed share their reward models."
    )
    return f"{head}\n\n{markdown(table(found))}"


def _possible(updates: Sequence[int]) -> str:
    if not updates:
        return ""
    return (
        f"An alarm at the first moment would have come {np.median(updates):.0f} updates before the "
        "fall (median). "
    )


def figure(found: Mapping[str, Any]) -> Figure:
    """Shares with their intervals, and each lead, a line a signal."""
    signals = list(found["signals"].values())
    drawn = Figure(figsize=(WIDTH, 0.8 + 0.42 * len(signals)), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    kinds = (("warned", "#1a7f37", -0.13, "falls warned of in time"),
             ("false", "#c24a00", 0.13, "false alarms"))  # fmt: skip
    for key, color, shift, name in kinds:
        for place, signal in enumerate(signals):
            if (record := signal[key]) is None:
                continue
            ends = [record["low"], record["high"]]
            left.plot(ends, [place + shift] * 2, color=color, lw=1.6)
            left.plot(record["mean"], place + shift, "o", color=color, ms=5,
                      label=name if place == 0 else None)  # fmt: skip
    for place, signal in enumerate(signals):
        leads = sorted(signal["leads"])
        spread = np.linspace(-0.18, 0.18, len(leads)) if len(leads) > 1 else [0.0] * len(leads)
        right.plot(leads, place + np.array(spread), "o", color=kinds[0][1], ms=4, alpha=0.5)
    left.set_yticks(range(len(signals)), [signal["name"] for signal in signals])
    left.invert_yaxis()
    left.set(xlim=(-0.03, 1.03), xlabel="share of runs")
    right.set(xlim=(0, None), xlabel="updates between alarm and fall")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn
