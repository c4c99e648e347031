"""Widgets: the content of each position, the twin in batch, and the control that turns it."""

from __future__ import annotations

import base64
import re
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import softmax

from rlhf_lib.data.encoding import Pair
from rlhf_lib.show import display as show_display
from rlhf_lib.show import widgets

VIEW = "application/vnd.jupyter.widget-view+json"
REFERENCE, REWARD = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 0.0, -0.5, 2.0])


def pair(number: int) -> Pair:
    asked = f"\n\nHuman: old\n\nAssistant: {number}\n\nHuman: request {number}\n\nAssistant:"
    return Pair("talk", asked, f" good {number} <b>", f" bad {number} or worse", [3], [4], [5])


PAIRS = [pair(number) for number in range(5)]
MARGINS = [2.0, -3.0, 0.5, 1.0, -0.1]


def run_of(level: float, **more: list[float]) -> pd.DataFrame:
    columns = {"step": [0, 1, 2], "reward": [level] * 3, "kl": [0.0, level, 2 * level]}
    return pd.DataFrame(columns | more)


SHELL = SimpleNamespace(kernel=object(), user_ns={})
RUNS = {coefficient: run_of(1 - coefficient) for coefficient in (0.4, 0.0, 0.1, 0.2)}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What is displayed from here on: (bundle, metadata) of each output."""
    outputs: list[tuple[dict, dict]] = []

    def display(bundle: dict, raw: bool, metadata: dict) -> None:
        assert raw
        outputs.append((bundle, metadata))

    monkeypatch.setattr(show_display, "display", display)
    return outputs


@pytest.fixture
def in_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_BATCH", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "01_dataset.ipynb")
    monkeypatch.setattr(widgets, "get_ipython", lambda: SHELL)


# ------------------------------------------------------------------- what a position holds


def test_a_pair_is_shown_with_its_last_request_and_its_lengths() -> None:
    (row,) = widgets.pair_page(PAIRS, [3]).to_dict("records")
    assert row == {
        "pair": 4,
        "request": "request 3",
        "chosen": "good 3 <b>",
        "rejected": "bad 3 or worse",
        "words": "3\u00a0:\u00a04",
    }


@pytest.mark.parametrize(("share", "place"), [(0.0, 1), (0.25, 4), (0.5, 2), (0.75, 3), (1.0, 0)])
def test_margins_are_read_from_the_worst_to_the_surest(share: float, place: int) -> None:
    (row,) = widgets.margin_page(PAIRS, MARGINS, [share]).to_dict("records")
    assert row["request"] == f"request {place}"
    assert float(row["margin"]) == pytest.approx(MARGINS[place])
    assert (float(row["P(chosen wins)"][:-1]) > 50) == (MARGINS[place] > 0)


def test_the_chance_of_a_margin_is_that_of_bradley_and_terry() -> None:
    (row,) = widgets.margin_page(PAIRS[:1], [float(np.log(3))], [0.0]).to_dict("records")
    assert row["P(chosen wins)"] == "75.0%"  # odds of three to one


def test_the_chosen_run_is_in_colour_and_lies_on_top() -> None:
    figure = widgets.kl_figure(RUNS, [0.1])
    for axis in figure.axes:
        *others, last = axis.lines
        assert len(others) == 3
        assert last.get_color() not in {line.get_color() for line in others}
    assert figure.axes[0].lines[-1].get_ydata()[-1] == pytest.approx(0.9)
    assert [axis.get_title() for axis in figure.axes] == [
        "proxy reward",
        "KL to SFT (nats a reply)",
    ]


def test_gold_has_a_panel_only_where_every_run_knows_it() -> None:
    known = {c: run_of(c, gold=[1.0, 2.0, 3.0]) for c in (0.1, 0.2)}
    assert widgets.logged(known) == ["reward", "kl", "gold"]
    assert widgets.logged(known | {0.3: run_of(0.3)}) == ["reward", "kl"]


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_optimum_is_what_a_search_finds(beta: float) -> None:
    def loss(logits: np.ndarray) -> float:
        policy = softmax(logits)
        return -(policy @ REWARD) + beta * widgets.kl_divergence(policy, REFERENCE)

    found = softmax(minimize(loss, np.zeros(4), tol=1e-10).x)
    assert widgets.optimum(REFERENCE, REWARD, beta) == pytest.approx(found, abs=1e-4)


def test_the_ends_of_beta() -> None:
    greedy, still = (widgets.optimum(REFERENCE, REWARD, beta) for beta in (1e-4, 1e6))
    assert greedy == pytest.approx([0, 0, 0, 1])
    assert widgets.kl_divergence(greedy, REFERENCE) == pytest.approx(np.log(10))
    assert still == pytest.approx(REFERENCE, abs=1e-5)


def test_the_bars_stand_in_the_order_of_reward_and_the_title_says_what_was_paid() -> None:
    (axis,) = widgets.beta_figure(REFERENCE, REWARD, [0.5]).axes
    heights = [bar.get_height() for bar in axis.patches]
    order = [2, 1, 0, 3]  # rewards -0.5, 0, 1, 2
    assert heights[:4] == pytest.approx(REFERENCE[order])
    assert heights[4:] == pytest.approx(softmax(np.log(REFERENCE) + 2 * REWARD)[order])
    assert axis.get_title() == "β = 0.5\nreward 1.57, KL 0.98"


def test_a_spread_keeps_both_ends() -> None:
    assert widgets.spread([1, 2, 3, 4, 5]) == [1, 3, 5]
    assert widgets.spread([1, 2]) == [1, 2]


# --------------------------------------------------------------------------- twins and controls

OFFERS = {
    "pairs": lambda: widgets.pair_browser(PAIRS),
    "margins": lambda: widgets.margin_explorer(PAIRS, MARGINS),
    "kl": lambda: widgets.kl_explorer(RUNS),
    "beta": lambda: widgets.beta_explorer(REFERENCE.tolist(), REWARD.tolist()),
}


@pytest.mark.parametrize("name", OFFERS)
def test_a_batch_run_shows_the_twin_and_makes_no_widget(
    name: str, shown: list, in_notebook: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a widget was made where nobody can touch it")

    monkeypatch.setenv("RLHF_BATCH", "1")
    monkeypatch.setattr(widgets, "control", refuse)
    OFFERS[name]()
    (bundle, metadata), _ = shown
    assert VIEW not in bundle
    assert metadata["caption"].endswith(".")
    mime = {"figure": "image/svg+xml", "table": "text/html"}[metadata["kind"]]
    assert len(bundle[mime]) > 100


@pytest.mark.parametrize("name", OFFERS)
def test_a_live_notebook_gets_twin_and_control_in_one_output(
    name: str, shown: list, in_notebook: None
) -> None:
    OFFERS[name]()
    (bundle, metadata), _ = shown
    # of ipywidgets 7 as of 8: Colab has 7.7.1, whose widgets have no `_repr_mimebundle_`
    assert bundle[VIEW] | {"model_id": ""} == {
        "version_major": 2,
        "version_minor": 0,
        "model_id": "",
    }
    assert bundle[VIEW]["model_id"]
    assert {"text/html", "image/svg+xml"} & bundle.keys()
    assert metadata["kind"] in ("table", "figure")


def test_somebody_is_there_in_jupyter_colab_and_vs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_BATCH", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)

    def within(shell: Any) -> bool:
        monkeypatch.setattr(widgets, "get_ipython", lambda: shell)
        return widgets.live()

    assert not within(None), "a script"
    assert not within(SimpleNamespace(user_ns={})), "IPython on a terminal"
    assert not within(SHELL), "papermill, nbconvert: a kernel, and nobody before it"
    assert within(SimpleNamespace(kernel=object(), user_ns={"__vsc_ipynb_file__": "x.ipynb"}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
        assert within(SHELL)
    monkeypatch.setenv("JPY_SESSION_NAME", "01_dataset.ipynb")
    assert within(SHELL)
    monkeypatch.setenv("RLHF_BATCH", "1")
    assert not within(SHELL)


def test_turning_the_control_shows_the_other_page() -> None:
    positions = {str(i): i for i in range(5)}
    page = partial(widgets.pair_page, PAIRS)
    slider, _, view = widgets.control("pair", positions, page).children
    assert "request 0" in view.value
    slider.value = 4
    assert "request 4" in view.value
    assert "request 0" not in view.value
    assert "&lt;b&gt;" in view.value, "a reply's text is text, not markup"


def test_turning_the_control_draws_the_other_figure() -> None:
    page = partial(widgets.beta_figure, REFERENCE, REWARD)
    slider, _, view = widgets.control("β", {"0.1": 0.1, "5": 5.0}, page).children
    first = view.value
    slider.value = 5.0
    assert view.value != first
    image = re.search(r"base64,([^\"]+)", view.value)
    assert image
    assert base64.b64decode(image[1]).startswith(b"\x89PNG")


def test_the_twins_show_several_positions(shown: list) -> None:
    for name in ("pairs", "margins"):
        OFFERS[name]()
    pages: list[Any] = [bundle["text/plain"] for bundle, _ in shown[::2]]
    assert all(f"request {i}" in pages[0] for i in range(3))
    assert all(f"{margin:+.2f}" in pages[1] for margin in MARGINS)
    assert len(widgets.kl_figure(RUNS, widgets.spread(sorted(RUNS))).axes) == 3 * 2


def test_preferences_must_belong_to_the_pairs() -> None:
    with pytest.raises(ValueError, match="5 pairs, but 4 preferences"):
        widgets.margin_explorer(PAIRS, MARGINS[:4])
