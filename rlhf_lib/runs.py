"""The run store: stages cached by content, published by one rename, resumed where they stopped.

    runs/<profile>/seed-<k>/<stage>-<hash12>/   config.json metrics.jsonl result.json ... DONE

While a stage runs, its folder is called `<stage>-<hash12>.partial` and holds `checkpoint/`; when
it has ended the checkpoint goes, `DONE` is written last, and one rename publishes the folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lib.config import Profile, as_dict, content_hash
from rlhf_lib.files import read_jsonl, replace_text, write_json, write_jsonl
from rlhf_lib.phases import phase, phase_seconds
from rlhf_lib.profiles import load_profile
from rlhf_lib.runtime import (
    environment,
    peak_memory_gb,
    progress,
    reset_peak_memory,
    seed_everything,
)

PACKAGE = Path(__file__).resolve().parent
# settings enter a hash by value, and how a run is started or drawn changes no result
NOT_HASHED = {"config", "profiles", "plots", "widgets", "report", "study", "schedule", "__main__"}


@dataclass(frozen=True)
class Run:
    """One seed of one profile; `root` holds all runs."""

    profile: Profile
    seed: int
    root: Path

    @classmethod
    def open(
        cls, profile: str, seed: int = 0, root: str | Path = "runs",
        overrides: str | Sequence[str] = (),
    ) -> Run:  # fmt: skip
        return cls(load_profile(profile, overrides), seed, Path(root))

    def stage(self, name: str, settings: object, upstream: Mapping[str, str], module: str) -> Stage:
        """The stage `name` under the hash of its settings, what it reads, and `module`'s source."""
        config = {
            "stage": name,
            "profile": self.profile.name,
            "seed": self.seed,
            "settings": as_dict(settings) if not isinstance(settings, dict) else settings,
            "model": as_dict(self.profile.model),
            "upstream": dict(upstream),
            "source": source_hash(module),
        }
        folder = self.root / self.profile.name / f"seed-{self.seed}"
        return Stage(name, folder, config, self.profile.checkpoint_minutes)


class Stage:
    """One stage of a run: its folder, and its results once it is `done`."""

    def __init__(
        self, name: str, folder: Path, config: dict, checkpoint_minutes: float = 2.0
    ) -> None:
        self.name, self.config = name, config
        self.hash = content_hash({k: v for k, v in config.items() if k != "profile"})
        self.path = folder / f"{name}-{self.hash[:12]}"
        self.checkpoint_minutes = checkpoint_minutes

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    def result(self) -> dict:
        """`result.json` of a finished stage. Raises FileNotFoundError naming how to run it."""
        if not self.done:
            raise FileNotFoundError(
                f"stage {self.name} (seed {self.config['seed']}) has not been run with these "
                f"settings: python -m rlhf_lib {self.name.replace('_', '-')} "
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

        A second process that wants the same stage waits for the first and uses its result.
        """
        if self.done:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if not self.done:
                work = Work(self)
                work.publish(build(work))
        return self


class Work:
    """A stage under way: logs metrics, saves its state, and picks up where a killed run stopped."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.path = stage.path.with_name(stage.path.name + ".partial")
        self.path.mkdir(exist_ok=True)
        self.model_path = self.path / "model"
        self._checkpoint = self.path / "checkpoint"
        self.keep = self.path / "kept"  # what a resumed stage need not make again; gone when done
        self._started = self._saved = self._logged = time.perf_counter()
        self._earlier = {"seconds": 0.0, "peak_memory_gb": 0.0, "num_tokens": 0, "phases": {}}
        self._phases = phase_seconds()
        self.num_tokens = 0
        write_json(self.path / "config.json", stage.config)
        write_json(self.path / "env.json", environment())
        reset_peak_memory()
        seed_everything(stage.config["seed"])

    @property
    def seconds(self) -> float:
        """Time spent on this stage, earlier attempts that were resumed included."""
        return self._earlier["seconds"] + time.perf_counter() - self._started

    @property
    def phases(self) -> dict[str, float]:
        """`seconds` by phase; what is missing of the sum was spent otherwise."""
        spent = Counter(phase_seconds())
        spent.subtract(self._phases)
        spent.update(self._earlier["phases"])
        return {name: seconds for name, seconds in spent.items() if seconds > 0}

    @property
    def peak_memory_gb(self) -> float:
        return max(self._earlier["peak_memory_gb"], peak_memory_gb())

    def steps(self, total: int, accelerator: Accelerator) -> Iterator[int]:
        """Yield the step numbers still to do, saving the accelerator's state every few minutes.

        The state is that of every model, optimizer and scheduler the accelerator has prepared, and
        of all random number generators: a resumed stage ends bit-identical (on CPU).
        """
        first = self._restore(accelerator)
        self._logged = time.perf_counter()
        for step in progress(range(first, total), self.stage.name, total=total, done=first):
            yield step
            due = time.perf_counter() - self._saved >= 60 * self.stage.checkpoint_minutes
            if due and step + 1 < total:
                self._save(accelerator, step + 1)

    def log(self, step: int, num_tokens: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; `num_tokens`: tokens processed in this step."""
        now = time.perf_counter()
        duration, self._logged = now - self._logged, now
        self.num_tokens += num_tokens
        row = {
            "step": step,
            **{key: float(value) for key, value in metrics.items()},
            "step_time": duration,
            "num_tokens": self.num_tokens,
            "tokens_per_second": num_tokens / duration,
            "peak_memory_gb": self.peak_memory_gb,
        }
        with open(self.path / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps(row) + "\n")

    @phase("saving")
    def _save(self, accelerator: Accelerator, step: int) -> None:
        fresh, old = self.path / "checkpoint.new", self.path / "checkpoint.old"
        shutil.rmtree(fresh, ignore_errors=True)
        accelerator.save_state(str(fresh))
        progress_made = {
            "step": step, "seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb,
            "num_tokens": self.num_tokens, "phases": self.phases,
        }  # fmt: skip
        write_json(fresh / "progress.json", progress_made)
        # two renames, so that at every moment one whole checkpoint stands under one of the names
        shutil.rmtree(old, ignore_errors=True)  # left over when the process was killed at the end
        if self._checkpoint.exists():
            self._checkpoint.rename(old)
        fresh.rename(self._checkpoint)
        shutil.rmtree(old, ignore_errors=True)
        self._saved = time.perf_counter()

    def _restore(self, accelerator: Accelerator) -> int:
        old = self.path / "checkpoint.old"
        if old.exists() and not self._checkpoint.exists():  # killed between the two renames
            old.rename(self._checkpoint)
        metrics = self.path / "metrics.jsonl"
        if not self._checkpoint.exists():
            metrics.unlink(missing_ok=True)
            return 0
        self._earlier = json.loads((self._checkpoint / "progress.json").read_text())
        self._started, self._phases = time.perf_counter(), phase_seconds()
        self.num_tokens = self._earlier["num_tokens"]
        step = self._earlier["step"]
        kept = metrics.read_text().splitlines(keepends=True)[:step]
        replace_text(metrics, "".join(kept))
        accelerator.load_state(str(self._checkpoint))
        return step

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, on disk until the stage is done: a resumed stage reads it instead."""
        path = self.keep / f"{name}.safetensors"
        if not path.exists():
            self.keep.mkdir(exist_ok=True)
            fresh = path.with_suffix(".new")
            save_file({name: make()}, fresh)
            fresh.rename(path)
        return load_file(path)[name]

    def write_samples(self, rows: Sequence[Mapping]) -> None:
        write_jsonl(self.path / "samples.jsonl", rows)

    def publish(self, result: dict) -> None:
        """Write the result, drop the checkpoint, and rename the folder to its final name."""
        result = {
            **result,
            "seconds": self.seconds,
            "phases": self.phases,
            "peak_memory_gb": self.peak_memory_gb,
            "num_tokens": self.num_tokens,
        }
        write_json(self.path / "result.json", result)
        for name in ("checkpoint", "checkpoint.old", "checkpoint.new", "kept"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / "DONE").write_text(self.stage.hash + "\n")
        if self.stage.path.exists():  # a folder that lost its DONE: whatever it holds is not whole
            shutil.rmtree(self.stage.path)
        self.path.rename(self.stage.path)


def stage_folders(folder: Path) -> list[dict]:
    """Every stage folder of a profile: seed, name with hash, state, and seconds so far."""
    rows = []
    for path in sorted(folder.glob("seed-*/*-*")):
        if not path.is_dir():
            continue
        metrics = path / "metrics.jsonl"
        steps = len(read_jsonl(metrics)) if metrics.exists() else 0
        done, seconds = (path / "DONE").exists(), None
        if done:
            seconds = json.loads((path / "result.json").read_text())["seconds"]
        state = "done" if done else f"under way: {steps}"
        name = path.name.removesuffix(".partial")
        rows.append({"seed": path.parent.name, "stage": name, "state": state, "seconds": seconds})
    return rows


@cache
def source_hash(module: str) -> str:
    """SHA-256 of the source of `rlhf_lib.<module>` and of every rlhf_lib module it imports."""
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name in NOT_HASHED:
            continue
        source = (PACKAGE / f"{name}.py").read_bytes()
        seen[name] = hashlib.sha256(source).hexdigest()
        waiting += [n for n in imported_modules(source) if (PACKAGE / f"{n}.py").exists()]
    return content_hash(seen)


def imported_modules(source: bytes) -> set[str]:
    """Names of the rlhf_lib modules that `source` imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_lib"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "rlhf_lib" and len(parts) > 1}
    return found
