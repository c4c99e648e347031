"""Things to touch: readers of pairs, and sliders over logged runs and over beta.

Each has two halves: a pure function that makes the table or figure for some positions, and a thin
layer that turns one position at a time into a control. A report cannot be touched, so each also has
a static twin that shows several positions at once. In batch (`RLHF_BATCH`), or without a notebook,
only the twin is shown; in a live notebook both are one output, and the front end takes the control.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from textwrap import shorten
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.core.getipython import get_ipython
from matplotlib.figure import Figure
from scipy.special import rel_entr, softmax

from rlhf_lib.catalogue import color
from rlhf_lib.data.encoding import Pair
from rlhf_lib.show.display import captioned, figure_bundle, table_bundle
from rlhf_lib.show.figures import smooth
from rlhf_lib.show.tables import Column, table_of
from rlhf_lib.world.grammar import last_request

Content = pd.DataFrame | Figure
Page = Callable[[list], Content]  # what is shown of a list of positions
PANELS = {"reward": "proxy reward", "kl": "KL to SFT (nats a reply)", "gold": "gold reward"}
WIDGET = "application/vnd.jupyter.widget-view+json"
TWIN_POSITIONS = 3  # how many positions of a slider its static twin shows


def live() -> bool:
    """Whether somebody can turn a control: in Jupyter, Colab or VS Code, and not in batch.

    papermill and nbconvert start a kernel too, but nobody sits before it: there, a widget would be
    lost on the reader, and leave its state in the executed notebook.
    """
    shell = get_ipython()
    if os.environ.get("RLHF_BATCH") or shell is None or not hasattr(shell, "kernel"):
        return False
    jupyter = "JPY_SESSION_NAME" in os.environ  # set by the server for the notebook of a session
    return jupyter or "google.colab" in sys.modules or "__vsc_ipynb_file__" in shell.user_ns


def control(title: str, positions: Mapping[str, object], content: Page) -> ipywidgets.VBox:
    """A slider over the named positions, above the content of the one that it stands at."""
    slider = ipywidgets.SelectionSlider(
        options=list(positions.items()),
        description=title,
        continuous_update=False,
        style={"description_width": "initial"},
        layout={"width": "32rem", "max_width": "100%"},
    )
    view = ipywidgets.HTML(_markup(content([slider.value])))
    note = ipywidgets.HTML("<small>It answers when no cell is running.</small>")

    def turn(change: Mapping) -> None:
        view.value = _markup(content([change["new"]]))

    slider.observe(turn, names="value")
    return ipywidgets.VBox([slider, note, view])


def _markup(content: Content) -> str:
    if isinstance(content, Figure):
        return f'<img alt="" src="data:image/png;base64,{figure_bundle(content)["image/png"]}">'
    return table_bundle(content)["text/html"]  # pandas escapes what the cells hold


def _offer(
    caption: str, twin: Content, title: str, positions: Mapping[str, object], content: Page
) -> None:
    """Show the twin, numbered and captioned, with the control over it where somebody can use it."""
    kind = "figure" if isinstance(twin, Figure) else "table"
    bundle: dict = figure_bundle(twin) if isinstance(twin, Figure) else table_bundle(twin)
    offer(bundle, kind, caption, lambda: control(title, positions, content))


def offer(
    twin: Mapping[str, Any], kind: str, caption: str, make: Callable[[], ipywidgets.Widget]
) -> None:
    """Display a twin, with the control that `make` gives over it where somebody can use it."""
    bundle = dict(twin)
    if live():
        # what ipywidgets 8 says of a widget, and 7, which Colab has, shows as well
        view = {"version_major": 2, "version_minor": 0}
        bundle[WIDGET] = view | {"model_id": make().model_id}
    captioned(bundle, kind, caption)


def spread(positions: Sequence, count: int = TWIN_POSITIONS) -> list:
    """At most `count` of the positions, evenly spaced, the first and the last among them."""
    picked = np.linspace(0, len(positions) - 1, min(count, len(positions))).round()
    return [positions[int(i)] for i in picked]


# ---------------------------------------------------------------------------------------- pairs


def _texts(pairs: Sequence[Pair], limit: int) -> list[Column]:
    """What is read of the pair at a place."""
    return [
        ("request", lambda place: shorten(last_request(pairs[place].prompt_text), limit)),
        ("chosen", lambda place: shorten(pairs[place].chosen_text, limit)),
        ("rejected", lambda place: shorten(pairs[place].rejected_text, limit)),
    ]


def pair_page(pairs: Sequence[Pair], places: Sequence[int], limit: int = 1000) -> pd.DataFrame:
    """Pairs to read: the last request, both replies, and how many words each of them has."""

    def words(place: int) -> str:
        sides = pairs[place].chosen_text, pairs[place].rejected_text
        return "\u00a0:\u00a0".join(str(len(text.split())) for text in sides)

    columns = [("pair", lambda place: place + 1), *_texts(pairs, limit), ("words", words)]
    return table_of(places, columns)


def pair_browser(pairs: Sequence[Pair]) -> None:
    """Turn over the pairs one by one. Twin: the first of them."""
    page, places = partial(pair_page, pairs), range(len(pairs))
    caption = "The first pairs, to be read; words of the chosen reply : words of the rejected one."
    positions = {str(place + 1): place for place in places}
    _offer(caption, page(places[:TWIN_POSITIONS], 200), "pair", positions, page)


def margin_page(
    pairs: Sequence[Pair], preferences: Sequence[float], shares: Sequence[float], limit: int = 1000
) -> pd.DataFrame:
    """The pairs that stand at these shares of all pairs when they are sorted by reward margin.

    preferences: (pairs,) score of the chosen reply minus that of the rejected one, in the reward
    model's own units. Share 0 is the pair it got most wrong, 1 the one it is surest of.
    """
    order = np.argsort(preferences, kind="stable")
    places = [int(order[round(share * (len(order) - 1))]) for share in shares]
    columns = [
        *_texts(pairs, limit),
        ("margin", lambda place: f"{preferences[place]:+.2f}"),
        ("P(chosen wins)", lambda place: f"{1 / (1 + np.exp(-preferences[place])):.1%}"),
    ]
    frame = table_of(places, columns)
    frame.insert(0, "pairs with a smaller margin", [f"{share:.0%}" for share in shares])
    return frame


def margin_explorer(pairs: Sequence[Pair], preferences: Sequence[float]) -> None:
    """Read pairs from the most wrongly to the most rightly ranked. Twin: five of them."""
    if len(pairs) != len(preferences):
        raise ValueError(f"{len(pairs)} pairs, but {len(preferences)} preferences")
    shares = np.linspace(0, 1, min(101, len(pairs))).tolist()
    page = partial(margin_page, pairs, preferences)
    caption = (
        "Pairs at five places of the order by reward margin: score of the chosen reply minus score "
        "of the rejected one. A negative margin is a pair that the reward model gets wrong."
    )
    positions = {f"{share:.0%}": share for share in shares}
    _offer(caption, page(spread(shares, 5), 120), "share of pairs below", positions, page)


# ------------------------------------------------------------------------------------- the leash


def logged(runs: Mapping[float, pd.DataFrame]) -> list[str]:
    """Which metrics of `PANELS` every run has."""
    return [key for key in PANELS if all(key in frame for frame in runs.values())]


def kl_figure(runs: Mapping[float, pd.DataFrame], coefficients: Sequence[float]) -> Figure:
    """A row of panels for each of these coefficients: its run among all of them, over the steps."""
    figure, keys = Figure((7.2, 2.1 * len(coefficients) + 0.3), layout="constrained"), logged(runs)
    grid = figure.subplots(len(coefficients), len(keys), sharex=True, sharey="col", squeeze=False)
    for row, coefficient in zip(grid, coefficients, strict=True):
        for axis, key in zip(row, keys, strict=True):
            for other in sorted(runs, key=lambda other: other == coefficient):  # it lies on top
                line = smooth(runs[other], key)
                chosen = {"color": color("ppo"), "lw": 1.8}
                look = chosen if other == coefficient else {"color": "#bbbbbb", "lw": 0.9}
                sns.lineplot(line, x="step", y=key, estimator=None, ax=axis, **look)
            axis.set(xlabel="", ylabel="")
        row[0].set_ylabel(f"β = {coefficient:g}", color=color("ppo"))
    for top, bottom, key in zip(grid[0], grid[-1], keys, strict=True):
        top.set_title(PANELS[key])
        bottom.set_xlabel("update")
    return figure


def kl_explorer(runs: Mapping[float, pd.DataFrame]) -> None:
    """Turn the KL coefficient. `runs`: coefficient -> logged metrics, one row a step."""
    page, positions = partial(kl_figure, runs), {f"{beta:g}": beta for beta in sorted(runs)}
    caption = (
        "The same training under different KL coefficients β: in each row one run in blue, the "
        "others in grey; running means over three updates."
    )
    _offer(caption, page(spread(sorted(runs))), "KL coefficient β", positions, page)


# -------------------------------------------------------------------------------------- beta


def optimum(reference: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """The policy that maximises mean reward - beta * KL(policy || reference); all (replies,).

    Source: arXiv:2305.18290, eq. 4.
    """
    return softmax(np.log(reference) + np.asarray(reward) / beta)


def kl_divergence(policy: np.ndarray, reference: np.ndarray) -> float:
    """KL(policy || reference) in nats, of two distributions over the same replies."""
    return float(rel_entr(policy, reference).sum())


def beta_figure(reference: np.ndarray, reward: np.ndarray, betas: Sequence[float]) -> Figure:
    """Reference and optimum at each beta as bars over the replies; what was gained, what paid."""
    figure = Figure((2.4 * max(len(betas), 2), 2.4), layout="constrained")
    axes = figure.subplots(1, len(betas), sharey=True, squeeze=False)[0]
    order, places = np.argsort(reward), np.arange(len(reward))
    for axis, beta in zip(axes, betas, strict=True):
        policy = optimum(reference, reward, beta)
        axis.bar(places - 0.2, reference[order], 0.4, color=color("sft"))
        axis.bar(places + 0.2, policy[order], 0.4, color=color("dpo"))
        gained, paid = float(policy @ reward), kl_divergence(policy, reference)
        axis.set_title(f"β = {beta:g}\nreward {gained:.2f}, KL {paid:.2f}")
        axis.set_xticks(places, [f"{r:g}" for r in reward[order]])
        axis.set(ylim=(0, 1), xlabel="reward of the reply")
    axes[0].set_ylabel("probability")
    return figure


def beta_explorer(reference: Sequence[float], reward: Sequence[float]) -> None:
    """Turn beta in a world of a few replies, where the optimum is known in closed form."""
    page = partial(beta_figure, np.asarray(reference, float), np.asarray(reward, float))
    positions = {f"{beta:g}": beta for beta in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)}
    caption = (
        "The best policy (purple) that a leash of strength β allows, and the reference (grey). A "
        "small β buys reward with KL (nats); a large one leaves everything as it was."
    )
    _offer(caption, page(spread(list(positions.values()))), "β", positions, page)
