"""How a whole study grows with its seeds and jobs: wall time and memory.

    python -m benchmarks.studies [--profile smoke] [--seeds 1,2,5] [--jobs 1,2]

Each case is the command that people run, in a folder of its own, with notebooks and report. Memory
is the highest sum of what its processes hold by themselves, looked at ten times a second: what they
share is left out, where the system says it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.text import studies_summary
from rlhf_lib.runtime import environment

PAUSE = 0.1  # seconds between two looks


def main(
    profile: str = "smoke",
    seeds: str = "1,2,5",
    jobs: str = "1,2",
    overrides: Annotated[str, typer.Option("--set", help="settings of all")] = "",
    out: Path = Path("benchmarks/results/studies.json"),
) -> None:
    """Run the study for each number of seeds and of jobs, and write what each took."""
    cases: list[dict] = []
    found = {"profile": profile, "environment": environment(), "studies": cases}
    for count in map(int, seeds.split(",")):
        for at_once in map(int, jobs.split(",")):
            settings = [*shlex.split(overrides), f"seeds={count}", f"jobs={at_once}"]
            asked = [part for setting in settings for part in ("--set", setting)]
            command = [sys.executable, "-m", "rlhf_lib", "run", "--profile", profile, *asked]
            with tempfile.TemporaryDirectory() as folder:
                seconds, peak = watched([*command, "--run-dir", folder])
            cases.append({"seeds": count, "jobs": at_once, "seconds": seconds, "peak_gb": peak})
            out.write_text(json.dumps(found, indent=1) + "\n")  # a run that is cut off keeps it
            print(f"{count} seeds, {at_once} at once: {seconds:.0f} s, {peak:.1f} GB", flush=True)
    print(studies_summary(found))


def watched(command: Sequence[str]) -> tuple[float, float]:
    """Seconds that a command takes, and the highest memory of it and its children, in GB.

    Raises SystemExit where it fails.
    """
    began, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        family = [watching := psutil.Process(process.pid)]
        try:
            while process.poll() is None:
                family = [watching, *watching.children(recursive=True)]
                peak = max(peak, sum(map(own_memory, family)) / 1e9)
                time.sleep(PAUSE)
        finally:
            for one in family:  # a study that is interrupted leaves nobody behind
                with suppress(psutil.NoSuchProcess):
                    one.kill()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}: see above")
    return time.monotonic() - began, peak


def own_memory(process: psutil.Process) -> int:
    """Bytes that are resident and of no file and no shared memory; 0 for one that has ended.

    Not what psutil calls `uss`: the system counts that page by page, and ten looks a second at some
    GB took a third of a core from what was measured.
    """
    try:
        found = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return found.rss - getattr(found, "shared", 0)  # Linux alone says it


if __name__ == "__main__":
    typer.run(main)
