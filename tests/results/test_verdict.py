"""The verdict says what the intervals allow and nothing beyond: made-up results of each kind."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_lib import catalogue
from rlhf_lib.catalogue import CATALOGUE
from rlhf_lib.profiles import load_profile
from rlhf_lib.results import verdict
from rlhf_lib.results.policies import compared
from rlhf_lib.settings import as_dict

MADE_UP = Path(__file__).parents[1] / "made_up"
METHODS = ("ppo", "grpo", "dpo")
PAIRS = ("ppo_minus_grpo", "ppo_minus_dpo", "grpo_minus_dpo")
FINDINGS = r"raised|lowered|PO (is|are) clearly|as labelled, (above|below)"


def interval(low: float, high: float) -> dict:
    """A made-up estimate, with the verdict that its interval allows."""
    word = "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"
    mean = (low + high) / 2
    record = {"mean": mean, "low": low, "high": high, "verdict": word, "detectable": None}
    return record | {"per_seed": [low, mean, high], "over": "seeds and prompts"}


UNCLEAR, UP, DOWN = interval(-0.1, 0.1), interval(0.4, 0.6), interval(-0.6, -0.4)


@pytest.fixture
def results() -> dict:
    """A study in which nothing can be told from anything."""
    made_up = json.loads((MADE_UP / "gold.json").read_text())
    for name in METHODS:
        made_up["policies"][name]["gold_gain"] = UNCLEAR
        made_up["policies"][name]["gold"] = interval(0.8, 1.0)
    made_up["comparisons"] = dict.fromkeys(PAIRS, UNCLEAR)
    made_up["needs"] = {}  # what is chosen for which need: test_verdict_choices.py
    made_up["overoptimisation"] = {"proxy": UNCLEAR, "gold": UNCLEAR}
    made_up["best_of_n_peak"] |= {"methods": dict.fromkeys(METHODS, UNCLEAR)}
    made_up["reward_model"]["accuracy"]["reward_model_minus_bag_of_words"] = UNCLEAR
    return made_up


def text(results: dict) -> str:
    return "\n".join(verdict.sentences(results))


def test_a_tie_is_called_a_tie(results: dict) -> None:
    said = text(results)
    start = "**PPO, GRPO and DPO are not distinguishable from SFT in gold reward** (differences: "
    assert said.startswith(f"{start}PPO 0.00 [-0.10, 0.10]")
    assert "Among themselves the three methods are not distinguishable" in said
    assert "not distinguishable from a bag of words" in said
    assert not re.search(FINDINGS, said)


def test_an_interval_without_0_that_does_not_survive_the_correction_is_explained(
    results: dict,
) -> None:
    assert "Holm's correction takes that off" not in text(results)
    results["policies"]["ppo"]["gold_gain"] = UP | {"verdict": "not distinguishable"}
    first = verdict.sentences(results)[0]
    assert "PPO, GRPO and DPO are not distinguishable" in first
    assert "PPO 0.50 [0.40, 0.60]" in first
    assert "Holm's correction takes that off" in first


def test_a_clear_winner_comes_first_with_its_numbers(results: dict) -> None:
    results["policies"]["ppo"]["gold_gain"] = UP
    results["comparisons"]["ppo_minus_grpo"] = results["comparisons"]["ppo_minus_dpo"] = UP
    first, second, *_ = verdict.sentences(results)
    assert first.startswith(
        "**PPO raised gold reward over SFT** (differences: PPO 0.50 [0.40, 0.60]); "
    )
    assert "**GRPO and DPO are not distinguishable from SFT in gold reward**" in first
    assert second == (
        "Among the methods: PPO above GRPO (difference 0.50 [0.40, 0.60]); PPO above DPO "
        "(difference 0.50 [0.40, 0.60]). Other pairs are not distinguishable."
    )


def test_everything_worse_than_sft_is_not_dressed_up(results: dict) -> None:
    for name in METHODS:
        results["policies"][name]["gold_gain"] = DOWN
        results["policies"][name]["gold"] = interval(0.3, 0.5)
    said = text(results)
    assert said.startswith(
        "**PPO, GRPO and DPO lowered gold reward over SFT** (differences: PPO -0.50 [-0.60,"
    )
    assert not re.search("raised|PO (is|are) clearly|not distinguishable from SFT", said)


def test_up_down_and_unclear_in_one_sentence(results: dict) -> None:
    results["policies"]["grpo"]["gold_gain"] = UP
    results["policies"]["dpo"]["gold_gain"] = DOWN
    first = verdict.sentences(results)[0]
    assert re.findall(r"\*\*(.*?)\*\*", first) == [
        "GRPO raised gold reward over SFT",
        "DPO lowered gold reward over SFT",
        "PPO is not distinguishable from SFT in gold reward",
    ]


def test_a_lower_comparison_is_turned_round_with_its_numbers(results: dict) -> None:
    results["comparisons"]["ppo_minus_grpo"] = interval(-0.6, -0.2)
    assert "GRPO above PPO (difference 0.40 [0.20, 0.60])" in text(results)


def test_every_method_is_held_against_imitating_the_best_samples(results: dict) -> None:
    assert "Against" not in text(results), "nothing is said of a baseline that was not run"
    for name, record in zip(METHODS, (UP, DOWN, UNCLEAR), strict=True):
        results["comparisons"][f"{name}_minus_rejection_sft"] = record
    said = text(results)
    assert (
        "Against Best-of-n SFT, which imitates the best of its samples: PPO higher (0.50 [0.40, "
        "0.60]); GRPO lower (-0.50 [-0.60, -0.40]); DPO not distinguishable (0.00 [-0.10, 0.10])."
    ) in said
    assert "Among themselves the three methods are not distinguishable" in said


def test_no_other_pairs_are_spoken_of_where_there_are_none(results: dict) -> None:
    results["comparisons"] = dict.fromkeys(PAIRS, UP)
    said = text(results)
    assert "GRPO above DPO" in said
    assert "Other pairs" not in said


@pytest.mark.parametrize(
    ("proxy", "gold", "shown"),
    [(UP, DOWN, True), (UP, UNCLEAR, False), (UNCLEAR, DOWN, False), (UP, UP, False)],
)
def test_overoptimisation_needs_more_proxy_and_less_gold(
    results: dict, proxy: dict, gold: dict, shown: bool
) -> None:
    results["overoptimisation"] = {"proxy": proxy, "gold": gold}
    about = ("Over-optimisation is", "**More proxy reward, worse replies")
    (said,) = [s for s in verdict.sentences(results) if s.startswith(about)]
    assert said.startswith("**More proxy reward, worse replies:**") is shown
    if shown:
        ppo = results["settings"]["ppo"]
        assert f"{ppo['low_kl_coef']:g} instead of {ppo['kl_coef']:g}" in said
    else:
        assert "Over-optimisation is not shown" in said
        assert f"{proxy['verdict']} in proxy and {gold['verdict']} in gold" in said


@pytest.mark.parametrize(
    ("fall", "words"),
    [
        (DOWN, "n = 8 is lower, difference -0.50 [-0.60, -0.40]"),
        (UNCLEAR, "n = 8 is not distinguishable from that, difference 0.00 [-0.10, 0.10]"),
    ],
)
def test_best_of_n_falls_only_where_that_is_shown(results: dict, fall: dict, words: str) -> None:
    results["best_of_n_peak"] = {
        "n": 4,
        "gold": interval(1.9, 2.1),
        "last": 8,
        "last_minus_peak": fall,
        "methods": {"ppo": DOWN, "grpo": UP, "dpo": UNCLEAR},
    }
    (said,) = [s for s in verdict.sentences(results) if s.startswith("Best-of-n")]
    assert said == (
        "Best-of-n, which trains nothing, is best at n = 4 on half the requests; on the others "
        f"it has gold reward 2.00 [1.90, 2.10] (all that follows is measured there; {words}); "
        "GRPO is above it (differences: GRPO 0.50 [0.40, 0.60]); PPO is below it "
        "(differences: PPO -0.50 [-0.60, -0.40]); DPO is not distinguishable from it (differences: "
        "DPO 0.00 [-0.10, 0.10])."
    )


@pytest.mark.parametrize(
    ("difference", "words"),
    [(UP, "as labelled, above a bag"), (DOWN, "as labelled, below a bag")],
)
def test_the_reward_model_is_measured_against_a_bag_of_words(
    results: dict, difference: dict, words: str
) -> None:
    results["reward_model"]["accuracy"]["reward_model_minus_bag_of_words"] = difference
    assert words in text(results)
    assert "ranks 72.0% [69.0, 75.0] of held-out pairs" in text(results)
    assert "76.0% is reachable" in text(results)


def test_with_the_proxy_as_only_judge_it_warns_and_never_speaks_of_gold() -> None:
    results = json.loads((MADE_UP / "proxy.json").read_text())
    said = text(results)
    assert "raised proxy reward over SFT" in said
    assert "not that their replies are better" in said
    assert "from a single seed" in said
    assert "pairs as labelled, above a bag of words" in said
    assert not re.search("gold|None|nan|reachable|[Oo]ver-optimisation", said)


def test_replies_are_counted_as_they_are_drawn(results: dict) -> None:
    asked = "evaluation.samples_per_prompt=3 evaluation.baseline_samples=1"
    results["settings"] = as_dict(load_profile("laptop", f"{asked} evaluation.measured_samples=4"))
    results["data"] = {"prompts": {"evaluation": {"count": 1000}}}
    said = verdict.asked(results)
    assert "3 times each, SFT 3 times" in said
    assert "entropy of the first 3 to" in said
    assert "SFT again has random numbers of its own" in said
    results["deciding"] = "proxy"
    results["policies"]["sft"]["proxy"] = {"units": 7}
    assert "proxy reward is measured of all replies; KL and entropy" in verdict.asked(results)


def test_a_tie_of_one_seed_is_laid_to_its_prompts(results: dict) -> None:
    assert "not distinguishable at this many seeds" in text(results)
    results["seeds"] = [0]
    assert "not distinguishable on this many prompts" in text(results)


def test_it_says_what_intervals_are_over_and_what_was_corrected(results: dict) -> None:
    over, families = verdict.sentences(results)[-2:]
    assert "95 % over seeds and evaluation prompts" in over
    assert "Holm's correction" in families
    assert "Uncorrected are policies that are no candidates, SFT against itself" in families
    assert "over-optimisation" in families
    assert "the methods among themselves; each method against Best-of-n SFT" in families
    results["seeds"] = [0]
    assert "from a single seed" in verdict.sentences(results)[-2]


def test_it_says_what_the_study_could_have_seen(results: dict) -> None:
    assert "What could be seen" not in text(results), "it does not know"
    sizes = dict(zip(PAIRS, (0.25, None, 0.4), strict=True))
    results["comparisons"] = {key: UNCLEAR | {"detectable": sizes[key]} for key in PAIRS}
    assert "a true difference of 0.25 to 0.40, by comparison, in gold reward" in text(results)
    results["comparisons"] = {key: UNCLEAR | {"detectable": 0.3} for key in PAIRS}
    assert "a true difference of 0.30 in gold reward" in text(results)
    assert "80% of studies" in text(results)


def test_a_held_out_judge_is_named_as_what_it_is(results: dict) -> None:
    """Real data with a judge: what the gold reward says elsewhere, the judge says here."""
    renamed = json.loads(
        json.dumps(results).replace('"gold"', '"judge"').replace("gold_", "judge_")
    )
    renamed["policies"]["ppo"]["judge_gain"] = UP
    renamed["overoptimisation"] = {"proxy": UP, "judge": DOWN}
    said = text(renamed)
    assert said.startswith(
        "**PPO raised judge reward over SFT** (differences: PPO 0.50 [0.40, 0.60])"
    )
    assert "trained on pairs that the proxy never saw" in said
    assert "ends higher in proxy and lower in judge (differences: proxy 0.50" in said
    assert "it has judge reward" in said
    others = [s for s in verdict.sentences(renamed) if not s.startswith("Coefficients")]
    assert "gold" not in "".join(others), "but of the search in the bundled world"


def test_every_number_of_the_made_up_study_is_one_of_its_results() -> None:
    """No number appears that was not looked up."""
    results = json.loads((MADE_UP / "gold.json").read_text())
    known = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)
        elif isinstance(value, (int, float)):
            known.update(f"{abs(value):.{digits}f}" for digits in (1, 2, 3))
            known.update((f"{100 * abs(value):.1f}", str(value)))

    collect(results)
    known.add(str(load_profile("laptop").tuning.trials))
    said = re.sub("95 %|80%|TF-IDF", "", text(results))
    numbers = re.findall(r"\d+(?:\.\d+)?", said)
    assert len(numbers) > 20
    assert not [number for number in numbers if number not in known]


# ------------------------------------------------------------------------------ a further method


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A study with one method more, the only one that gained."""
    toy = replace(CATALOGUE["ppo"], name="toy", label="Toy")
    monkeypatch.setitem(CATALOGUE, "toy", toy)
    made_up = json.loads((MADE_UP / "gold.json").read_text())
    made_up["policies"]["toy"] = made_up["policies"]["ppo"] | {"gold_gain": UP}
    for name in METHODS:
        made_up["policies"][name]["gold_gain"] = DOWN
    names = [*METHODS, "toy", "rejection_sft"]
    pairs = [key for family in compared(names).values() for key in family]
    made_up["comparisons"] = {key: UP if "toy" in key else UNCLEAR for key in pairs}
    values = {name: interval(0.8, 1.0) for name in names}
    need = {"policies": values, "comparisons": made_up["comparisons"], "better": "higher"}
    made_up["needs"] = {"reward": need}
    return made_up


def test_a_further_method_is_spoken_of_wherever_methods_are(with_toy: dict) -> None:
    assert list(compared([*METHODS, "toy", "rejection_sft"])["baseline"]) == [
        f"{name}_minus_rejection_sft" for name in (*METHODS, "toy")
    ]
    said = verdict.sentences(with_toy)
    assert said[0].startswith(
        "**Toy raised gold reward over SFT** (differences: Toy 0.50 [0.40, 0.60]); "
    )
    assert "PPO above Toy (difference 0.50 [0.40, 0.60])" in said[1]
    assert "Toy higher (0.50 [0.40, 0.60])" in said[2]
    assert said[3].startswith("**Highest gold reward:** ")
    assert "Toy (0.90 [0.80, 1.00])" in said[3]
    assert "PPO† (0.90" in said[3]


def test_the_number_of_methods_is_counted(with_toy: dict) -> None:
    with_toy["comparisons"] = dict.fromkeys(with_toy["comparisons"], UNCLEAR)
    assert "Among themselves the four methods are not distinguishable" in text(with_toy)


def test_a_method_that_a_study_did_not_measure_is_left_out(with_toy: dict) -> None:
    old = json.loads((MADE_UP / "gold.json").read_text())
    assert "Toy" not in text(old)
    for name in ("toy", "rejection_sft"):
        with_toy["policies"][name]["gold_gain"] = DOWN
    (said,) = verdict.choices(with_toy)
    assert "PPO, GRPO, DPO, Toy and Best-of-n SFT were not shown" in said


def test_of_the_proxy_it_names_the_methods_that_learnt_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = json.loads((MADE_UP / "proxy.json").read_text())
    assert "reward model that PPO and GRPO were trained against: a higher" in text(results)
    monkeypatch.setitem(CATALOGUE, "grpo", replace(CATALOGUE["grpo"], rewarded=False))
    assert "reward model that PPO was trained against: a higher" in text(results)


def test_what_a_repeat_may_move_is_the_spread_between_seeds(results: dict) -> None:
    for name, spread in zip(METHODS, (0.2, 0.05, 0.1), strict=True):
        gain = UNCLEAR | {"per_seed": [1 - spread, 1.0, 1 + spread]}
        results["policies"][name]["gold_gain"] = gain
    assert "a method's gain moves by 0.05 to 0.20 (standard deviation)" in text(results)
    results["seeds"] = [0]
    assert "is not shown by a single seed" in text(results)


def test_a_judge_is_said_to_be_right_as_often_as_it_is(results: dict) -> None:
    results["deciding"] = "judge"
    for name in METHODS:
        results["policies"][name]["judge_gain"] = UNCLEAR
    results["reward_model"]["judge_accuracy"] = interval(0.6, 0.66)
    assert "It ranks 63.0% [60.0, 66.0] of held-out pairs as labelled." in verdict._gains(results)


def test_sft_that_differs_from_itself_is_an_alarm(results: dict) -> None:
    """Its own second draw has a gain of 0: where it is found to have one, that comes first."""
    for gain, heard in ((UP, True), (DOWN, True), (UNCLEAR, False)):
        results["policies"]["sft_again"]["gold_gain"] = gain
        for said in (verdict.sentences(results), verdict.headline(results)):
            assert said[1].startswith("**A warning:** SFT again") is heard
            assert not heard or f"came out {gain['verdict']} than SFT" in said[1]


def test_one_seed_promises_nothing_of_other_training_runs(results: dict) -> None:
    results["comparisons"] = {key: UNCLEAR | {"detectable": 0.3} for key in PAIRS}
    results["seeds"] = [0]
    (said,) = [s for s in verdict.sentences(results) if s.startswith("What could be seen")]
    assert "between two of these trained models is one that 80% of sets of as many prompts" in said
    assert said.endswith("How other training runs would differ is not in it.")
    assert "studies like this one" not in said
    assert "said of the one model that it trained" in verdict.sentences(results)[-2]


def test_values_that_no_search_has_found_are_not_called_tuned(results: dict) -> None:
    def said() -> str:
        return next(s for s in verdict.sentences(results) if s.startswith("Coefficients and"))

    results["settings"] = as_dict(load_profile("laptop", "seeds=1"))
    assert "the best of 9 pairs of values" in said()
    assert "other here" not in said()
    assert "This study" not in said()
    results["settings"] = as_dict(load_profile("laptop", "dpo.beta=0.3 ppo.kl_coef=7"))
    assert "; `ppo.kl_coef` and `dpo.beta` are other here." in said()
    for key, value in (("profile", "smoke"), ("model", "gpt2"), ("source", "path:mine.jsonl")):
        results |= {"profile": "laptop", "model": "tiny", "source": "bundled"} | {key: value}
        assert (
            f"This study: {results['source']}, {results['model']}, {results['profile']};" in said()
        )


def test_a_method_that_nobody_searched_for_is_named(
    results: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    results["settings"] = as_dict(load_profile("laptop"))
    assert "No search" not in text(results)
    monkeypatch.setitem(CATALOGUE, "grpo", replace(CATALOGUE["grpo"], tuned=()))
    assert "No search was made for GRPO." in text(results)


def test_where_nothing_is_as_the_search_found_it_no_search_is_spoken_of(results: dict) -> None:
    tuned = [key for name in catalogue.tuned() for key in catalogue.record(name).tuned]
    results["settings"] = as_dict(load_profile("laptop"))
    for section, key in (key.split(".") for key in tuned):
        results["settings"][section][key] = -1
    said = next(s for s in verdict.sentences(results) if s.startswith("Coefficients and"))
    assert "the profile's or your own" in said
    assert "best of 9" not in said


def test_it_says_who_answered_what(results: dict) -> None:
    results["settings"] = as_dict(load_profile("laptop"))
    results["data"] = {"prompts": {"evaluation": {"count": 1000}}}
    said = verdict.asked(results)
    assert said.startswith("7 policies answered 1000 prompts (96 different requests) 4 times each")
    assert "SFT 8 times, for each of 3 seeds" in said
    assert "the first 2 to each of the first 512 prompts" in said
    assert "judged by the gold reward" in said
    results["data"]["prompts"]["evaluation"]["count"] = 32
    assert "to each of the first 32 prompts" in verdict.asked(results)
