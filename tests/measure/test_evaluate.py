"""Evaluation: best-of-n by hand, rows that add up, and one small evaluation of real policies."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lib import catalogue
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.files import read_jsonl
from rlhf_lib.measure import evaluate
from rlhf_lib.methods.rewards import Reply
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.runs import Stage
from rlhf_lib.study import training

# ------------------------------------------------------------------------------------ best of n

PROXY = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, -1.0, 6.0]])
GOLD = np.array([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]])


def test_best_of_n_takes_the_winner_of_each_block() -> None:
    rows = evaluate.best_of_n(PROXY, {"gold": GOLD, "judge": -GOLD})
    assert rows["prompt"].tolist() == [0, 1] * 3
    means = rows.groupby("n").mean()
    assert means.index.tolist() == [1, 2, 4]
    one, two, four = means.to_dict("records")
    assert (one["proxy"], one["gold"]) == (PROXY.mean(), GOLD.mean())
    assert two["proxy"] == (3 + 2 + 5 + 6) / 4
    assert two["gold"] == (20 + 40 + 50 + 80) / 4, "the gold reward of the proxy's pick"
    assert (four["proxy"], four["gold"]) == ((3 + 6) / 2, (20 + 80) / 2)
    assert [row["judge"] for row in (one, two, four)] == [-r["gold"] for r in (one, two, four)]


def test_best_of_n_has_the_analytic_kl() -> None:
    rows = evaluate.best_of_n(np.random.default_rng(0).normal(size=(3, 16)), {})
    for row in rows.to_dict("records"):
        assert row["kl"] == pytest.approx(math.log(row["n"]) - (row["n"] - 1) / row["n"])
        assert "gold" not in row
    assert row["n"] == 16
    assert row["kl"] == pytest.approx(1.8351, abs=1e-4)


def test_best_of_n_of_normal_scores_is_the_expected_maximum() -> None:
    rows = evaluate.best_of_n(np.random.default_rng(1).normal(size=(4000, 4)), {})
    # expected maxima of 1, 2 and 4 standard normals
    assert rows.groupby("n")["proxy"].mean().tolist() == pytest.approx(
        [0, 0.5642, 1.0294], abs=0.04
    )


# ----------------------------------------------------------------------------------------- rows


def made_up_rollout(**changes: Any) -> Rollout:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    values: dict[str, Any] = {
        "prompts": [[5, 6], [7]],
        "responses": [[8, 9, 10], [1]],
        "response_mask": mask,
        "logprobs": torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -2.5, -3.5], [-0.25, 0.0, 0.0]]),
        "finished": torch.tensor([False, True]),
        "scores": torch.tensor([0.5, -1.0]),
        "rewards": torch.tensor([0.5, -1.0]),
        "gold": [2.0, 1.0],
        "entropies": torch.tensor([[0.5, 1.0, 3.0], [0.25, 9.0, 9.0]]),
        "exact_kl": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]),
    }
    return Rollout(**values | changes)


PROMPTS = [Prompt("first", [5, 6]), Prompt("second", [7])]
REPLIES = [Reply(" a b c", [8, 9, 10], False), Reply("", [1], True)]


def test_a_row_holds_what_was_measured_of_its_reply() -> None:
    gold = {"gold": torch.tensor([2.0, 1.0])}
    first, second = evaluate.records(made_up_rollout(), PROMPTS, REPLIES, gold)
    # k3 of a log-ratio of +0.5 is e^-0.5 - 1 + 0.5, of -0.25 it is e^0.25 - 1 - 0.25
    assert first == {
        "prompt": "first",
        "response": " a b c",
        "proxy": 0.5,
        "kl": pytest.approx(0.6),
        "kl_k1": pytest.approx(1.5),
        "kl_k3": pytest.approx(3 * (math.exp(-0.5) - 0.5)),
        "entropy": pytest.approx(1.5),
        "length": 3,
        "finished": False,
        "gold": 2.0,
    }
    assert second["kl"] == pytest.approx(0.4)
    assert second["kl_k1"] == pytest.approx(-0.25), "the sampled estimate may be negative"
    assert second["kl_k3"] == pytest.approx(math.exp(0.25) - 1.25), "and this one may not"
    assert second["entropy"] == 0.25, "padding does not count"
    assert (second["length"], second["finished"]) == (1, True)


def test_rows_of_real_data_have_no_gold_and_rows_without_exact_kl_are_refused() -> None:
    rows = evaluate.records(made_up_rollout(gold=None), PROMPTS, REPLIES, {})
    assert all("gold" not in row and "judge" not in row for row in rows)
    judge = {"judge": torch.tensor([3.0, 4.0])}
    judged = evaluate.records(made_up_rollout(gold=None), PROMPTS, REPLIES, judge)
    assert [row["judge"] for row in judged] == [3.0, 4.0]
    with pytest.raises(AssertionError, match="exact_kl=True"):
        evaluate.records(made_up_rollout(exact_kl=None), PROMPTS, REPLIES, {})


# ------------------------------------------------------------------------- policies of one seed


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, tiny_data: Any, finished: Any
) -> SimpleNamespace:
    """Base and SFT on sixteen prompts, two of which a test pair shares, each answered twice.

    The reward model stands in for its control and for the judge as well.
    """
    pairs = tiny_data.pairs["test"]
    prompts = [*tiny_data.prompts["train"][:14]]
    prompts += [Prompt(f"cut {p.prompt_text}", p.prompt) for p in pairs[:2]]
    data = replace(tiny_data, prompts=tiny_data.prompts | {"evaluation": prompts})
    small = (
        "evaluation.best_of_n=4",
        "evaluation.best_of_n_prompts=3",
        "evaluation.batch_size=5",
        "evaluation.samples_per_prompt=3",
        "evaluation.baseline_samples=4",
        "evaluation.measured_prompts=10",
        "evaluation.heldout_texts=7",
    )
    run = make_run(tmp_path_factory.mktemp("evaluated"), *small)
    needed = vars(finished) | dict.fromkeys(
        ("reward_model_control", "judge"), finished.reward_model
    )

    def run_it(needed: dict = needed, data: Any = data, root: Path = run.root) -> Stage:
        there = replace(run, root=root)
        return training.run_stage(there, catalogue.record("evaluate"), data, needed)

    return SimpleNamespace(
        evaluate=run_it, stage=run_it(), prompts=prompts, pairs=pairs, data=data, needed=needed
    )


def samples(stage: Stage, policy: str) -> list[dict]:
    return read_jsonl(stage.path / "samples" / f"{policy}.jsonl")


def measured(stage: Stage, policy: str) -> list[dict]:
    return [row for row in samples(stage, policy) if "kl" in row]


def test_every_policy_answers_every_prompt_and_sft_more_often(evaluated: SimpleNamespace) -> None:
    files = sorted(path.stem for path in (evaluated.stage.path / "samples").iterdir())
    assert files == ["base", "sft", "sft_again"]
    for name in files:
        rows, count = samples(evaluated.stage, name), 4 if name == "sft" else 3
        asked = [prompt.text for prompt in evaluated.prompts]
        assert [row["prompt"] for row in rows] == asked * count
        assert [row["reply"] for row in rows] == [k for k in range(count) for _ in asked]
        assert all(0 < row["length"] <= 8 for row in rows)
        assert all("gold" not in row and "judge" in row for row in rows)
        assert [r["response"] for r in rows[:16]] != [r["response"] for r in rows[16:32]]
        measured = [i for i, row in enumerate(rows) if "kl" in row]
        assert measured == [*range(10), *range(16, 26)], "two replies to ten prompts, in full"
    first, second = (samples(evaluated.stage, name) for name in ("sft", "sft_again"))
    assert [r["response"] for r in first[:16]] != [r["response"] for r in second[:16]], "own luck"


def test_policies_that_are_one_say_one_thing(evaluated: SimpleNamespace) -> None:
    """Common random numbers, whatever batch a reply is drawn in: twins differ by nothing."""
    sft = evaluated.needed["sft"]
    twins = evaluated.needed | {name: sft for name in ("ppo", "dpo")}
    stage = evaluated.evaluate(needed=twins)
    ppo, dpo, sft = (samples(stage, name) for name in ("ppo", "dpo", "sft"))
    assert ppo == dpo
    for row, own in zip(ppo, sft, strict=False):
        # scores are rounded with their batch, and SFT's are larger
        assert row == own | {key: pytest.approx(row[key], abs=1e-5) for key in ("judge",)}
    alone = samples(evaluated.stage, "sft")
    assert [r["response"] for r in alone[: len(ppo)]] == [r["response"] for r in ppo]


def test_a_reply_hangs_on_its_own_luck_alone(evaluated: SimpleNamespace) -> None:
    """The same numbers wherever they are asked for; other ones for another seed or use."""
    numbers = evaluate.random_numbers(0, "policies", (3, 4))
    assert torch.equal(numbers, evaluate.random_numbers(0, "policies", (3, 4)))
    for other in (
        evaluate.random_numbers(1, "policies", (3, 4)),
        evaluate.random_numbers(0, "sft_again", (3, 4)),
    ):
        assert not torch.equal(numbers, other)


def test_a_killed_evaluation_goes_on_with_the_next_policy(
    evaluated: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], evaluate.replies_of

    def killed(sampler: Any, policy: Any, prompts: Any, luck: Any, *rest: Any) -> Any:
        asked.append(len(luck))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(sampler, policy, prompts, luck, *rest)

    monkeypatch.setattr(evaluate, "replies_of", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated.evaluate(root=tmp_path)
    stage = evaluated.evaluate(root=tmp_path)
    assert asked == [3, 4, 4, 3], "the base model is not asked again"
    for name in ("base", "sft", "sft_again"):
        assert samples(stage, name) == samples(evaluated.stage, name)
    for part in ("policies", "best_of_n"):
        assert stage.result()[part] == evaluated.stage.result()[part]
    assert stage.result()["num_tokens"] == evaluated.stage.result()["num_tokens"]
    assert not (stage.path / "kept").exists()


def test_the_judge_scores_what_was_said(evaluated: SimpleNamespace) -> None:
    """Here it is the proxy itself, so the two columns agree: rows, chosen replies, best-of-n."""
    rows = [row for row in samples(evaluated.stage, "base") if "proxy" in row]
    rows += read_jsonl(evaluated.stage.path / "chosen.jsonl")
    assert [row["judge"] for row in rows] == pytest.approx([row["proxy"] for row in rows], abs=1e-5)
    for row in evaluated.stage.result()["best_of_n"]["default"]:
        assert row["judge"] == pytest.approx(row["proxy"], abs=1e-5)
    judged = evaluated.stage.result()["policies"]["base"]["judge"]
    assert judged == pytest.approx(np.mean([r["judge"] for r in samples(evaluated.stage, "base")]))


def test_a_chosen_reply_is_scored_where_a_prompt_has_one(evaluated: SimpleNamespace) -> None:
    rows = read_jsonl(evaluated.stage.path / "chosen.jsonl")
    assert [row["prompt"] for row in rows] == [p.text for p in evaluated.prompts[-2:]]
    assert [row["response"] for row in rows] == [p.chosen_text for p in evaluated.pairs[:2]]
    assert [row["length"] for row in rows] == [len(p.chosen) for p in evaluated.pairs[:2]]


def test_held_out_texts_are_measured_under_every_policy(evaluated: SimpleNamespace) -> None:
    rows = read_jsonl(evaluated.stage.path / "heldout.jsonl")
    assert [row["tokens"] for row in rows] == [len(p.chosen) for p in evaluated.pairs[:7]]
    assert all(row["nll"].keys() == {"base", "sft"} for row in rows)
    assert evaluated.stage.result()["heldout"] == evaluate.REAL_TEXTS
    totals = {name: sum(row["nll"][name] for row in rows) for name in ("base", "sft")}
    assert totals["base"] != totals["sft"]


def test_the_reference_is_at_no_distance_from_itself_and_the_base_is(
    evaluated: SimpleNamespace,
) -> None:
    for name in ("sft", "sft_again"):
        for row in measured(evaluated.stage, name):
            assert row["kl"] == pytest.approx(0, abs=1e-5)
            assert row["kl_k1"] == pytest.approx(0, abs=1e-5)
    base = [row["kl"] for row in measured(evaluated.stage, "base")]
    assert min(base) > 1e-4, "an exact KL is positive for every reply"


def test_the_means_are_those_of_the_rows(evaluated: SimpleNamespace) -> None:
    for name, means in evaluated.stage.result()["policies"].items():
        rows = measured(evaluated.stage, name)
        for mean, key in (
            ("reward", "proxy"),
            ("kl", "kl"),
            ("completions/mean_length", "length"),
        ):
            assert means[mean] == pytest.approx(np.mean([r[key] for r in rows]), abs=1e-5), key
        unfinished = np.mean([not row["finished"] for row in rows])
        assert means["completions/clipped_ratio"] == pytest.approx(unfinished)


def test_best_of_n_curves_rise_and_a_control_has_its_own(evaluated: SimpleNamespace) -> None:
    curves = evaluated.stage.result()["best_of_n"]
    assert curves.keys() == {"default", "control"}
    for curve in curves.values():
        assert [row["n"] for row in curve] == [1, 2, 4]
        assert curve[2]["kl"] == pytest.approx(math.log(4) - 3 / 4)
        proxy = [row["proxy"] for row in curve]
        assert proxy == sorted(proxy)
        assert proxy[0] < proxy[-1]
    assert curves["default"] == curves["control"], "the same model on the same samples"


def test_a_finished_evaluation_is_not_run_again(
    evaluated: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "measure", lambda config: pytest.fail("measured again"))
    assert evaluated.evaluate().path == evaluated.stage.path
    needed = evaluated.needed
    without_judge = {name: stage for name, stage in needed.items() if name != "judge"}
    other_sft = SimpleNamespace(hash="other", model_path=needed["sft"].model_path)
    for changed in (
        {"data": replace(evaluated.data, hash="changed")},
        {"needed": without_judge},
        {"needed": needed | {"sft": other_sft}},
    ):
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            evaluated.evaluate(**changed)
    with gzip.open(tmp_path / "heldout.jsonl.gz", "wt") as texts:
        texts.write("others\n")
    monkeypatch.setattr(training, "bundled_folder", lambda: tmp_path)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        evaluated.evaluate()
