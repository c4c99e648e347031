"""The report's first page: what was asked and found, how sure that is, how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import nbformat
import pandas as pd
from matplotlib.figure import Figure

from rlhf_lib import catalogue
from rlhf_lib.catalogue import GREY, color, label
from rlhf_lib.files import read_jsonl
from rlhf_lib.results import verdict
from rlhf_lib.show import figures
from rlhf_lib.show.display import described, figure_bundle, table_bundle
from rlhf_lib.show.tables import HEADLINE_CAPTION, headline_table
from rlhf_lib.world.grammar import last_request

QUESTION = (
    "PPO, GRPO and DPO train a language model on pairs of replies of which somebody liked one "
    "better. Do its replies become better by that, or do they only please better?"
)
WORDS = {
    "gold": "*Gold reward* is how good a reply truly is. It is known, for requests, replies and "
    "raters come from a small world with fixed rules, made for this study. *Proxy reward* is what "
    "a reward model says, which has seen the raters' choices alone.",
    "judge": "How good a reply truly is, nobody knows. *Judge reward* is what a reward model says "
    "that was trained on pairs the rest never saw; *proxy reward* is what the one says that the "
    "policies learnt from.",
    "proxy": "How good a reply truly is, nobody knows. *Proxy reward* is what the reward model "
    "says that the policies learnt from: it proves little by itself.",
}
KINDS = (
    "Where the gain comes from: {deciding} reward gained over SFT on each kind of request, with "
    "95 % intervals. {said}"
)
WORLD_KINDS = (
    "Of the kinds, *help* asks for tips, *harm* should be refused, *edge* sounds like it and "
    "should not, *truth* asks whether a claim is true."
)
REPLIES = (
    "One request, two policies. Of all requests it is the one on which the weakly regularised PPO "
    "gains most proxy and loses most gold against {best}, which has the most gold of the methods."
)
GAINS = (
    "Gain over SFT on the same held-out prompts, with 95 % intervals{each}. *SFT again* is "
    "another draw from SFT itself: its interval holds 0 in nineteen studies of twenty."
)


def front_page(results: Mapping, folder: Path | None = None) -> nbformat.NotebookNode:
    """The poster, and behind it the main table. `folder`: the evaluation's, for two replies."""
    deciding, seeds = results["deciding"], len(results["seeds"])
    each = ", small ticks single seeds" if seeds > 1 else ""
    opening = f"**{QUESTION}** {WORDS[deciding]} The model is *{results['model']}*"
    small = ", a GPT-2 of less than a million weights" if results["model"] == "tiny" else ""
    cells = [
        prose(f"{opening}{small}."),
        figure(figures.gains(results), GAINS.format(each=each).replace("*", "")),
        prose("## What was found\n\n" + "\n".join(f"- {x}" for x in verdict.lessons(results))),
    ]
    if results["requests"]:
        caption = KINDS.format(deciding=deciding, said=WORLD_KINDS if deciding == "gold" else "")
        cells.append(figure(kinds(results), caption.replace("*", "").strip()))
    if deciding == "gold" and folder is not None and (two := two_replies(results, folder)):
        cells.append(table(pd.DataFrame(two[1]), REPLIES.format(best=label(two[0]))))
    cells.append(prose("## How sure\n\n" + " ".join([*verdict.sureness(results), again(results)])))
    more = [
        verdict.beside_best_of_n(results),
        "What to choose for which need, and what was corrected for how many comparisons, stands at "
        "the end of [chapter 7](07_evaluation.ipynb#the-verdict).",
    ]
    cells.append(prose("## All policies\n\n" + "\n\n".join(more)))
    caption = HEADLINE_CAPTION.format(deciding=deciding)
    return notebook([*cells, table(headline_table(results), caption)])


def again(results: Mapping) -> str:
    """How to repeat the study, and what to compare it by."""
    digests = [digest[:12] for digest in next(iter(results["stages"].values())).values()]
    return (
        f"To repeat it: `python -m rlhf_lib run --profile {results['profile']}`; the last of its "
        f"stages' hashes is `{digests[-1]}`, all stand in the appendix."
    )


def kinds(results: Mapping) -> Figure:
    """A panel a kind of request: what each policy gained over SFT on it."""
    groups = results["requests"]["kind"]
    names = [n for n in catalogue.policies("baseline", "method") if n in results["policies"]]
    drawn = Figure((figures.WIDTH, 0.2 * len(names) + 0.9), layout="constrained")
    axes = drawn.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (kind, group) in zip(axes, groups.items(), strict=True):
        axis.axvline(0, color=GREY, lw=0.8)
        for place, name in enumerate(names):
            if name in group["policies"]:
                figures.dots(axis, [group["policies"][name]["gain"]], [place], color(name))
        axis.set_title(kind, loc="left")
    figures.name_rows(axes[0], names)
    drawn.supxlabel(f"{results['deciding']} reward gained over SFT", fontsize="medium")
    return drawn


def two_replies(results: Mapping, folder: Path) -> tuple[str, list[dict]] | None:
    """The best method, and its reply beside an over-optimised one; None where there is no such."""
    loose = "ppo_low_kl"
    methods = [n for n in catalogue.methods() if n in results["policies"]]
    best = max(methods, key=lambda name: results["policies"][name]["gold"]["mean"])
    files = [folder / "samples" / f"{name}.jsonl" for name in (best, loose)]
    if not all(file.is_file() for file in files):
        return None
    good, bad = ({(r["seed"], r["prompt"]): r for r in reversed(_whole(f))} for f in files)
    shared = [(good[key], bad[key]) for key in good if key in bad]
    told = [(g, b) for g, b in shared if b["proxy"] > g["proxy"] and b["gold"] < g["gold"]]
    if not told:
        return None
    pair = max(told, key=_apart)
    rows = [
        {
            "policy": label(name),
            f"reply to: {last_request(pair[0]['prompt'])}": shorten(row["response"], 200),
            "proxy": f"{row['proxy']:.2f}",
            "gold": f"{row['gold']:.2f}",
        }
        for name, row in zip((best, loose), pair, strict=True)
    ]
    return best, rows


def _apart(two: tuple[dict, dict]) -> float:
    """Proxy gained and gold lost by the second reply."""
    good, bad = two
    return bad["proxy"] - good["proxy"] + good["gold"] - bad["gold"]


def _whole(file: Path) -> list[dict]:
    """Replies that were measured in full."""
    return [row for row in read_jsonl(file) if row.get("proxy") is not None]


# --------------------------------------------------------------------------- pages of the report


def notebook(cells: Sequence[nbformat.NotebookNode]) -> nbformat.NotebookNode:
    for number, cell in enumerate(cells):
        cell["id"] = f"page-{number}"
    return nbformat.v4.new_notebook(cells=list(cells))


def _cell(data: dict, metadata: dict) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    cell = nbformat.v4.new_code_cell("", execution_count=1, outputs=[output])
    cell.metadata["tags"] = ["remove-input"]
    return cell


def prose(text: str) -> nbformat.NotebookNode:
    return _cell({"text/markdown": text, "text/plain": text}, {})


def figure(drawn: Figure, caption: str) -> nbformat.NotebookNode:
    about = {"kind": "figure", "caption": caption, "alt": described(drawn)}
    return _cell(figure_bundle(drawn), about)


def table(frame: pd.DataFrame, caption: str) -> nbformat.NotebookNode:
    return _cell(table_bundle(frame), {"kind": "table", "caption": caption})
