"""Which method for which need: made-up studies with a clear winner, a tie, and no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lib import catalogue
from rlhf_lib.results import verdict
from rlhf_lib.results.policies import compared

MADE_UP = Path(__file__).parents[1] / "made_up"


def need(values: dict[str, float], better: str = "higher", resolution: float = 0.2) -> dict:
    """A need in which differences above `resolution` are distinguishable."""
    pairs = {}
    families = compared(list(values)).values()
    for key, (one, other) in (pair for family in families for pair in family.items()):
        gap = values[one] - values[other]
        word = "higher" if gap > resolution else "lower" if gap < -resolution else None
        pairs[key] = {"verdict": word or "not distinguishable"}
    return {
        "policies": {n: {"mean": v, "low": v - 0.1, "high": v + 0.1} for n, v in values.items()},
        "comparisons": pairs,
        "better": better,
    }


def gains(ppo: float, grpo: float, dpo: float, rejection_sft: float) -> dict[str, float]:
    return {"ppo": ppo, "grpo": grpo, "dpo": dpo, "rejection_sft": rejection_sft}


def study(values: dict[str, float], **needs: Any) -> dict:
    """A study with these gains over SFT; those above 0.2 are clear."""
    results = json.loads((MADE_UP / "gold.json").read_text())
    for name, value in values.items():
        word = "higher" if value > 0.2 else "lower" if value < -0.2 else "not distinguishable"
        results["policies"][name]["gold_gain"]["verdict"] = word
    results["needs"] = {"reward": need(values), **needs}
    return results


def first(results: dict) -> str:
    return verdict.choices(results)[0]


def without_rl(results: dict) -> str:
    (said,) = [s for s in verdict.choices(results) if s.startswith("**No reinforcement")]
    return said


def test_a_clear_winner_is_named_with_what_it_leaves_behind() -> None:
    results = study(gains(1.0, 0.5, 0.4, 0.5))
    assert first(results) == (
        "**Highest gold reward:** PPO (1.00 [0.90, 1.10] gain over SFT), clearly ahead of "
        "GRPO (0.50 [0.40, 0.60]), DPO (0.40 [0.30, 0.50]) and Best-of-n SFT (0.50 [0.40, 0.60])."
    )


def test_a_tie_is_not_broken() -> None:
    results = study(gains(0.9, 1.0, 0.4, 0.3))
    assert first(results).startswith(
        "**Highest gold reward:** the data do not say: GRPO (1.00 [0.90, 1.10] gain over SFT) is "
        "not distinguishable from PPO (0.90 [0.80, 1.00]); clearly behind: DPO (0.40"
    )


def test_everything_worse_than_sft_leaves_sft() -> None:
    said = verdict.choices(study(gains(-1.0, -0.5, -0.4, -0.5)))
    assert said == [
        "**Which method for which need? The data do not say:** PPO, GRPO, DPO and Best-of-n SFT "
        "were not shown to raise gold reward over SFT. Until one is, nothing here speaks for "
        "paying more than SFT costs."
    ]


def test_nothing_distinguishable_from_sft_leaves_sft_too() -> None:
    assert "The data do not say" in first(study(gains(0.1, 0.0, 0.1, 0.0)))


def test_best_of_n_best() -> None:
    results = study(gains(0.5, 0.4, 0.3, 1.0))
    assert first(results).startswith("**Highest gold reward:** Best-of-n SFT (1.00")
    assert without_rl(results).endswith("Best-of-n SFT is clearly above PPO.")


def test_who_was_not_shown_to_raise_the_reward_is_ranked_and_marked() -> None:
    """DPO moved least and forgot least, perhaps because it did nothing: both is said."""
    values = gains(0.5, 1.0, 0.0, -1.0)
    kl = need(gains(5.0, 8.0, 0.1, 0.2), better="lower")
    said = verdict.choices(study(values, kl=kl))
    assert said[1] == (
        "**Least KL to SFT:** the data do not say: DPO† (0.1 [0.0, 0.2] nats a reply) is not "
        "distinguishable from Best-of-n SFT† (0.2 [0.1, 0.3]); clearly behind: PPO (5.0 [4.9, "
        "5.1]) and GRPO (8.0 [7.9, 8.1])."
    )
    assert said[-1] == "† was not shown to raise gold reward over SFT."
    assert said[0].startswith("**Highest gold reward:** GRPO (1.00")
    assert "DPO† (0.00" in said[0]
    end = "DPO and Best-of-n SFT were not shown to raise gold reward."
    assert without_rl(study(values)).endswith(end)


def test_who_has_the_worst_kl_is_not_named_for_the_least() -> None:
    """The only one that raised the reward moved furthest from SFT."""
    values = gains(0.0, 0.0, 1.0, 0.0)
    kl = need(gains(0.5, 1.5, 9.0, 3.0), better="lower")
    said = verdict.choices(study(values, kl=kl))[1]
    assert said.startswith("**Least KL to SFT:** PPO† (0.5")
    assert "clearly ahead of GRPO† (1.5 [1.4, 1.6]), DPO (9.0" in said


def test_a_leader_whose_own_interval_includes_0_leads_nobody() -> None:
    values = gains(0.9, 0.3, 0.1, 0.1)
    per_minute = need(values)
    per_minute["policies"]["ppo"]["low"] = -0.2
    said = verdict.choices(study(values, per_minute=per_minute))[1]
    assert said.startswith("**Most gold reward per minute, on this machine:** nobody is shown to")
    assert all(name in said for name in ("PPO (0.90 [-0.20, 1.00]", "GRPO (", "DPO† (", "n SFT† ("))


@pytest.mark.parametrize(
    ("values", "end"),
    [
        (gains(1.0, 0.9, 0.5, 0.3), "PPO is clearly above DPO."),
        (gains(0.6, 0.3, 0.5, 0.0), "PPO is not distinguishable from DPO."),
        (gains(0.3, 0.3, 0.9, 0.3), "DPO is clearly above PPO."),
        (gains(0.0, -0.5, 0.9, 0.3), "No method with it was shown to raise the reward."),
    ],
)
def test_what_rl_adds(values: dict[str, float], end: str) -> None:
    assert without_rl(study(values)).endswith(end)


def test_nothing_is_said_of_others_than_was_shown() -> None:
    said = " ".join(verdict.choices(study(gains(0.5, 0.0, 0.0, 0.0))))
    assert "PPO (0.50 [0.40, 0.60] gain over SFT), clearly ahead of GRPO† (0.00" in said
    assert not any(word in said for word in ("nothing else", "at all", "did not", "raised"))


def test_lower_is_better_where_it_is() -> None:
    found = verdict.leaders(need(gains(1.0, 1.1, 5.0, 9.0), better="lower"), catalogue.candidates())
    assert found == verdict.Leaders("ppo", ["grpo"], ["dpo", "rejection_sft"])
    found = verdict.leaders(need(gains(1.0, 1.1, 5.0, 9.0)), ("ppo", "dpo"))
    assert found == verdict.Leaders("dpo", [], ["ppo"])


def test_one_seed_and_a_missing_judge_are_said() -> None:
    results = json.loads((MADE_UP / "proxy.json").read_text())
    said = verdict.choices(results)
    assert said[-1].startswith("One seed:")
    assert "not whose replies are best" in said[-2]
    assert not any("gold" in sentence for sentence in said)
    both = verdict.choices(json.loads((MADE_UP / "gold.json").read_text()))
    assert not any(s.startswith(("One seed", "No judge")) for s in both)


def test_a_comparison_that_was_not_made_fails() -> None:
    results = study(gains(1.0, 0.5, 0.4, 0.5))
    del results["needs"]["reward"]["comparisons"]["ppo_minus_dpo"]
    with pytest.raises(KeyError, match="dpo_minus_ppo"):
        verdict.choices(results)


def test_one_candidate_without_rl_is_spoken_of_as_one() -> None:
    results = study(gains(0.5, 0.4, 0.0, 0.0))
    del results["policies"]["rejection_sft"]
    assert without_rl(results).endswith("DPO was not shown to raise gold reward.")
    del results["policies"]["dpo"]
    assert not [s for s in verdict.choices(results) if s.startswith("**No reinforcement")]
