"""What asks a GPU: parts that go together under a limit, and what is said of what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import gpu, text


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_is_cut_off_keeps_what_it_wrote(tmp_path: Path) -> None:
    slow = tmp_path / "slow.json"
    write = f"import pathlib, time; pathlib.Path({str(slow)!r}).write_text('{{\"sft\": 1}}')"
    commands = {
        "slow": command(f"{write}; time.sleep(60)"),
        "quick": command("print('said')"),
        "wrong": command("raise SystemExit(3)"),
    }
    said: list[str] = []
    gpu.together(commands, tmp_path, 3.0, said.append)
    parts = gpu.write(tmp_path, small=True)["parts"]
    assert parts["slow"]["sft"] == 1
    assert parts["slow"]["end"].startswith("stopped after 3")
    assert parts["quick"] == {"end": "done"}
    assert parts["wrong"] == {"end": "3"}
    assert (tmp_path / "quick.log").read_text() == "said\n"
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"] == parts
    assert len(said) == 3


def test_what_a_gpu_showed_is_told_failures_first_of_all() -> None:
    good = {"not_finite": [], "skipped": 1.0, "peak_memory_gb": 4.25, "steps": 3}
    found = {
        "gpu": "A card",
        "environment": {"packages": {"torch": "2", "transformers": "5"}},
        "parts": {
            "smoke-fp16": {"end": "done", "sft": good, "ppo": {"error": "no"}},
            "smoke-bf16": {"end": "done", "sft": good | {"not_finite": ["kl"]}},
            "resume": {"killed_at_step": 1, "largest_difference_of_weights": 0.5},
            "t4-fp16": {"end": "done", "sft": good, "ppo": {"error": "out of memory"}},
            "decoding": {"8 rows, library": {"first_seconds": 1.0, "tokens_per_second": [5, 7]}},
        },
    }
    said = text.summary(found)
    assert "`smoke-fp16`: 1 of 2 stages ended (not ppo); all numbers finite; 1 steps" in said
    assert "numbers that are not finite in sft" in said
    assert "resumed: its weights differ from those of the run that nothing stopped by 0.5." in said
    assert "| sft | 4.2 | – | 3 | 1 |" in said
    assert "| 8 | library | 6 | 5 | 7 | 1.0 |" in said


def test_gradients_are_told_of_passes_that_were_recorded() -> None:
    """Two plain passes agree as well, and say nothing of recording."""
    found = {"largest_difference": 0.0, "largest_gradient": 4.5}
    part = {"end": "done", "fp32": {"recordings": 2, **found}, "bf16": {"recordings": 0, **found}}
    (said,) = text._passes(part)
    assert said.endswith("by at most 0 of 4.5 in fp32.")
    assert text._passes({"bf16": part["bf16"]}) == []
