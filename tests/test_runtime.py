"""Device, precision, seeds, memory, progress and the snapshot of the environment."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
import transformers

from rlhf_lib import processes, runtime
from rlhf_lib.runtime import (
    choose_precision,
    environment,
    make_accelerator,
    peak_memory_gb,
    progress,
    reset_peak_memory,
    seed_everything,
    set_up_process,
)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says how it is on a CPU")


def test_a_precision_that_is_asked_for_is_taken() -> None:
    assert [choose_precision(p) for p in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.precision='fp8': choose auto, fp32, bf16, fp16"):
        choose_precision("fp8")


@pytest.mark.parametrize(
    ("gpu", "capability", "flags", "expected"),
    [
        (True, (7, 5), {"avx512_bf16"}, "fp16"),  # a T4 only emulates bf16
        (True, (8, 0), set(), "bf16"),
        (True, (9, 0), set(), "bf16"),
        (False, None, {"avx512_bf16"}, "bf16"),
        (False, None, {"avx2"}, "fp32"),
    ],
)
def test_the_precision_follows_the_device(
    gpu: bool, capability: tuple, flags: set, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(runtime, "_cpu_flags", lambda: flags)
    assert choose_precision("auto") == expected


def test_each_handle_has_its_own_precision() -> None:
    """A chapter's small model learns in fp32 beside its study's in another precision."""
    handles = {name: make_accelerator(name) for name in ("fp32", "bf16", "fp32")} | {
        "half": make_accelerator("bf16")
    }
    said = {name: handle.mixed_precision for name, handle in handles.items()}
    assert said == {"fp32": "no", "bf16": "bf16", "half": "bf16"}
    made = torch.ones(2, 2)
    for name, handle in handles.items():
        with handle.autocast():
            dtype = (made @ made).dtype
        assert dtype == (torch.float32 if name == "fp32" else torch.bfloat16), name


def test_seeding_reaches_all_generators() -> None:
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(4)
    first = draw()
    seed_everything(4)
    assert draw() == first
    seed_everything(5)
    assert not set(draw()) & set(first)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What `torch.set_num_threads` is called with, on a machine with six cores."""
    wanted: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", wanted.append)
    monkeypatch.delenv("RLHF_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 6)
    return wanted


def test_threads_from_the_environment_win(
    threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_process()
    set_up_process(2)
    monkeypatch.setenv("RLHF_THREADS", "3")
    set_up_process(2)
    assert threads == [6, 2, 3]
    monkeypatch.delenv("RLHF_THREADS")
    monkeypatch.setattr(processes, "neighbours", 2)
    set_up_process()
    assert threads[3:] == [3], "the cores are shared out among processes started together"


def test_a_system_that_cannot_count_its_cores_gets_one_thread(
    threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    set_up_process()
    assert threads == [1]


def test_a_process_of_ours_is_quiet(threads: list[int]) -> None:
    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_warning()
        set_up_process()
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
        assert not transformers.logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled()
    finally:
        transformers.logging.set_verbosity(before)


@no_gpu
def test_peak_memory_sees_what_was_given_back_and_can_be_reset() -> None:
    runtime._keep_freed_memory()
    reset_peak_memory()
    before = peak_memory_gb()
    assert before < 0.01, "what there was at the start is not in it"
    block = torch.ones(75_000_000)  # 0.3 GB
    time.sleep(4 * runtime._MemorySampler.interval)
    del block
    assert before + 0.25 < peak_memory_gb() < before + 0.4
    reset_peak_memory()
    assert peak_memory_gb() < before + 0.1


@no_gpu
@pytest.mark.skipif(not hasattr(runtime._glibc(), "mallinfo2"), reason="asks glibc 2.33 or later")
def test_peak_memory_leaves_out_what_the_process_keeps_of_freed_memory() -> None:
    runtime._keep_freed_memory()
    reset_peak_memory()
    blocks = [torch.ones(5_000_000) for _ in range(40)]  # 0.8 GB
    time.sleep(4 * runtime._MemorySampler.interval)
    del blocks[::2]  # holes in which nothing larger fits
    blocks += [torch.ones(10_000_000) for _ in range(10)]  # 0.4 GB
    time.sleep(4 * runtime._MemorySampler.interval)
    assert 0.75 < peak_memory_gb() < 0.95


@no_gpu
def test_a_look_from_before_a_reset_is_not_noted_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's thread may be slow to hear what is allocated; a new stage begins meanwhile."""
    sampler, asked, answer = runtime._MemorySampler(), threading.Event(), threading.Event()

    def allocated() -> int:
        if threading.current_thread() is threading.main_thread():
            return 5
        asked.set()
        answer.wait(5)
        return 9

    monkeypatch.setattr(runtime, "_allocated", allocated)
    monkeypatch.setattr(runtime._MemorySampler, "interval", 100.0)  # it looks once
    sampler.reset()
    asked.wait(5)
    threading.Timer(0.3, answer.set).start()
    sampler.reset()  # waits for that look, and begins anew
    time.sleep(0.2)
    assert (sampler.start, sampler.peak) == (5, 5)


@no_gpu
def test_peak_memory_is_what_is_resident_where_malloc_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_glibc", SimpleNamespace)
    resident = psutil.Process().memory_info().rss
    assert runtime._allocated() == pytest.approx(resident, rel=0.05)


@pytest.mark.parametrize("library", [("", ""), ("musl", "1.2"), ("libc", "2.0")])
def test_memory_of_other_c_libraries_is_left_as_it_is(
    library: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: library)
    monkeypatch.setattr(runtime.ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(runtime, "_glibc", runtime._glibc.__wrapped__)  # not the one remembered
    runtime._keep_freed_memory()
    reset_peak_memory()
    assert not loaded


def test_progress_yields_everything_and_is_silent_in_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_BATCH", "1")
    assert list(progress(range(2, 5), "stage", total=5, done=2)) == [2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_progress_draws_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RLHF_BATCH", raising=False)
    monkeypatch.delitem(runtime.sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(runtime.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(range(2, 5), "stage", total=5, done=2)) == [2, 3, 4]
    drawn = capsys.readouterr().err
    assert "stage" in drawn
    assert "5/5" in drawn


def test_the_environment_is_json_and_names_no_place() -> None:
    snapshot = environment()
    assert snapshot["cpu"]
    text = json.dumps(snapshot)
    assert snapshot["packages"]["torch"] == torch.__version__
    assert snapshot["threads"] == torch.get_num_threads()
    assert runtime.platform.node() not in text
    assert "/" not in text


def test_missing_data_names_the_rebuild_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "rlhf_lib" / "runtime.py"))
    with pytest.raises(FileNotFoundError, match=r"python -m tools\.build_world"):
        runtime.bundled_folder()


@pytest.mark.parametrize(
    ("built", "said"), [(None, "this torch was built for CPUs"), ("13.0", "`nvidia-smi`")]
)
def test_it_is_said_why_no_gpu_is_seen(
    built: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert runtime.no_gpu().startswith("No GPU is seen: ")
    assert said in runtime.no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.no_gpu() == ""
