"""Who does the jobs: a study's stages in order, by two processes, on Ray, and by two together.

    python -m benchmarks.engines [--profile smoke] [--seeds 2]     measured, on this machine
    python -m benchmarks.engines estimate                         on paper, for eight GPUs

Measured are the stages alone, without notebooks and report, each way in a folder of its own. The
estimate takes the rates that a GPU was measured at, divides what one stage computes among eight
(and adds the time in which gradients travel), or gives each of eight workers a stage at a time, in
the order of the plan. It knows nothing of batches that are too small to fill a card.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.predict import gpt2_sizes, predict
from benchmarks.studies import watched
from benchmarks.text import engines_summary
from rlhf_lib import catalogue
from rlhf_lib.files import write_json
from rlhf_lib.pools import worker_pool
from rlhf_lib.profiles import load_profile
from rlhf_lib.runtime import environment
from rlhf_lib.settings import Profile
from rlhf_lib.show.display import markdown
from rlhf_lib.show.tables import table_of
from rlhf_lib.study import schedule
from rlhf_lib.study.schedule import plan

app = typer.Typer(add_completion=False)
ALONE = sys.executable, "-m"
TOGETHER = *ALONE, "torch.distributed.run", "--nproc_per_node", "2", "-m"
# what it is called -> how this module is started, and the settings
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "in order": (ALONE, ("jobs=1",)),
    "two processes side by side": (ALONE, ("jobs=2",)),
    "Ray, one worker": (ALONE, ("jobs=1", "engine=ray")),
    "Ray, two workers": (ALONE, ("jobs=2", "engine=ray")),
    "two processes together (torchrun)": (TOGETHER, ("jobs=1",)),
}
GPUS, PAIRS = 8, 160_000
# bytes a second in one direction between two H200 (NVIDIA's data sheet: NVLink, 900 GB/s both ways)
LINK = 450e9
BYTES = 4  # of a gradient's number


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    profile: str = "smoke",
    seeds: int = 2,
    overrides: Annotated[str, typer.Option("--set", help="settings of all")] = "",
    out: Path = Path("benchmarks/results/engines.json"),
) -> None:
    """Run the stages of a study each way, and write what each took."""
    if context.invoked_subcommand:
        return
    ways: list[dict[str, Any]] = []
    found = {"profile": profile, "seeds": seeds, "environment": environment(), "ways": ways}
    for name, (how, settings) in WAYS.items():
        given = " ".join([*overrides.split(), f"seeds={seeds}", *settings])
        with tempfile.TemporaryDirectory() as folder:
            asked = [*how, "benchmarks.engines", "stages", profile, folder, given]
            seconds, peak = watched(asked)
        ways.append({"way": name, "seconds": seconds, "peak_gb": peak})
        write_json(out, found)  # a run that is cut off keeps it
        print(f"{name}: {seconds:.0f} s, {peak:.1f} GB", flush=True)
    print(engines_summary(found))


@app.command()
def stages(profile: str, folder: Path, overrides: str) -> None:
    """The stages of a study, in this process and its workers."""
    from rlhf_lib import processes

    processes.begin()
    given = overrides.split()
    chosen = catalogue.load(profile, given)
    jobs = [job for job in plan(chosen) if job.kind == "stage"]
    with worker_pool(chosen) as (pool, workers):
        schedule._run_jobs(pool, workers, jobs, profile, folder, given)


@app.command()
def estimate(measured: Path = Path("benchmarks/results/gpu.json")) -> None:
    """Hours of `full` on 160,000 pairs, on one such GPU and on eight, on paper."""
    print(on_paper(json.loads(measured.read_text(encoding="utf-8"))))


def on_paper(measured: Mapping[str, Any]) -> str:
    rates = measured["parts"]["compare"] if "parts" in measured else measured
    overrides = [f"data.train_pairs={PAIRS}", f"data.demonstrations={PAIRS}", "seeds=5"]
    profile = load_profile("full", overrides)
    hours = by_stage(predict(rates, "full", overrides)["stages"])
    columns = [
        ("study", lambda row: row[0]),
        ("one GPU", lambda row: f"{row[1]:.1f} h"),
        ("eight together (torchrun)", lambda row: f"{row[2]:.1f} h"),
        ("eight workers (Ray)", lambda row: f"{row[3]:.1f} h"),
    ]
    rows = []
    for name, count in (("one seed", 1), ("five seeds", 5)):
        jobs = [j for j in plan(load_profile("full", [*overrides, f"seeds={count}"]))
                if j.kind == "stage"]  # fmt: skip
        needed = sum(hours.get(job.name, 0.0) for job in jobs)
        together = sum(shared_out(profile, job.name, hours) for job in jobs)
        rows.append((name, needed, together, side_by_side(jobs, hours, GPUS)))
    gpu = rates["environment"]["gpu"]
    return (
        f"On paper, from the rates measured on one {gpu}: GPT-2, profile `full` on {PAIRS:,} pairs,"
        f" stages without notebooks and report. Together: work divided by {GPUS}, and gradients "
        f"that travel at {LINK / 1e9:.0f} GB/s after each step; nothing is lost to small batches."
        f"\n\n{markdown(table_of(rows, columns))}"
    )


def by_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Hours of each stage, its parts together; a part without a measured rate counts nothing."""
    hours: dict[str, float] = {}
    for row in rows:
        name = row["stage"].partition(":")[0]
        hours[name] = hours.get(name, 0.0) + (row["hours"] or 0.0)
    return hours


def shared_out(profile: Profile, stage: str, hours: Mapping[str, float]) -> float:
    """Hours of a stage that eight processes compute together."""
    config = catalogue.record(stage).config(profile)
    count = getattr(config, "optimizer_steps", lambda rows: 0)(profile.data.train_pairs)
    weights = sum(gpt2_sizes())  # embeddings are the output layer as well
    travelling = count * 2 * (GPUS - 1) / GPUS * BYTES * weights / LINK / 3600
    return hours.get(stage, 0.0) / GPUS + travelling


def side_by_side(jobs: Sequence[schedule.Job], hours: Mapping[str, float], workers: int) -> float:
    """When the last job ends, if each worker takes the first in the plan that may begin."""
    ended: dict[str, float] = {}
    free = [0.0] * workers
    waiting = list(jobs)
    while waiting:
        now = min(free)
        ready = [j for j in waiting if all(ended.get(n, float("inf")) <= now for n in j.needs)]
        place = free.index(now)
        if not ready:  # nothing may begin before the next job ends
            free[place] = min(end for end in ended.values() if end > now)
            continue
        job = ready[0]
        waiting.remove(job)
        ended[job.key] = free[place] = now + hours.get(job.name, 0.0)
    return max(ended.values())


if __name__ == "__main__":
    app()
