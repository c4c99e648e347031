"""What chapters 06 and 07 say of their runs: looked up in made-up numbers, and drawn."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_lib.catalogue import label, policies
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.measure.statistics import interval
from rlhf_lib.results import frontier
from rlhf_lib.show import costs, findings, tables

MADE_UP = Path(__file__).parents[1] / "made_up"


@pytest.fixture(params=["gold", "proxy"])
def results(request: pytest.FixtureRequest) -> dict:
    return json.loads((MADE_UP / f"{request.param}.json").read_text())


@pytest.fixture
def gold() -> dict:
    return json.loads((MADE_UP / "gold.json").read_text())


# ------------------------------------------------------------------------------------------ DPO


@pytest.fixture
def update() -> pd.DataFrame:
    """Two pairs, given in another order than their numbers."""
    rewards = torch.tensor([[0.5, 0.0], [-1.0, 0.0]])
    after = torch.tensor([[2.0, 1.0], [-2.0, -3.0]])
    return findings.pair_frame([2, 1], rewards, after, beta=0.5)


def test_a_pair_has_lead_loss_pull_and_what_the_step_did(update: pd.DataFrame) -> None:
    new, ranked = update.to_dict("records")
    assert (new["pair"], ranked["pair"]) == (1, 2)
    assert new["loss"] == pytest.approx(math.log(2))
    assert new["pull"] == pytest.approx(0.25)
    assert (new["chosen moved"], new["rejected moved"]) == (1.0, -3.0)
    assert ranked["lead"] == pytest.approx(3.0), "1.5 of implicit reward at a beta of a half"
    assert ranked["loss"] == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert ranked["pull"] == pytest.approx(0.5 / (1 + math.exp(1.5)))
    assert ranked["chosen moved"] == pytest.approx(2.0 - 0.5 / 0.5)
    assert ranked["rejected moved"] == pytest.approx(-2.0 + 1.0 / 0.5)


def test_pairs_are_followed_through_the_updates(update: pd.DataFrame) -> None:
    table = findings.pair_table([update, update], pairs=1)
    assert table[["pair", "update"]].values.tolist() == [[1, 1], [1, 2]]
    assert table["chosen moved (nats)"].tolist() == ["+1.00", "+1.00"]
    assert table["r̂ of chosen"].tolist() == ["+0.00"] * 2, "no -0.00"
    assert table["loss"].tolist() == ["0.693"] * 2
    assert len(findings.pair_table([update, update], pairs=2)) == 4


def test_steps_are_drawn_a_panel_an_update(update: pd.DataFrame) -> None:
    axes = findings.pair_steps([update, update.assign(**{"chosen moved": 9.0})], "#a6409a").axes
    assert [axis.get_title() for axis in axes] == ["update 1", "update 2"]
    drawn = axes[0].lines[-1].get_xydata()
    assert drawn.tolist() == [[1.0, -3.0], [1.0, 0.0]]
    assert axes[1].lines[-1].get_xdata().tolist() == [9.0, 9.0]


def test_losses_are_one_where_both_replies_are_level() -> None:
    leads = torch.tensor([-1.0, 0.0, 1.0])
    curves = {name: torch.tensor([6.0, 2.0, 1.0]) for name in "abcd"}
    left, right = findings.loss_curves(leads, curves).axes
    assert [len(axis.lines) for axis in (left, right)] == [3, 1]
    assert left.lines[0].get_ydata().tolist() == [3.0, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"0\.0"):
        findings.loss_curves(leads + 0.5, curves)


@pytest.mark.parametrize(
    ("chosen", "rejected", "moral"),
    [
        (-1.0, -2.0, "Both sides fell"),
        (-1.0, 0.0, "that the rejected ones fell is not shown"),
        (0.0, -1.0, "as one would hope"),
        (1.0, 0.0, "Neither side clearly fell"),
    ],
)
def test_what_is_said_of_both_sides(chosen: float, rejected: float, moral: str) -> None:
    noise = np.random.default_rng(0).normal(scale=0.01, size=(40, 2))
    metrics = [
        {"rewards/chosen": 0.1 * chosen + a, "rewards/rejected": 0.1 * rejected + b}
        for a, b in 0.1 * (noise - noise[-10:].mean(0))
    ]
    said = findings.sides_moved(metrics, beta=0.1)
    assert moral in said
    assert f"{chosen:+.2f} nats" in said or chosen == 0.0
    assert f"{rejected:+.2f}." in said or rejected == 0.0


def test_replies_of_several_policies_stand_together(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    def replies(said: str, prompts: list, tokenizer: Any, policy: str) -> pd.DataFrame:
        assert (prompts, tokenizer) == (asked, tiny_tokenizer)
        return pd.DataFrame({"policy": policy, "prompt": ["b", "a"], "reply": [said, said]})

    asked = [Prompt("a", [1]), Prompt("b", [2])]
    monkeypatch.setattr(tables, "replies", replies)
    table = findings.answers({"SFT": "x", "DPO": "y"}, asked, tiny_tokenizer)  # type: ignore[dict-item]
    assert table["prompt"].tolist() == ["b", "b", "a", "a"], "in the order of the prompts"
    assert table["policy"].tolist() == ["SFT", "DPO"] * 2


# ----------------------------------------------------------------------------- made-up studies

FOUND = [{"low": 0.1, "high": 0.3}, {"low": -0.1, "high": 0.3}, {"low": -0.2, "high": -0.1}]


def test_intervals_that_leave_zero_out_are_counted_and_drawn_in_another_colour() -> None:
    assert findings.missed(FOUND) == pytest.approx(2 / 3)
    assert findings.width(FOUND) == pytest.approx(0.7 / 3)
    right, wrong = findings.studies({"right": FOUND[1:2], "wrong": FOUND}).axes
    assert right.get_title() == "right\n0.0% leave 0 out"
    assert wrong.get_title() == "wrong\n66.7% leave 0 out"
    marked = [line.get_color() == findings.WRONG for line in wrong.lines[:3]]
    assert marked == [True, False, True]


def test_few_of_many_studies_are_drawn() -> None:
    (axis,) = findings.studies({"all": FOUND * 50}).axes
    assert len(axis.lines) == findings.SHOWN + 1, "and the line at 0"
    assert "66.7%" in axis.get_title(), "the share is of all"


def test_lines_and_dots_over_kl() -> None:
    lines = {"gold": ([0.0, 1.0], [0.0, 2.0]), "best": ([0.0], [1.0])}
    (axis,) = findings.against_kl(lines, {"others": ([0.5], [0.1])}, "reward").axes
    dots, first, _ = axis.lines
    assert dots.get_xydata().tolist() == [[0.5, 0.1]]
    assert first.get_xydata().tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert axis.get_ylabel() == "reward"
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["others", "gold", "best"]


# ----------------------------------------------------------------------------- of a study's results


def test_the_finest_and_the_coarsest_comparison(results: dict) -> None:
    for place, record in enumerate(results["comparisons"].values()):
        record["detectable"] = 1.0 + place
    first, *_, last = map(tables.pair_name, results["comparisons"])
    said = findings.seen(results)
    assert said.startswith(f"The finest comparison is {first}: it would show 1.00.")
    last_size = float(len(results["comparisons"]))
    assert f"coarsest is {last}: {last_size:.2f} ({results['deciding']} reward)." in said
    for record in results["comparisons"].values():
        record["detectable"] = None
    assert "No comparison" in findings.seen(results)


def test_kinds_are_said_of_the_baseline_and_each_method(gold: dict) -> None:
    said = findings.kinds(gold)
    names = policies("method", "baseline")
    assert [sentence.partition("**:")[0] for sentence in said] == [f"**{label(n)}" for n in names]
    clear = {"mean": 5.0, "low": 4.0, "high": 6.0}
    kind = next(iter(gold["requests"]["kind"]))
    gold["requests"]["kind"][kind]["policies"][names[0]]["gain"] = clear
    assert f"more in {kind} (5.00 [4.00, 6.00])" in findings.kinds(gold)[0]


def test_what_a_taste_taught(gold: dict) -> None:
    differences = gold["attribution"]["differences"]
    said = findings.taught(gold)
    assert len(said) == len(differences)
    for sentence, (control, gaps) in zip(said, differences.items(), strict=True):
        assert sentence.startswith(f"**{label(control)}**, less the same method")
        assert all(f"{what} {interval(gap)} ({gap['verdict']})" in sentence
                   for what, gap in gaps.items())  # fmt: skip


def test_each_dose_has_its_place_and_each_method_its_slope(gold: dict) -> None:
    figure = findings.doses(gold)
    assert len(figure.axes) == 2
    polite = figure.axes[1]
    means = gold["attribution"]["policies"]
    for line, method in zip(polite.containers, ("ppo", "dpo"), strict=True):
        runs = [f"{method}_control", f"{method}_half", method, f"{method}_double"]
        drawn = line.lines[0].get_ydata()
        assert list(drawn) == [means[name]["polite words"]["mean"] for name in runs]
    assert [label.get_text() for label in polite.get_xticklabels()] == ["0", "0.5", "1", "2"]
    said = findings.leanings(gold)
    assert len(said) == 2
    slope = gold["attribution"]["slopes"]["ppo"]["polite words"]
    assert f"polite words {interval(slope)} (higher)" in said[0]


def test_samples_come_in_the_order_of_tables_and_in_full_where_they_were_measured(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = [{"prompt": "a", "proxy": 1.0}, {"prompt": "b", "proxy": None}]
    for name in ("ppo", "sft", "sft_again"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines + "\n")
    samples = findings.read_samples(tmp_path)
    assert list(samples) == ["sft", "ppo"], "the null is no policy"
    assert len(samples["sft"]) == 2
    assert findings.in_full(samples) == {n: [{"prompt": "a", "proxy": 1.0}] for n in samples}


def test_ends_of_runs_are_those_of_the_frontier() -> None:
    points = pd.DataFrame(
        [
            {"seed": 0, "policy": "ppo", "kind": "training", "step": step, "kl": 0.1 * step,
             "proxy": 1.0 * step, "gold": None, "coefficient": 0.1}
            for step in range(8)
        ]
    )  # fmt: skip
    ends, known = findings.run_ends(points, "gold")
    assert known == ["proxy"], "gold was never logged"
    assert ends["proxy"].tolist() == [6.5], "a mean over the last quarter"


def test_budgets_are_read_where_the_thriftiest_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(stage: str, reward_model: str, reward: str) -> pd.DataFrame:
        assert (reward_model, reward) == ("stage of reward_model", "gold")
        times = {"stage of ppo": 2.0, "stage of dpo": 1.0}[stage]
        steps = np.arange(1.0, 4.0)
        return pd.DataFrame(
            {"TFLOPs": times * steps, "minutes": steps, "gold": steps, "kl": 0.1 * steps}
        )

    monkeypatch.setattr(findings, "spent", spent)
    stage: Callable = "stage of {}".format
    used = findings.used_up(stage, ["ppo", "dpo"], "gold")
    assert list(used) == ["ppo", "dpo"]
    expected = costs.budget_table(frontier.at_equal_budget(used))
    pd.testing.assert_frame_equal(findings.budget_table(used), expected)
    assert "50%" in findings.budget_table(used).to_string()


def test_replies_that_are_read_are_counted() -> None:
    results = {"settings": {"dpo": {"epochs": 3}, "ppo": {"epochs": 4}}}
    said = findings.replies_read(results, {"ppo": 500}, pairs=200)
    assert "reads 1,200 replies of the dataset" in said, "both replies of a pair, in each epoch"
    assert "its own 4 times, 2,000 in all" in said


def test_over_optimisation_is_said_of_each_reward(gold: dict) -> None:
    found = gold["overoptimisation"]
    said = findings.overoptimised(gold)
    assert len(said) == len(found)
    for sentence, reward in zip(said, sorted(found), strict=True):
        assert f"**{reward}** reward: {interval(found[reward])}: " in sentence
        assert sentence.endswith(f"{found[reward]['verdict']}.")


def test_stops_have_readable_titles(gold: dict) -> None:
    changed = copy.deepcopy(gold)
    changed["early_stops"] = [{"seed": 0, "kl_there": 1.239, "gold_at_end": 0.5}]
    table = findings.stop_table(changed)
    assert table.to_dict("records") == [{"seed": 0, "KL (k1) there": 1.24, "gold at end": 0.5}]


def test_what_probes_rest_on_and_whether_they_tempt(gold: dict) -> None:
    gold["settings"]["evaluation"] |= {"probe_prompts": 24, "probe_samples": 3}
    said = findings.probed(gold)
    assert "At most 24 prompts of each probe, 3 replies to each" in said
    assert f"in each seed (of {len(gold['seeds'])})" in said
    proxy = gold["probes"]["proxy"]["ppo"]
    proxy["failing"] = {"mean": 2.0, "low": 1.0, "high": 3.0}
    proxy["other"] = None
    assert "replies 2.00 [1.00, 3.00] on average, and its other replies –" in findings.tempted(gold)


def test_proofs_have_a_line_a_claim() -> None:
    proof = SimpleNamespace(
        claim="a = b", measured=0.123456, expected=0.5, error=1.25e-7, verdict="holds"
    )
    (row,) = findings.proof_table([proof]).to_dict("records")
    assert row == {
        "claim": "a = b",
        "measured": "0.1235",
        "expected": "0.5",
        "error": "1.2e-07",
        "verdict": "holds",
    }
