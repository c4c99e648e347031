"""The stage that asks the probes: every policy, every probe, as often as set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlhf_lib import catalogue
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.files import read_jsonl
from rlhf_lib.measure import probes
from rlhf_lib.measure.probes import PROBES, fails, load_probes
from rlhf_lib.methods.rewards import Reply, read_replies
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.runs import Run, Stage
from rlhf_lib.study import training

LIMITS = (
    "evaluation.probe_prompts=3",
    "evaluation.probe_samples=2",
    "evaluation.batch_size=2",
    "data.max_prompt_tokens=24",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, make_run: Callable, ask: Callable) -> Stage:
    return ask(make_run(tmp_path_factory.mktemp("probes"), *LIMITS))


@pytest.fixture(scope="module")
def ask(tiny_data: Any, finished: SimpleNamespace) -> Callable[[Run], Stage]:
    """The stage of a run whose policies are the base model and SFT."""
    record = catalogue.record("probes")
    return lambda run: training.run_stage(run, record, tiny_data, vars(finished))


def test_every_policy_is_asked_every_probe_as_often_as_set(measured: Stage) -> None:
    asked = load_probes(None, 3) * 2
    samples = sorted((measured.path / "samples").iterdir())
    assert [file.stem for file in samples] == ["base", "sft"]
    for file in samples:
        rows = read_jsonl(file)
        assert [row["id"] for row in rows] == [probe["id"] for probe in asked]
        assert Counter(row["probe"] for row in rows) == dict.fromkeys(PROBES["english"], 6)


def test_each_row_holds_the_verdict_on_its_own_reply(measured: Stage) -> None:
    rows = read_jsonl(measured.path / "samples" / "sft.jsonl")
    for row in rows:
        assert row["failure"] == fails(row, row["response"], None)
    assert {row["failure"] for row in rows} == {0, 1}, "else the line above shows nothing"
    assert measured.result()["num_tokens"] > len(rows)


def test_killed_probes_go_on_with_the_next_policy(
    measured: Stage, ask: Callable, make_run: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    real, asked = probes.read_policy, []

    def killed(path: str, accelerator: Any) -> Any:
        asked.append(path)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(path, accelerator)

    monkeypatch.setattr(probes, "read_policy", killed)
    run = make_run(tmp_path, *LIMITS)
    with pytest.raises(KeyboardInterrupt):
        ask(run)
    stage = ask(run)
    assert len(asked) == 3, "the base model is not asked again"
    for name in ("base", "sft"):
        one, two = (read_jsonl(s.path / "samples" / f"{name}.jsonl") for s in (stage, measured))
        assert one == two
    assert stage.result()["num_tokens"] == measured.result()["num_tokens"]


def test_replies_land_at_the_prompt_they_answer(
    ask: Callable,
    finished: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_run: Callable,
) -> None:
    """Batches are cut by length, so an answer could easily come to stand at another prompt."""

    def parrot(sampler: Sampler, policy: Any, prompts: Sequence[Prompt], *luck: Any) -> list[Reply]:
        return read_replies(sampler.tokenizer, [[*p.ids[:3], 1] for p in prompts])

    def length(
        sampler: Sampler, prompts: Sequence[Prompt], replies: Sequence[Reply]
    ) -> tuple[Tensor, dict]:
        return torch.tensor([float(len(p.ids)) for p in prompts]), {}

    monkeypatch.setattr(Sampler, "draw", parrot)
    monkeypatch.setattr(Sampler, "score", length)
    stage = ask(make_run(tmp_path, *LIMITS))
    rows = read_jsonl(stage.path / "samples" / "sft.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(finished.sft.model_path)
    for row in rows:
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"][-24:]
        assert row["proxy"] == len(ids)
        assert row["response"] == tokenizer.decode(ids[:3], skip_special_tokens=True)
        assert row["finished"]


def test_a_stage_depends_on_its_probes_and_settings(
    measured: Stage,
    ask: Callable,
    make_run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Stage, "ensure", lambda self, build: self)
    hashes = {measured.hash, ask(make_run(tmp_path, *LIMITS)).hash}
    assert len(hashes) == 1
    for changed in (
        "evaluation.probe_samples=1",
        "evaluation.probe_prompts=2",
        "evaluation.temperature=0.5",
        "data.max_response_tokens=7",
    ):
        hashes.add(ask(make_run(tmp_path, *LIMITS, changed)).hash)
    (tmp_path / "probes").mkdir()
    for name in ("world", "english"):
        (tmp_path / "probes" / f"{name}.jsonl").write_text("{}\n")
    monkeypatch.setattr(training, "bundled_folder", lambda: tmp_path)
    hashes.add(ask(make_run(tmp_path, *LIMITS)).hash)
    assert len(hashes) == 6
