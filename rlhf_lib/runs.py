"""The run store: stages cached by content, published by one rename, resumed where they stopped.

    runs/<profile>/seed-<k>/<stage>-<hash12>/   config.json metrics.jsonl result.json ... DONE

While a stage runs, its folder is called `<stage>-<hash12>.partial` and holds its saved states
(`checkpoints`); when it has ended, `DONE` is the last file that is written, they go, and one rename
publishes the folder: who finds it with `DONE` and not published does that and nothing else.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lib import catalogue, files, processes, trackers
from rlhf_lib.checkpoints import Checkpoints
from rlhf_lib.code_hash import source_hash
from rlhf_lib.files import read_jsonl, replace_text, write_json, write_jsonl
from rlhf_lib.profiles import Overrides
from rlhf_lib.runtime import (
    MEASURING,
    choose_precision,
    computed_by,
    counted,
    environment,
    peak_memory_gb,
    phase,
    phase_seconds,
    progress,
    reset_peak_memory,
    seed_everything,
)
from rlhf_lib.settings import Profile, UserError, as_dict, content_hash

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One seed of one profile; `root` holds all runs."""

    profile: Profile
    seed: int
    root: Path

    @classmethod
    def open(
        cls, profile: str, seed: int = 0, root: str | Path = "runs",
        overrides: Overrides = (),
    ) -> Run:  # fmt: skip
        return cls(catalogue.load(profile, overrides), seed, Path(root))

    def stage(
        self, name: str, settings: object, upstream: Mapping[str, str], *modules: str
    ) -> Stage:
        """The stage `name` under the hash of all that its result hangs on.

        Its settings and those of the model as resolved, the lengths that samples are cut at, what
        it reads, the source of `modules`, and what computes: device, torch, transformers.
        """
        model, data = as_dict(self.profile.model), self.profile.data
        config = {
            "stage": name,
            "profile": self.profile.name,
            "seed": self.seed,
            "settings": as_dict(settings) if not isinstance(settings, dict) else settings,
            "model": model | {"precision": choose_precision(self.profile.model.precision)},
            "lengths": [data.max_prompt_tokens, data.max_response_tokens],
            "upstream": dict(upstream),
            "source": source_hash(*modules),
            "computed_by": computed_by(),
        }
        folder = self.root / self.profile.name / f"seed-{self.seed}"
        return Stage(name, folder, config, self.profile.checkpoint_minutes, self.profile.tracker)


class Stage:
    """One stage of a run: its folder, and its results once it is `done`."""

    def __init__(
        self,
        name: str,
        folder: Path,
        config: dict,
        checkpoint_minutes: float = 2.0,
        tracker: str = trackers.OFF,
    ) -> None:
        self.name, self.config = name, config
        self.hash = content_hash({k: v for k, v in config.items() if k != "profile"})
        self.path = folder / f"{name}-{self.hash[:12]}"
        self.checkpoint_minutes, self.tracker = checkpoint_minutes, tracker

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    def result(self) -> dict:
        """`result.json` of a finished stage. Raises UserError naming how to run it."""
        if not self.done:
            raise UserError(
                f"stage {self.name} (seed {self.config['seed']}) has not been run with these "
                f"settings: python -m rlhf_lib stage {self.name} "
                f"--profile {self.config['profile']} --seed {self.config['seed']}"
            )
        return json.loads((self.path / "result.json").read_text())

    def metrics(self) -> list[dict]:
        """One record a step."""
        return read_jsonl(self.path / "metrics.jsonl")

    def samples(self) -> list[dict]:
        return read_jsonl(self.path / "samples.jsonl")

    def ensure(self, build: Callable[[Work], dict]) -> Stage:
        """Run `build(work)` unless the stage is done, and publish what it wrote and returned.

        Somebody else who wants the same stage waits for the first and uses its result; processes
        that were started together run it together. Raises UserError where the disk is full, or a
        drive has dropped.
        """
        if processes.told(lambda: self.done):
            return self
        try:
            with self._locked() as mine:
                if not processes.told(lambda: self.done):
                    self._work(build, mine)
        except OSError as error:
            if said := files.mishap(error, self.path.parent):
                raise UserError(said) from error
            raise
        return self

    @contextmanager
    def _locked(self) -> Iterator[Callable[[], bool]]:
        """Hold the stage's lock, which the first process does for all."""
        if not processes.first():
            yield lambda: True
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(self.path.with_name(f"{self.path.name}.lock")) as mine:
            yield mine

    @property
    def partial(self) -> Path:
        """Its folder while it runs."""
        return self.path.with_name(f"{self.path.name}.partial")

    def _work(self, build: Callable[[Work], dict], mine: Callable[[], bool]) -> None:
        ended = processes.told((self.partial / "DONE").exists)
        if not ended:  # else it was only not published
            work = Work(self, mine)
            try:
                work.finish(build(work))
            finally:
                work.leave()
        processes.gathered(None)  # what the others wrote is gone by now
        processes.told(self._publish)

    def _publish(self) -> None:
        Checkpoints(self.partial, 0).discard()
        files.discard(self.partial / "kept")
        for left in self.partial.glob("process-*"):  # of a run of several that was killed
            shutil.rmtree(left)
        files.publish(self.partial, self.path, last="DONE")


def training_minutes(result: Mapping) -> float:
    """What a stage took, by its result, without what was done to measure."""
    return (result["seconds"] - result["phases"].get(MEASURING, 0.0)) / 60


class Work:
    """A stage under way: logs metrics, saves its state, and picks up where a killed run stopped.

    `mine` says whether its folder is still this process' to write: where it is not, nothing more
    is written and UserError is raised. Of processes that were started together the first alone
    writes there; the others write where nobody looks.
    """

    def __init__(self, stage: Stage, mine: Callable[[], bool] = lambda: True) -> None:
        self.stage, self._mine = stage, mine
        self.path = stage.partial
        if not processes.first():
            self.path = stage.partial / f"process-{processes.rank()}"
        self.path.mkdir(parents=True, exist_ok=True)
        self.model_path = self.path / "model"
        self.checkpoints = Checkpoints(stage.partial, stage.checkpoint_minutes)
        self.keep = (
            stage.partial / "kept"
        )  # what a resumed stage need not make again; gone when done
        self._logged = time.perf_counter()
        self._measured = phase_seconds().get(MEASURING, 0.0)
        self._go_on_from(*processes.told(self._kept_cost))
        self.num_tokens = 0
        folder, run = stage.path.parent, f"seed-{stage.config['seed']}-{stage.path.name}"
        window = folder.parent / stage.tracker
        tracker = stage.tracker if processes.first() else trackers.OFF
        self.tracker = trackers.begin(tracker, window, run, stage.config["settings"])
        write_json(self.path / "config.json", stage.config)
        write_json(self.path / "env.json", environment())
        reset_peak_memory()
        seed_everything(stage.config["seed"])

    def _kept_cost(self) -> list[dict]:
        """What was kept took its time; none where it does not say how much."""
        try:
            return [json.loads((self.keep / "progress.json").read_text())]
        except (FileNotFoundError, ValueError):
            return []

    def _go_on_from(self, *earlier: Mapping[str, Any]) -> None:
        """What is spent from now on is added to what was spent earlier."""
        self._earlier: dict[str, Any] = {
            "seconds": sum(cost["seconds"] for cost in earlier),
            "peak_memory_gb": max((cost["peak_memory_gb"] for cost in earlier), default=0.0),
            **{k: sum((Counter(c[k]) for c in earlier), Counter()) for k in ("phases", "spent")},
        }
        self._started, self._phases, self._counted = time.perf_counter(), phase_seconds(), counted()

    @property
    def seconds(self) -> float:
        """Time spent on this stage, earlier attempts that were resumed included."""
        return self._earlier["seconds"] + time.perf_counter() - self._started

    @property
    def spent(self) -> dict[str, float]:
        """FLOPs, and tokens generated, in all processes, without what was spent on measuring."""
        here = _since(self._counted, counted(), {})
        return dict(sum(map(Counter, processes.gathered(here)), Counter(self._earlier["spent"])))

    @property
    def peak_memory_gb(self) -> float:
        return max(self._earlier["peak_memory_gb"], peak_memory_gb())

    def steps(self, total: int, accelerator: Accelerator) -> Iterator[int]:
        """Yield the step numbers still to do, saving the accelerator's state from time to time.

        The state is that of every model, optimizer and scheduler the accelerator has prepared, and
        of all random number generators: a resumed stage ends bit-identical (on CPU).
        """
        processes.told(partial(self.checkpoints.check_space, accelerator))
        first = self._restore(accelerator)
        self._logged, self._measured = time.perf_counter(), phase_seconds().get(MEASURING, 0.0)
        for step in progress(range(first, total), self.stage.name, total=total, done=first):
            yield step
            if step + 1 < total and processes.told(lambda: self.checkpoints.due):
                self._save(accelerator, step + 1)

    def log(self, step: int, num_tokens: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; `num_tokens`: tokens processed in this step."""
        self.check_mine()
        now, measured = time.perf_counter(), phase_seconds().get(MEASURING, 0.0)
        duration = now - self._logged - (measured - self._measured)
        self._logged, self._measured = now, measured
        self.num_tokens += num_tokens
        row = {
            "step": step,
            # JSON has no infinity and no number that is none
            **{k: float(v) if math.isfinite(v) else None for k, v in metrics.items()},
            "flops": self.spent.get("flops", 0.0),
            "step_time": duration,
            "num_tokens": self.num_tokens,
            "tokens_per_second": num_tokens / duration,
            "peak_memory_gb": self.peak_memory_gb,
        }
        with open(self.path / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            self.tracker.log(trackers.shown(row), step=step)

    def check_mine(self) -> None:
        """Raises UserError where another process has taken this stage over."""
        if not self._mine():
            raise UserError(
                f"stage {self.stage.name} is worked on by another process now, which took this one "
                "for dead: it stops here, and the same command takes what the other makes"
            )

    @phase("saving")
    def _save(self, accelerator: Accelerator, step: int) -> None:
        self.check_mine()
        cost = self._spent()
        if processes.first():
            self.checkpoints.save(accelerator, {"step": step, **cost})

    def _spent(self) -> dict:
        """What the stage has cost up to now, as results and progress say it."""
        phases = _since(self._phases, phase_seconds(), self._earlier["phases"])
        return {
            "seconds": self.seconds, "phases": phases, "peak_memory_gb": self.peak_memory_gb,
            "num_tokens": self.num_tokens, "spent": self.spent,
        }  # fmt: skip

    def _restore(self, accelerator: Accelerator) -> int:
        metrics = self.path / "metrics.jsonl"
        saved = self.checkpoints.restore(accelerator)
        if saved is None:
            metrics.unlink(missing_ok=True)
            return 0
        self._go_on_from(saved)
        self.num_tokens, step = saved["num_tokens"], saved["step"]
        rows = map(_row, metrics.read_text().splitlines()) if metrics.exists() else ()
        write_jsonl(metrics, [row for row in rows if row.get("step", step) < step])
        return step

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, on disk until the stage is done: a resumed stage reads it instead."""

        def write(path: Path, made: Tensor) -> None:
            fresh = path.with_suffix(".new")
            save_file({name: made}, fresh)
            fresh.rename(path)

        path = self.keep / f"{name}.safetensors"
        return self._once(path, make, write, lambda path: load_file(path)[name])

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, a JSON value, kept likewise."""
        path = self.keep / f"{name}.json"
        return self._once(path, make, write_json, lambda path: json.loads(path.read_text()))

    def _once(
        self, path: Path, make: Callable[[], T], write: Callable[[Path, T], None],
        read: Callable[[Path], T],
    ) -> T:  # fmt: skip
        if not processes.told(path.exists):
            made = make()
            cost = self._spent()
            if processes.first():
                self.check_mine()
                self.keep.mkdir(exist_ok=True)
                write(path, made)
                write_json(self.keep / "progress.json", cost)
        return processes.told(partial(read, path))

    def within(self, name: str, run: Callable[[], Stage]) -> dict:
        """Result, and samples as `rows`, of a stage that is a part of this one: kept likewise. It
        costs what its result says, so that attempts at it that were killed count as well.
        """

        def finished() -> dict:
            before, stage = self._spent(), run()
            self._go_on_from(before, stage.result())
            return stage.result() | {"rows": stage.samples()}

        return self.part(name, finished)

    def write_samples(self, rows: Sequence[Mapping]) -> None:
        write_jsonl(self.path / "samples.jsonl", rows)

    def leave(self) -> None:
        """Take away what a stage that failed has left, unless it can go on from there."""
        if self.tracker is not None:
            self.tracker.finish()
        if not processes.first():
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with suppress(OSError):  # of a drive that has dropped
            done = (self.path / "DONE").exists()
            if self._mine() and not (done or self.checkpoints.exist or self.keep.exists()):
                shutil.rmtree(self.path)

    def finish(self, result: dict) -> None:
        """Write the result, and last that it is whole: from here on nothing is computed again."""
        self.check_mine()
        write_json(self.path / "result.json", {**result, **self._spent()})
        replace_text(self.path / "DONE", self.stage.hash + "\n")


def _row(line: str) -> dict:
    """A line of the metrics; nothing of one that a kill has cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _since(start: Mapping, now: Mapping, earlier: Mapping) -> dict[str, float]:
    """What was added to each sum since `start`, and what was there earlier."""
    added = Counter(now)
    added.subtract(start)
    added.update(earlier)
    return {name: amount for name, amount in added.items() if amount > 0}
