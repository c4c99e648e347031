"""What a training log gives away: known ways to go wrong, found in its numbers.

    python -m rlhf_lib doctor runs/laptop/seed-0/ppo-…/metrics.jsonl

The names are those of TRL's logs, which this library's have as well: a file of one JSON object a
line, or TRL's `trainer_state.json`. A finding is a suspicion with its reason; a log without one is
no proof that all is well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlhf_lib.settings import UserError

KNOWN = {
    "clip_ratio/region_mean", "completions/clipped_ratio", "entropy", "frac_reward_zero_std", "kl",
    "loss", "objective/entropy", "objective/kl", "objective/scores", "policy/clipfrac_avg",
    "policy/entropy_avg",
    "rewards/margins", "val/explained_variance", "val/ratio",
}  # fmt: skip
CUT = 2.0  # that a mean reward may lose to the clip, and to what a reply without its end costs
Series = np.ndarray  # of a metric, where it was logged
Logs = dict[str, Series]


class Finding(NamedTuple):
    name: str
    seen: str  # what in the log says so
    cause: str  # what it usually comes from


def examine(path: Path) -> list[Finding]:
    """All findings in a log. Raises UserError where it cannot be read as one."""
    logs = read(path)
    return [finding for look in LOOKS if (finding := look(logs))]


def read(path: Path) -> Logs:
    """Each metric's values in the order of the steps, as far as they are numbers."""
    try:
        text = path.read_text(encoding="utf-8")
        whole = json.loads(text) if path.suffix == ".json" else None
        rows = whole["log_history"] if whole else [json.loads(x) for x in text.splitlines() if x]
        rows = [row for row in rows if isinstance(row, dict)]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no training log ({error}): give a file of one JSON object a line, such as "
            "metrics.jsonl, or TRL's trainer_state.json"
        ) from error
    logs: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                logs.setdefault(key, []).append(float(value))
    if not KNOWN & logs.keys():
        raise UserError(
            f"{path} logs none of what is looked at ({', '.join(sorted(KNOWN))}): is it the log of "
            "another program?"
        )
    return {key: np.array(values) for key, values in logs.items()}


def _first(logs: Logs, *names: str) -> Series | None:
    """The first of these metrics that was logged, without what is no number."""
    for name in names:
        if name in logs and np.isfinite(logs[name]).any():
            return logs[name][np.isfinite(logs[name])]
    return None


def _late(series: Series) -> Series:
    """The last quarter."""
    return series[-max(1, len(series) // 4) :]


def _mostly(logs: Logs, name: str) -> float | None:
    """A share's mean over the last quarter, where that is half or more."""
    share = _first(logs, name)
    end = 0.0 if share is None else float(_late(share).mean())
    return end if end >= 0.5 else None


def no_numbers(logs: Logs) -> Finding | None:
    bad = sorted(name for name, values in logs.items() if not np.isfinite(values).all())
    if not bad:
        return None
    step = min(int(np.argmin(np.isfinite(logs[name]))) for name in bad)
    return Finding(
        "not a number",
        f"{', '.join(bad[:4])}: infinite or NaN from the {step + 1}. logged step on",
        "the learning rate is too high, or half precision overflows",
    )


def negative_kl(logs: Logs) -> Finding | None:
    kl = _first(logs, "objective/kl", "kl")
    if kl is None or len(kl) < 3:
        return None
    # an estimate of a small KL may be below 0 by chance, a mean over steps hardly
    p = float(kl[0] >= 0)
    if np.ptp(kl):
        p = float(stats.ttest_1samp(kl, 0.0, alternative="less")[1])  # type: ignore[arg-type]
    if kl.mean() >= -0.01 or p > 0.01:
        return None
    return Finding(
        "negative KL",
        f"the KL to the reference is {kl.mean():.3f} on average, and below 0 beyond chance",
        "replies are no samples of the policy (top-k, top-p, a minimum length, another temperature "
        "than the one that they are scored at), or the log-ratio is taken the wrong way round",
    )


def silent_groups(logs: Logs) -> Finding | None:
    share = _mostly(logs, "frac_reward_zero_std")
    if share is None:
        return None
    return Finding(
        "silent groups",
        f"{share:.0%} of the last groups have equal rewards throughout",
        "the reward cannot tell these replies apart, or they are all the same: a coarse reward, "
        "too cold a sampling temperature, a collapsed policy",
    )


def collapsed_entropy(logs: Logs) -> Finding | None:
    entropy = _first(logs, "entropy", "policy/entropy_avg", "objective/entropy")
    if entropy is None or len(entropy) < 3 or entropy[0] <= 0:
        return None
    end = float(_late(entropy).mean())
    if end > 0.2 * entropy[0]:
        return None
    return Finding(
        "collapsed entropy",
        f"entropy fell from {entropy[0]:.2f} to {end:.2f}",
        "the policy says the same thing again and again: too high a learning rate, too weak a KL "
        "penalty, a reward with one favourite reply",
    )


def exploding_margins(logs: Logs) -> Finding | None:
    margins = _first(logs, "rewards/margins")
    if margins is None or _late(margins).mean() < 8:
        return None
    return Finding(
        "exploding margins",
        f"the implicit reward margin ends at {_late(margins).mean():.1f}: the policy holds its "
        f"labels for right with odds of {math.exp(min(_late(margins).mean(), 30)):.0e} to 1",
        "too many epochs, too high a learning rate, or a β that is meant for means and not sums",
    )


def other_reference(logs: Logs) -> Finding | None:
    margins, loss = _first(logs, "rewards/margins"), _first(logs, "loss")
    if margins is None or loss is None or abs(loss[0] - math.log(2)) < 0.05:
        return None
    if loss[0] < math.log(2) and len(loss) > 1 and abs(loss[0] - loss[1]) > 0.05:
        return None  # a log that averages over its first steps, in which much was learnt
    return Finding(
        "a first DPO loss that is not ln 2",
        f"it is {loss[0]:.3f}, at a margin of {margins[0]:.2f}; a policy that is its reference has "
        "0.693 and 0",
        "dropout is on, the reference is another model, or the two are computed in different ways "
        "(of other losses than DPO's this says nothing)",
    )


def idle_value_model(logs: Logs) -> Finding | None:
    explained = _first(logs, "val/explained_variance")
    if explained is None or len(explained) < 4 or _late(explained).mean() > 0.05:
        return None
    return Finding(
        "a value model that predicts nothing",
        f"its explained variance ends at {_late(explained).mean():.2f}",
        "it reads the wrong place, learns too slowly, or its returns move under it",
    )


def ratio_at_the_start(logs: Logs) -> Finding | None:
    ratio = _first(logs, "val/ratio")
    clipped = _first(logs, "policy/clipfrac_avg", "clip_ratio/region_mean")
    off = 0.0 if ratio is None else abs(float(ratio[0]) - 1)
    share = 0.0 if clipped is None else float(clipped[0])
    if off < 0.1 and share < 0.15:
        return None
    return Finding(
        "a ratio far from 1 at the first step",
        f"mean ratio {1 if ratio is None else ratio[0]:.2f}, {share:.0%} of the tokens clipped",
        "sampling and training see different policies: dropout, another temperature, a shifted "
        "mask, other precision; or the first steps are far too large",
    )


def cut_replies(logs: Logs) -> Finding | None:
    share = _mostly(logs, "completions/clipped_ratio")
    if share is None:
        return None
    return Finding(
        "replies that do not end",
        f"{share:.0%} of the last replies were cut off at the length limit",
        "the end-of-sequence token is masked or never trained, or the reward likes length",
    )


def cut_rewards(logs: Logs) -> Finding | None:
    names = ("objective/scores", "objective/rlhf_reward", "objective/non_score_reward")
    if not all(name in logs for name in names):
        return None
    given, shaped, charged = (float(np.nanmean(_late(logs[name]))) for name in names)
    if not abs(given - (shaped - charged)) > CUT:
        return None
    return Finding(
        "rewards that are cut",
        f"the reward model gives {given:.1f} on average, and {shaped - charged:.1f} is learnt from",
        "reward_clip is far inside these replies' rewards: their unit is the spread over the "
        "demonstrations, which is small where these resemble one another",
    )


LOOKS: Sequence[Callable[[Logs], Finding | None]] = (
    no_numbers,
    negative_kl,
    silent_groups,
    collapsed_entropy,
    exploding_margins,
    other_reference,
    idle_value_model,
    ratio_at_the_start,
    cut_replies,
    cut_rewards,
)


def as_text(findings: Sequence[Finding]) -> str:
    """What a terminal shows."""
    lines = [f"{f.name}: {f.seen}.\n    Often because {f.cause}." for f in findings]
    return "\n".join(lines) or "nothing suspicious in this log; that is no proof that all is well"
