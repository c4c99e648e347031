"""The run store: stages cached by content, published by one rename, resumed where they stopped.

    runs/<profile>/seed-<k>/<stage>-<hash12>/   config.json metrics.jsonl result.json ... DONE

While a stage runs, its folder is called `<stage>-<hash12>.partial` and holds `checkpoint/`; when
it has ended the checkpoint goes, `DONE` is written last, and one rename publishes the folder.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lib import catalogue, user_code
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
from rlhf_lib.settings import Profile, SettingsError, UserError, as_dict, content_hash

PACKAGE = Path(__file__).resolve().parent
BY_VALUE = {"rlhf_lib.settings", "rlhf_lib.catalogue"}  # what they say enters a hash, not how


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

        A second process that wants the same stage waits for the first and uses its result.
        """
        if self.done:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if not self.done:
                work = Work(self)
                try:
                    work.publish(build(work))
                finally:
                    work.leave()
        return self


def training_minutes(result: Mapping) -> float:
    """What a stage took, by its result, without what was done to measure."""
    return (result["seconds"] - result["phases"].get(MEASURING, 0.0)) / 60


class Work:
    """A stage under way: logs metrics, saves its state, and picks up where a killed run stopped."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.path = stage.path.with_name(stage.path.name + ".partial")
        self.path.mkdir(exist_ok=True)
        self.model_path = self.path / "model"
        self._checkpoint = self.path / "checkpoint"
        self.keep = self.path / "kept"  # what a resumed stage need not make again; gone when done
        self._saved = self._logged = time.perf_counter()
        self._measured = phase_seconds().get(MEASURING, 0.0)
        kept = self.keep / "progress.json"  # what was kept took its time
        self._go_on_from(*([json.loads(kept.read_text())] if kept.exists() else []))
        self.num_tokens = 0
        write_json(self.path / "config.json", stage.config)
        write_json(self.path / "env.json", environment())
        reset_peak_memory()
        seed_everything(stage.config["seed"])

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
        """FLOPs, and tokens generated, without what was spent on measuring."""
        return _since(self._counted, counted(), self._earlier["spent"])

    @property
    def peak_memory_gb(self) -> float:
        return max(self._earlier["peak_memory_gb"], peak_memory_gb())

    def steps(self, total: int, accelerator: Accelerator) -> Iterator[int]:
        """Yield the step numbers still to do, saving the accelerator's state every few minutes.

        The state is that of every model, optimizer and scheduler the accelerator has prepared, and
        of all random number generators: a resumed stage ends bit-identical (on CPU).
        """
        first = self._restore(accelerator)
        self._logged, self._measured = time.perf_counter(), phase_seconds().get(MEASURING, 0.0)
        for step in progress(range(first, total), self.stage.name, total=total, done=first):
            yield step
            due = time.perf_counter() - self._saved >= 60 * self.stage.checkpoint_minutes
            if due and step + 1 < total:
                self._save(accelerator, step + 1)

    def log(self, step: int, num_tokens: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; `num_tokens`: tokens processed in this step."""
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

    @phase("saving")
    def _save(self, accelerator: Accelerator, step: int) -> None:
        fresh, old = self.path / "checkpoint.new", self.path / "checkpoint.old"
        shutil.rmtree(fresh, ignore_errors=True)
        accelerator.save_state(str(fresh))
        write_json(fresh / "progress.json", {"step": step, **self._spent()})
        shutil.rmtree(old, ignore_errors=True)  # left over when the process was killed at the end
        # two renames, so that at every moment one whole checkpoint stands under one of the names
        if self._checkpoint.exists():
            self._checkpoint.rename(old)
        fresh.rename(self._checkpoint)
        shutil.rmtree(old, ignore_errors=True)
        self._saved = time.perf_counter()

    def _spent(self) -> dict:
        """What the stage has cost up to now, as results and progress say it."""
        phases = _since(self._phases, phase_seconds(), self._earlier["phases"])
        return {
            "seconds": self.seconds, "phases": phases, "peak_memory_gb": self.peak_memory_gb,
            "num_tokens": self.num_tokens, "spent": self.spent,
        }  # fmt: skip

    def _restore(self, accelerator: Accelerator) -> int:
        old = self.path / "checkpoint.old"
        if old.exists() and not self._checkpoint.exists():  # killed between the two renames
            old.rename(self._checkpoint)
        metrics = self.path / "metrics.jsonl"
        if not self._checkpoint.exists():
            metrics.unlink(missing_ok=True)
            return 0
        self._go_on_from(saved := json.loads((self._checkpoint / "progress.json").read_text()))
        self.num_tokens, step = saved["num_tokens"], saved["step"]
        lines = metrics.read_text().splitlines(keepends=True)
        replace_text(metrics, "".join(lines[:step]))
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
            write_json(self.keep / "progress.json", self._spent())
        return load_file(path)[name]

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, a JSON value, kept likewise."""
        path = self.keep / f"{name}.json"
        if not path.exists():
            self.keep.mkdir(exist_ok=True)
            write_json(path, make())
            write_json(self.keep / "progress.json", self._spent())
        return json.loads(path.read_text())

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
        if not (self._checkpoint.exists() or self.keep.exists()):
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, result: dict) -> None:
        """Write the result, drop the checkpoint, and rename the folder to its final name."""
        write_json(self.path / "result.json", {**result, **self._spent()})
        for name in ("checkpoint", "checkpoint.old", "checkpoint.new", "kept"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / "DONE").write_text(self.stage.hash + "\n")
        if self.stage.path.exists():  # a folder that lost its DONE: whatever it holds is not whole
            shutil.rmtree(self.stage.path)
        self.path.rename(self.stage.path)


def _since(start: Mapping, now: Mapping, earlier: Mapping) -> dict[str, float]:
    """What was added to each sum since `start`, and what was there earlier."""
    added = Counter(now)
    added.subtract(start)
    added.update(earlier)
    return {name: amount for name, amount in added.items() if amount > 0}


# ------------------------------------------------------------------------- what a stage runs


def source_hash(*modules: str) -> str:
    """SHA-256 of what `modules` do, and all that they import of this library or of the user's own.

    A module is named as Python names it, or by the path of its file. Comments, docstrings and
    layout do not count, nor do imports that are written as no import statement. Raises
    SettingsError for a file of the user's that is not there, not what this process has run, or one
    of two under one name.
    """
    seen: dict[str, str] = {}
    files: dict[str, Path] = {}
    waiting = [(name, source_file(name)) for name in modules]
    while waiting:
        name, path = waiting.pop()
        if path is None or name in BY_VALUE:
            continue
        key = path.stem if name.endswith(".py") else name  # wherever the file lies
        if files.setdefault(key, path) != path:
            raise SettingsError(f"{path} and {files[key]} have one name: rename one of them")
        if key in seen:
            continue
        own = user_code.is_own(path)
        text = user_code.IMPORTED.get(path, path.read_bytes()) if own else _library_text(path)
        if own and text != path.read_bytes():
            raise SettingsError(f"{path} has been edited: start Python anew to run it as it is now")
        seen[key], imported = _read_source(path, name, text)
        for other in imported:
            if not own and other.partition(".")[0] != PACKAGE.name:
                continue  # the library imports nothing of the user's
            beside = _root(name, path).joinpath(*other.split("."))
            found = [p for p in (beside.with_suffix(".py"), beside / "__init__.py") if p.is_file()]
            waiting.append((other, found[0] if own and found else source_file(other)))
    return content_hash(seen)


def _root(name: str, path: Path) -> Path:
    """The folder that a module was found from."""
    depth = 0 if name.endswith(".py") else name.count(".") + (path.name == "__init__.py")
    return path.parents[depth]


def source_file(name: str) -> Path | None:
    """The file of a module, or of `FILE.py`; None for one that is not there, or not ours to follow.

    Followed are this library and what is the user's: no installed package, nothing of Python.
    """
    if name.endswith(".py"):
        return user_code.user_file(name)
    root = name.partition(".")[0]
    if root == PACKAGE.name:  # found without importing what is above it
        path = PACKAGE.parent.joinpath(*name.split("."))
        found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
        return found[0] if found else None
    try:
        spec = importlib.util.find_spec(root)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        if not any(place and user_code.is_own(Path(place)) for place in places):
            return None
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # `from module import name`: no such module
        return None
    origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") else None


@cache
def _library_text(path: Path) -> bytes:
    """Kept for as long as Python keeps a module that it has imported."""
    return path.read_bytes()


@cache
def _read_source(path: Path, name: str, text: bytes) -> tuple[str, list[str]]:
    """Hash of a file's code, and every module that it may import, anywhere in it."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise SettingsError(f"{path}, line {error.lineno}: {error.msg}") from error
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imported = imported_modules(tree, package)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported


def imported_modules(tree: ast.AST, package: str) -> list[str]:
    """Modules that a module of `package` imports, wherever in it; names of them that may be one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, package) if node.level else dots
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return sorted(found)


def write_json(path: Path, value: object) -> None:
    """Raises UserError for what JSON cannot hold, numbers that are not finite among it."""
    replace_text(path, _json(path, value, indent=2))


def write_jsonl(path: Path, rows: Sequence[Mapping]) -> None:
    replace_text(path, "".join(_json(path, row) for row in rows))


def _json(path: Path, value: object, indent: int | None = None) -> str:
    try:
        # a number of numpy or torch is a number
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path.parent.name}/{path.name} cannot hold this: {error}") from error
    return text + "\n"


def replace_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: nobody ever sees half a file."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
