"""The running spread of rewards."""

from __future__ import annotations

import pytest
import torch

from rlhf_lib.objectives.masked import RunningScale


def test_the_running_spread_is_that_of_everything_seen() -> None:
    batches = [torch.randn(5) * 3 + 2, torch.randn(1), torch.randn(4, 8) * 0.1 - 7]
    scale = RunningScale()
    for batch in batches:
        scale.update(batch)
    everything = torch.cat([b.flatten() for b in batches])
    assert scale.std == pytest.approx(everything.std().item(), rel=1e-5)
    assert scale.mean == pytest.approx(everything.mean().item(), rel=1e-5)


def test_the_spread_is_one_until_two_rewards_differ() -> None:
    scale = RunningScale()
    assert scale.std == 1.0
    for _ in range(2):
        scale.update(torch.tensor([3.0]))
        assert scale.std == 1.0
    scale.update(torch.tensor([6.0]))
    assert scale.std == pytest.approx(3**0.5)


def test_its_state_survives_a_checkpoint() -> None:
    scale, again = RunningScale(), RunningScale()
    scale.update(torch.tensor([1.0, 5.0]))
    again.load_state_dict(scale.state_dict())
    for one in (scale, again):
        one.update(torch.tensor([2.0]))
    assert (again.std, again.mean, again.count) == (scale.std, scale.mean, 3)
