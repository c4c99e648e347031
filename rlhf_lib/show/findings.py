"""What chapters 06 and 07 say of their runs: sentences, tables and figures, each from one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from rlhf_lib.catalogue import GREY, color, label, policies
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.measure.attribution import DOSED
from rlhf_lib.measure.statistics import contrast, interval
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.results.frontier import SMOOTH, at_equal_budget, logged, spent, swept
from rlhf_lib.runs import Stage
from rlhf_lib.show import costs, tables
from rlhf_lib.show.figures import WIDTH, dots
from rlhf_lib.show.training import update_panels

WRONG = "#c24a00"  # a run with a mistake, an interval that leaves out the truth
SHOWN = 60  # made-up studies whose intervals are drawn
AVERAGED = SMOOTH  # steps that a moving mean of the frontier takes together


# ------------------------------------------------------------------------------------------ DPO


def pair_frame(numbers: Sequence[int], rewards: Tensor, after: Tensor, beta: float) -> pd.DataFrame:
    """One update of DPO, a row a pair, by their numbers.

    rewards (2, B): implicit rewards before the step, chosen and rejected; after (2, B): log-ratios
    to the reference behind it, in nats.
    """
    margins, moved = rewards[0] - rewards[1], after - rewards / beta
    frame = pd.DataFrame(
        {
            "pair": list(numbers),
            "chosen": rewards[0].numpy(),
            "rejected": rewards[1].numpy(),
            "lead": (margins / beta).numpy(),
            "loss": -logsigmoid(margins).numpy(),
            "pull": (beta * (-margins).sigmoid()).numpy(),
            "chosen moved": moved[0].numpy(),
            "rejected moved": moved[1].numpy(),
        }
    )
    return frame.sort_values("pair", ignore_index=True)


PAIR_TITLES = {
    "pair": "pair",
    "update": "update",
    "chosen": "r̂ of chosen",
    "rejected": "r̂ of rejected",
    "lead": "lead (nats)",
    "loss": "loss",
    "pull": "pull",
    "chosen moved": "chosen moved (nats)",
    "rejected moved": "rejected moved (nats)",
}


def pair_table(updates: Sequence[pd.DataFrame], pairs: int) -> pd.DataFrame:
    """The first pairs of some updates (`pair_frame`), each followed through all of them."""
    rows = pd.concat(
        [frame.head(pairs).assign(update=number) for number, frame in enumerate(updates, 1)]
    )
    rows = rows.sort_values(["pair", "update"], ignore_index=True)
    for column in ("chosen", "rejected", "lead", "chosen moved", "rejected moved"):
        # + 0.0: what rounds to -0.00 is no fall
        rows[column] = [f"{round(value, 2) + 0.0:+.2f}" for value in rows[column]]
    for column in ("loss", "pull"):
        rows[column] = [f"{value:.3f}" for value in rows[column]]
    return pd.DataFrame({title: rows[column] for column, title in PAIR_TITLES.items()})


def pair_steps(updates: Sequence[pd.DataFrame], colour: str) -> Figure:
    """A panel an update: of each pair, how far the step moved both replies (`pair_frame`)."""
    figure, axes = update_panels(len(updates), "chosen moved (nats)", "rejected moved (nats)")
    for axis, frame in zip(axes, updates, strict=True):
        axis.axline((0, 0), slope=1, color=GREY, lw=0.8, ls=":")
        axis.axvline(0, color=GREY, lw=0.8)
        axis.plot(frame["chosen moved"], frame["rejected moved"], "o", color=colour, ms=4)
    return figure


def loss_curves(leads: Tensor, curves: Mapping[str, Tensor], first: int = 3) -> Figure:
    """Losses by lead, each divided by its value where lead is 0; the `first` in a panel of theirs.

    Raises ValueError where no lead is 0.
    """
    level = leads.tolist().index(0.0)
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    names = list(curves)
    for axis, some in zip(figure.subplots(1, 2), (names[:first], names[first:]), strict=True):
        for name in some:
            axis.plot(leads.numpy(), (curves[name] / curves[name][level]).numpy(), label=name)
        axis.set(xlabel="lead of the chosen reply (nats)", ylabel="loss, 1 where level")
        axis.set_ylim(0, 3)
        axis.legend(fontsize=8)
    return figure


def sides_moved(metrics: Sequence[Mapping], beta: float) -> str:
    """Where DPO's last quarter of training had both sides of the pairs, and what that shows."""
    sides = ("chosen", "rejected")
    last = {s: [r / beta for r in tables.quarters(metrics, f"rewards/{s}")[1]] for s in sides}
    moved = {side: contrast([0.0, 0.0], last[side]) for side in sides}
    chosen, rejected = (moved[side]["verdict"] for side in sides)
    if chosen == rejected == "lower":
        moral = "Both sides fell: a margin won by pushing down."
    elif chosen == "lower":
        moral = "The chosen replies fell; that the rejected ones fell is not shown."
    elif rejected == "lower":
        moral = (
            "The rejected replies fell; that the chosen ones fell is not shown: as one would hope."
        )
    else:
        moral = "Neither side clearly fell in this run."
    return (
        f"In the last quarter of training the chosen replies stood {moved['chosen']['last']:+.2f} "
        f"nats from where SFT had put them, the rejected ones {moved['rejected']['last']:+.2f}. "
        f"{moral}"
    )


def answers(
    sampled: Mapping[str, Rollout], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """Replies of some policies to the same prompts, prompt by prompt."""
    frames = [tables.replies(said, prompts, tokenizer, policy=p) for p, said in sampled.items()]
    return pd.concat(frames).sort_index(kind="stable")


# ----------------------------------------------------------------------------- made-up studies


def studies(ways: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Intervals of made-up studies in which the truth is 0, a panel a way of computing them."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(axes, ways.items(), strict=True):
        for place, record in enumerate(found[:SHOWN]):
            hue = WRONG if leaves_out(record) else GREY
            axis.plot([place, place], [record["low"], record["high"]], color=hue, lw=1.2)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel="study", title=f"{name}\n{missed(found):.1%} leave 0 out")
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("difference, 95 % interval")
    return figure


def leaves_out(record: Mapping) -> bool:
    """Whether an interval leaves out 0."""
    return bool(record["low"] > 0 or record["high"] < 0)


def missed(found: Sequence[Mapping]) -> float:
    """Share of intervals that leave out 0."""
    return float(np.mean([leaves_out(record) for record in found]))


def width(found: Sequence[Mapping]) -> float:
    """How wide intervals are on average."""
    return float(np.mean([record["high"] - record["low"] for record in found]))


def against_kl(
    lines: Mapping[str, tuple[Any, Any]], dots: Mapping[str, tuple[Any, Any]], ylabel: str
) -> Figure:
    """Lines and dots over KL; each is its KL and its height."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axis = figure.subplots()
    for name, (x, y) in dots.items():
        axis.plot(x, y, ".", ms=3, alpha=0.6, color=GREY, label=name)
    for name, (x, y) in lines.items():
        hue = color(name) if name in ("proxy", "gold") else None
        axis.plot(x, y, "-o", ms=3, lw=1.4, label=name, color=hue)
    axis.set(xlabel="KL (nats)", ylabel=ylabel)
    axis.legend()
    return figure


# ----------------------------------------------------------------------------- of a study's results


def seen(results: Mapping) -> str:
    """The smallest differences that the finest and the coarsest comparison would show."""
    sizes = {k: r["detectable"] for k, r in results["comparisons"].items() if r["detectable"]}
    if not sizes:
        return "No comparison has an error that is known, so none says what it could have seen."
    finest, coarsest = (tables.pair_name(end(sizes, key=sizes.__getitem__)) for end in (min, max))
    return (
        f"The finest comparison is {finest}: it would show {min(sizes.values()):.2f}. The coarsest "
        f"is {coarsest}: {max(sizes.values()):.2f} ({results['deciding']} reward)."
    )


def kinds(results: Mapping) -> list[str]:
    """Of the baseline and each method, the kinds of request in which it gained or lost."""
    said = []
    for name in policies("method", "baseline"):
        found = results["requests"]["kind"].items()
        gains = {kind: group["policies"][name]["gain"] for kind, group in found}
        said.append(f"**{label(name)}**: {tables.moved(gains)}.")
    return said


def taught(results: Mapping) -> list[str]:
    """What each method on unbiased labels does differently from the same on the annotator's."""
    return [
        f"**{label(control)}**, less the same method on the annotator's: {_judged(gaps)}"
        for control, gaps in results["attribution"]["differences"].items()
    ]


def _judged(found: Mapping[str, Mapping]) -> str:
    return "; ".join(f"{what} {interval(x)} ({x['verdict']})" for what, x in found.items()) + "."


def doses(results: Mapping) -> Figure:
    """Gold reward and polite words of a reply over how strongly the annotator likes the latter."""
    means, shown = results["attribution"]["policies"], ("gold reward", "polite words")
    figure = Figure((WIDTH, 2.4), layout="constrained")
    for axis, what in zip(figure.subplots(1, len(shown)), shown, strict=True):
        axis.axhline(means["sft"][what]["mean"], color=GREY, lw=0.8, ls=":", label="SFT")
        for place, (method, runs) in enumerate(DOSED.items()):
            taste = sorted(runs)
            records = [means[runs[dose]][what] for dose in taste]
            aside = [dose + 0.03 * place for dose in taste]  # intervals would hide each other
            dots(axis, records, aside, color(method), upright=True, label=label(method), fmt="o-")
        axis.set_title(f"{what} of a reply", loc="left")
        axis.set_xticks(taste, [f"{dose:g}" for dose in taste])
    named = figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.supxlabel("the annotator's taste, times its own", fontsize="medium")
    return figure


def leanings(results: Mapping) -> list[str]:
    """How much of each grows with the taste, method by method."""
    return [
        f"**{label(method)}**, for each unit of the taste: {_judged(found)}"
        for method, found in results["attribution"]["slopes"].items()
    ]


def read_samples(folder: Path) -> dict[str, pd.DataFrame]:
    """The replies that a study kept of each policy, in the order of tables."""
    files = {file.stem: file for file in (folder / "samples").glob("*.jsonl")}
    names = [name for name in policies() if name in files]
    return {name: pd.read_json(files[name], orient="records", lines=True) for name in names}


def in_full(samples: Mapping[str, pd.DataFrame]) -> dict[str, list[dict]]:
    """The replies that were measured in full; of the others only what decides is known."""
    rows = {name: frame.dropna(subset=["proxy"]) for name, frame in samples.items()}
    return {name: frame.to_dict("records") for name, frame in rows.items()}


def run_ends(frontier: pd.DataFrame, deciding: str) -> tuple[pd.DataFrame, list[str]]:
    """Where runs at other coefficients end, and which rewards are known there."""
    ends = swept(frontier)
    return ends, logged(ends, deciding)


def used_up(
    stage: Callable[[str], Stage], names: Sequence[str], reward: str
) -> dict[str, pd.DataFrame]:
    """What each of these stages had used up, step by step, and the reward that it had by then."""
    return {name: spent(stage(name), stage("reward_model"), reward) for name in names}


def budget_table(used: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The runs at equal budgets."""
    return costs.budget_table(at_equal_budget(used))


def replies_read(results: Mapping, sampled: Mapping[str, int], pairs: int) -> str:
    """How many replies DPO reads, who samples none, and how many PPO."""
    dpo, ppo = (results["settings"][name]["epochs"] for name in ("dpo", "ppo"))
    return (
        f"DPO samples none: it reads {2 * dpo * pairs:,} replies of the dataset, where PPO reads "
        f"its own {ppo} times, {ppo * sampled['ppo']:,} in all."
    )


def overoptimised(results: Mapping) -> list[str]:
    """What a smaller KL coefficient did to PPO's rewards."""
    return [
        f"Under-regularised minus default PPO, **{reward}** reward: {interval(found)}: "
        f"{found['verdict']}."
        for reward, found in sorted(results["overoptimisation"].items())
    ]


def stop_table(results: Mapping) -> pd.DataFrame:
    """Where gold would have stopped under-regularised PPO, and what was seen there."""
    stops = pd.DataFrame(results["early_stops"]).round(2)
    stops.columns = pd.Index([n.replace("_", " ").replace("kl", "KL (k1)") for n in stops])
    return stops


def probed(results: Mapping) -> str:
    """How many prompts, replies and seeds the shares of failures rest on."""
    asked, seeds = results["settings"]["evaluation"], len(results["seeds"])
    return (
        f"At most {asked['probe_prompts']} prompts of each probe, {asked['probe_samples']} replies "
        f"to each, in each seed (of {seeds}). Replies to one prompt count as one unit, so these "
        "intervals are wide."
    )


def tempted(results: Mapping) -> str:
    """What the reward model gives PPO's failing replies, and its other ones."""
    proxy = results["probes"]["proxy"]["ppo"]
    return (
        f"On the probes the reward model gives PPO's failing replies {interval(proxy['failing'])} "
        f"on average, and its other replies {interval(proxy['other'])}."
    )


def proof_table(proofs: Sequence[Any]) -> pd.DataFrame:
    """One row a claim (`proofs.claims.Proof`): measured, expected, error and verdict."""
    columns = [
        ("claim", lambda proof: proof.claim),
        ("measured", lambda proof: f"{proof.measured:.4g}"),
        ("expected", lambda proof: f"{proof.expected:.4g}"),
        ("error", lambda proof: f"{proof.error:.1e}"),
        ("verdict", lambda proof: proof.verdict),
    ]
    return tables.table_of(proofs, columns)
