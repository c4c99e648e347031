"""What a study could see: of each comparison, and with how many seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import noise
from benchmarks.text import summary
from rlhf_lib import catalogue
from rlhf_lib.data.pairs import load_data
from rlhf_lib.data.truth import truth_of, unit_of
from rlhf_lib.measure.statistics import detectable
from rlhf_lib.measure.two_errors import total
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.profiles import load_profile

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
    assert found["seeds_corrected"] > found["seeds"] > 5
    assert noise.seen("grpo", "rejection_sft", record(0.05))["seeds"] < found["seeds"]


def test_where_prompts_alone_hide_it_no_seeds_are_enough() -> None:
    assert noise.seen("ppo", "dpo", record(0.01, prompts=0.1))["seeds"] is None


def test_prompts_that_ask_the_same_count_once() -> None:
    names, luck = (*catalogue.candidates(), "sft"), np.random.default_rng(0)
    prompts = ["a", "A", "b", "c", "C"]

    def seed() -> tuple[dict, dict]:
        plain = {name: luck.normal(size=(2, 5)) for name in names}
        rows = {
            name: [{"prompt": p, "gold": float(luck.normal())} for p in prompts] for name in names
        }
        return plain, rows

    found = noise.both_ways([seed(), seed(), seed()], str.lower)
    for way in ("plain", "study"):
        assert {row[way]["errors"][1][1] for row in found} == {2.0}, "three requests"


@pytest.mark.parametrize("between", [0.2, 1.0, 5.0])
def test_a_ratio_of_variances_is_as_uncertain_as_the_seeds(between: float) -> None:
    """Of errors of five seeds and many prompts, the interval covers the true ratio."""
    luck = np.random.default_rng(1)

    def of(size: float) -> dict:
        seeds = float(np.sqrt(size * between * luck.chisquare(4) / 4))
        errors = [[seeds, 4.0], [float(np.sqrt(size)), 300.0]]
        return {"se": total(errors), "errors": errors}

    hits = 0
    for _ in range(2000):
        found = noise.times_less(of(3.0), of(2.0))
        assert found is not None
        hits += found["low"] <= 1.5 <= found["high"]
    assert hits / 2000 > 0.94


def test_of_two_that_reply_alike_no_ratio_is_known() -> None:
    nothing = {"se": 0.0, "errors": [[0.0, 4.0], [0.0, 300.0]]}
    assert noise.times_less(record(0.1), nothing) is None


def test_against_sft_nothing_is_wanted_and_four_are_compared() -> None:
    found = noise.seen("ppo", "sft", record(0.05))
    assert found == {"family": "sft", "corrected": detectable(record(0.05), 4)}


def test_the_first_of_a_family_has_to_be_larger() -> None:
    alone, third = (detectable(record(0.05), comparisons) for comparisons in (1, 3))
    assert alone == pytest.approx(detectable(record(0.05)))
    assert third > 1.2 * alone  # type: ignore[operator]


def test_the_stored_comparisons_are_what_their_errors_give() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    prompts = load_data(load_profile("laptop").data, load_tokenizer("tiny")).prompts["evaluation"]
    unit = unit_of(truth_of("bundled"))
    requests = len({unit(prompt.text) for prompt in prompts})
    assert requests < len(prompts)
    for row in stored["pairs"]:
        known = {"errors": row["study"]["errors"], "se": total(row["study"]["errors"])}
        found = noise.seen(*row["pair"].split("_minus_"), known)
        assert found["corrected"] == pytest.approx(row["corrected"])
        assert found.get("seeds") == row.get("seeds")
        assert found.get("seeds_corrected") == row.get("seeds_corrected")
        assert row["study"]["errors"][1][1] == requests - 1
        assert row["times_less"]["mean"] == pytest.approx(
            row["plain"]["variance"] / row["study"]["variance"]
        )
        assert row["study"]["detectable"] == pytest.approx(detectable(known))
    said = summary(stored)
    assert said.startswith("Profile laptop, 5 seeds")
    assert "| GRPO − DPO |" in said
