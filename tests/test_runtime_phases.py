"""Where time goes: phases within phases add up, and an error closes what it leaves."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_lib import runtime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test moves, and no time spent yet."""
    now = [100.0]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(runtime.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "_seconds", Counter())
    monkeypatch.setattr(runtime, "_open", [])
    monkeypatch.setattr(runtime, "_since", 0.0)
    return now


def test_what_an_inner_phase_takes_is_its_own(clock: list[float]) -> None:
    with runtime.phase("update"):
        clock[0] += 1
        with runtime.phase("scoring"):
            clock[0] += 10
        clock[0] += 2
    clock[0] += 100  # in no phase
    with runtime.phase("update"):
        clock[0] += 4
    assert runtime.phase_seconds() == {"update": 7, "scoring": 10}


def test_an_error_closes_its_phase(clock: list[float]) -> None:
    @runtime.phase("scoring")
    def fail() -> None:
        clock[0] += 3
        raise ValueError("broken")

    with runtime.phase("update"):
        with pytest.raises(ValueError, match="broken"):
            fail()
        clock[0] += 5
    clock[0] += 100
    assert runtime.phase_seconds() == {"scoring": 3, "update": 5}
