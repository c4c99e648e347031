"""One update of both: the same weights, unless one of the two is another method."""

from __future__ import annotations

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


def updates(small: Small) -> dict[str, twins.Both]:
    """One update of each method by both."""
    seed_everything(0)
    policy, reference, asked = small.policy(), small.reference(), [p.ids for p in small.prompts]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # the KL is not 0
    batch = plain.sample(policy, asked[:8], small.eos, S)
    groups = plain.sample(policy, [a for a in asked[:2] for _ in range(4)], small.eos, S)
    return {
        "sft": twins.sft(policy, small.demonstrations[:8], S),
        "reward_model": twins.reward_model(small.scorer(), small.pairs[:8], S),
        "ppo": twins.ppo(policy, small.scorer(), reference, batch, small.gold(batch), S),
        "grpo": twins.grpo(policy, reference, groups, small.gold(groups), S),
        "dpo": twins.dpo(policy, reference, small.pairs[:8], S),
    }


def test_all_five_methods_end_at_the_same_weights(small: Small) -> None:
    for name, both in updates(small).items():
        assert both.moved > 0.1, name
        assert both.same, (name, both)


BROKEN = {
    "sft": mistakes.SFT["the end is not learnt"],
    "reward_model": mistakes.REWARD_MODEL["the labels are turned round"],
    "ppo": mistakes.PPO["the KL's sign is turned"],
    "grpo": mistakes.GRPO["compared with all, not with the group"],
    "dpo": mistakes.DPO["log-probs are averaged"],
}


def test_a_mistake_in_one_of_the_two_is_seen(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mistake in BROKEN.items():
        with monkeypatch.context() as patch:
            patch.setattr(twins, "plain", mistakes.put_back(mistake))
            assert not updates(small)[name].same, name
