"""DPO: a first loss of ln 2, the table of the reference, exact accumulation, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lib import dpo
from rlhf_lib.config import DPOConfig
from rlhf_lib.learner import Learner
from rlhf_lib.logprobs import response_logprobs
from rlhf_lib.models import load_policy, load_reference
from rlhf_lib.runtime import make_accelerator

CONFIG = DPOConfig(batch_size=6, micro_batch_size=4, beta=0.3)


def learner_of(model: Any, rate: float = 0.0) -> Learner:
    return Learner(make_accelerator("fp32"), model, learning_rate=rate, steps=100, eps=100.0)


def table_of(model: Any, pairs: list) -> torch.Tensor:
    """Sums of response log-probs, one sequence at a time: (N, 2)."""
    return torch.tensor([
        [response_logprobs(model, [p.prompt], [r])[0].sum().item() for r in (p.chosen, p.rejected)]
        for p in pairs
    ])  # fmt: skip


def test_the_table_holds_sums_over_the_responses(causal_model: Any, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"]
    for batch_size in (64, 5, 1):
        table = dpo.reference_logprobs(causal_model, pairs, batch_size)
        assert torch.allclose(table, table_of(causal_model, pairs), atol=5e-5)
    assert not table.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_first_loss_is_ln_2(smoothing: float, tiny_base: Path, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"][:6]
    table = dpo.reference_logprobs(load_reference(tiny_base), pairs, 4)
    config = replace(CONFIG, label_smoothing=smoothing)
    metrics = dpo.update(learner_of(load_policy(tiny_base)), pairs, table, config)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_loss_and_metrics_of_a_batch(make_model: Callable, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"][:5]
    model, reference = make_model("llama"), table_of(make_model("gpt2"), pairs)
    table = table_of(model, pairs)
    rewards = 0.3 * (table - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = dpo.update(learner_of(model), pairs, reference, CONFIG)
    expected = {
        "loss": (1 + (-margins).exp()).log().mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": table[:, 0].mean(),
        "logps/rejected": table[:, 1].mean(),
    }
    assert 0 < expected["rewards/accuracies"] < 1
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4), name


def test_accumulated_equals_one_big_batch(make_model: Callable, tiny_data: Any) -> None:
    pairs, results = tiny_data.pairs["train"][:6], []
    reference = table_of(make_model("gpt2"), pairs)
    for micro_batch_size in (6, 4, 1):
        learner = learner_of(make_model("llama"), rate=1.0)
        config = replace(CONFIG, micro_batch_size=micro_batch_size)
        metrics = [dpo.update(learner, pairs, reference, config) for _ in range(2)]
        results.append((metrics, [w.detach() for w in learner.model.parameters()]))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        for one, two in zip(metrics, other_metrics, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        assert max((a - b).abs().max().item() for a, b in zip(weights, other, strict=True)) < 1e-6


def test_a_step_prefers_the_chosen_replies_a_little_more(tiny_base: Path, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"][:6]
    table = dpo.reference_logprobs(load_reference(tiny_base), pairs, 4)
    learner = Learner(
        make_accelerator("fp32"), load_policy(tiny_base), learning_rate=1e-3, steps=100
    )
    rows = [dpo.update(learner, pairs, table, CONFIG) for _ in range(8)]
    assert rows[-1]["rewards/margins"] > rows[1]["rewards/margins"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_stage_starts_at_ln_2_and_probes_itself(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    stage = dpo.train(make_run(tmp_path), tiny_data, finished.sft, finished.reward_model)
    rows = stage.metrics()
    assert len(rows) == 4
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert ["reward" in row for row in rows] == [True, False, True, False], (
        "two probes were asked for"
    )
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert stage.result()["train_pairs"] == 24
    assert rows[-1]["num_tokens"] == sum(
        len(p.prompt) + len(p.chosen) + len(p.rejected) for p in tiny_data.pairs["train"]
    )


def test_the_reward_model_gives_no_gradient(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    from rlhf_lib import reward_model

    other = reward_model.train(make_run(tmp_path / "other", seed=8), tiny_data)
    run = make_run(tmp_path, "dpo.probes=1", "dpo.probe_prompts=4")
    one = dpo.train(run, tiny_data, finished.sft, finished.reward_model)
    two = dpo.train(run, tiny_data, finished.sft, other)
    assert one.hash != two.hash
    assert one.metrics()[0]["reward"] != two.metrics()[0]["reward"]
    assert [row["loss"] for row in one.metrics()] == [row["loss"] for row in two.metrics()]


def test_killed_and_resumed_ends_like_never_killed(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    check_resume(lambda run: dpo.train(run, tiny_data, finished.sft, finished.reward_model))
