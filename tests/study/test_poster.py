"""The first page: question, pictures, lessons, two replies, how sure, how to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest

from rlhf_lib.results import verdict
from rlhf_lib.study import poster

MADE_UP = Path(__file__).resolve().parents[1] / "made_up"


def made_up(kind: str) -> dict:
    return json.loads((MADE_UP / f"{kind}.json").read_text(encoding="utf-8"))


def said(page: Any) -> str:
    return "\n\n".join(
        cell.outputs[0]["data"].get("text/markdown", "") for cell in page.cells
    ).strip()


def captions(page: Any, kind: str) -> list[str]:
    shown = [cell.outputs[0]["metadata"] for cell in page.cells]
    return [metadata["caption"] for metadata in shown if metadata.get("kind") == kind]


@pytest.mark.parametrize("kind", ["gold", "proxy"])
def test_the_poster_asks_finds_and_says_how_sure(kind: str) -> None:
    results = made_up(kind)
    page = poster.front_page(results)
    nbformat.validate(page)
    text = said(page)
    assert text.startswith(f"**{poster.QUESTION}** {poster.WORDS[results['deciding']]}")
    found = text.index("## What was found")
    sure, rest = text.index("## How sure"), text.index("## All policies")
    for lesson in verdict.lessons(results):
        assert found < text.index(f"- {lesson}") < sure
    for sentence in verdict.sureness(results):
        assert sure < text.index(sentence) < rest
    assert f"--profile {results['profile']}`" in text[sure:rest]
    first, *_ = captions(page, "figure")
    assert ("small ticks" in first) == (len(results["seeds"]) > 1)
    assert len(captions(page, "table")) == 1, "without samples there are no two replies"
    assert set(verdict.headline(results)) < set(verdict.sentences(results))


def test_what_gold_and_proxy_are_is_said_where_they_first_stand() -> None:
    text = said(poster.front_page(made_up("gold")))
    opening = text[: text.index("## What was found")]
    assert "*Gold reward* is how good a reply truly is" in opening
    assert "*Proxy reward* is what a reward model says" in opening


def samples(folder: Path, name: str, rows: list[tuple]) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    lines = [
        {"seed": 0, "prompt": f"\n\nHuman: {p}\n\nAssistant:", "response": r, "proxy": x, "gold": g}
        for p, r, x, g in rows
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def best_of(results: dict) -> str:
    gold = {n: results["policies"][n]["gold"]["mean"] for n in ("ppo", "grpo", "dpo")}
    return max(gold, key=gold.__getitem__)


def test_the_two_replies_are_those_furthest_apart(tmp_path: Path) -> None:
    results = made_up("gold")
    best = best_of(results)
    samples(
        tmp_path, best, [("a", "fine", 0.0, 1.0), ("b", "good", 0.5, 2.0), ("c", "x", 3.0, 0.0)]
    )
    rows = [("a", "thanks", 1.0, 0.5), ("b", "thanks friend", 2.0, -1.0), ("c", "y", 0.0, -9.0)]
    samples(tmp_path, "ppo_low_kl", rows)
    found = poster.two_replies(results, tmp_path)
    assert found is not None
    name, (good, bad) = found
    assert name == best
    assert good["reply to: b"] == "good"
    assert bad["reply to: b"] == "thanks friend"
    assert (bad["proxy"], bad["gold"]) == ("2.00", "-1.00")
    assert len(captions(poster.front_page(results, tmp_path), "table")) == 2


def test_where_nothing_was_over_optimised_no_reply_is_shown(tmp_path: Path) -> None:
    results = made_up("gold")
    assert poster.two_replies(results, tmp_path) is None
    samples(tmp_path, best_of(results), [("a", "fine", 0.0, 1.0), ("b", "cut", None, 9.0)])
    samples(tmp_path, "ppo_low_kl", [("a", "better", 1.0, 2.0), ("b", "x", 9.0, 0.0)])
    assert poster.two_replies(results, tmp_path) is None
    assert len(captions(poster.front_page(results, tmp_path), "table")) == 1


def test_a_kind_has_a_panel_and_a_policy_a_colour() -> None:
    results = made_up("gold")
    figure = poster.kinds(results)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == list(results["requests"]["kind"])
    low = {axis.get_xlim() for axis in figure.axes}
    assert len(low) == 1, "one scale"
