"""States of a stage under way: where they lie, what they cost, and what fits on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf_lib import checkpoints, files
from rlhf_lib.checkpoints import Checkpoints
from rlhf_lib.methods.learner import Learner
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import UserError


@pytest.fixture
def accelerator(make_model: Callable) -> Accelerator:
    """One that has prepared a small model, its optimizer and its schedule."""
    handle = make_accelerator("fp32")
    Learner(handle, make_model("gpt2"), learning_rate=1e-2, steps=5)
    return handle


def test_states_are_written_in_turn_and_nothing_large_is_thrown_away(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    """A drive keeps what is deleted or replaced, and counts it."""
    states = Checkpoints(tmp_path, 0)
    for step in (1, 2):
        states.save(accelerator, {"step": step})
    with ExitStack() as stack:
        paths = [path for slot in states.slots for path in slot.iterdir()]
        old = [stack.enter_context(open(path, "rb")) for path in paths]
        for step in (3, 4, 5):
            states.save(accelerator, {"step": step})
        for path, file in zip(paths, old, strict=True):
            kept = os.fstat(file.fileno())
            assert kept.st_ino == path.stat().st_ino or kept.st_size < 3000, path
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-a", "checkpoint-b"}
    found = states.restore(accelerator)
    assert found is not None
    assert found["step"] == 5


def test_saving_keeps_to_its_share_of_the_time(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: clock.now)
    write, saved = checkpoints._write, 0.0

    def slow(*of: object) -> None:
        nonlocal saved
        clock.now += 30
        saved += 30
        write(*of)

    monkeypatch.setattr(checkpoints, "_write", slow)
    states = Checkpoints(tmp_path, minutes=2)
    times = []
    for second in range(2 * 3600):
        clock.now = max(clock.now, float(second))
        if states.due:
            times.append(clock.now)
            states.save(accelerator, {"step": second})
    assert times[0] == 120, "what a state costs is not known yet"
    assert all(later - earlier == 600 for earlier, later in pairwise(times))
    assert saved / clock.now <= checkpoints.SHARE + 30 / 7200, "the first one came early"
    assert not Checkpoints(tmp_path, minutes=2).due
    assert Checkpoints(tmp_path, minutes=0).due


def test_a_disk_too_small_is_said_before_the_first_step(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerator._custom_objects[0].model
    weights = sum(w.numel() for w in model.parameters())
    needed = 4 * weights * (1 + 2 * 3)  # the model, and two states of weights and two moments
    states = Checkpoints(tmp_path, 0)
    monkeypatch.setattr(files, "free_space", lambda folder: needed)
    states.check_space(accelerator)
    monkeypatch.setattr(files, "free_space", lambda folder: needed - 1)
    with pytest.raises(UserError, match=r"GB are free where .* make room, or choose another place"):
        states.check_space(accelerator)
    states.save(accelerator, {"step": 1})  # what is overwritten needs no room
    states.check_space(accelerator)


def test_a_state_that_cannot_be_written_is_the_disk_s_fault(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object) -> None:
        raise SafetensorError("Error while serializing: I/O error")

    states = Checkpoints(tmp_path, 0)
    for step in (1, 2):
        states.save(accelerator, {"step": step})
    monkeypatch.setattr(checkpoints, "_write", fail)
    with pytest.raises(OSError, match="Input/output error: Error while serializing") as lost:
        states.save(accelerator, {"step": 3})
    assert lost.value.errno == errno.EIO
    monkeypatch.setattr(files, "free_space", lambda folder: 100)
    with pytest.raises(OSError, match="No space left on device") as full:
        states.save(accelerator, {"step": 3})
    assert full.value.errno == errno.ENOSPC
    found = states.restore(accelerator)
    assert found is not None
    assert found["step"] == 2, "the newer of the two stays"


@pytest.mark.parametrize("change", [("2", "6"), ('"seconds"', '"secondz"'), ("a1", "a2")])
def test_a_record_with_one_sign_changed_is_passed_over(
    change: tuple[str, str],
    accelerator: Accelerator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A step that is another's would leave out, or repeat, what lies between."""
    states = Checkpoints(tmp_path, 0)
    for step in (1, 2):
        states.save(accelerator, {"step": step, "seconds": 0.5, "note": "a1"})
    record = states.slots[1] / "progress.json"
    record.write_text(record.read_text().replace(*change))
    found = states.restore(accelerator)
    assert found is not None
    assert found["step"] == 1
    assert "checkpoint-b/progress.json is not what was saved" in caplog.text


def test_an_unreadable_record_counts_as_none(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = Checkpoints(tmp_path, 0)
    states.save(accelerator, {"step": 1})
    os.truncate(states.slots[0] / "progress.json", 5)
    assert states.restore(accelerator) is None
    assert "progress.json is not what was saved" in caplog.text
    states.discard()
    assert not list(tmp_path.iterdir())
