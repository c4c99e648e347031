"""Many trainings from one file: methods, coefficients and seeds, their results in one table.

    profile: laptop
    methods: [ppo, grpo, dpo]
    coefficients: [0.25, 1, 4]     # times each method's own; or a list of values for each method
    seeds: 3                       # so many, or a list of them
    set: {ppo.updates: 10}         # what is overridden for all, in any form that OVERRIDES has

A training that has ended stands in `trials.json` at once, and the same command goes on from there,
with more methods, coefficients or seeds as well. What is asked with other settings has a folder of
its own. A folder is delivered to any address that fsspec knows: s3://bucket/folder, memory:// ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import yaml
from matplotlib.figure import Figure

from rlhf_lib import catalogue
from rlhf_lib.files import below, check_address, deliver, fetch, locked, write_json
from rlhf_lib.measure.statistics import interval, over_seeds
from rlhf_lib.pools import worker_pool
from rlhf_lib.profiles import as_overrides, check_seed
from rlhf_lib.review.trials import Trial
from rlhf_lib.runtime import progress
from rlhf_lib.settings import Profile, SettingsError, as_dict, content_hash, deciding, unknown
from rlhf_lib.show import figures
from rlhf_lib.show.display import markdown, write_figure
from rlhf_lib.show.tables import Column, table_of
from rlhf_lib.study.tuning import judges, train, try_values

TRIALS = "trials.json"
MOST = 1000  # seeds
KEYS = ("profile", "methods", "coefficients", "seeds", "set")


class Matrix(NamedTuple):
    """What a file asks for: every method with each of its coefficients and each seed."""

    profile: Profile
    overrides: list[str]
    values: dict[str, list[float]]  # method -> its coefficients
    seeds: list[int]

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """In the order of what is compared first: all methods in one seed, then the next seed."""
        for seed in self.seeds:
            for method, values in self.values.items():
                yield from ((method, value, seed) for value in values)

    @property
    def shared(self) -> str:
        """A hash of the settings that all trainings share: those of another lie elsewhere."""
        settings = deciding(as_dict(self.profile)) | {"tuning": as_dict(self.profile.tuning)}
        for method in _known():
            section, _, key = _setting(method).partition(".")
            settings[section].pop(key)
        return content_hash(settings)[:8]


def _known() -> list[str]:
    """Methods that have a coefficient."""
    return [name for name in catalogue.methods() if catalogue.record(name).coefficient]


class Once(yaml.SafeLoader):
    """YAML in which a key stands once: of two, the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [str(key.value) for key, _ in node.value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.MarkedYAMLError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path, besides: Sequence[str] = ()) -> Matrix:
    """What a file asks for, with overrides besides its own.

    Raises SettingsError, naming the key, for a file that asks for what there is not.
    """
    try:
        asked = yaml.load(path.read_text(encoding="utf-8"), Once)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(asked, Mapping):
        raise SettingsError(f"{path} has no keys: give {', '.join(KEYS)}")
    for key in asked:
        if key not in KEYS:
            raise unknown(f"key in {path}", str(key), KEYS)
    # a cell is a whole training, whatever share of one a trial of the profile's is
    given = asked.get("set")
    overrides = ["tuning.budget=1", *besides, *as_overrides([] if given is None else given)]
    profile = catalogue.load(asked.get("profile", "laptop"), overrides)
    judges(profile)
    seeds = _seeds(path, asked.get("seeds", profile.seeds))
    values = _coefficients(path, profile, asked)
    if not (seeds and values and all(values.values())):
        raise SettingsError(f"{path} asks for nothing: methods, coefficients and seeds need one")
    return Matrix(profile, overrides, values, seeds)


def _seeds(path: Path, given: Any) -> list[int]:
    try:
        if not isinstance(given, list):
            given = range(min(check_seed(given), MOST + 1))
        seeds = list(dict.fromkeys(map(check_seed, given)))
    except SettingsError as error:
        raise SettingsError(f"{path}: seeds: {error}") from error
    if len(seeds) > MOST:
        raise SettingsError(f"{path}: seeds: more than {MOST} are asked for")
    return seeds


def _coefficients(path: Path, profile: Profile, asked: Mapping) -> dict[str, list[float]]:
    """Each method's coefficients: what the file lists for it, or its own times each factor."""
    methods = _listed(path, "methods", asked.get("methods", sorted(_known())))
    given = asked.get("coefficients", [1])
    for method in [*methods, *(given if isinstance(given, Mapping) else [])]:
        if method not in _known():
            raise unknown(f"method in {path}", str(method), _known())
        if method not in methods:
            raise SettingsError(f"{path}: coefficients: {method} is not among its methods")
    found = {}
    for method in methods:
        record = catalogue.record(method)
        own = getattr(record.config(profile), record.coefficient)
        mine = given.get(method, [own]) if isinstance(given, Mapping) else given
        factor = 1 if isinstance(given, Mapping) else own
        listed = _listed(path, "coefficients", mine)
        numbers = (factor * _number(path, value) for value in listed)
        found[method] = list(dict.fromkeys(float(f"{_number(path, n):.6g}") for n in numbers))
    return found


def _listed(path: Path, key: str, given: Any) -> list:
    if not isinstance(given, list):
        raise SettingsError(f"{path}: {key}: {given!r} is no list: write [...]")
    return given


def _number(path: Path, value: Any) -> float:
    with suppress(ValueError, OverflowError, TypeError):  # YAML takes 1e-3 for a word
        if not isinstance(value, bool) and 0 <= float(value) < math.inf:
            return float(value)
    raise SettingsError(f"{path}: coefficients: {value!r} is no number from 0 on")


def run(path: Path, run_dir: Path, out: str = "", engine: str = "") -> Path:
    """Train and judge every cell that is not done; the folder of trials, table and figure.

    `out`: an address that fsspec knows, where the folder is delivered as it grows. `engine`: who
    does it, where the file leaves that open.
    """
    matrix = read(path, [f"engine={engine}"] if engine else [])
    if out:
        check_address(out)
    folder = run_dir / matrix.profile.name / f"matrix-{path.stem}-{matrix.shared}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        there = below(out, folder.name) if out else ""
        trials, wanted = _with_delivered(_load(folder / TRIALS), there), list(matrix.cells())
        done = set(map(_cell, trials))
        missing = [cell for cell in wanted if cell not in done]
        print(f"{len(wanted) - len(missing)} of {len(wanted)} trainings are done", flush=True)
        if trials:
            _write(folder, trials, there)
        for trial in _trained(matrix, missing, run_dir):
            trials = _with_delivered([*trials, trial], there)
            _write(folder, trials, there)
    return folder


def _cell(trial: Trial) -> tuple:
    return (trial["method"], *trial["values"].values(), trial["seed"])


def _with_delivered(trials: list[Trial], address: str) -> list[Trial]:
    """These and those that another machine has delivered meanwhile: it knows no lock of ours."""
    if not address:
        return trials
    with TemporaryDirectory() as place:
        fetch(address, Path(place) / TRIALS)
        delivered = _load(Path(place) / TRIALS, address)
    known = set(map(_cell, trials))
    return trials + [trial for trial in delivered if _cell(trial) not in known]


def _trained(
    matrix: Matrix, cells: Sequence[tuple[str, float, int]], run_dir: Path
) -> Iterator[Trial]:
    if not cells:
        return
    profile = matrix.profile
    with worker_pool(profile) as (pool, _):
        studies = {s: (profile.name, s, str(run_dir), matrix.overrides) for _, _, s in cells}
        before = ("reward_model", "sft", *judges(profile))
        for future in [pool.submit(train, s, name) for s in studies.values() for name in before]:
            future.result()
        running: list[Future[Trial]] = [
            pool.submit(try_values, studies[seed], method, {_setting(method): value})
            for method, value, seed in cells
        ]
        bar = progress(as_completed(running), "matrix", total=len(running))
        for number, future in enumerate(bar, start=1):
            trial = future.result()
            print(f"{number:3}/{len(cells)}  {_line(trial)}", flush=True)
            yield trial


def _setting(method: str) -> str:
    record = catalogue.record(method)
    return f"{record.sections[0]}.{record.coefficient}"


def _line(trial: Trial) -> str:
    ((setting, value),) = trial["values"].items()
    found = "diverged" if trial["mean"] is None else f"{trial['rater']} {interval(trial, 3)}"
    return f"seed {trial['seed']}: {setting}={value:g}  {found}"


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One a method and coefficient: the mean over seeds, and an interval.

    From two seeds on it is Student's t over them; one seed's speaks of prompts alone. Seeds that
    diverged are counted and in no mean.
    """
    cells: dict[tuple[str, str, float], list[Trial]] = {}
    for trial in trials:
        ((setting, value),) = trial["values"].items()
        cells.setdefault((trial["method"], setting, value), []).append(trial)
    found = []
    for (method, setting, value), own in sorted(cells.items()):
        ended = [trial for trial in own if trial["mean"] is not None]
        measured: Mapping[str, Any] = ended[0] if len(ended) == 1 else {}
        if len(ended) > 1:
            measured = over_seeds([trial["mean"] for trial in ended])
        found.append({
            "method": method, "setting": setting, "value": value, "seeds": len(ended),
            "diverged": len(own) - len(ended),
            **{key: measured.get(key) for key in ("mean", "low", "high")},
            "interval": {0: "", 1: "prompts"}.get(len(ended), "seeds"),
        })  # fmt: skip
    return found


def as_text(folder: Path) -> str:
    """The table of a matrix, to be read: means with their intervals."""
    found = rows(_load(folder / TRIALS))
    columns: list[Column] = [
        ("method", lambda row: row["method"]),
        ("setting", lambda row: f"{row['setting']}={row['value']:g}"),
        ("seeds", lambda row: row["seeds"]),
        ("reward", lambda row: interval(row if row["seeds"] else None, 3)),
        ("interval over", lambda row: row["interval"]),
    ]
    return markdown(table_of(found, columns))


def figure(found: Sequence[Mapping[str, Any]], rater: str) -> Figure:
    """One panel a method: reward on validation prompts by its coefficient, means over seeds."""
    names = list(dict.fromkeys(row["method"] for row in found))
    drawn = Figure(figsize=(figures.WIDTH, 2.6), layout="constrained")
    axes = drawn.subplots(1, len(names), squeeze=False, sharey=True)[0]
    drawn.supylabel(f"{rater} reward", fontsize="medium")
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in found if row["method"] == name and row["mean"] is not None]
        places = [row["value"] for row in own]
        if own:  # else all of them diverged
            figures.dots(axis, own, places, catalogue.color(name), upright=True, fmt="o-")
        (setting,) = {row["setting"] for row in found if row["method"] == name}
        scale = "log" if min(places, default=0) > 0 else "linear"
        axis.set(xscale=scale, xlabel=setting.rpartition(".")[2], title=catalogue.label(name))
        axis.set_xticks(places, [f"{value:g}" for value in places])
        axis.minorticks_off()
    return drawn


def _load(path: Path, address: str = "") -> list[Trial]:
    if not path.exists():
        return []
    try:
        trials = json.loads(path.read_text(encoding="utf-8"))["trials"]
        _ = [(t["method"], t["values"].items(), t["mean"], t["seed"]) for t in trials]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = below(address, path.name) if address else path
        raise SettingsError(f"{where} is no file of trials: move it away to begin anew") from error
    return trials


def _write(folder: Path, trials: Sequence[Trial], address: str) -> None:
    """Trials, table and figure; delivered to the address, if there is one."""
    write_json(folder / TRIALS, {"trials": list(trials)})
    found = rows(trials)
    pd.DataFrame(found).to_csv(folder / "table.csv", index=False)
    judged = [trial["rater"] for trial in trials if trial["mean"] is not None]
    if judged:
        write_figure(figure(found, judged[0]), folder / "figure")
    if address:
        deliver(folder, address)
