"""Policies over seeds: paired gains and wins, length control, corrections, and the needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf_lib import catalogue
from rlhf_lib.files import write_jsonl
from rlhf_lib.results import policies
from rlhf_lib.results.policies import Samples, distinct, length_controlled
from tests.made_up_study import sample_rows, strict, summarise


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = summarise(tmp_path_factory.mktemp("runs"))
    return strict((folder / "results.json").read_text())


def test_gains_are_paired_by_prompt_and_measured_over_seeds(results: dict) -> None:
    gain = results["policies"]["ppo"]["gold_gain"]
    assert gain["per_seed"] == pytest.approx([0.5, 0.6, 0.7])
    assert (gain["n"], gain["over"]) == (3, "seeds and prompts")
    assert gain["high"] - gain["mean"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-4)
    grpo = results["policies"]["grpo"]
    assert grpo["gold_gain"]["verdict"] == "not distinguishable", "-0.25, -0.15, -0.05"
    assert results["policies"]["base"]["gold_gain"]["verdict"] == "lower"
    assert results["policies"]["dpo"]["gold_gain"]["mean"] == pytest.approx(0)


def test_a_gain_is_called_one_only_where_the_correction_leaves_it(results: dict) -> None:
    """Five trained policies are compared with SFT; its second draw and base are not among them."""
    policies = results["policies"]
    gain = policies["ppo"]["gold_gain"]  # 0.6 with a standard error of 0.0577 and two df
    assert gain["low"] > 0
    assert gain["p"] == pytest.approx(0.00913, abs=1e-4)
    low_kl = policies["ppo_low_kl"]["gold_gain"]  # a demonstration: alone, and of one seed
    assert (low_kl["per_seed"], low_kl["over"]) == ([pytest.approx(-1.0)], "prompts")
    assert low_kl["p_adjusted"] == low_kl["p"]
    assert gain["p_adjusted"] == pytest.approx(4 * gain["p"])
    assert gain["verdict"] == "higher"
    grpo = policies["grpo"]["proxy_gain"]  # 0.5, 0.6, 0.7 likewise
    assert grpo["p_adjusted"] == pytest.approx(3 * grpo["p"])
    alone = policies["base"]["gold_gain"]
    assert alone["p_adjusted"] == alone["p"]
    assert gain["detectable"] == pytest.approx(5.6535 * gain["se"], rel=1e-3)


def test_wins_are_paired_and_a_tie_is_half_of_one(results: dict) -> None:
    policies = results["policies"]
    assert policies["ppo"]["win_rate_vs_sft"]["mean"] == 1.0
    assert policies["sft_again"]["win_rate_vs_sft"]["mean"] == 0.5, "the same rewards: all ties"
    assert policies["sft"]["win_rate_vs_base"]["mean"] == 1.0
    assert "win_rate_vs_sft" not in policies["sft"]
    assert "win_rate_vs_base" not in policies["base"]
    assert policies["sft"]["win_rate_vs_chosen"]["mean"] == 0.0
    assert policies["ppo"]["win_rate_vs_chosen"]["mean"] == 1.0
    assert policies["ppo"]["win_rate_vs_chosen"]["units"] <= 6
    assert "win_rate_vs_chosen" not in policies["sft_again"]


def test_methods_are_compared_with_each_other(results: dict) -> None:
    comparisons = results["comparisons"]
    assert len(comparisons) == 6
    assert comparisons["ppo_minus_grpo"]["mean"] == pytest.approx(0.75)
    assert comparisons["ppo_minus_grpo"]["verdict"] == "higher"
    assert comparisons["ppo_minus_dpo"]["mean"] == pytest.approx(0.6)
    assert comparisons["grpo_minus_dpo"]["mean"] == pytest.approx(-0.15)
    assert comparisons["ppo_minus_dpo"]["p_adjusted"] > comparisons["ppo_minus_dpo"]["p"]


def test_needs_compare_the_candidates_in_what_a_user_may_ask_for(results: dict) -> None:
    needs = results["needs"]
    assert list(needs) == ["reward", "per_flop", "per_minute", "kl", "forgetting"]
    assert [need["better"] for need in needs.values()] == 3 * ["higher"] + 2 * ["lower"]
    assert needs["reward"]["comparisons"] == results["comparisons"]
    kl = needs["kl"]["comparisons"]["ppo_minus_dpo"]
    assert (kl["mean"], kl["verdict"]) == (pytest.approx(-1.5), "lower")
    # each name further on in the list costs 2 nats a text more, of 7.5 tokens on average
    forgetting = needs["forgetting"]["comparisons"]["ppo_minus_rejection_sft"]
    assert forgetting["mean"] == pytest.approx(2 / 7.5)
    assert results["policies"]["ppo"]["forgetting"]["mean"] == pytest.approx(4 / 7.5)


# ------------------------------------------------------------------------------- by themselves


def made_up(extra: str | None = None, seeds: int = 2) -> Samples:
    """Base, SFT and the candidates; `extra`: another column, the proxy's opposite."""
    rows: dict[str, Any] = {}
    for name in ("base", "sft", *catalogue.candidates()):
        rows[name] = [sample_rows(name, seed, gold=False) for seed in range(seeds)]
        for row in (row for seed in rows[name] for row in seed if extra):
            row[extra] = -row["proxy"]
    return Samples(rows, [[]] * seeds, [[]] * seeds)


def test_the_best_measure_there_is_decides() -> None:
    assert made_up().deciding == "proxy"
    judged = made_up("judge")
    assert judged.deciding == "judge"
    table = policies.policies(judged)
    assert table["ppo"]["proxy_gain"]["mean"] > 0
    assert table["ppo"]["judge_gain"]["mean"] == -table["ppo"]["proxy_gain"]["mean"]
    assert table["ppo"]["win_rate_vs_sft"]["mean"] == 0.0, "the judge decides who wins"
    assert made_up("gold").deciding == "gold"


def test_a_study_without_held_out_texts_or_chosen_replies_says_nothing_of_them() -> None:
    samples = made_up()
    table = policies.policies(samples)
    said = {key for record in table.values() for key in record}
    assert not said & {"perplexity", "forgetting", "win_rate_vs_chosen"}
    price = dict.fromkeys(catalogue.candidates(), 1.0)
    needs = policies.needs(samples, price, price)
    assert "forgetting" not in needs


def test_twice_the_price_is_half_the_gain_for_it() -> None:
    samples, one = made_up(), dict.fromkeys(catalogue.candidates(), 1.0)
    two = dict.fromkeys(catalogue.candidates(), 2.0)
    found = policies.needs(samples, one, two)
    gain = found["reward"]["policies"]["ppo"]
    for need, price in (("per_flop", 1), ("per_minute", 2)):
        record = found[need]["policies"]["ppo"]
        assert record["mean"] == pytest.approx(gain["mean"] / price)
        assert record["se"] == pytest.approx(gain["se"] / price)
    uncounted = policies.needs(samples, one | {"ppo": 0.0}, two)
    assert list(uncounted) == ["reward", "per_minute", "kl"], "a method that nobody counted"


def test_families_are_fixed_and_a_demonstration_costs_nobody_anything() -> None:
    assert policies.compared(["ppo", "dpo", "rejection_sft"]) == {
        "among": {"ppo_minus_dpo": ("ppo", "dpo")},
        "baseline": {
            "ppo_minus_rejection_sft": ("ppo", "rejection_sft"),
            "dpo_minus_rejection_sft": ("dpo", "rejection_sft"),
        },
    }
    samples = made_up("gold", seeds=3)
    rows = dict(samples.rows)
    rows |= {name: [sample_rows(name, s, gold=True) for s in range(3)] for name in ("ppo_low_kl",)}
    alone, beside = (policies.policies(Samples(r, [], [])) for r in (samples.rows, rows))
    for name in catalogue.candidates():
        assert alone[name]["gold_gain"] == beside[name]["gold_gain"]
        assert beside[name]["gold_gain"]["p_adjusted"] >= beside[name]["gold_gain"]["p"]
    low = beside["ppo_low_kl"]["gold_gain"]
    assert low["p_adjusted"] == low["p"], "a family of its own"


def test_every_gain_is_measured_from_all_that_sft_said() -> None:
    """One draw of SFT happens to be good: the mean of its four draws hardly moves."""
    samples = made_up(seeds=1)
    sft = [
        row | {"reply": k, "proxy": row["proxy"] + (1.0 if k == 0 else 0.0)}
        for k in range(4)
        for row in samples.rows["sft"][0]
    ]
    found = policies.policies(Samples({**samples.rows, "sft": [sft]}, [], []))
    before = policies.policies(samples)
    for name in catalogue.candidates():
        gain = found[name]["proxy_gain"]["mean"]
        assert gain == pytest.approx(before[name]["proxy_gain"]["mean"] - 0.25)
        assert found[name]["proxy_gain"]["units"] == 24


def of_seeds(root: Path, seeds: tuple[int, ...]) -> Samples:
    """Three seeds of rising reward; `mine` is 1 better than SFT of its seed, where it exists."""
    folders, heldout = [root / str(seed) for seed in range(3)], []
    for seed, folder in enumerate(folders):
        (folder / "samples").mkdir(parents=True)
        rows = sample_rows("sft", seed, gold=True)
        rows = [row | {"gold": row["gold"] + 10 * seed} for row in rows]
        nll = {"sft": 10.0 * seed, "base": 0.0}
        write_jsonl(folder / "samples" / "sft.jsonl", rows)
        write_jsonl(folder / "samples" / "base.jsonl", rows)
        if seed in seeds:
            better = [row | {"gold": row["gold"] + 1} for row in rows]
            write_jsonl(folder / "samples" / "mine.jsonl", better)
            nll |= {"mine": 10.0 * seed + 2.0}
        heldout.append([{"tokens": 1, "nll": nll}] * 4)
    chosen = [sample_rows("sft", seed, gold=True) for seed in range(3)]
    chosen = [[r | {"gold": r["gold"] + 10 * s + 2} for r in c] for s, c in enumerate(chosen)]
    return Samples(policies.read_samples(folders), chosen, heldout)


@pytest.mark.parametrize("seeds", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_a_policy_is_compared_with_sft_of_its_own_seeds(
    tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    samples = of_seeds(tmp_path, seeds)
    assert tuple(samples.of("mine")) == seeds
    mine = policies.policies(samples)["mine"]
    assert mine["gold_gain"]["per_seed"] == pytest.approx([1.0] * len(seeds))
    assert mine["forgetting"]["per_seed"] == pytest.approx([2.0] * len(seeds))
    assert mine["win_rate_vs_sft"]["per_seed"] == [1.0] * len(seeds)
    assert mine["win_rate_vs_chosen"]["per_seed"] == [0.0] * len(seeds)
    assert len(mine["gold"]["per_seed"]) == len(mine["distinct_1"]["per_seed"]) == len(seeds)


def test_the_same_policy_under_the_same_luck_differs_by_nothing() -> None:
    samples = made_up(seeds=2)
    twice = Samples({**samples.rows, "ppo": samples.rows["grpo"]}, [], [])
    record = twice.compare({"x": ("ppo", "grpo")}, "proxy")["x"]
    assert (record["mean"], record["low"], record["high"]) == (0, 0, 0)


def test_perplexity_counts_tokens_and_forgetting_is_paired_by_text() -> None:
    samples = made_up()
    rows = [
        {"tokens": 2, "nll": {"sft": 2.0, "ppo": 3.0, "base": 9.0}},
        {"tokens": 8, "nll": {"sft": 18.0, "ppo": 19.0, "base": 9.0}},
    ]
    table = policies.policies(Samples(samples.rows, samples.chosen, [rows] * 2))
    assert table["sft"]["perplexity"]["mean"] == pytest.approx(np.exp(20 / 10))
    assert table["ppo"]["perplexity"]["mean"] == pytest.approx(np.exp(22 / 10))
    assert table["ppo"]["forgetting"]["mean"] == pytest.approx(0.2)
    assert table["ppo"]["forgetting"]["se"] == pytest.approx(0), "the same on both texts"
    assert "forgetting" not in table["sft"]


def test_equal_prompts_are_one_unit_of_a_policys_interval() -> None:
    """Whether a prompt is asked twice, or gives two replies: what was said twice is said once."""
    samples = made_up(seeds=1)
    asked = {name: [part * 2 for part in seeds] for name, seeds in samples.rows.items()}
    replied = {
        name: [[row | {"reply": k} for k in range(2) for row in part] for part in seeds]
        for name, seeds in samples.rows.items()
    }
    for rows in (asked, replied):
        doubled = policies.policies(Samples(rows, [], []))
        for one, two in zip(policies.policies(samples).values(), doubled.values(), strict=True):
            assert two["proxy"]["units"] == one["proxy"]["units"]
            assert two["proxy"]["se"] == pytest.approx(one["proxy"]["se"], rel=1e-6)


# ------------------------------------------------------------------------------------- variety


def test_distinct_counts_within_a_block() -> None:
    texts = ["a b", "a c", "a b", "d"]
    # a b a c: three words of four; a b d: all three
    assert distinct(texts, 1, block=2) == [3 / 4, 1.0]
    assert distinct(texts, 2, block=2) == [1.0, 1.0]
    assert distinct(texts, 1, block=4) == [4 / 7]


def test_it_does_not_fall_with_the_number_of_replies() -> None:
    few, many = ["a b"] * 16, ["a b"] * 160
    assert set(distinct(few, 1)) == set(distinct(many, 1)) == {2 / 32}
    assert len(distinct(many, 1)) == 10


def test_what_is_left_over_counts_only_where_it_is_all() -> None:
    assert distinct(["a", "a", "b"], 1, block=2) == [0.5]
    assert distinct(["a", "b"], 1, block=16) == [1.0]
    assert distinct(["", ""], 1, block=2) == [0.0]


# ------------------------------------------------------------------------------ length control


def replies(rng: np.random.Generator, skill: float, bias: float, extra: float, n: int = 4000):
    """Wins of replies that are `extra` tokens longer, before a judge who likes length."""
    longer = rng.normal(extra, 6.0, size=n)
    return (rng.normal(skill + bias * np.tanh(longer / 8), 1.0) > 0).astype(float), longer


def test_length_control_takes_off_what_length_has_won() -> None:
    rng = np.random.default_rng(0)
    won, longer = replies(rng, skill=0.0, bias=0.8, extra=5.0)
    assert won.mean() > 0.6
    assert length_controlled(won, longer).mean() == pytest.approx(0.5, abs=0.03)
    won, longer = replies(rng, skill=0.0, bias=0.0, extra=5.0)
    assert length_controlled(won, longer).mean() == pytest.approx(won.mean(), abs=0.03)
    won, longer = replies(rng, skill=0.5, bias=0.8, extra=-5.0)
    assert won.mean() < length_controlled(won, longer).mean() == pytest.approx(0.69, abs=0.03)


def test_its_error_is_that_of_refitting_on_resampled_replies() -> None:
    rng = np.random.default_rng(1)
    won, longer = replies(rng, skill=0.2, bias=0.6, extra=3.0, n=300)
    values = length_controlled(won, longer)
    x = np.tanh(longer / longer.std())
    fits = []
    for _ in range(1000):
        rows = rng.integers(0, 300, 300)
        fits.append(stats.linregress(x[rows], won[rows]).intercept)
    assert stats.sem(values) == pytest.approx(np.std(fits), rel=0.08)
    assert values.mean() == pytest.approx(stats.linregress(x, won).intercept)


def test_a_policy_that_always_wins_or_has_one_length_is_left_as_it_is() -> None:
    always, longer = np.ones(20), np.arange(20.0)
    assert length_controlled(always, longer) == pytest.approx(always)
    won = np.array([1.0, 0.0, 1.0])
    assert length_controlled(won, np.full(3, 4.0)) is won
