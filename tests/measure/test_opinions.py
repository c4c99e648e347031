"""The second opinion: what another seed's reward model says of the same replies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from rlhf_lib.measure import opinions
from rlhf_lib.measure.opinions import WATCHED
from rlhf_lib.runs import write_jsonl


def test_replies_are_scored_by_both_models(
    tmp_path: Path, make_run: Callable, finished: SimpleNamespace
) -> None:
    """The stage itself: with one model in both roles the two columns are equal, row by row."""
    run = make_run(tmp_path, "evaluation.samples_per_prompt=2")
    rows = [
        {"prompt": f"\n\nHuman: Question {i % 3}?\n\nAssistant:", "response": reply}
        for i, reply in enumerate([" Yes.", " No, sorry.", " Bring a coat and water."] * 2)
    ]
    evaluated = SimpleNamespace(path=tmp_path, hash="evaluated")
    (tmp_path / "samples").mkdir()
    for policy in WATCHED:
        write_jsonl(tmp_path / "samples" / f"{policy}.jsonl", rows)
    model = finished.reward_model
    stage = opinions.measure(run, evaluated, model, model)  # type: ignore[arg-type]
    scored = stage.samples()
    assert len(scored) == len(WATCHED) * 3, "one reply a prompt"
    assert [row["own"] for row in scored] == [row["other"] for row in scored]
    assert [row["prompt"] for row in scored[:3]] == [row["prompt"] for row in rows[:3]]
    assert len({row["own"] for row in scored}) > 1, "different replies, different scores"
    assert stage.result()["num_tokens"] > 0
