"""The stage that asks the probes: every policy, every probe, and counts that add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_lib.measure import probe_stage
from rlhf_lib.measure.probes import PROBES, fails, load_probes
from rlhf_lib.runs import Run, Stage, read_jsonl

LIMITS = ("evaluation.probe_prompts=3", "evaluation.probe_samples=2", "evaluation.batch_size=2",
          "data.max_prompt_tokens=24")  # fmt: skip


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, finished: SimpleNamespace
) -> tuple[Run, Stage]:
    run = make_run(tmp_path_factory.mktemp("probes"), *LIMITS)
    return run, measure(run, finished)


def measure(run: Run, finished: SimpleNamespace) -> Stage:
    policies = {"base": run.profile.model.name, "sft": str(finished.sft.model_path)}
    return probe_stage.measure(run, policies, finished.reward_model, {"sft": finished.sft.hash})


def test_every_policy_is_asked_every_probe_as_often_as_set(measured: tuple[Run, Stage]) -> None:
    run, stage = measured
    asked = load_probes(run.profile.data.source, 3) * 2
    for policy, counts in stage.result()["counts"].items():
        rows = read_jsonl(stage.path / "samples" / f"{policy}.jsonl")
        assert [row["id"] for row in rows] == [probe["id"] for probe in asked]
        assert list(counts) == list(PROBES["english"])
        for probe, count in counts.items():
            part = [row for row in rows if row["probe"] == probe]
            assert (count["prompts"], count["replies"]) == (3, 6)
            assert count["failures"] == sum(row["failure"] for row in part)
            assert count["proxy"] == pytest.approx(sum(row["proxy"] for row in part) / 6)


def test_each_row_holds_the_verdict_on_its_own_reply(measured: tuple[Run, Stage]) -> None:
    run, stage = measured
    rows = read_jsonl(stage.path / "samples" / "sft.jsonl")
    for row in rows:
        assert row["failure"] == fails(row, row["response"], run.profile.data.source)
    assert {row["failure"] for row in rows} == {0, 1}, "else the line above shows nothing"
    assert stage.result()["num_tokens"] > len(rows)


def test_replies_land_at_the_prompt_they_answer(
    measured: tuple[Run, Stage], finished: SimpleNamespace, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, make_run: Callable,
) -> None:  # fmt: skip
    """Batches are cut by length, so an answer could easily come to stand at another prompt."""

    def parrot(self, policy, prompts):
        return [[*p.ids[:3], 1] for p in prompts], torch.tensor(
            [float(len(p.ids)) for p in prompts]
        )

    monkeypatch.setattr(probe_stage.Sampler, "draw", parrot)
    stage = measure(make_run(tmp_path, *LIMITS), finished)
    rows = read_jsonl(stage.path / "samples" / "sft.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(finished.sft.model_path)
    for row in rows:
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"][-24:]
        assert row["proxy"] == len(ids)
        assert row["response"] == tokenizer.decode(ids[:3], skip_special_tokens=True)
        assert row["finished"]


def test_a_stage_depends_on_its_probes_and_settings(
    measured: tuple[Run, Stage], finished: SimpleNamespace, make_run: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, stage = measured
    monkeypatch.setattr(Stage, "ensure", lambda self, build: self)
    hashes = {stage.hash, measure(run, finished).hash}
    assert len(hashes) == 1
    for changed in ("evaluation.probe_samples=1", "evaluation.probe_prompts=2",
                    "evaluation.temperature=0.5", "data.max_response_tokens=7"):  # fmt: skip
        hashes.add(measure(make_run(run.root, *LIMITS, changed), finished).hash)
    monkeypatch.setattr(probe_stage, "load_probes", lambda *_: load_probes("path:x", 3)[1:])
    hashes.add(measure(run, finished).hash)
    assert len(hashes) == 6
