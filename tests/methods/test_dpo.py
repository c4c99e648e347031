"""DPO and its family: first losses, the table of the reference, exact accumulation, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from rlhf_lib.methods import dpo
from rlhf_lib.methods.learner import Learner
from rlhf_lib.models.load import load_policy, load_reference
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.runs import Run
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import DPOConfig, SettingsError
from tests.conftest import learner_of, train_stage

CONFIG = DPOConfig(batch_size=6, micro_batch_size=4, beta=0.3)
# every loss, at a beta that suits it
CONFIGS = {
    name: replace(CONFIG, loss=name, beta=beta)
    for name, beta in {
        "dpo": 0.3,
        "dpo_normalised": 2.0,
        "ipo": 0.3,
        "simpo": 2.0,
        "orpo": 1.0,
        "kto": 0.3,
    }.items()
}


def with_loss(run: Run, name: str) -> Run:
    changed = replace(run.profile.dpo, loss=name, beta=CONFIGS[name].beta)
    return replace(run, profile=replace(run.profile, dpo=changed))


def update(
    policy: Learner, pairs: list, table: torch.Tensor, config: DPOConfig, others: Any = ()
) -> dict[str, float]:
    """A step as `train` takes it: KTO alone is given replies to other prompts."""
    unrelated, loss = others if config.loss == "kto" else (), dpo.preference_loss(config)
    return dpo.update(
        policy, pairs, table, loss, unrelated, micro_batch_size=config.micro_batch_size
    )


def table_for(reference: Any, pairs: list, others: list, config: DPOConfig) -> torch.Tensor:
    size = config.micro_batch_size
    return dpo.reference_table(reference, pairs, others, config.loss, size)


def table_of(model: Any, pairs: list) -> torch.Tensor:
    """Sums of response log-probs, one sequence at a time: (N, 2)."""
    return torch.tensor(
        [
            [
                response_logprobs(model, [p.prompt], [r])[0].sum().item()
                for r in (p.chosen, p.rejected)
            ]
            for p in pairs
        ]
    )


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
    metrics = update(learner_of(load_policy(tiny_base)), pairs, table, config)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_loss_and_metrics_of_a_batch(make_model: Callable, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"][:5]
    model, reference = make_model("llama"), table_of(make_model("gpt2"), pairs)
    table = table_of(model, pairs)
    rewards = 0.3 * (table - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = update(learner_of(model), pairs, reference, CONFIG)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulated_equals_one_big_batch(name: str, make_model: Callable, tiny_data: Any) -> None:
    pairs, results = tiny_data.pairs["train"][:6], []
    others = dpo.unrelated_replies(pairs)
    reference = table_for(make_model("gpt2"), pairs, others, CONFIGS[name])
    if name == "kto":
        reference[:, 2] -= torch.tensor([20.0, 0, 0, 0, 0, 70])  # a KL above 0, of unequal parts
    for micro_batch_size in (6, 4, 1):
        learner = learner_of(make_model("llama"), rate=1.0)
        config = replace(CONFIGS[name], micro_batch_size=micro_batch_size)
        metrics = [update(learner, pairs, reference, config, others) for _ in range(2)]
        assert metrics[0].get("kto/kl", 1.0) > 0
        results.append((metrics, [w.detach() for w in learner.model.parameters()]))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        for one, two in zip(metrics, other_metrics, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        assert max((a - b).abs().max().item() for a, b in zip(weights, other, strict=True)) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_prefers_the_chosen_replies_a_little_more(
    name: str, tiny_base: Path, tiny_data: Any
) -> None:
    pairs = tiny_data.pairs["train"][:6]
    others = dpo.unrelated_replies(pairs)
    table = table_for(load_reference(tiny_base), pairs, others, CONFIGS[name])
    learner = Learner(
        make_accelerator("fp32"), load_policy(tiny_base), learning_rate=1e-3, steps=100
    )
    rows = [update(learner, pairs, table, CONFIGS[name], others) for _ in range(8)]
    margins = [row["rewards/margins"] for row in rows]
    assert margins[-1] > margins[1] > margins[0]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_stage_starts_at_ln_2_and_probes_itself(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    stage = train_stage(make_run(tmp_path), "dpo", tiny_data, finished)
    rows = stage.metrics()
    assert len(rows) == 4
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert ["reward" in row for row in rows] == [True, False, True, False], (
        "two probes were asked for"
    )
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert stage.result()["train_pairs"] == 24
    pairs = tiny_data.pairs["train"]
    replies = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert rows[-1]["num_tokens"] == replies + sum(len(p.prompt) for p in pairs)
    assert sum(row["reply_tokens"] for row in rows) == replies, "not those of a probe"


def test_the_reward_model_gives_no_gradient(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    other = train_stage(make_run(tmp_path / "other", seed=8), "reward_model", tiny_data)
    run = make_run(tmp_path, "dpo.probes=1", "dpo.probe_prompts=4")
    one = train_stage(run, "dpo", tiny_data, finished)
    other_start = SimpleNamespace(sft=finished.sft, reward_model=other)
    two = train_stage(run, "dpo", tiny_data, other_start)
    assert one.hash != two.hash
    assert one.metrics()[0]["reward"] != two.metrics()[0]["reward"]
    assert [row["loss"] for row in one.metrics()] == [row["loss"] for row in two.metrics()]


def test_killed_and_resumed_ends_like_never_killed(
    check_resume: Callable, finished: Any, tiny_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, reference_logprobs, stages = [], dpo.reference_logprobs, []

    def count(reference: Any, pairs: Any, batch_size: int) -> Any:
        passes.append(len(pairs))
        return reference_logprobs(reference, pairs, batch_size)

    def train(run: Any) -> Any:
        stages.append(train_stage(run, "dpo", tiny_data, finished))
        return stages[-1]

    monkeypatch.setattr(dpo, "reference_logprobs", count)
    check_resume(train)
    assert passes == [24, 24], "one pass over the pairs a run, whether it was killed or not"
    assert not list(stages[-1].path.glob("*/reference*")), "the log-probs outlived their use"


# -------------------------------------------------------------------------------- the whole family


def test_every_loss_of_the_setting_exists_and_no_other() -> None:
    names = get_args(get_type_hints(DPOConfig)["loss"])
    assert set(CONFIGS) == set(names)
    for name in names:
        assert callable(dpo.preference_loss(CONFIGS[name]))
    with pytest.raises(SettingsError, match=f"Known: {', '.join(sorted(names))}$"):
        dpo.preference_loss(replace(CONFIG, loss="ippo"))


def test_an_unknown_loss_is_refused_before_anything_is_computed(
    make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"unknown dpo\.loss = 'ippo': did you mean 'ipo'"):
        make_run(tmp_path, "dpo.loss=ippo")
    nothing: Any = object()  # neither policy nor sampler is asked for anything
    with pytest.raises(SettingsError, match=r"unknown dpo\.loss = 'ippo': did you mean 'ipo'"):
        dpo.train(nothing, nothing, tiny_data.pairs["train"], [], replace(CONFIG, loss="ippo"))


def test_label_smoothing_is_refused_where_nothing_would_read_it(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, "dpo.loss=ipo", "dpo.label_smoothing=0.1")
    with pytest.raises(SettingsError, match=r"label_smoothing=0\.1 means nothing to dpo\.loss=ipo"):
        train_stage(run, "dpo", tiny_data, finished)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dpo"])
def test_the_stage_runs_with_every_loss(
    name: str,
    make_run: Callable,
    finished: Any,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = with_loss(make_run(tmp_path, "dpo.probes=1", "dpo.probe_prompts=2"), name)
    tables = []
    compute = dpo.reference_logprobs
    monkeypatch.setattr(
        dpo, "reference_logprobs", lambda *args: (tables.append(args), compute(*args))[1]
    )
    stage = train_stage(run, "dpo", tiny_data, finished)
    rows = stage.metrics()
    assert len(rows) == 4
    assert all(math.isfinite(value) for row in rows for value in row.values())
    first = {
        "dpo_normalised": math.log(2),
        "ipo": (1 / (2 * CONFIGS["ipo"].beta)) ** 2,
        "kto": 0.5,
    }
    if name in first:
        assert rows[0]["loss"] == pytest.approx(first[name], abs=1e-4)
        assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert len(tables) == (name not in ("simpo", "orpo")), "a table no loss reads costs time"
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5), (
        "the probes' reference is there all the same"
    )
    assert ("kto/kl" in rows[0]) == (name == "kto")
    assert rows[0].get("kto/kl", 0.0) == pytest.approx(0, abs=1e-4), "each reply has its own row"


def test_every_loss_is_given_what_it_reads(make_model: Callable, tiny_data: Any) -> None:
    pairs = tiny_data.pairs["train"][:5]
    model = make_model("llama")
    reference, table = table_of(make_model("gpt2"), pairs), table_of(model, pairs)
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
    difference = -(table - reference).diff(dim=1)
    average = -((table - reference) / lengths).diff(dim=1)
    own_average = -(table / lengths).diff(dim=1)

    def smoothed(margin: torch.Tensor) -> torch.Tensor:
        right = margin.sigmoid()
        return -0.8 * right.log() - 0.2 * (1 - right).log()

    expected = {
        "dpo": smoothed(0.3 * difference),
        "dpo_normalised": smoothed(2 * average),
        "ipo": (difference - 1 / 0.6) ** 2,
        "simpo": -(2 * own_average - 0.7).sigmoid().log(),
    }
    for name, losses in expected.items():
        smoothing = 0.2 if name in dpo.SMOOTHED else 0.0
        config = replace(CONFIGS[name], simpo_margin=0.7, label_smoothing=smoothing)
        metrics = update(learner_of(model), pairs, reference, config)
        assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-4), name


def test_kto_measures_its_kl_on_the_chosen_reply_of_the_next_pair(
    make_model: Callable, tiny_data: Any
) -> None:
    pairs = tiny_data.pairs["train"][:5]
    model, reference = make_model("llama"), make_model("gpt2")
    others = [pairs[(i + 1) % 5].chosen for i in range(5)]
    assert dpo.unrelated_replies(pairs) == others

    def logprobs(model: Any) -> torch.Tensor:
        return torch.tensor(
            [
                response_logprobs(model, [p.prompt], [r])[0].sum().item()
                for p, r in zip(pairs, others, strict=True)
            ]
        )

    table = table_for(reference, pairs, others, CONFIGS["kto"])
    assert not table.requires_grad
    assert torch.allclose(table[:, :2], table_of(reference, pairs), atol=5e-5)
    assert torch.allclose(table[:, 2], logprobs(reference), atol=5e-5)
    table[:, 2] -= 9
    kl = (logprobs(model) - table[:, 2]).mean().item()
    assert kl > 1
    config = replace(CONFIGS["kto"], desirable_weight=1.5, undesirable_weight=0.5)
    metrics = update(learner_of(model), pairs, table, config, others)
    assert metrics["kto/kl"] == pytest.approx(kl, rel=1e-4)
    chosen, rejected = (0.3 * (table_of(model, pairs) - table[:, :2])).unbind(1)
    losses = 1.5 * (0.3 * kl - chosen).sigmoid() + 0.5 * (rejected - 0.3 * kl).sigmoid()
    assert metrics["loss"] == pytest.approx(losses.mean().item() / 2, rel=1e-4)


def test_kto_killed_and_resumed_ends_like_never_killed(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    check_resume(lambda run: train_stage(with_loss(run, "kto"), "dpo", tiny_data, finished))
