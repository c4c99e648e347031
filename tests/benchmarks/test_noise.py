"""What a study could see: of each comparison, and with how many seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import noise
from benchmarks.text import summary
from rlhf_lib.measure.statistics import detectable
from rlhf_lib.measure.two_errors import total

RESULTS = Path(noise.__file__).parent / "results" / "noise.json"


def record(between: float, prompts: float = 0.01, seeds: int = 5) -> dict:
    errors = [[between, seeds - 1.0], [prompts, 500.0]]
    return {"errors": errors, "se": total(errors)}


def test_the_seeds_that_are_named_are_the_fewest_that_see_what_is_wanted() -> None:
    found = noise.seen("grpo", "dpo", record(0.05))
    assert found["family"] == "among"
    for seeds, enough in ((found["seeds"], True), (found["seeds"] - 1, False)):
        smaller = record(0.05 * (5 / seeds) ** 0.5, seeds=seeds)
        assert (detectable(smaller) <= noise.WANTED["among"]) is enough  # type: ignore[operator]
    assert found["seeds"] > 5
    assert noise.seen("grpo", "rejection_sft", record(0.05))["seeds"] < found["seeds"]


def test_where_prompts_alone_hide_it_no_seeds_are_enough() -> None:
    assert noise.seen("ppo", "dpo", record(0.01, prompts=0.1))["seeds"] is None


def test_against_sft_nothing_is_wanted_and_four_are_compared() -> None:
    found = noise.seen("ppo", "sft", record(0.05))
    assert found == {"family": "sft", "corrected": detectable(record(0.05), 4)}


def test_the_first_of_a_family_has_to_be_larger() -> None:
    alone, third = (detectable(record(0.05), comparisons) for comparisons in (1, 3))
    assert alone == pytest.approx(detectable(record(0.05)))
    assert third > 1.2 * alone  # type: ignore[operator]


def test_the_stored_comparisons_are_what_their_errors_give() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    for row in stored["pairs"]:
        known = {"errors": row["study"]["errors"], "se": total(row["study"]["errors"])}
        found = noise.seen(*row["pair"].split("_minus_"), known)
        assert found["corrected"] == pytest.approx(row["corrected"])
        assert found.get("seeds") == row.get("seeds")
        assert row["study"]["detectable"] == pytest.approx(detectable(known))
    said = summary(stored)
    assert said.startswith("Profile laptop, 5 seeds")
    assert "| GRPO − DPO |" in said
