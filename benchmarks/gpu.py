"""What only a GPU can show, in ten minutes: `python -m benchmarks gpu`, or `benchmarks/gpu.sh`.

Every part is a process of its own under a time limit, and writes what it found as it goes: a run
that is cut off loses nothing. Parts that ask whether something works go together; those that are
timed go alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.predict import predict
from rlhf_lib.runtime import environment

TRAINED = "sft,reward_model,dpo,grpo"
COMPARED = "compare"  # beside TRL: `python -m benchmarks run`
# What goes together, and the seconds that it is given at most.
GROUPS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("passes", "smoke-fp16", "smoke-bf16", "t4-fp16", "t4-bf16"), 150),
    (("resume",), 60),
    ((COMPARED,), 360),
    (("decoding",), 120),
)


def run(
    folder: Path, minutes: float, small: bool, say: Callable[[str], None],
    only: Sequence[str] = (), peer_python: str = sys.executable,
) -> dict:  # fmt: skip
    """All parts, or `only` some; `{"environment", "small", "parts": {name: what it found}}`."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes
    for names, limit in GROUPS:
        commands = {
            name: part_command(name, folder, small, peer_python)
            for name in names if not only or name in only
        }  # fmt: skip
        together(commands, folder, min(limit, ends - time.monotonic()), say)
        write(folder, small)
    return write(folder, small)


def part_command(name: str, folder: Path, small: bool, peer_python: str) -> list[str]:
    if name == COMPARED:
        return compare_command(folder, small, peer_python)
    command = [sys.executable, "-m", "benchmarks.gpu_part", name, str(folder)]
    return [*command, "small"] if small else command


def compare_command(folder: Path, small: bool, peer_python: str) -> list[str]:
    sizes = ["--rounds", "2", "--pairs", "8", "--samples", "16"] if small else [
        "--rounds", "2", "--pairs", "64", "--samples", "32"
    ]  # fmt: skip
    return [
        sys.executable, "-m", "benchmarks", "run", "--model", "random", "--only", TRAINED,
        "--processes", "2",
        "--peer-python", peer_python, "--out", str(folder / f"{COMPARED}.json"), *sizes,
    ]  # fmt: skip


def together(
    commands: dict[str, list[str]], folder: Path, seconds: float, say: Callable[[str], None]
) -> None:
    """Run these at once, each with a log beside its record, until all are done or time is up."""
    began = time.monotonic()
    running = {}
    for name, command in commands.items():
        log = open(folder / f"{name}.log", "w")  # noqa: SIM115  closed with its process
        running[name] = subprocess.Popen(command, stdout=log, stderr=log), log
    for name, (process, log) in running.items():
        try:
            end = process.wait(max(0.0, seconds - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            end = f"stopped after {time.monotonic() - began:.0f} s"
        log.close()
        say(f"{name}: {end or 'done'}, {time.monotonic() - began:.0f} s")
        (folder / f"{name}.end").write_text(str(end or "done"))


def write(folder: Path, small: bool) -> dict:
    """`gpu.json`: what the parts have written up to now."""
    parts = {}
    for path in sorted(folder.glob("*.end")):
        record = path.with_suffix(".json")
        found = json.loads(record.read_text()) if record.exists() else {}
        parts[path.stem] = {"end": path.read_text(), **found}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"gpu": name, "small": small, "environment": environment(), "parts": parts}
    if "stages" in (compared := parts.get(COMPARED, {})):
        found["t4"] = predict(compared, "t4")
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return found
