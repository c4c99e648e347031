"""Things to touch: readers of pairs and samples, and sliders over logged runs and over beta.

Each has two halves: a pure function that makes the table or figure for one position, and a thin
layer that turns positions into a control. A report cannot be touched, so each also has a static
twin that shows several positions at once. In batch (`RLHF_BATCH`), or without a notebook, only the
twin is shown; in a live notebook both are one output, and the front end takes the control.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten

import ipywidgets
import numpy as np
import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_lib.data.encoding import Pair
from rlhf_lib.show.display import NAMES, figure_bundle, last_request, table_bundle
from rlhf_lib.show.figures import COLORS

VIEW = "application/vnd.jupyter.widget-view+json"
Content = pd.DataFrame | Figure
PANELS = {"reward": "proxy reward", "kl": "KL to SFT (nats a reply)", "gold": "gold reward"}
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


def control(
    label: str, options: Sequence[tuple[str, object]], content: Callable[..., Content]
) -> ipywidgets.VBox:
    """A slider over `options` (name, value) above the content of the value it stands at."""
    slider = ipywidgets.SelectionSlider(
        options=options, description=label, continuous_update=False,
        style={"description_width": "initial"}, layout={"width": "32rem", "max_width": "100%"},
    )  # fmt: skip
    view = ipywidgets.HTML(_markup(content(slider.value)))

    def turn(change: Mapping) -> None:
        view.value = _markup(content(change["new"]))

    slider.observe(turn, names="value")
    return ipywidgets.VBox([slider, view])


def _markup(content: Content) -> str:
    if isinstance(content, Figure):
        return f'<img alt="" src="data:image/png;base64,{figure_bundle(content)["image/png"]}">'
    return table_bundle(content)["text/html"]  # pandas escapes what the cells hold


def _offer(
    label: str, options: Sequence[tuple[str, object]], content: Callable[..., Content],
    twin: Content, caption: str,
) -> None:  # fmt: skip
    """Show the twin, numbered and captioned, with the control over it where somebody can use it."""
    kind = "figure" if isinstance(twin, Figure) else "table"
    bundle: dict = figure_bundle(twin) if isinstance(twin, Figure) else table_bundle(twin)
    if live():
        bundle |= control(label, options, content)._repr_mimebundle_() or {}
    display(bundle, raw=True, metadata={"caption": caption, "kind": kind})


def spread(positions: Sequence, count: int = TWIN_POSITIONS) -> list:
    """At most `count` of the positions, evenly spaced, the first and the last among them."""
    picked = np.linspace(0, len(positions) - 1, min(count, len(positions))).round()
    return [positions[int(i)] for i in picked]


# ----------------------------------------------------------------------------- pairs and samples


def pair_page(pairs: Sequence[Pair], position: int, limit: int = 1000) -> pd.DataFrame:
    """One pair to read: the last request, both replies, and how many words each of them has."""
    pair = pairs[position]
    lengths = [len(text.split()) for text in (pair.chosen_text, pair.rejected_text)]
    return pd.DataFrame([{
        "pair": position + 1,
        "request": shorten(last_request(pair.prompt_text), limit),
        "chosen": shorten(pair.chosen_text, limit),
        "rejected": shorten(pair.rejected_text, limit),
        "words": "{}\u00a0:\u00a0{}".format(*lengths),
    }])  # fmt: skip


def pair_browser(pairs: Sequence[Pair]) -> None:
    """Turn over the pairs one by one. Twin: the first of them."""
    options = [(str(i + 1), i) for i in range(len(pairs))]
    twin = pd.concat([pair_page(pairs, i, 200) for _, i in options[:TWIN_POSITIONS]])
    _offer(
        "pair", options, lambda i: pair_page(pairs, i), twin,
        "The first pairs, to be read; words of the chosen reply : words of the rejected one.",
    )  # fmt: skip


def margin_page(
    pairs: Sequence[Pair], preferences: Sequence[float], share: float, limit: int = 1000
) -> pd.DataFrame:
    """The pair that stands at this share of all pairs when they are sorted by reward margin.

    preferences: (pairs,) score of the chosen reply minus that of the rejected one, in the reward
    model's own units. Share 0 is the pair it got most wrong, 1 the one it is surest of.
    """
    order = np.argsort(preferences, kind="stable")
    place = int(order[round(share * (len(order) - 1))])
    pair, margin = pairs[place], float(preferences[place])
    return pd.DataFrame([{
        "pairs with a smaller margin": f"{share:.0%}",
        "request": shorten(last_request(pair.prompt_text), limit),
        "chosen": shorten(pair.chosen_text, limit),
        "rejected": shorten(pair.rejected_text, limit),
        "margin": f"{margin:+.2f}",
        "P(chosen wins)": f"{1 / (1 + np.exp(-margin)):.1%}",
    }])  # fmt: skip


def margin_explorer(pairs: Sequence[Pair], preferences: Sequence[float]) -> None:
    """Read pairs from the most wrongly to the most rightly ranked. Twin: five of them."""
    if len(pairs) != len(preferences):
        raise ValueError(f"{len(pairs)} pairs, but {len(preferences)} preferences")
    shares = np.linspace(0, 1, min(101, len(pairs))).tolist()
    twin = pd.concat([margin_page(pairs, preferences, s, 120) for s in spread(shares, 5)])
    _offer(
        "share of pairs below", [(f"{s:.0%}", s) for s in shares],
        lambda s: margin_page(pairs, preferences, s), twin,
        "Pairs at five places of the order by reward margin: score of the chosen reply minus score "
        "of the rejected one. A negative margin is a pair that the reward model gets wrong.",
    )  # fmt: skip


def sample_page(
    samples: Mapping[str, Sequence[Mapping]], prompt: str, limit: int = 1000
) -> pd.DataFrame:
    """What each policy replied to one prompt, with the rewards that are known.

    samples: policy -> rows with `prompt`, `response`, and perhaps `proxy` and `gold`, as in a
    study's `samples/<policy>.jsonl`. Raises KeyError for a policy that was not asked.
    """
    rows = []
    for policy, replies in samples.items():
        reply = next((row for row in replies if row["prompt"] == prompt), None)
        if reply is None:
            raise KeyError(f"{policy} has no reply to the prompt {prompt[:80]!r}")
        request = shorten(last_request(prompt), limit)
        row = {"request": request, "policy": NAMES.get(policy, policy)}
        row["reply"] = shorten(reply["response"], limit)
        rows.append(row | {k: f"{reply[k]:.2f}" for k in ("proxy", "gold") if k in reply})
    return pd.DataFrame(rows)


def sample_reader(samples: Mapping[str, Sequence[Mapping]]) -> None:
    """Read all policies' replies to a prompt side by side. Twin: the first three prompts."""
    prompts = list(dict.fromkeys(row["prompt"] for row in next(iter(samples.values()))))
    twin = pd.concat([sample_page(samples, prompt, 160) for prompt in prompts[:TWIN_POSITIONS]])
    _offer(
        "prompt", [(str(i), prompt) for i, prompt in enumerate(prompts, 1)],
        lambda prompt: sample_page(samples, prompt), twin,
        "One sampled reply of each policy to the same prompts.",
    )  # fmt: skip


# ------------------------------------------------------------------------------------- the leash


def draw_kl(axes: Sequence[Axes], runs: Mapping[float, pd.DataFrame], coefficient: float) -> None:
    """One panel a metric: the run with this KL coefficient among all of them, over the steps."""
    keys = logged(runs)
    for axis, key in zip(axes, keys, strict=True):
        for other, frame in sorted(runs.items(), key=lambda item: item[0] == coefficient):
            chosen = other == coefficient  # drawn last, on top
            line = pd.Series(frame.set_index("step")[key].dropna().rolling(3, 1).mean())
            color, width = (COLORS["ppo"], 1.8) if chosen else ("#bbbbbb", 0.9)
            axis.plot(line.index, line, color=color, lw=width)
        axis.set(title=PANELS[key], xlabel="update")
    axes[0].set_ylabel(f"β = {coefficient:g}", color=COLORS["ppo"])


def logged(runs: Mapping[float, pd.DataFrame]) -> list[str]:
    """Which metrics of `PANELS` every run has."""
    return [key for key in PANELS if all(key in frame for frame in runs.values())]


def kl_figure(runs: Mapping[float, pd.DataFrame], coefficients: Sequence[float]) -> Figure:
    """A row of panels for each of these coefficients; all rows have the same axes."""
    figure = Figure((7.2, 2.1 * len(coefficients) + 0.3), layout="constrained")
    shape = (len(coefficients), len(logged(runs)))
    grid = figure.subplots(*shape, sharex=True, sharey="col", squeeze=False)
    for row, coefficient in zip(grid, coefficients, strict=True):
        draw_kl(row, runs, coefficient)
    for axis in grid[1:].flat:
        axis.set_title("")
    for axis in grid[:-1].flat:
        axis.set_xlabel("")
    return figure


def kl_explorer(runs: Mapping[float, pd.DataFrame]) -> None:
    """Turn the KL coefficient. `runs`: coefficient -> logged metrics, one row a step."""
    ordered = sorted(runs)
    _offer(
        "KL coefficient β", [(f"{c:g}", c) for c in ordered], lambda c: kl_figure(runs, [c]),
        kl_figure(runs, spread(ordered)),
        "The same training under different KL coefficients β: in each row one run in blue, the "
        "others in grey; running means over three updates.",
    )  # fmt: skip


# -------------------------------------------------------------------------------------- beta


def optimum(reference: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """The policy that maximises mean reward - beta * KL(policy || reference); all (replies,).

    Source: arXiv:2305.18290, eq. 4.
    """
    logits = np.log(reference) + np.asarray(reward) / beta
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kl_divergence(policy: np.ndarray, reference: np.ndarray) -> float:
    """KL(policy || reference) in nats, of two distributions over the same replies."""
    held = policy > 0  # a reply that is never given costs nothing
    return float((policy[held] * np.log(policy[held] / np.asarray(reference)[held])).sum())


def draw_beta(axis: Axes, reference: np.ndarray, reward: np.ndarray, beta: float) -> None:
    """Reference and optimum as bars over the replies, with what was gained and what was paid."""
    policy, order = optimum(reference, reward, beta), np.argsort(reward)
    places = np.arange(len(order))
    axis.bar(places - 0.2, reference[order], 0.4, color=COLORS["sft"])
    axis.bar(places + 0.2, policy[order], 0.4, color=COLORS["dpo"])
    gained, paid = float(policy @ reward), kl_divergence(policy, reference)
    axis.set_title(f"β = {beta:g}\nreward {gained:.2f}, KL {paid:.2f}")
    axis.set_xticks(places, [f"{r:g}" for r in reward[order]])
    axis.set(ylim=(0, 1), xlabel="reward of the reply")


def beta_figure(reference: np.ndarray, reward: np.ndarray, betas: Sequence[float]) -> Figure:
    """A panel for each beta."""
    figure = Figure((2.4 * max(len(betas), 2), 2.4), layout="constrained")
    axes = figure.subplots(1, len(betas), sharey=True, squeeze=False)[0]
    for axis, beta in zip(axes, betas, strict=True):
        draw_beta(axis, reference, reward, beta)
    axes[0].set_ylabel("probability")
    return figure


def beta_explorer(
    reference: Sequence[float], reward: Sequence[float],
    betas: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
) -> None:  # fmt: skip
    """Turn beta in a world of a few replies, where the optimum is known in closed form."""
    known = np.asarray(reference, dtype=float), np.asarray(reward, dtype=float)
    _offer(
        "β", [(f"{b:g}", b) for b in betas], lambda b: beta_figure(*known, [b]),
        beta_figure(*known, spread(betas)),
        "The best policy (purple) that a leash of strength β allows, and the reference (grey). A "
        "small β buys reward with KL (nats); a large one leaves everything as it was.",
    )  # fmt: skip
