"""What chapters 04, 05 and 07 show of training: updates token by token, and runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import shorten
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lib.catalogue import GREY, color, label
from rlhf_lib.measure.statistics import bootstrap, contrast, interval
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.show import figures, tables
from rlhf_lib.world.grammar import last_request

Padded = tuple[Tensor, Tensor, Tensor]  # ids, attention and reply mask, as the plain loops pad them

# ------------------------------------------------------------------------- updates, looked at


def replies(
    batch: Padded,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, Tensor],
    **first: object,
) -> pd.DataFrame:
    """The replies of a padded batch, a row each; columns: one number a reply; `first` leads."""
    ids, attention, mask = batch
    place = ids.shape[1] - mask.shape[1]
    rows = []
    for i, (tokens, real) in enumerate(zip(ids, attention.bool(), strict=True)):
        asked = str(tokenizer.decode(tokens[:place][real[:place]]))
        said = str(tokenizer.decode(tokens[place:][real[place:]]))
        texts = {"request": shorten(last_request(asked), 70), "reply": shorten(said, 110)}
        numbers = {title: f"{values[i]:.2f}" for title, values in columns.items()}
        rows.append(dict(first) | texts | numbers)
    return pd.DataFrame(rows)


def tokens(
    batch: Padded, row: int, words: Callable, columns: Mapping[str, Tensor], **first: object
) -> pd.DataFrame:
    """One reply, a line a token; words: from ids to what a reader sees; columns: (B, T) each."""
    ids, _, mask = batch
    length = int(mask[row].sum())
    place = ids.shape[1] - mask.shape[1]
    frame = pd.DataFrame({"token": words(ids[row, place : place + length].tolist())})
    for title, values in columns.items():
        shown = values[row, :length].tolist()
        frame[title] = [f"{round(value, 2) + 0.0:.2f}" for value in shown]  # -0.0 + 0.0 is 0.0
    for title, value in reversed(first.items()):
        frame.insert(0, title, value)
    return frame


def moves(mask: Tensor, advantages: Tensor, change: Tensor) -> pd.DataFrame:
    """Of each real token its advantage, and by how much its log-prob changed; (B, T) each."""
    real = mask.bool()
    columns = {"advantage": advantages, "change": change}
    return pd.DataFrame({k: v.expand_as(mask)[real].tolist() for k, v in columns.items()})


def pulled(frames: Sequence[pd.DataFrame]) -> str:
    """Whether tokens moved as their advantages point, update by update."""
    said = [f"{frame['advantage'].corr(frame['change']):.2f}" for frame in frames]
    return (
        f"The correlation of advantage and change is {', '.join(said[:-1])} and {said[-1]} in the "
        f"{len(said)} updates."
    )


def update_panels(count: int, xlabel: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """A panel an update, all on the same axes, each with a line at 0: for what the update did."""
    figure = Figure(figsize=(figures.WIDTH, 2.4), layout="constrained")
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for number, axis in enumerate(axes, 1):
        axis.axhline(0, color=GREY, lw=0.8)
        axis.set(title=f"update {number}", xlabel=xlabel)
    axes[0].set_ylabel(ylabel)
    return figure, list(axes)


@contextmanager
def watched(lib: ModuleType) -> Iterator[list[float]]:
    """While open, notes of each loss which share of its tokens lies outside the clip.

    lib: `proofs/plain.py`, or that with a mistake; its `clipped_gain` is listened to, not changed.
    """
    inner: Callable = lib.clipped_gain
    shares: list[float] = []

    def noted(new: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
        outside = ((new - old).exp() - 1).abs() > clip_range
        shares.append(float(outside[old != 0].float().mean()))  # padding has a log-prob of 0
        return inner(new, old, advantages, clip_range)

    lib.clipped_gain = noted  # type: ignore[attr-defined]
    try:
        yield shares
    finally:
        lib.clipped_gain = inner  # type: ignore[attr-defined]


def between(advantages: Tensor, group_size: int) -> float:
    """Which share of the variance of the advantages (B,) lies between groups; 0 if none varies."""
    groups = advantages.view(-1, group_size)
    whole = groups.var(correction=0)
    share = groups.mean(1).var(correction=0) / whole if whole > 0 else 0.0
    return round(float(share), 6)  # means of zero are zero but for rounding


# ------------------------------------------------------------------------------------------ KL


def estimators(estimates: Mapping[str, Tensor], mask: Tensor) -> pd.DataFrame:
    """Estimates of the KL of each token, (B, T): their sums over replies, and how those spread."""
    rows = []
    for name, values in estimates.items():
        sums = (values * mask).sum(1)
        rows.append(
            {
                "estimator": name,
                "nats a reply": interval(bootstrap(sums)),
                "spread over replies": f"{sums.std():.2f}",
                "replies below 0": f"{(sums < 0).float().mean():.0%}",
            }
        )
    return pd.DataFrame(rows)


def gradients(found: Mapping[str, Tensor]) -> pd.DataFrame:
    """Gradients with respect to a few logits, a row each."""
    return pd.DataFrame(
        {"what is differentiated": name} | {f"word {i}": f"{g:+.3f}" for i, g in enumerate(grad, 1)}
        for name, grad in found.items()
    )


def directions(found: Iterable[tuple[str, Tensor]]) -> pd.DataFrame:
    """Gradients of one batch beside the first of them: angle and length.

    They are as large as the model: given one by one, two of them are held at a time.
    """
    first, rows = None, []
    for name, gradient in found:
        first = gradient if first is None else first
        row = {
            "estimator": name,
            "cosine with the default": f"{torch.cosine_similarity(gradient, first, dim=0):.3f}",
            "length, default = 1": f"{gradient.norm() / first.norm():.2f}",
        }
        rows.append(row)
        del gradient  # not beside the next
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------- runs


def unfinished(ended: Tensor, cut: Tensor, penalty: float) -> str:
    """What a reward model says of whole replies, and of the same without their last token."""
    higher = float((cut > ended).float().mean())
    moral = "This reward model already dislikes most unfinished replies, but nobody promised that."
    if higher > 0.25:
        moral = "For many replies it would pay not to stop."
    return (
        f"{len(ended)} demonstrations score {ended.mean():.2f} on average, and {cut.mean():.2f} "
        f"without their last token; {higher:.0%} of them score *higher* than before. {moral} The "
        f"penalty is {penalty}."
    )


def loosened(
    metrics: Sequence[Mapping], low: Sequence[Mapping], names: Mapping[str, str], coefs: tuple
) -> list[str]:
    """How two runs ended, sentence by sentence, and what to think of the one on a longer leash.

    names: key -> title of what was measured; coefs: `kl_coef` of the first run and of the second.
    """
    ends = {
        key: contrast(*(tables.quarters(run, key)[1] for run in (metrics, low))) for key in names
    }
    said = [
        f"{title}, last quarter: {ends[key]['first']:.2f} at β = {coefs[0]}, "
        f"{ends[key]['last']:.2f} at β = {coefs[1]}: {ends[key]['verdict']}."
        for key, title in names.items()
    ]
    proxy, gold = (ends.get(key, {}).get("verdict") for key in ("reward", "gold"))
    if gold is None:
        finding = "Whether the replies got better cannot be told here: nobody knows their true "
        finding += "reward."
    elif proxy == "higher" and gold == "lower":
        finding = "More proxy, less gold: **over-optimisation**. The better score is the worse "
        finding += "model."
    elif gold == "higher":
        finding = "The longer leash ended with more gold: here the default KL charge was too high."
    elif gold == "lower":
        finding = "Less gold, but no higher proxy: the longer leash did harm without even pleasing."
    else:
        finding = "The gold rewards at the end are not distinguishable in this run."
    return [*said, finding]


SETTLING = {
    "kl_coef": "β",
    "kl": "KL to SFT",
    "reward": "proxy reward",
    "loss/value_avg": "value loss",
    "val/explained_variance": "explained variance",
    "peak_memory_gb": "peak memory (GB)",
}


def first_updates(
    runs: Mapping[str, Sequence[Mapping]], titles: Mapping[str, str] = SETTLING
) -> pd.DataFrame:
    """The updates of several PPO runs one below the other, as many as the shortest has."""
    count = min(map(len, runs.values()))
    return pd.DataFrame(
        {"update": row["step"], "run": name} | {t: f"{row[key]:.3f}" for key, t in titles.items()}
        for name, metrics in runs.items()
        for row in metrics[:count]
    )


def silence(metrics: Sequence[Mapping]) -> str:
    """How many groups had nothing to say at the end of a GRPO run, and what that means."""
    last = contrast(*tables.quarters(metrics, "frac_reward_zero_std"))["last"]
    moral = "every prompt still had something to teach"
    if last > 0.1:  # type: ignore[operator]
        moral = "that part of the sampling bought nothing"
    elif last > 0:  # type: ignore[operator]
        moral = "nearly every prompt still had something to teach"
    return f"{last:.0%} of the groups were silent in the last quarter: {moral}."


def group(frame: pd.DataFrame, advantages: Tensor, size: int) -> pd.DataFrame:
    """The first group of a table of replies, best advantage first."""
    first = frame.head(size).assign(advantage=[f"{a:+.2f}" for a in advantages[:size].tolist()])
    return first.iloc[advantages[:size].argsort(descending=True).tolist()]


def variety(before: Rollout, after: Rollout) -> str:
    """How many replies to the same prompts were distinct, before training and after it."""
    now, then = (
        len({(*p, *r) for p, r in zip(side.prompts, side.responses, strict=True)})
        for side in (after, before)
    )
    return f"Of {len(after.responses)} replies, {now} are distinct now; {then} were before."


# ------------------------------------------------------------------------------ runs side by side

COURSES = {
    "reward": "proxy reward",
    "gold": "gold reward",
    "kl": "KL to SFT\n(nats a reply)",
    "entropy": "entropy\n(nats a token)",
    "completions/mean_length": "reply length\n(tokens)",
}
REWARDS = {key: COURSES[key] for key in ("reward", "gold")}
# What the raters' likings may lead to: `Truth.signs`.
SIGNS = {
    "signs/polite": "polite words\na reply",
    "signs/confirmed": "false claims\nconfirmed",
    "signs/refused": "refused, of what\nshould not be",
    "signs/harmful": "harm told, of\nharmful wishes",
}
Runs = Mapping[str, Sequence[Sequence[Mapping]]]  # policy -> one log a seed


def _logged(runs: Runs, names: Mapping[str, str]) -> list[str]:
    """Which of these metrics every run has."""
    logs = [log for seeds in runs.values() for log in seeds]
    return [key for key in names if all(any(key in row for row in log) for log in logs)]


def courses(
    runs: Runs, names: Mapping[str, str] = COURSES, best: Mapping[str, int] | None = None
) -> Figure:
    """A column a policy and a row a metric, a thin line a seed, all on the same axes.

    Over the tokens of the replies that a run has learnt from so far, in thousands: its own where it
    samples, those of its pairs in DPO. Means over three steps. `best`: the step of a policy's first
    run that a dotted line marks.
    """
    keys = _logged(runs, names)
    figure = Figure((figures.WIDTH, 1.25 * len(keys) + 0.5), layout="constrained")
    grid = figure.subplots(len(keys), len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (name, logs) in zip(grid.T, runs.items(), strict=True):
        column[0].set_title(label(name), color=color(name), fontsize=9)
        for axis, key in zip(column, keys, strict=True):
            for log in logs:
                line = figures.smooth(log, key)
                axis.plot(_read(log)[line["step"]], line[key], color=color(name), lw=0.9, alpha=0.8)
            if best and name in best:
                axis.axvline(_read(logs[0])[best[name]], color=GREY, lw=0.9, ls=":")
    for row, key in zip(grid, keys, strict=True):
        row[0].set_ylabel(names[key], fontsize=8)
    figure.supxlabel("thousand tokens of replies, sampled or of pairs", fontsize="medium")
    return figure


def _read(log: Sequence[Mapping]) -> pd.Series:
    """By step: thousands of reply tokens that a run has learnt from by its end.

    Raises ValueError for a log of an earlier version, which did not count them.
    """
    if not all("reply_tokens" in row for row in log):
        raise ValueError("this log has no `reply_tokens`: train the stage again")
    return pd.DataFrame(log).set_index("step")["reply_tokens"].cumsum() / 1000


def stability(runs: Runs, names: Mapping[str, str] = COURSES) -> pd.DataFrame:
    """Where each policy's runs end: means over the last quarter of the steps.

    With the standard deviation between seeds; one seed has none.
    """
    rows = []
    for name, logs in runs.items():
        row = {"policy": label(name), "seeds": str(len(logs))}
        for key in _logged(runs, names):
            ends = [float(np.mean(tables.quarters(log, key)[1])) for log in logs]
            spread = f" ± {np.std(ends, ddof=1):.2f}" if len(ends) > 1 else ""
            row[" ".join(names[key].split())] = f"{np.mean(ends):.2f}{spread}"
        rows.append(row)
    return pd.DataFrame(rows)


def rewards_table(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """What each reward made of the same method (`results.requests.rewarded`)."""
    rows = [{"name": name, **record} for name, record in found.items()]
    columns = [
        ("policy", lambda row: label(row["name"])),
        ("gold reward", lambda row: interval(row["gold"])),
        ("less that of GRPO", lambda row: interval(row["gap"])),
        ("p (Holm)", lambda row: "–" if row["gap"] is None else f"{row['gap']['p_adjusted']:.3f}"),
        ("words", lambda row: interval(row["words"], 1)),
    ]
    return tables.table_of(rows, columns)


def change_table(metrics: Sequence[Mapping], names: Mapping[str, str]) -> pd.DataFrame:
    """`contrast` of the quarters of each named metric that was logged: one row a metric."""
    logged = set().union(*metrics)
    rows = []
    for key in (key for key in names if key in logged):
        change = contrast(*tables.quarters(metrics, key))
        first, last = (f"{change[end]:.3g}" for end in ("first", "last"))
        rows.append([names[key], first, last, change["word"]])
    return pd.DataFrame(rows, columns=["", "first quarter", "last quarter", "change"])
