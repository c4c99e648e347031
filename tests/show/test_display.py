"""What notebooks show: captioned figures and tables, and sentences whose numbers are looked up."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
from matplotlib.figure import Figure

from rlhf_lib.methods.learner import Learner
from rlhf_lib.objectives import kl
from rlhf_lib.show import display


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What was displayed: bundles with their metadata."""
    bundles: list[tuple[dict, dict]] = []

    def catch(bundle: dict, raw: bool, metadata: dict | None = None) -> None:
        assert raw
        bundles.append((bundle, metadata or {}))

    monkeypatch.setattr(display, "display", catch)
    return bundles


def drawing() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2, 3])
    return figure


def test_figures_and_tables_carry_their_captions(shown: list) -> None:
    display.show(drawing(), "A line.")
    display.table(pd.DataFrame({"a": [1]}), "A cell.")
    (figure, about_figure), one, (table, about_table), other = shown
    assert about_figure == {"caption": "A line.", "kind": "figure"}
    assert about_table == {"caption": "A cell.", "kind": "table"}
    assert "<svg" in figure["image/svg+xml"]
    assert figure["image/png"].startswith("iVBOR")  # PNG in base64
    assert '<td style="text-align: right">1</td>' in table["text/html"]
    for line, said in ((one, "A line."), (other, "A cell.")):
        assert line[1] == {"kind": "caption"}
        assert line[0]["text/plain"] == said
        assert f">{said}</div>" in line[0]["text/html"]


def test_a_figure_is_told_in_words_with_its_values() -> None:
    figure = Figure()
    rows, lines = figure.subplots(1, 2)
    rows.errorbar([0.25], [0], xerr=[[0.1], [0.1]], fmt="o")
    rows.errorbar([1.5], [1], xerr=[[0.1], [0.1]], fmt="o")
    rows.set_yticks([0, 1], ["SFT", "PPO"])
    rows.set(title="gains", xlim=(0, 2))
    figure.supxlabel("gold")
    lines.plot([1, 8], [0.1, 0.9], label="best of n")
    lines.plot([1, 8], [5, 5])  # a line of no name
    lines.set(xlabel="n", ylabel="reward\n(points)", xlim=(0, 10), ylim=(1, 0))
    lines.annotate("SFT", (1, 1))
    figure.subplots().set_visible(False)
    assert display.described(figure) == (
        "Panel 1, gains; gold from 0 to 2; SFT: 0.25; PPO: 1.5. Panel 2, n from 0 to 10; "
        "reward (points) from 0 to 1; best of n: 0.1 at 1 to 0.9 at 8; SFT"
    )
    assert display.described(drawing()) == "", "nothing is named: the caption has to do"


def test_what_a_figure_shows_and_is_called_goes_with_it(shown: list) -> None:
    figure = drawing()
    figure.axes[0].set_title("A line")
    display.show(figure, "A line.", "line")
    display.table(pd.DataFrame({"a": [1]}), "A cell.", "cell")
    about, _, other, _ = (metadata for _, metadata in shown)
    assert (about["name"], about["alt"]) == ("line", "A line")
    assert other == {"caption": "A cell.", "kind": "table", "name": "cell"}


def test_a_caption_is_text_and_no_markup(shown: list) -> None:
    display.table(pd.DataFrame({"a": [1]}), "Where a < b: <script>alert(1)</script>")
    assert "a &lt; b: &lt;script&gt;" in shown[1][0]["text/html"]


def test_words_stand_on_the_left_and_numbers_on_the_right() -> None:
    frame = pd.DataFrame(
        {
            "who": ["PPO", "7 of them, or words"],
            "gain": ["0.45 [0.24, 0.67]", "–"],
            "less": ["−1.2", "+3"],
            "share": [0.5, math.nan],
            "reply": ["- is a list", "<td>12</td>"],
        }
    )
    found = display.table_bundle(frame)["text/html"]
    sides = re.findall(r'<(?:th|td) style="text-align: (\w+)">', found)
    assert sides == 3 * ["left", "right", "right", "right", "left"]


def test_equal_figures_give_equal_files() -> None:
    one, other = (display.figure_bundle(drawing()) for _ in range(2))
    assert one == other
    assert "<dc:date>" not in one["image/svg+xml"]


def test_a_table_keeps_long_texts_whole_and_lets_no_markup_through() -> None:
    reply = "word " * 100 + "<script>alert(1)</script>"
    bundle = display.table_bundle(pd.DataFrame({"reply": [reply], "gap": [math.nan]}))
    assert bundle["text/html"].count("word") == 100
    assert "<script" not in bundle["text/html"]
    assert "–" in bundle["text/html"]


def test_a_sentence_looks_its_numbers_up(shown: list) -> None:
    display.say("Accuracy\n  {r[accuracy]:.1%} of {n}.", r={"accuracy": 0.723}, n=4)
    assert shown[0][0]["text/markdown"] == "Accuracy 72.3% of 4."
    assert shown[0][0]["text/plain"] == "Accuracy 72.3% of 4.", "what papermill --log-output shows"


@pytest.mark.parametrize("template", ["{kl:.2f}", "{r[kl]}", "{0}", "{r[0]}", "{n[kl]}"])
def test_a_number_that_was_not_measured_fails(template: str) -> None:
    with pytest.raises(KeyError, match=r"no measurement for .* in the sentence: 'KL was"):
        display.sentence(f"KL was {template}.", r={"reward": 1.0}, n=4)


def test_source_is_the_librarys_own(shown: list) -> None:
    display.source(kl.k3)
    code = shown[0][0]["text/markdown"]
    assert code.startswith("```python\ndef k3(")
    assert code.endswith("\n```")


def test_sources_of_several_functions_are_one_listing(shown: list) -> None:
    display.source(kl.k1, kl.k3)
    code = shown[0][0]["text/plain"]
    assert code.index("def k1(") < code.index("\n\n\ndef k3(")


def test_a_methods_source_begins_at_the_margin(shown: list) -> None:
    display.source(Learner.step)
    assert shown[0][0]["text/plain"].startswith('@phase("update")\ndef step(')
