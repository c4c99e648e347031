"""Gains by kind of request: their parts add up, and what one kind alone gained is not another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_lib.data.truth import truth_of
from rlhf_lib.profiles import load_profile
from rlhf_lib.results.policies import Samples
from rlhf_lib.results.requests import attribution, gains_by_request
from rlhf_lib.runs import Run
from rlhf_lib.world.grammar import KIND_SHARES, sample_prompts
from tests.made_up_study import stages_of

TRUTH = truth_of("bundled")
assert TRUTH is not None
PROMPTS = sample_prompts("requests", 200, "test", 0)
POLICIES = ("sft", "ppo", "grpo")


def rows(policy: str, seed: int) -> list[dict]:
    """PPO is better by 2 at harms alone; GRPO by 1 where the whole request was held out."""
    assert TRUTH is not None
    rng, found = np.random.default_rng([seed, POLICIES.index(policy)]), []
    for prompt in PROMPTS:
        gain = 2.0 * (policy == "ppo" and TRUTH.kind(prompt) == "harm")
        gain += 1.0 * (policy == "grpo" and TRUTH.held_out(prompt) == "request")
        row = {"reply": 0, "prompt": prompt, "gold": gain + 0.01 * rng.standard_normal()}
        found.append(row)
    return found


SAMPLES = Samples(
    {name: [rows(name, seed) for seed in range(3)] for name in POLICIES}, [], [], TRUTH.asked
)


def test_the_parts_of_a_policy_add_up_to_its_gain() -> None:
    found = gains_by_request(SAMPLES, TRUTH)
    assert found is not None
    for name in ("ppo", "grpo"):
        whole = SAMPLES.estimate(SAMPLES.difference(name, "sft", "gold"))
        for groups in found.values():
            assert sum(g["prompts"] for g in groups.values()) == len(PROMPTS)
            parts = [g["policies"][name]["part"] for g in groups.values()]
            assert sum(part["mean"] for part in parts) == pytest.approx(whole["mean"])
            for seed, value in enumerate(whole["per_seed"]):
                assert sum(part["per_seed"][seed] for part in parts) == pytest.approx(value)


def test_a_gain_stands_where_it_was_made() -> None:
    found = gains_by_request(SAMPLES, TRUTH)
    assert found is not None
    assert set(found["kind"]) == set(KIND_SHARES)
    for kind, group in found["kind"].items():
        gain = group["policies"]["ppo"]["gain"]
        assert gain["mean"] == pytest.approx(2.0 if kind == "harm" else 0.0, abs=0.02)
        asked = {TRUTH.asked(p) for p in PROMPTS if TRUTH.kind(p) == kind}
        assert gain["units"] == len(asked) < group["prompts"]
        assert gain["low"] < gain["mean"] < gain["high"]
    for group, gain in (("request", 1.0), ("wording", 0.0)):
        found_gain = found["held_out"][group]["policies"]["grpo"]["gain"]["mean"]
        assert found_gain == pytest.approx(gain, abs=0.02)


def test_nothing_is_known_of_the_kinds_of_real_prompts() -> None:
    assert gains_by_request(SAMPLES, None) is None


def test_what_the_annotators_taste_taught_is_the_difference(tmp_path: Path) -> None:
    stages = [
        stages_of(Run(load_profile("smoke", ["seeds=2"]), s, tmp_path), "bundled") for s in (0, 1)
    ]
    found = attribution(stages)
    assert found is not None
    assert found["policies"]["ppo"]["polite words"]["mean"] == pytest.approx(2.05)
    gap = found["differences"]["ppo_control"]["polite words"]
    assert (gap["mean"], gap["verdict"]) == (pytest.approx(-2.0), "lower")
    for control, what in (("dpo", "polite words"), ("ppo", "words"), ("ppo", "gold reward")):
        assert found["differences"][f"{control}_control"][what]["mean"] == 0
    slope = found["slopes"]["ppo"]["polite words"]
    assert (slope["mean"], slope["verdict"]) == (pytest.approx(2.0), "higher")
    assert found["slopes"]["dpo"]["polite words"]["mean"] == pytest.approx(0.0)
    assert found["slopes"]["ppo"]["gold reward"]["verdict"] == "not distinguishable"
    assert attribution(stages[1:]) is None, "the first seed alone has it"
