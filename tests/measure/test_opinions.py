"""The second opinion: what another seed's reward model says of the same replies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_lib import catalogue
from rlhf_lib.files import write_jsonl
from rlhf_lib.measure import opinions
from rlhf_lib.study.training import run_stage


def test_replies_are_scored_by_both_models(
    tmp_path: Path, make_run: Callable, tiny_data: Any, finished: SimpleNamespace
) -> None:
    """The stage itself: with one model in both roles the two columns are equal, row by row."""
    run = make_run(tmp_path, "evaluation.samples_per_prompt=2")
    rows = [
        {
            "reply": i // 3,
            "prompt": f"\n\nHuman: Question {i % 3}?\n\nAssistant:",
            "response": reply,
            "proxy": 0.0,
        }
        for i, reply in enumerate([" Yes.", " No, sorry.", " Bring a coat and water."] * 2)
    ]
    evaluated = SimpleNamespace(path=tmp_path, hash="evaluated")
    (tmp_path / "samples").mkdir()
    for policy in opinions.watched():
        write_jsonl(tmp_path / "samples" / f"{policy}.jsonl", rows)
    model = finished.reward_model
    needed = {"evaluate": evaluated, "reward_model": model, "rival": model}
    stage = run_stage(run, catalogue.record("second_opinion"), tiny_data, needed)  # type: ignore[arg-type]
    scored = stage.samples()
    assert len(scored) == len(opinions.watched()) * 3, "one reply a prompt"
    assert [row["own"] for row in scored] == [row["other"] for row in scored]
    assert [row["prompt"] for row in scored[:3]] == [row["prompt"] for row in rows[:3]]
    assert len({row["own"] for row in scored}) > 1, "different replies, different scores"
    assert stage.result()["num_tokens"] > 0
