"""What of a study is done, running, stopped, stale or missing, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lib import files
from rlhf_lib.checkpoints import PROGRESS
from rlhf_lib.measure.statistics import listed
from rlhf_lib.runs import Run, Stage
from rlhf_lib.settings import Profile
from rlhf_lib.study.schedule import plan
from rlhf_lib.study.stages import Study, read_data
from rlhf_lib.study.tuning import trial_seed

WORDS = {  # part of a stage's config -> what it means that it differs
    "source": "its code has changed",
    "computed_by": "device, torch or transformers have changed",
    "model": "other settings of the model",
    "lengths": "other lengths of prompts or replies",
}


class Row(NamedTuple):
    """One stage folder, or a stage that has none yet."""

    place: str  # seed
    stage: str
    state: str  # done, running, stopped, missing, stale
    why: str
    seconds: float | None = None


def rows(profile: Profile, run_dir: Path) -> list[Row]:
    """Every stage of the study as it stands, and every folder that belongs to no stage of it."""
    found: list[Row] = []
    known: dict[Path, Stage] = {}
    read = cache(read_data)  # all seeds read the same
    for seed in range(profile.seeds):
        study = Study(Run(profile, seed, run_dir))
        study.read = read
        for stage in study.planned().values():
            known.setdefault(stage.path, stage)
    found += [_of_stage(stage) for stage in known.values()]
    wanted = {(stage.path.parent, stage.name): stage for stage in known.values()}
    for folder in sorted((run_dir / profile.name).glob("seed-*/*-*")):
        if folder.is_dir() and _whole(folder) not in known:
            found.append(_stale(folder, wanted, profile))
    return found


def summary(found: Sequence[Row]) -> str:
    """How many stand in which state."""
    states = Counter(row.state for row in found)
    return ", ".join(f"{count} {state}" for state, count in states.items())


def as_text(row: Row) -> str:
    minutes = "" if row.seconds is None else f"{row.seconds / 60:.1f} min"
    return f"{row.place:<8} {row.stage:<28} {row.state:<8} {minutes:>9}  {row.why}".rstrip()


def outlook(profile: Profile, run_dir: Path, only: str = "") -> list[str]:
    """What a run would do now: each job of its plan that has not been done, or what one notebook
    lacks.
    """
    if only:
        missing = Study(Run(profile, 0, run_dir)).missing(only)
        return [f"{only} needs {len(missing)} stages first", *(f"  seed 0: {m}" for m in missing)]
    finished = [row for row in rows(profile, run_dir) if row.state == "done"]
    done = {f"{row.place.replace('-', ' ')}: {row.stage}" for row in finished}
    jobs = plan(profile)
    left = [job for job in jobs if job.key not in done]
    stages, missing = (sum(job.kind == "stage" for job in of) for of in (jobs, left))
    said = f"done: {stages - missing} of {stages} stages"
    to_do = f"to be run: {missing} stages, {len(left) - missing} notebooks and reports"
    return [f"{said}; {to_do}", *(f"  {job.key}" for job in left)]


def _of_stage(stage: Stage) -> Row:
    place = stage.path.parent.name
    if stage.done:
        return Row(place, stage.name, "done", "", _seconds(stage.path))
    partial = stage.partial
    if not partial.is_dir():
        return Row(place, stage.name, "missing", "")
    lock = stage.path.with_name(f"{stage.path.name}.lock")
    step = f"step {_steps(partial)}"
    if (partial / "DONE").exists():
        return Row(place, stage.name, "stopped", "has ended, and is published by the next run")
    if files.is_held(lock):
        holder = lock.with_suffix(".holder")
        return Row(place, stage.name, "running", f"{step}, by {_read(holder) or 'a process'}")
    saved = [_json(slot / PROGRESS).get("step") for slot in partial.glob("checkpoint-?")]
    last = max((step for step in saved if isinstance(step, int)), default=0)
    return Row(place, stage.name, "stopped", f"{step}; its last saved state is of step {last}")


def _stale(folder: Path, wanted: Mapping[tuple[Path, str], Stage], profile: Profile) -> Row:
    """A folder that no stage of these settings has: what makes it another."""
    name = folder.name.removesuffix(".partial").rpartition("-")[0]
    place = folder.parent.name
    if place == f"seed-{trial_seed(profile)}":
        return Row(place, name, "stale", "a trial of tuning", _seconds(folder))
    stage = wanted.get((folder.parent, name))
    if stage is None:
        return Row(place, name, "stale", "no stage of this study", _seconds(folder))
    config = _json(folder / "config.json")
    if not config:
        return Row(place, name, "stale", "its config.json cannot be read")
    why = ", ".join(dict.fromkeys(_differences(config, stage.config)))
    return Row(place, name, "stale", why or "nothing that its config.json shows", _seconds(folder))


def _differences(had: Mapping[str, Any], has: Mapping[str, Any]) -> Iterator[str]:
    """What of a stage's config is another now."""
    before, now = had.get("settings") or {}, has["settings"]
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key} was {before.get(key)}, is {now.get(key)}"
    yield from (word for part, word in WORDS.items() if had.get(part) != has[part])
    read, reads = had.get("upstream") or {}, has["upstream"]
    others = sorted(key for key in read.keys() | reads.keys() if read.get(key) != reads.get(key))
    if others:
        yield f"read before it, and others now: {listed(others)}"


def _whole(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix(".partial"))


def _steps(partial: Path) -> int:
    return len(_read(partial / "metrics.jsonl").splitlines())


def _seconds(folder: Path) -> float | None:
    seconds = _json(folder / "result.json").get("seconds")
    return seconds if isinstance(seconds, int | float) else None


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where that is no record."""
    try:
        found = json.loads(_read(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> str:
    """What a file says; nothing where it is not there, or is taken away just now."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
