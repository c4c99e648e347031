"""What notebooks show: captioned figures and tables, and sentences whose numbers are looked up."""

from __future__ import annotations

import math
import re
from datetime import date

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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
    told = "a line: 1 at 0 to 3 at 2"
    assert about_figure == {"caption": "A line.", "kind": "figure", "alt": told}
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
    rows, also = figure.subplots(1, 2, sharey=True)
    for axis, scale in ((rows, 1), (also, 2)):
        bars = {"xerr": [[0.1], [0.2]], "fmt": "o", "capsize": 2}  # caps are no values
        axis.errorbar([0.25 * scale], [0], **bars)
        axis.errorbar([1.5 * scale], [1], **bars)
        axis.plot([1.0, 2.0], [0.2, 0.2], "|")  # single seeds
        axis.set(title=f"times {scale}", xlim=(0, 4))
    rows.set_yticks([0, 1], ["1. SFT", "PPO"])
    also.axvline(0.5)
    figure.supxlabel("gold")
    assert display.described(figure) == (
        "Panel 1, times 1; gold from 0 to 4; 1. SFT: 0.25 [0.15, 0.45]; PPO: 1.5 [1.4, 1.7]. "
        "Panel 2, times 2; gold from 0 to 4; 1. SFT: 0.5 [0.4, 0.7]; PPO: 3 [2.9, 3.2]"
    )


def test_lines_dots_and_texts_are_told() -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.plot([1, 2, 8], [0.1, 5, 0.9], label="best of n")
    axis.plot([0, 1, 8], [float("nan"), 5, 5])  # a line of no name
    axis.scatter([1, 3], [2, 4], label="PPO")
    axis.errorbar([2], [3], yerr=[[1], [1]], fmt="s", label="DPO")
    axis.errorbar([2], [3], xerr=[[1], [2]], yerr=[[1], [1]], fmt="none", label="GRPO")
    axis.set(xlabel="n", ylabel="reward\n(points)", xlim=(0, 10), ylim=(1, 0))
    axis.set_title("on the left", loc="left")
    axis.annotate("SFT", (1, 1))
    axis.annotate("SFT", (2, 1))
    assert display.described(figure) == (
        "on the left; n from 0 to 10; reward (points) from 0 to 1; DPO: 3 [2, 4] at 2; "
        "GRPO: 2 to 4 at 1 to 4; best of n: 0.1 at 1 to 0.9 at 8; a line: 5 at 1 to 5 at 8; "
        "PPO: 3 at 2; SFT"
    )


def test_shares_are_told_as_their_axis_says() -> None:
    axis = (figure := Figure()).subplots()
    axis.errorbar([0.5], [0], xerr=[[0.1], [0.1]], fmt="o")
    axis.set(yticks=[0], yticklabels=["PPO"], xlim=(0, 1), xlabel="per cent")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    assert display.described(figure) == "per cent from 0 to 100; PPO: 50 [40, 60]"


def test_what_has_no_numbers_is_told_all_the_same() -> None:
    days, names = (figure := Figure()).subplots(1, 2)
    days.plot([date(2020, 1, 1), date(2021, 1, 1)], [1, 2])
    names.plot(["a", "b"], [1, 2])
    assert display.described(figure).endswith("a line: 1 at 0 to 2 at 1")
    bare, some = (figure := Figure()).subplots(1, 2)
    bare.errorbar([1, 2], [3, 4], fmt="o")
    some.errorbar([1, 2], [3, 4], yerr=[1, 1], errorevery=2, fmt="o")
    assert display.described(figure) == "Panel 1. Panel 2"
    long = Figure()
    long.subplots().set_title("word " * 1000)
    assert len(display.described(long)) == pytest.approx(1500, abs=10)
    assert display.described(drawing()) == "a line: 1 at 0 to 3 at 2"


def test_what_a_figure_shows_and_is_called_goes_with_it(shown: list) -> None:
    figure = drawing()
    figure.axes[0].set_title("A line")
    display.show(figure, "A line.", "line")
    display.table(pd.DataFrame({"a": [1]}), "A cell.", "cell")
    about, _, other, _ = (metadata for _, metadata in shown)
    assert '<div id="line" style' in shown[1][0]["text/html"], "a link in Jupyter leads there"
    assert (about["name"], about["alt"]) == ("line", "A line; a line: 1 at 0 to 3 at 2")
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
