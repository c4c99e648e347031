"""Tables, figures and sentences of the notebooks: looked up, not typed; a gap is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from rlhf_lib.data.encoding import Pair
from rlhf_lib.objectives import kl
from rlhf_lib.show import display

MADE_UP = Path(__file__).parents[1] / "made_up"


@pytest.fixture(params=["gold", "proxy"])
def results(request: pytest.FixtureRequest) -> dict:
    return json.loads((MADE_UP / f"{request.param}.json").read_text())


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


# --------------------------------------------------------------------------- what is displayed


def test_figures_and_tables_carry_their_captions(shown: list) -> None:
    display.show(drawing(), "A line.")
    display.table(pd.DataFrame({"a": [1]}), "A cell.")
    (figure, about_figure), (table, about_table) = shown
    assert about_figure == {"caption": "A line.", "kind": "figure"}
    assert about_table == {"caption": "A cell.", "kind": "table"}
    assert "<svg" in figure["image/svg+xml"]
    assert figure["image/png"].startswith("iVBOR")  # PNG in base64
    assert "<td>1</td>" in table["text/html"]


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


@pytest.mark.parametrize("template", ["{kl:.2f}", "{r[kl]}", "{0}", "{r[0]}", "{n[kl]}"])
def test_a_number_that_was_not_measured_fails(template: str) -> None:
    with pytest.raises(KeyError, match=r"no measurement for .* in the sentence: 'KL was"):
        display.sentence(f"KL was {template}.", r={"reward": 1.0}, n=4)


def test_source_is_the_librarys_own(shown: list) -> None:
    display.source(kl.k3)
    code = shown[0][0]["text/markdown"]
    assert code.startswith("```python\ndef k3(")
    assert code.endswith("\n```")


@pytest.mark.parametrize(
    ("low", "high", "arguments", "text"),
    [
        (0.41, 0.63, {}, "0.52 [0.41, 0.63]"),
        (0.41, 0.63, {"digits": 0, "percent": True}, "52% [41, 63]"),
        (None, None, {}, "0.52"),
        (0.52, 0.52, {"digits": 1}, "0.5"),
    ],
)
def test_intervals_as_text(low: Any, high: Any, arguments: dict, text: str) -> None:
    assert display.interval({"mean": 0.52, "low": low, "high": high}, **arguments) == text


@pytest.mark.parametrize(
    ("words", "text"), [(["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")]
)
def test_words_are_listed(words: list[str], text: str) -> None:
    assert display.listed(words, "or") == text


def test_an_unknown_interval_is_a_dash() -> None:
    assert display.interval(None) == "–"


# ---------------------------------------------------------------------------- tables of a study


def test_the_comparison_table_has_a_row_a_policy(results: dict) -> None:
    table = display.comparison_table(results).set_index("policy")
    assert list(table.index) == [display.NAMES[name] for name in display.POLICIES]
    assert ("gold" in table.columns) == (results["judge"] == "gold")
    assert "judge" not in table.columns
    ppo = results["policies"]["ppo"]
    assert table.loc["PPO", "proxy"] == display.interval(ppo["proxy"])
    assert table.loc["PPO", "KL"] == display.interval(ppo["kl"], 1)
    assert table.loc["SFT", "wins vs SFT"] == "–"
    assert table.loc["Base", "min"] == "–", "nobody trained the base"
    seconds = results["cost"]["ppo"]["seconds"]["mean"]
    assert table.loc["PPO", "min"] == f"{seconds / 60:.1f}"


def test_the_headline_table_has_the_deciding_reward_first(results: dict) -> None:
    table = display.headline_table(results).set_index("policy")
    rewards = list(dict.fromkeys((results["judge"], "proxy")))
    assert list(table.columns) == [*rewards, "KL", "wins vs SFT"]
    ppo = results["policies"]["ppo"]
    assert table.loc["PPO", rewards[0]] == display.interval(ppo[rewards[0]])


# -------------------------------------------------------------------------- change in training


def test_a_contrast_is_students_t() -> None:
    # means 1 and 3, deviations 1, so the error of the difference is sqrt(2/3) = 0.816;
    # t(0.975) with 4 degrees of freedom is 2.776: 2 is within 2.27, 3 is not
    clear = display.contrast([0, 1, 2], [3, 4, 5])
    assert clear == {"first": 1.0, "last": 4.0, "verdict": "higher", "word": "rose"}
    assert display.contrast([3, 4, 5], [0, 1, 2])["word"] == "fell"
    unclear = display.contrast([0, 1, 2], [2, 3, 4])
    assert (unclear["verdict"], unclear["word"]) == ("not distinguishable", "no clear change")


def test_a_single_step_a_side_distinguishes_nothing() -> None:
    assert display.contrast([0.0], [9.0])["verdict"] == "not distinguishable"
    assert display.contrast([1.0, 1.0], [1.0, 1.0])["verdict"] == "not distinguishable"


def test_quarters_are_of_the_steps_at_which_the_metric_was_logged() -> None:
    metrics = [{"step": i} | ({"kl": float(i)} if i % 2 else {}) for i in range(16)]
    assert display.quarters(metrics, "kl") == ([1.0, 3.0], [13.0, 15.0])
    assert display.quarters(metrics[:4], "kl") == ([1.0], [3.0])
    assert display.change(metrics, "kl")["word"] == "rose"


def test_the_change_table_has_the_metrics_that_were_logged() -> None:
    metrics = [{"step": i, "loss": 10.0 - i + 0.1 * (i % 2)} for i in range(8)]
    table = display.change_table(metrics, {"loss": "loss", "kl": "KL"})
    assert table.to_dict("records") == [
        {"": "loss", "first quarter": "9.55", "last quarter": "3.55", "change": "fell"}
    ]


# ------------------------------------------------------------------------------ texts to read


def test_replies_show_the_last_turn_and_what_was_cut(tiny_tokenizer: Any) -> None:
    words = tiny_tokenizer.encode
    rollout = SimpleNamespace(
        prompts=[words("Human: a b Assistant: c Human: d e Assistant:"), words("f")],
        responses=[[*words("g h"), tiny_tokenizer.eos_token_id], words("i")],
        finished=torch.tensor([True, False]), scores=torch.tensor([0.5, -1.25]),
        gold=[2.0, math.pi], kl=torch.tensor([0.0, 3.21]),
    )  # fmt: skip
    table = display.replies(rollout, tiny_tokenizer, step=7)
    assert table.to_dict("records") == [
        {"step": 7, "prompt": "d e", "reply": "g h", "proxy": "0.50", "gold": "2.00",
         "log-ratio to SFT": "0.0"},
        {"step": 7, "prompt": "f", "reply": "i (cut)", "proxy": "-1.25", "gold": "3.14",
         "log-ratio to SFT": "3.2"},
    ]  # fmt: skip
    rollout.gold = None
    assert "gold" not in display.replies(rollout, tiny_tokenizer).columns


def test_error_counts_have_every_category_that_can_occur() -> None:
    errors = [{"category": "safety"}, {"category": "safety"}, {"category": "other"}]
    table = display.error_counts(errors, gold_known=True).set_index("category")
    assert table.loc["safety", ["errors", "share of errors"]].tolist() == [2, "67%"]
    assert table["errors"].sum() == 3
    without = display.error_counts([], gold_known=False)
    assert set(table.index) - set(without["category"]) == {"label against gold"}
    assert set(without["share of errors"]) == {"0%"}


def test_the_error_table_takes_the_most_confident_of_each_category() -> None:
    prompt = "\n\nHuman: First?\n\nAssistant: A.\n\nHuman: Last?\n\nAssistant:"
    pairs = [Pair("talk", prompt, f" chosen {i}", f" rejected {i}", [], [], []) for i in range(9)]
    errors = [{"pair": i, "preference": -9.0 + i, "category": "other"} for i in range(8)]
    errors.append({"pair": 8, "preference": -0.1, "category": "near tie"})
    table = display.error_table(errors, pairs, limit=3)
    assert table["category"].tolist() == ["near tie", "other", "other"]
    assert table["labelled better"].tolist() == ["chosen 8", "chosen 0", "chosen 1"]
    assert table["scored higher"].tolist() == ["rejected 8", "rejected 0", "rejected 1"]
    assert set(table["request"]) == {"Last?"}
    assert len(display.error_table(errors, pairs)) == 9
