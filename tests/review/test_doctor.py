"""The doctor: each finding by the mistake that causes it, and clean runs without alarm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lib.course.mistakes import GRPO, PPO, Mistake, put_back
from rlhf_lib.course.small import Small
from rlhf_lib.course.twins import triples
from rlhf_lib.proofs import plain
from rlhf_lib.proofs.plain import Settings
from rlhf_lib.review import doctor
from rlhf_lib.runtime import seed_everything
from rlhf_lib.settings import UserError

S = Settings(
    updates=5, batch_size=8, minibatch_size=8, group_size=4, max_new_tokens=12, learning_rate=2e-4
)
Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def findings(rows: Rows) -> set[str]:
    logs: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            logs.setdefault(key, []).append(float(value))
    arrays = {key: doctor.np.array(values) for key, values in logs.items()}
    return {found.name for look in doctor.LOOKS if (found := look(arrays))}


def ppo_log(
    small: Small, lib: Any = plain, s: Settings = S, start: Any = None, scored_at: float = 1.0
) -> Rows:
    """A log of PPO on bare torch, under TRL's names."""
    seed_everything(0)
    policy, value = start or small.policy(), small.scorer()
    others = small.reference(), small.gold, [p.ids for p in small.prompts], small.eos, s
    rows, of_loss = [], lib.ppo_loss
    ratios: list[torch.Tensor] = []

    def noted(policy: Any, value: Any, batch: Any, seen: Any, s: Settings) -> Any:
        with torch.no_grad():
            new = plain.logprobs(policy, batch, scored_at)
            ratios.append((new - seen.old).exp()[batch.mask.bool()])
        return of_loss(policy, value, batch, seen, s)

    lib.ppo_loss = noted
    try:
        for batch, seen in lib.ppo(policy, value, *others):
            mask, ratio = batch.mask.bool(), torch.cat(ratios)
            left = (seen.returns - seen.values)[mask].var() / seen.returns[mask].var()
            rows.append(
                {
                    "objective/kl": (seen.old - seen.ref).sum(1).mean(),
                    "entropy": -seen.old.sum() / batch.mask.sum(),
                    "val/ratio": ratio.mean(),
                    "policy/clipfrac_avg": ((ratio - 1).abs() > s.clip_range).float().mean(),
                    "val/explained_variance": 1 - left,
                    "completions/clipped_ratio": (batch.mask.sum(1) == s.max_new_tokens)
                    .float()
                    .mean(),
                }
            )
            ratios.clear()
    finally:
        lib.ppo_loss = of_loss
    return rows


def grpo_log(small: Small, reward: Callable, lib: Any = plain, s: Settings = S) -> Rows:
    seed_everything(0)
    s = s._replace(batch_size=4)
    others = small.reference(), reward, [p.ids for p in small.prompts], small.eos, s
    rows = []
    for batch, seen in lib.grpo(small.policy(), *others):
        silent = seen.earned.view(-1, s.group_size).std(1) == 0
        ended = (batch.ids[:, -batch.mask.shape[1] :] == small.eos).any(1)
        rows.append(
            {
                "frac_reward_zero_std": silent.float().mean(),
                "completions/clipped_ratio": (~ended).float().mean(),
                "kl": (seen.old - seen.ref).sum(1).mean(),
            }
        )
    return rows


def dpo_log(small: Small, s: Settings, reference: Any = None) -> Rows:
    seed_everything(0)
    pairs = triples(small.pairs[:32])
    steps = plain.dpo(small.policy(), reference or small.reference(), pairs, s)
    return [
        {
            "rewards/margins": (c - r).mean(),
            "loss": -torch.nn.functional.logsigmoid(c - r).mean(),
        }
        for _, (c, r) in steps
    ]


def length(batch: plain.Batch) -> torch.Tensor:
    return batch.mask.sum(1).float()


def test_clean_runs_raise_no_alarm(small: Small) -> None:
    s = S._replace(learning_rate=1e-4, max_new_tokens=24)
    assert findings(ppo_log(small, s=s)) <= {"a value model that predicts nothing"}  # a new head
    assert not findings(grpo_log(small, small.gold, s=s))
    assert not findings(dpo_log(small, s))


def test_a_log_ratio_that_is_turned_round_has_a_negative_kl(small: Small) -> None:
    right = "Experience(old, ref, earned, rewards, old_values, advantages, returns)"
    swapped = put_back(Mistake(right, right.replace("old, ref", "ref, old")))
    assert "negative KL" in findings(ppo_log(small, swapped, S._replace(updates=10)))


def test_a_reward_that_cannot_tell_replies_apart_leaves_groups_silent(small: Small) -> None:
    rows = grpo_log(small, lambda batch: torch.zeros(len(batch.ids)))
    assert "silent groups" in findings(rows)


def test_steps_that_are_far_too_large_collapse_the_entropy(small: Small) -> None:
    rows = ppo_log(small, s=S._replace(learning_rate=3e-2, kl_coef=0.0, updates=8))
    assert "collapsed entropy" in findings(rows)


def test_too_many_steps_on_few_pairs_explode_the_margins(small: Small) -> None:
    s = S._replace(updates=30, learning_rate=3e-3, beta=0.5)
    assert "exploding margins" in findings(dpo_log(small, s))


def test_another_reference_shows_in_the_first_loss(small: Small) -> None:
    other = small.policy()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert "a first DPO loss that is not ln 2" in findings(dpo_log(small, S, other))


def test_a_value_model_that_never_learns_predicts_nothing(small: Small) -> None:
    idle = put_back(Mistake("(0.5 * error - gain)", "(0.0 * error - gain)"))
    rows = ppo_log(small, idle, S._replace(updates=12))
    assert "a value model that predicts nothing" in findings(rows)


def test_another_temperature_shows_in_the_first_ratio(small: Small) -> None:
    hot = put_back(PPO["scored at another temperature"])
    assert "a ratio far from 1 at the first step" in findings(
        ppo_log(small, hot, scored_at=1.5)[:1]
    )


def test_an_end_that_is_masked_is_never_reached_again(small: Small) -> None:
    masked = put_back(GRPO["the end token is masked"])
    rows = grpo_log(small, length, masked, S._replace(updates=10, learning_rate=2e-3))
    assert "replies that do not end" in findings(rows)


def test_a_reward_far_outside_its_clip_is_found(tmp_path: Path) -> None:
    def log(given: float, learnt: float) -> list[str]:
        row = {"objective/scores": given, "objective/non_score_reward": -0.5}
        file = tmp_path / "metrics.jsonl"
        rows = [json.dumps(row | {"objective/rlhf_reward": learnt - 0.5})] * 4
        file.write_text("\n".join(rows), encoding="utf-8")
        return [finding.name for finding in doctor.examine(file)]

    assert log(given=-24.5, learnt=-5.0) == ["rewards that are cut"]
    assert not log(given=1.2, learnt=0.3)


def test_a_log_with_nan_names_metric_and_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"loss": 1.0}\n{"loss": NaN}\n', encoding="utf-8")
    (finding,) = doctor.examine(log)
    assert finding.name == "not a number"
    assert "loss: infinite or NaN from the 2. logged step on" in finding.seen


def test_trls_own_file_is_read(tmp_path: Path) -> None:
    state = tmp_path / "trainer_state.json"
    rows = [{"step": i, "entropy": 2.0 - 0.6 * i} for i in range(4)]
    state.write_text(json.dumps({"log_history": [*rows, {"train_loss": 0.1}]}), encoding="utf-8")
    assert [f.name for f in doctor.examine(state)] == ["collapsed entropy"]
    assert doctor.read(state)["entropy"].tolist() == pytest.approx([2.0, 1.4, 0.8, 0.2])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "{"),
        ("a.json", "[]"),
        ("a.json", "{}"),
        ("a.jsonl", '{"a": "b"}\n'),
        ("a", None),
    ],
)
def test_what_is_no_log_is_said(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"is no training log|logs none of what"):
        doctor.examine(tmp_path / name)


def test_the_text_names_finding_and_cause() -> None:
    said = doctor.as_text([doctor.Finding("silent groups", "60% are", "the reward is coarse")])
    assert said == "silent groups: 60% are.\n    Often because the reward is coarse."
    assert "no proof" in doctor.as_text([])
