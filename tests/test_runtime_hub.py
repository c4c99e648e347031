"""Whether the hub can be asked: the answer is quick, and says why not."""

from __future__ import annotations

import time

import pytest

from rlhf_lib import runtime


def test_offline_mode_is_named() -> None:
    assert runtime.unreachable() == "HF_HUB_OFFLINE is set"


def test_no_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    reason = runtime.unreachable()
    assert time.monotonic() - start < runtime.TIMEOUT + 1
    assert reason is not None
    assert reason.startswith("http://127.0.0.1:9 does not answer (")


def test_an_answer_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert timeout == runtime.TIMEOUT

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(runtime, "get_session", Session)
    assert runtime.unreachable() is None
