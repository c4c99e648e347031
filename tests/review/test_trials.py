"""Trials of tuning: a table of what came of them."""

from __future__ import annotations

from rlhf_lib.review import trials


def trial(method: str, rate: float, steps: int, mean: float | None) -> dict:
    values = {f"{method}.learning_rate": rate, f"{method}.epochs": steps}
    return {
        "method": method,
        "values": values,
        "rater": "gold",
        "mean": mean,
        "low": 0.0,
        "high": 1.0,
    }


def test_what_stands_at_the_end_of_a_search_is_said_of_every_method() -> None:
    tried = [trial("ppo", 0.1, 2, 0.4), trial("ppo", 0.2, 4, 0.9), trial("ppo", 0.1, 8, 0.5)]
    tried += [trial("dpo", 0.2, 4, 0.8), trial("dpo", 0.1, 2, 0.7), trial("dpo", 0.4, 8, 0.6)]
    tried += [trial("ppo", 0.8, 4, None), trial("grpo", 0.1, 2, None)]
    ppo, dpo, grpo = trials.table(tried).to_dict("records")
    assert ppo["tried"] == "4"
    assert ppo["next"] == "learning_rate=0.1 epochs=8 gold 0.500 [0.000, 1.000]"
    assert ppo["best at the end of what was tried"] == "no", "a higher rate diverged"
    assert dpo["best at the end of what was tried"] == "no"
    assert (grpo["tried"], grpo["best"], grpo["next"]) == ("1", "all diverged", "–")
    (alone,) = trials.table(tried[:1]).to_dict("records")
    assert alone["best"] == alone["next"], "one trial is the best and the next"
    assert alone["best at the end of what was tried"] == "no", "where nothing varied nothing ends"
    (ppo,) = trials.table(tried[:3]).to_dict("records")
    assert ppo["best at the end of what was tried"] == "learning_rate (highest)"
