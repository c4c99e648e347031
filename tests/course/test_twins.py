"""One update of both: the same weights, unless one of the two is another method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf_lib.course import mistakes, twins
from rlhf_lib.course.small import Small
from rlhf_lib.proofs import plain
from rlhf_lib.proofs.plain import Settings
from rlhf_lib.runtime import seed_everything

S = Settings(batch_size=8, group_size=4, max_new_tokens=16)


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


@pytest.fixture(scope="module")
def update(small: Small) -> Callable[[str], twins.Both]:
    """`update("ppo")`: one update of a method by both."""
    seed_everything(0)
    policy, reference, asked = small.policy(), small.reference(), [p.ids for p in small.prompts]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # the KL is not 0
    batch = plain.sample(policy, asked[:8], small.eos, S)
    groups = plain.sample(policy, [a for a in asked[:2] for _ in range(4)], small.eos, S)
    made: dict[str, Callable[[], twins.Both]] = {
        "sft": lambda: twins.sft(policy, small.demonstrations[:8], S),
        "reward_model": lambda: twins.reward_model(small.scorer(), small.pairs[:8], S),
        "ppo": lambda: twins.ppo(policy, small.scorer(), reference, batch, small.gold(batch), S),
        "grpo": lambda: twins.grpo(policy, reference, groups, small.gold(groups), S),
        "dpo": lambda: twins.dpo(policy, reference, small.pairs[:8], S),
    }
    return lambda name: made[name]()


BROKEN = {
    "sft": mistakes.SFT["the end is not learnt"],
    "reward_model": mistakes.REWARD_MODEL["the labels are turned round"],
    "ppo": mistakes.PPO["the KL's sign is turned"],
    "grpo": mistakes.GRPO["compared with all, not with the group"],
    "dpo": mistakes.DPO["log-probs are averaged"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_both_end_at_the_same_weights(name: str, update: Callable) -> None:
    both = update(name)
    assert both.moved > 0.1
    assert both.same, both


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_in_one_of_the_two_is_seen(
    name: str, update: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "plain", mistakes.put_back(BROKEN[name]))
    assert not update(name).same
