"""CPU-seconds of a fixed list of stages, by one code and by another.

    python -m benchmarks.stages BEFORE AFTER [--profile laptop] [--seed 1] [--only sft,ppo ...]

BEFORE and AFTER are checkouts of this repository. Both run side by side, each in a process of its
own with one thread, so that what else a machine does slows both down alike; a stage is named when
both have ended it. The ratio is of user and system time together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.text import stages_summary
from rlhf_lib.runtime import environment

STAGES = "sft,reward_model,ppo,grpo,dpo,rejection_sft,evaluate"  # of a further seed, in order
CODE = """
import json, os, sys
from rlhf_lib.study.stages import Study
profile, seed, folder, names, overrides = sys.argv[1:]
for name in names.split(","):
    before = os.times()
    Study.open(profile, int(seed), folder, overrides).stage(name)
    after = os.times()
    spent = after.user + after.system - before.user - before.system
    print(json.dumps({"stage": name, "seconds": spent}), flush=True)
"""


def main(
    before: Path,
    after: Path,
    profile: str = "laptop",
    seed: int = 1,
    only: str = STAGES,
    overrides: Annotated[str, typer.Option("--set", help="settings of both")] = "",
    out: Path = Path("benchmarks/results/stages.json"),
) -> None:
    """Run the stages by both codes, and write how many CPU-seconds each has taken."""
    results = {
        "profile": profile, "seed": seed, "environment": environment(),
        "commits": [commit_of(code) for code in (before, after)],
        "cpu_seconds": (found := [{}, {}]),
    }  # fmt: skip
    asked = profile, str(seed), only, overrides
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = [
            stack.enter_context(started(code, f"{folder}/{way}", *asked))
            for way, code in (("before", before), ("after", after))
        ]
        for name in only.split(","):
            for process, seconds in zip(running, found, strict=True):
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{name} ended with {process.wait()}: see above")
                seconds[name] = json.loads(line)["seconds"]
            out.write_text(json.dumps(results, indent=1) + "\n")  # a run that is cut off keeps it
            print(f"{name}: {found[0][name]:.0f} s, {found[1][name]:.0f} s", flush=True)
    print(stages_summary(results))


@contextmanager
def started(
    code: Path, folder: str, profile: str, seed: str, names: str, overrides: str
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs these stages by one code; leaving ends it."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE, profile, seed, folder, names, overrides],
        cwd=code, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(code.resolve()), "RLHF_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def commit_of(code: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    typer.run(main)
