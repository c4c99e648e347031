"""Tables to be read along training and of replies: what changed, errors, probes, samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf_lib.catalogue import label
from rlhf_lib.data.encoding import Pair, Prompt
from rlhf_lib.files import write_jsonl
from rlhf_lib.measure.statistics import interval
from rlhf_lib.show import tables, training

MADE_UP = Path(__file__).parents[1] / "made_up"


def test_quarters_are_of_the_steps_at_which_the_metric_was_logged() -> None:
    metrics = [{"step": i} | ({"kl": float(i)} if i % 2 else {}) for i in range(16)]
    assert tables.quarters(metrics, "kl") == ([1.0, 3.0], [13.0, 15.0])
    assert tables.quarters(metrics[:4], "kl") == ([1.0], [3.0])


def test_the_change_table_has_the_metrics_that_were_logged() -> None:
    metrics = [{"step": i, "loss": 10.0 - i + 0.1 * (i % 2)} for i in range(8)]
    table = training.change_table(metrics, {"loss": "loss", "kl": "KL"})
    assert table.to_dict("records") == [
        {"": "loss", "first quarter": "9.55", "last quarter": "3.55", "change": "fell"}
    ]


def test_replies_show_the_last_turn_and_what_was_cut(tiny_tokenizer: Any) -> None:
    words = tiny_tokenizer.encode
    asked = ["\n\nHuman: a b\n\nAssistant: c\n\nHuman: d e\n\nAssistant:", "f"]
    prompts = [Prompt(text, words(text)) for text in asked]
    rollout = SimpleNamespace(
        responses=[[*words("g h"), tiny_tokenizer.eos_token_id], words("i")],
        finished=torch.tensor([True, False]),
        scores=torch.tensor([0.5, -1.25]),
        gold=[2.0, math.pi],
        kl=torch.tensor([-0.01, 3.21]),
    )
    table = tables.replies(rollout, prompts, tiny_tokenizer, step=7)  # type: ignore[arg-type]
    assert table.to_dict("records") == [
        {
            "step": 7,
            "prompt": "d e",
            "reply": "g h",
            "proxy": "0.50",
            "gold": "2.00",
            "log-ratio to SFT": "0.0",
        },
        {
            "step": 7,
            "prompt": "f",
            "reply": "i (cut)",
            "proxy": "-1.25",
            "gold": "3.14",
            "log-ratio to SFT": "3.2",
        },
    ]
    rollout.gold = None
    assert "gold" not in tables.replies(rollout, prompts, tiny_tokenizer).columns  # type: ignore[arg-type]


def test_error_counts_have_every_category_that_can_occur() -> None:
    errors = [{"category": "safety"}, {"category": "safety"}, {"category": "other"}]
    table = tables.error_counts(errors, gold_known=True).set_index("category")
    assert table.loc["safety", ["errors", "share of errors"]].tolist() == [2, "67%"]
    assert table["errors"].sum() == 3
    without = tables.error_counts([], gold_known=False)
    assert set(table.index) - set(without["category"]) == {"label against gold"}
    assert set(without["share of errors"]) == {"0%"}


def test_the_error_table_takes_the_most_confident_of_each_category() -> None:
    prompt = "\n\nHuman: First?\n\nAssistant: A.\n\nHuman: Last?\n\nAssistant:"
    pairs = [Pair("talk", prompt, f" chosen {i}", f" rejected {i}", [], [], []) for i in range(9)]
    errors = [{"pair": i, "preference": -9.0 + i, "category": "other"} for i in range(8)]
    errors.append({"pair": 8, "preference": -0.1, "category": "near tie"})
    table = tables.error_table(errors, pairs, limit=3)
    assert table["category"].tolist() == ["near tie", "other", "other"]
    assert table["labelled better"].tolist() == ["chosen 8", "chosen 0", "chosen 1"]
    assert table["scored higher"].tolist() == ["rejected 8", "rejected 0", "rejected 1"]
    assert set(table["request"]) == {"Last?"}
    assert len(tables.error_table(errors, pairs)) == 9


def test_a_row_a_measure_a_column_a_policy_and_an_arrow_where_it_differs() -> None:
    measured = json.loads((MADE_UP / "gold.json").read_text())["probes"]
    failures = measured["failures"]
    table = tables.probe_table(failures, percent=True).set_index("")
    assert list(table.index) == list(failures)
    assert list(table.columns) == [label(policy) for policy in next(iter(failures.values()))]
    arrows = {"higher": "▲", "lower": "▼", "not distinguishable": "]"}
    for measure, records in failures.items():
        for policy in set(records) - {"sft"}:
            change = records[policy]["change"]["verdict"]
            assert table.loc[measure, label(policy)][-1] in (arrows[change], "%")
        assert table.loc[measure, "SFT"] == interval(records["sft"], 0, percent=True)
    differs = {"ppo": record(0.1, "lower"), "dpo": record(0.9, "higher")}
    row = tables.probe_table({"mode": differs}, percent=True).iloc[0]
    assert (row["PPO"], row["DPO"]) == ("10% [0, 20] ▼", "90% [80, 100] ▲")
    wanted = list(measured["scores"])
    definitions = tables.definition_table(measured["definitions"], wanted)
    assert definitions["measure"].tolist() == wanted
    assert definitions["what counts"].tolist() == [measured["definitions"][m] for m in wanted]


def test_every_candidate_with_an_arrow_is_spoken_of() -> None:
    unchanged = {"mean": 0.0, "low": 0.0, "high": 0.0, "verdict": "not distinguishable"}
    fewer = {"mean": -0.03, "low": -0.05, "high": -0.01, "verdict": "lower"}
    more = {"mean": 0.875, "low": 0.5, "high": 1.0, "verdict": "higher"}
    changes = {"base": more, "rejection_sft": more, "ppo": fewer, "dpo": unchanged}
    records = {name: {"change": change} for name, change in changes.items()}
    said = tables.failure_sentences({"repetitive": {"sft": {}, **records}})
    assert sorted(said) == [
        "Best-of-n SFT fails **more often** than SFT: repetitive, by 88 [50, 100] points of a "
        "hundred.",
        "PPO fails **less often** than SFT: repetitive, by 3 [1, 5] points of a hundred.",
    ]
    none = tables.failure_sentences({"repetitive": {"sft": {}, "dpo": {"change": unchanged}}})
    assert none == ["No candidate was shown to fail more or less often than SFT."]


def record(mean: float, verdict: str) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "change": {"verdict": verdict}}


def test_examples_show_the_first_prompt_on_which_policies_differ(tmp_path: Path) -> None:
    # two prompts a probe, two samples each; in the first probe the policies part at the second
    failures = {"sft": [0, 0, 1, 0, 1, 1, 1, 1], "ppo": [0, 1, 0, 0, 1, 1, 1, 1]}
    (tmp_path / "samples").mkdir()
    for policy, failed in failures.items():
        rows = [
            {
                "id": f"{probe} {number}",
                "probe": probe,
                "finished": sample == 0,
                "prompt": f"\n\nHuman: {probe} {number}?\n\nAssistant:",
                "response": f" {policy}",
            }
            for probe in ("first", "second")
            for number in (1, 2)
            for sample in (0, 1)
        ]
        rows = [row | {"failure": f} for row, f in zip(rows, failed, strict=True)]
        write_jsonl(tmp_path / "samples" / f"{policy}.jsonl", rows)
    stage: Any = SimpleNamespace(path=tmp_path)
    table = tables.example_table(stage, ("sft", "ppo"))
    assert table["probe"].tolist() == ["first", "", "second", ""]
    assert table["request"].tolist() == ["first 2?", "", "second 1?", ""]
    assert table["policy"].tolist() == ["SFT", "PPO"] * 2
    assert table["reply"].tolist() == ["sft", "ppo"] * 2
    assert table["fails"].tolist() == ["yes", "no", "yes", "yes"]
