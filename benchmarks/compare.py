"""The driver: library and peer in turn, A B A B, stage by stage; one computes, the other waits."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks import ratios, roof
from benchmarks.job import Job
from benchmarks.protocol import Worker
from rlhf_lib.runtime import environment

ROOT = Path(__file__).resolve().parent.parent
# The first touch of memory is slow (a fifth of a round of SFT; the second round is as fast as the
# third); a GPU looks for kernels at each new shape.
WARM_UP = 3 if torch.cuda.is_available() else 1
PEERS = {
    **dict.fromkeys(("sft", "reward_model", "dpo", "grpo"), "TRL"),
    **dict.fromkeys(("ppo", "dpo_plain", "grpo_plain"), "bare torch"),
    "generation": "transformers",
}
# what results do not say of a job: paths, texts, and what no side is measured by
UNSAID = {"model", "reward_model", "sizes", "rows", "prompt_texts"}
UNSAID |= {"kl_coef", "beta", "learning_rate"}


def run_rounds(
    commands: Mapping[str, Sequence[str]], rounds: int, processes: int, say: Callable[[str], None]
) -> dict[str, list[dict]]:
    """Rounds of both in turn, the first WARM_UP of each left out: `{"library": [...], ...}`.

    All of it `processes` times, each time with two new processes: where a process puts its memory
    moves its speed for as long as it lives, so rounds of one pair are no independent measurements.
    Nothing goes to the network: models are folders, and the hub's client is told to stay offline.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": search}
    found: dict[str, list[dict]] = {name: [] for name in commands}
    for process in range(processes):
        # both load at once; only then does one compute while the other waits
        library, peer = Worker(commands["library"], settings), Worker(commands["peer"], settings)
        with library, peer:
            for number in range(WARM_UP + rounds):
                for name, worker in (("library", library), ("peer", peer)):
                    record = worker.ask(number)
                    rate = record["items"] / record["seconds"]
                    note = " (warm-up)" if number < WARM_UP else ""
                    say(
                        f"  processes {process + 1}/{processes}, round {number}, {name}: "
                        f"{record['seconds']:.1f} s, {rate:.2f} items/s{note}"
                    )
                    if number >= WARM_UP:
                        found[name].append(record | {"process": process})
    return found


def benchmark(
    job: Job,
    path: Path,
    stages: Sequence[str],
    rounds: int,
    processes: int,
    peer_python: str,
    say: Callable[[str], None],
    keep: Callable[[dict], None],
) -> None:
    """Compare stage by stage. The job is written to `path`.

    `keep` is given all that was measured, as JSON values, after each stage: a run that is cut off
    loses one at most.
    """
    job.write(path)
    say(f"measuring the matmul roof ({job.precision}) ...")
    limit = roof.measure(AutoConfig.from_pretrained(job.model), job.precision)
    say(f"  {limit['flops_per_second'] / 1e9:.0f} GFLOP/s")
    found: dict[str, dict] = {}
    results = {
        "environment": environment(),
        "peer_packages": peer_packages(peer_python),
        "settings": settings(job, rounds) | {"processes": processes},
        "roof": limit,
        "stages": found,
    }
    for stage in stages:
        say(f"{stage}: this library and {PEERS[stage]}")
        commands = {
            "library": [sys.executable, "-m", "benchmarks.library_worker", str(path), stage],
            "peer": [peer_python, "-m", "benchmarks.peer_worker", str(path), stage],
        }
        sides = run_rounds(commands, rounds, processes, say)
        record = ratios.compare(sides["library"], sides["peer"], limit["flops_per_second"])
        found[stage] = {"peer_name": PEERS[stage], **record}
        keep(results)


def settings(job: Job, rounds: int) -> dict:
    """What was measured, without paths and without text."""
    count = len(job.rows)
    return {
        **{name: value for name, value in vars(job).items() if name not in UNSAID},
        "rounds": rounds,
        "rows": count,
        "pairs": len(job.batches("dpo")) * job.batch_size,
        "mean_tokens": {
            side: sum(len(getattr(row, side)) for row in job.rows) / count
            for side in ("prompt", "chosen", "rejected")
        },
        "trunk_weights": job.sizes.trunk,
        "head_weights": job.sizes.head,
    }


def peer_packages(python: str) -> dict[str, str]:
    """Versions that the peer ran with, asked of its own interpreter."""
    names = ("torch", "transformers", "accelerate", "trl")
    if python == sys.executable:
        return {name: importlib.metadata.version(name) for name in names}
    code = "import importlib.metadata as m, sys\nfor n in sys.argv[1:]: print(n, m.version(n))"
    output = subprocess.run(
        [python, "-c", code, *names], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split() for line in output.splitlines())
