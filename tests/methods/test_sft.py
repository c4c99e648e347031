"""SFT: prompts excluded, accumulation exact, and a killed stage that ends like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.methods import sft
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rewards import Reply, read_replies
from rlhf_lib.models.load import load_policy, load_tokenizer
from rlhf_lib.models.logprobs import response_logits, response_logprobs
from rlhf_lib.objectives.masked import entropy
from rlhf_lib.runs import Work
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import SFTConfig
from tests.conftest import learner_of, train_stage


def test_the_loss_is_the_mean_over_response_tokens(make_model: Callable, tiny_data: Any) -> None:
    batch = tiny_data.demonstrations[:6]
    model = make_model("llama")
    terms, entropies = [], []
    for example in batch:
        logprobs, _ = response_logprobs(model, [example.prompt], [example.response])
        terms += logprobs[0].tolist()
        logits, _, _ = response_logits(model, [example.prompt], [example.response])
        entropies += entropy(logits).tolist()
    metrics = sft.update(learner_of(model), batch, micro_batch_size=4)
    assert len(terms) == sum(len(e.response) for e in batch)
    assert metrics["loss"] == pytest.approx(-sum(terms) / len(terms), abs=1e-5)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert metrics["mean_length"] == pytest.approx(len(terms) / 6)


def test_accumulated_equals_one_big_batch(make_model: Callable, tiny_data: Any) -> None:
    batch = tiny_data.demonstrations[:6]
    results = []
    for micro_batch_size in (6, 4, 1):
        learner = learner_of(make_model("gpt2"), rate=1.0)
        results.append((sft.update(learner, batch, micro_batch_size), learner.model.state_dict()))
    (metrics, weights), *others = results
    for other_metrics, other in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-5)
        assert max((weights[k] - other[k]).abs().max().item() for k in weights) < 1e-6


def test_prompts_are_not_trained_on(make_model: Callable, tiny_data: Any) -> None:
    example = replace(tiny_data.demonstrations[0], prompt=[30, 30, 30], response=[4, 5, 1])
    learner = learner_of(make_model("llama"))
    loss = []
    learner.step = lambda losses: (loss.extend(losses), (0.0, 0.0))[1]  # type: ignore[method-assign]
    sft.update(learner, [example], 1)
    logits, labels, _ = response_logits(learner.model, [example.prompt], [example.response])
    (gradient,) = torch.autograd.grad(loss[0], learner.model.lm_head.weight)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, labels), learner.model.lm_head.weight
    )
    assert labels.tolist() == [4, 5, 1]
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_it_learns_the_demonstrations(make_model: Callable, tiny_data: Any) -> None:
    model = make_model("gpt2")

    def loss() -> float:
        rows = tiny_data.demonstrations
        logprobs, mask = response_logprobs(
            model, [d.prompt for d in rows], [d.response for d in rows]
        )
        return -(logprobs.sum() / mask.sum()).item()

    before, config = loss(), SFTConfig(epochs=5, batch_size=8)
    learner = Learner(make_accelerator("fp32"), model, learning_rate=1e-2, steps=15)
    assert sft.train(learner, tiny_data.demonstrations, config) == {"examples": 24}
    assert loss() < before - 0.5


def test_the_stage_saves_what_it_trained(
    make_run: Callable, tiny_data: Any, tmp_path: Path, tiny_base: Path
) -> None:
    stage = train_stage(make_run(tmp_path), "sft", tiny_data)
    rows = stage.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"loss", "grad_norm", "learning_rate", "step_time", "num_tokens"} <= rows[0].keys()
    assert rows[-1]["num_tokens"] == sum(
        len(d.prompt) + len(d.response) for d in tiny_data.demonstrations
    )
    rates = [row["learning_rate"] / 3e-4 for row in rows]
    assert rates == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4]), "each is that of its own step"
    assert stage.result()["examples"] == 24
    trained, base = load_policy(stage.model_path).state_dict(), load_policy(tiny_base).state_dict()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert load_tokenizer(stage.model_path).eos_token_id == 1


def test_what_the_stage_reads_is_in_its_hash(
    make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, "sft.epochs=1")
    stage = train_stage(run, "sft", tiny_data)
    assert train_stage(run, "sft", tiny_data).path == stage.path
    others = [
        train_stage(run, "sft", replace(tiny_data, hash="other")),
        train_stage(make_run(tmp_path, "sft.epochs=1", "sft.learning_rate=1e-5"), "sft", tiny_data),
        train_stage(make_run(tmp_path, "sft.epochs=1", seed=4), "sft", tiny_data),
    ]
    assert len({stage.hash, *(other.hash for other in others)}) == 4


def test_killed_and_resumed_ends_like_never_killed(check_resume: Callable, tiny_data: Any) -> None:
    check_resume(lambda run: train_stage(run, "sft", tiny_data))


# -------------------------------------------------------------------------- the best of n samples


class Oracle:
    """A sampler whose replies and scores are known: reply i of a prompt is worth SCORES[i]."""

    SCORES = (0.1, 0.9, 2.0, 0.5)
    reference = None

    def __init__(self, tokenizer: Any, ends: tuple[bool, ...]) -> None:
        self.tokenizer, self.ends, self.drawn = tokenizer, ends, 0

    def draw(self, policy: None, prompts: list[Prompt], temperature: float) -> list[Reply]:
        self.drawn += len(prompts)
        groups = len(prompts) // 4
        replies = [[p.ids[0], 4 + i] for i, p in zip([0, 1, 2, 3] * groups, prompts, strict=True)]
        ended = [r + [1] * end for r, end in zip(replies, self.ends * groups, strict=True)]
        return read_replies(self.tokenizer, ended)

    def score(self, prompts: list[Prompt], replies: list[Reply]) -> tuple[torch.Tensor, dict]:
        assert len(prompts) == len(replies)
        return torch.tensor(self.SCORES * (len(prompts) // 4)), {}


@pytest.mark.parametrize(
    ("ends", "best"),
    [
        ((True, True, True, True), 2),
        ((True, True, False, True), 1),  # the favourite never ended
        ((False, False, False, False), 2),
    ],
)
def test_the_favourite_among_those_that_ended_is_imitated(
    ends: tuple[bool, ...], best: int, tiny_tokenizer: Any
) -> None:
    prompts = [Prompt(f"p{i}", [10 + i, 3]) for i in range(20)] * 5  # more than one round
    oracle = Oracle(tiny_tokenizer, ends)
    picked, tokens = sft.best_of_n(oracle, prompts, 4)  # type: ignore[arg-type]
    assert oracle.drawn == 400
    assert tokens == 400 * (2 + 2) + 100 * sum(ends)
    assert [d.prompt for d in picked] == [p.ids for p in prompts]
    assert [d.response for d in picked] == [
        [p.ids[0], 4 + best] + [1] * ends[best] for p in prompts
    ]
    assert picked[0].response_text == tiny_tokenizer.decode([10, 4 + best])


def test_training_on_the_best_raises_what_the_reward_model_says(
    make_run: Callable, make_sampler: Callable, finished: Any, tiny_data: Any, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path,
        "rejection.prompts=16",
        "rejection.samples=16",
        "rejection.epochs=20",
        "rejection.learning_rate=1e-2",
    )
    stage = train_stage(run, "rejection_sft", tiny_data, finished)
    assert stage.result()["examples"] == 16
    assert stage.result()["samples"] == 256
    trained = sum(len(p.ids) + 1 for p in tiny_data.prompts["train"][:16])
    assert stage.metrics()[0]["num_tokens"] > 16 * trained, "sampling costs tokens as well"
    sampler, prompts = make_sampler(), tiny_data.prompts["train"] * 32
    before, after = (
        sampler.score(prompts, sampler.draw(policy, prompts))[0].mean()
        for policy in (sampler.reference, load_policy(stage.model_path).eval())
    )
    assert after > before + 0.15


@pytest.mark.parametrize("rank", [0, 4])
def test_killed_after_it_has_sampled_it_learns_the_same(
    make_run: Callable,
    finished: Any,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> None:
    """Adapters start at random, and sampling has drawn random numbers before."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    few = f"model.lora_rank={rank}", "rejection.prompts=8", "rejection.samples=2"
    whole = train_stage(make_run(tmp_path / "whole", *few), "rejection_sft", tiny_data, finished)
    run = make_run(tmp_path / "killed", *few)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            train_stage(run, "rejection_sft", tiny_data, finished)
    again = train_stage(run, "rejection_sft", tiny_data, finished)
    losses = [[row["loss"] for row in stage.metrics()] for stage in (whole, again)]
    assert losses[0] == losses[1]


def test_training_on_the_best_resumes(
    check_resume: Callable, finished: Any, tiny_data: Any
) -> None:
    def train(run: Any) -> Any:
        few = replace(run.profile.rejection, prompts=12, samples=2, epochs=2)
        run = replace(run, profile=replace(run.profile, rejection=few))
        return train_stage(run, "rejection_sft", tiny_data, finished)

    check_resume(train)
