"""The course's own pictures: what a chapter is made of, and what a few updates did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from textwrap import fill
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rlhf_lib.catalogue import GREY, color
from rlhf_lib.show.figures import WIDTH
from rlhf_lib.show.findings import WRONG
from rlhf_lib.show.training import update_panels

DATA, MODELS, LOSS = "#e8eef4", "#f4efe6", "#e9f3ea"  # what a box holds


class Box(NamedTuple):
    text: str
    file: str  # below rlhf_lib/, or a folder of the checkout
    fill: str = MODELS


# Of each chapter its columns, from the left: every box hands something to those right of it.
DIAGRAMS: dict[str, tuple[tuple[Box, ...], ...]] = {
    "01_dataset": (
        (Box("rows", "data/sources.py", DATA),),
        (Box("prompt, chosen, rejected", "data/dialogues.py", DATA),),
        (Box("splits by conversation", "data/pairs.py", DATA),),
        (Box("token ids", "data/encoding.py", DATA),),
    ),
    "02_reward_model": (
        (Box("pairs", "data/pairs.py", DATA),),
        (Box("model with a scalar head", "models/load.py"),),
        (Box("two scores", "models/logprobs.py"),),
        (Box("Bradley–Terry loss", "objectives/losses.py", LOSS),),
        (Box("step", "methods/learner.py", LOSS),),
    ),
    "03_sft": (
        (Box("demonstrations", "data/encoding.py", DATA),),
        (Box("policy", "models/load.py"),),
        (Box("log-probs of replies", "models/logprobs.py"),),
        (Box("mean over tokens", "objectives/losses.py", LOSS),),
        (Box("step", "methods/learner.py", LOSS),),
    ),
    "04_ppo": (
        (Box("prompts", "data/pairs.py", DATA),),
        (Box("policy replies", "methods/rollout.py"),),
        (
            Box("reward model", "methods/rewards.py"),
            Box("reference: KL", "objectives/kl.py"),
            Box("value model", "models/logprobs.py"),
        ),
        (Box("advantages", "objectives/advantages.py", LOSS),),
        (Box("clipped loss", "objectives/losses.py", LOSS),),
    ),
    "05_grpo": (
        (Box("prompts", "data/pairs.py", DATA),),
        (Box("groups of replies", "methods/rollout.py"),),
        (
            Box("reward model", "methods/rewards.py"),
            Box("reference: KL", "objectives/kl.py"),
        ),
        (Box("compared in the group", "objectives/advantages.py", LOSS),),
        (Box("clipped loss", "objectives/losses.py", LOSS),),
    ),
    "06_dpo": (
        (Box("pairs", "data/pairs.py", DATA),),
        (
            Box("policy", "models/load.py"),
            Box("reference", "models/load.py"),
        ),
        (Box("log-probs of both replies", "models/logprobs.py"),),
        (Box("−log σ(β·lead)", "objectives/preference.py", LOSS),),
        (Box("step", "methods/learner.py", LOSS),),
    ),
    "07_evaluation": (
        (Box("held-out prompts", "data/pairs.py", DATA),),
        (Box("replies of every policy", "measure/evaluate.py"),),
        (Box("gold, proxy, KL", "measure/evaluate.py"),),
        (Box("paired differences", "measure/statistics.py", LOSS),),
        (Box("what may be said", "results/verdict.py", LOSS),),
    ),
}


def diagram(chapter: str) -> Figure:
    """From data to the loss, each box with the file in which it lies.

    Raises KeyError for a chapter that has none.
    """
    columns = DIAGRAMS[chapter]
    rows = max(len(column) for column in columns)
    figure = Figure(figsize=(WIDTH, 0.3 + 0.8 * rows))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, len(columns)), ylim=(rows + 0.1, -0.1))
    axis.axis("off")
    middles = []
    for place, column in enumerate(columns):
        heights = [rows * (i + 0.5) / len(column) for i in range(len(column))]
        middles.append([(place + 0.5, height) for height in heights])
        for box, middle in zip(column, middles[-1], strict=True):
            _draw(axis, box, middle)
    for left, right in pairwise(middles):
        for x, y in left:
            for to_x, to_y in right:
                look = {"arrowstyle": "->", "color": GREY}
                axis.annotate("", (to_x - 0.42, to_y), (x + 0.42, y), arrowprops=look)
    return figure


def _draw(axis: Axes, box: Box, middle: tuple[float, float]) -> None:
    x, y = middle
    look = {"boxstyle": "round,pad=0,rounding_size=0.05", "fc": box.fill, "ec": GREY, "lw": 0.8}
    axis.add_patch(FancyBboxPatch((x - 0.42, y - 0.38), 0.84, 0.76, **look))
    words = box.text.split()
    half = (len(words) + 1) // 2
    lines = (
        box.text if len(box.text) < 15 else f"{' '.join(words[:half])}\n{' '.join(words[half:])}"
    )
    axis.text(x, y - 0.14, lines, ha="center", va="center", fontsize=8, color="black")
    file = box.file.replace("/", "/\n") if len(box.file) > 16 else box.file
    axis.text(x, y + 0.2, file, ha="center", va="center", fontsize=6.5, family="monospace")


def trial(
    runs: Mapping[str, Sequence[Mapping[str, float]]], panels: Mapping[str, str], color: str
) -> Figure:
    """What a few updates did, as it should be (the first run) and with a mistake (the second).

    runs: name -> one record an update; panels: key of the records -> title.
    """
    wide = min(3, len(panels))
    tall = -(-len(panels) // wide)
    figure = Figure(figsize=(WIDTH, 0.35 + 2.0 * tall), layout="constrained")
    axes = figure.subplots(tall, wide, squeeze=False).flat
    styles = ((color, "o-", 1.8), (WRONG, "s--", 1.4))
    for axis, (key, title) in zip(axes, panels.items(), strict=False):
        for (name, rows), (hue, style, thick) in zip(runs.items(), styles, strict=True):
            places, values = range(1, len(rows) + 1), [row[key] for row in rows]
            axis.plot(places, values, style, color=hue, lw=thick, ms=4, label=name)
        axis.set(title=fill(title, 28), xlabel="update")
        if not any(row[key] for rows in runs.values() for row in rows):
            axis.set_ylim(0, 1)  # both are 0 throughout, and look like it
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    return figure


def weights(tokens: Tensor, replies: Tensor, clip: float) -> Figure:
    """The weight of a token's gradient over its ratio, under a clip and under CISPO's limit, for
    better and worse replies; below, the ratios of a batch: of its tokens, and of its replies.
    """
    ratios = torch.linspace(0.4, 1.8, 281)
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, inside) in zip(
        axes,
        {"advantage above 0": ratios < 1 + clip, "advantage below 0": ratios > 1 - clip}.items(),
        strict=True,
    ):
        axis.plot(ratios, ratios * inside, color=color("ppo"), lw=1.8, label="clip")
        limited = ratios.clamp(max=1 + clip)
        axis.plot(ratios, limited, "--", color=color("grpo"), lw=1.8, label="CISPO")
        for seen, height in ((tokens, -0.15), (replies, -0.4)):
            shown = seen[(seen > ratios[0]) & (seen < ratios[-1])]
            axis.plot(shown, [height] * len(shown), "|", color=GREY, ms=6, alpha=0.5)
        axis.set(title=title, xlabel="ratio", ylim=(-0.55, 1.85))
        axis.set_yticks(
            [-0.4, -0.15, 0, 0.5, 1, 1.5], ["replies (GSPO)", "tokens", "0", "0.5", "1", "1.5"]
        )
    axes[0].set_ylabel("weight of the gradient")
    axes[1].legend(loc="upper left")
    return figure


def steps(updates: Sequence[pd.DataFrame], color: str) -> Figure:
    """A panel an update: advantage of each token, and how its log-prob changed by the update.

    updates: frames with the columns `advantage` and `change`.
    """
    figure, axes = update_panels(len(updates), "advantage of a token", "change of its log-prob")
    for axis, frame in zip(axes, updates, strict=True):
        axis.axvline(0, color=GREY, lw=0.8)
        axis.plot(frame["advantage"], frame["change"], ".", color=color, alpha=0.5, ms=4)
        axis.set_yscale("symlog", linthresh=0.1)  # most change little, and a few very much
    return figure
