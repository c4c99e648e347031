"""The table of failures: made-up stages whose shares, intervals and changes are known by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_lib.data.truth import Truth, truth_of
from rlhf_lib.files import write_jsonl
from rlhf_lib.measure import statistics
from rlhf_lib.measure.probes import ORDINARY, PROBES, SCORES, load_probes
from rlhf_lib.results import probes

WORLD = truth_of("bundled")
PROMPTS = 16  # of each probe, two replies each
# share of each policy's prompts on which it fails, in every probe
SHARES = {"sft": 0.5, "ppo": 0.0, "dpo": 1.0}


def stages(folder: Path, truth: Truth | None, seeds: int) -> list[dict]:
    made = []
    for seed in range(seeds):
        paths = {name: folder / str(seed) / name for name in ("probes", "evaluate")}
        for path in paths.values():
            (path / "samples").mkdir(parents=True)
        for policy, share in SHARES.items():
            probed, ordinary = [], []
            for number, row in enumerate(load_probes(truth, PROMPTS) * 2):
                failure = int(number % PROMPTS < share * PROMPTS)
                more = {"response": f" says {policy}", "finished": True, "proxy": 1.0 - failure}
                probed.append(row | more | {"failure": failure})
            for number in range(20):
                prompt = f"\n\nHuman: Give me {'one' if number % 2 else 'two'} tips on it."
                if truth:
                    prompt = "\n\nHuman: How do I rob a bank?\n\nAssistant:"
                reply = " Sorry, I cannot." if policy == "ppo" else " Let it rise."
                ordinary.append({"prompt": prompt, "response": reply, "finished": policy == "sft"})
            write_jsonl(paths["probes"] / "samples" / f"{policy}.jsonl", probed)
            write_jsonl(paths["evaluate"] / "samples" / f"{policy}.jsonl", ordinary)
        made.append({name: SimpleNamespace(path=path) for name, path in paths.items()})
    return made


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> dict:
    made = stages(tmp_path_factory.mktemp("english"), None, 1)
    return probes.probe_table(made, None)


def test_one_table_holds_probes_and_ordinary_modes(english: dict) -> None:
    modes = [mode for mode in ORDINARY if mode != "flattery"]  # that is one of the world's
    assert list(english["failures"]) == [*PROBES["english"], *modes]
    assert list(english["scores"]) == list(SCORES["english"])
    assert set(english["definitions"]) >= {*english["failures"], *english["scores"]}
    json.dumps(english)
    for records in (*english["failures"].values(), *english["scores"].values()):
        assert list(records) == list(SHARES)
        assert "change" not in records["sft"]


def test_shares_are_those_of_the_replies(english: dict) -> None:
    for probe in PROBES["english"]:
        means = {p: r["mean"] for p, r in english["failures"][probe].items()}
        assert means == SHARES
    assert english["failures"]["unfinished"]["ppo"]["mean"] == 1.0
    assert english["scores"]["harmless"]["ppo"]["mean"] == 1.0
    assert english["proxy"]["sft"]["failing"]["mean"] == 0.0
    assert english["proxy"]["sft"]["other"]["mean"] == 1.0
    assert english["proxy"]["ppo"]["failing"] is None, "it never fails: there is no such reply"


def test_two_replies_to_a_prompt_are_one_unit(english: dict) -> None:
    record = english["failures"]["sycophancy"]["sft"]
    assert record["units"] == PROMPTS
    # 16 prompts, half of them failing: sd 0.5, t with 15 degrees of freedom
    assert record["high"] - record["mean"] == pytest.approx(2.131 * 0.5 / 16**0.5, rel=0.15)
    assert record["mean"] - record["low"] == pytest.approx(record["high"] - record["mean"])


def test_never_failing_is_no_certainty(english: dict) -> None:
    never, always = (english["failures"]["sycophancy"][p] for p in ("ppo", "dpo"))
    assert never["low"] == 0.0
    assert never["high"] == pytest.approx(0.1432, abs=1e-4), "Jeffreys' interval of 0 in 16"
    assert always["low"] == pytest.approx(1 - 0.1432, abs=1e-4)


def share_of(failing: int, seeds: int = 1) -> dict:
    """31 prompts, 8 replies each, so many prompts of which have one reply that fails."""
    replies = {f"prompt {i}": [float(i < failing)] + 7 * [0.0] for i in range(31)}
    return probes._estimate([replies] * seeds, share=True)


@pytest.mark.parametrize("seeds", [1, 3])
def test_failing_seldom_is_known_no_better_than_failing_never(seeds: int) -> None:
    records = [share_of(failing, seeds) for failing in range(4)]
    for fewer, more in pairwise(records):
        assert fewer["low"] < more["low"]
        assert fewer["high"] < more["high"], "it was 11 of a hundred for none, and 1 for one"
        assert more["low"] < more["mean"] < more["high"]
    assert records[0]["low"] == 0.0
    assert records[0]["high"] == pytest.approx(0.0772, abs=1e-4), "Jeffreys' interval of 0 in 31"


def test_shares_of_whole_prompts_have_jeffreys_interval() -> None:
    won = np.array([1.0] * 20 + [0.0] * 80)
    record = probes._estimate([{f"prompt {i}": [v] for i, v in enumerate(won)}], share=True)
    exact = statistics.share(won)
    # a hair wider: the spread is a guess here, with 99 degrees of freedom
    assert exact["low"] - 0.002 < record["low"] < exact["low"]
    assert exact["high"] < record["high"] < exact["high"] + 0.002


def test_intervals_of_shares_cover() -> None:
    """Prompts that fail seldom, two replies each, three seeds: a t interval covers half of them."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        often = rng.beta(0.03, 0.97, 24)  # a mean of 3 in a hundred
        seeds = [
            {f"prompt {i}": (rng.random(2) < p).astype(float).tolist() for i, p in enumerate(often)}
            for _ in range(3)
        ]
        record = probes._estimate(seeds, share=True)
        covered.append(record["low"] <= 0.03 <= record["high"])
    assert np.mean(covered) >= 0.93


def test_a_difference_of_shares_is_no_more_than_a_hundred_points() -> None:
    few = [{f"prompt {i}": [v] for i, v in enumerate(values)} for values in ((0, 0, 0, 0),)]
    most = [{f"prompt {i}": [v] for i, v in enumerate((1, 1, 1, 0))}]
    records = probes._estimates({"sft": few, "ppo": most, "dpo": few}, share=True)
    assert records["ppo"]["change"]["high"] == 1.0
    scores = probes._estimates({"sft": few, "ppo": most, "dpo": few}, share=False)
    assert scores["ppo"]["change"]["high"] > 1.0, "a score has no bounds"


def test_changes_are_paired_and_called_by_their_interval(english: dict) -> None:
    records = english["failures"]["over-refusal"]
    assert records["ppo"]["change"]["mean"] == -0.5
    assert records["dpo"]["change"]["mean"] == 0.5
    assert records["ppo"]["change"]["verdict"] == "lower"
    assert records["dpo"]["change"]["p_adjusted"] >= records["dpo"]["change"]["p"]
    unchanged = english["failures"]["says nothing"]["ppo"]["change"]
    assert unchanged["verdict"] == "not distinguishable"


def test_the_world_has_flattery_and_the_parts_of_the_gold_reward(tmp_path: Path) -> None:
    made = stages(tmp_path, WORLD, 2)
    for seed in made:  # the scores need every kind of request
        for path in (seed["evaluate"].path / "samples").glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            asked = "\n\nHuman: Give me one tip on baking bread.\n\nAssistant:"
            write_jsonl(path, [*rows, *({**row, "prompt": asked} for row in rows)])
    measured = probes.probe_table(made, WORLD)
    assert list(measured["failures"]) == [*PROBES["world"], *ORDINARY]
    assert measured["scores"]["harmless"]["ppo"]["mean"] == pytest.approx(1.5)
    assert measured["scores"]["helpful"]["sft"]["mean"] == pytest.approx(2.0)
    assert measured["rules"] is None, "there the rules are the definition"
