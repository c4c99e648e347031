"""Where preference pairs come from: the bundled world, the hub, or files. Rows with their numbers.

What a row means is the business of `dialogues`; here it is a dictionary that knows its place, so
that every later complaint can name file and line.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet

from rlhf_lib import runtime
from rlhf_lib.data.store import Stored, Writer
from rlhf_lib.runtime import bundled_folder
from rlhf_lib.settings import UserError, unknown
from rlhf_lib.world.grammar import ASSISTANT
from rlhf_lib.world.rewards import DOSES, preference_probability, with_taste

EXAMPLES = ("bundled", "bundled:control", "hub:Anthropic/hh-rlhf", "path:FILE_OR_FOLDER")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HH = "Anthropic/hh-rlhf"
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {"eval": "test", "valid": "validation", "dev": "validation"} | {s: s for s in SPLITS}


class DataError(UserError):
    """Data that cannot be used. The message names file, line and the way out."""


@dataclass(frozen=True)
class Row:
    """One row and where it stood. `number`: line of a text file or row of a table, from 1.

    `subset`: the part of the source it belongs to, such as "helpful-base"; None where it has none.
    """

    file: str
    number: int
    values: dict
    subset: str | None = None

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Source:
    """Everything read. `splits`: "train", and "validation" and "test" where the source has them.

    `files` says what was read: name, rows, sha256. Demonstrations and prompts of their own come
    with the bundled world only.
    """

    splits: Mapping[str, Sequence[Row]]
    files: list[dict]
    demonstrations: Sequence[Row] = ()
    prompts: dict[str, Sequence[Row]] = field(default_factory=dict)


def read_source(source: str) -> Source:
    """All rows of `bundled`, `bundled:control`, `hub:NAME[:SUBSET]` or `path:FILE_OR_FOLDER`.

    After `bundled:` stands whose labels: those of an annotator with another taste (`DOSES`).
    Raises SettingsError for a source of another kind, DataError for one that cannot be read.
    """
    kind, _, rest = source.partition(":")
    if source == "bundled" or (kind == "bundled" and rest in DOSES):
        return _read_bundled(rest)
    if kind == "hub" and rest:
        return _read_hub(*_hub_parts(rest))
    if kind == "path" and rest:
        return _read_path(Path(rest).expanduser())
    known = [*EXAMPLES, f"path:{source}"] if Path(source).expanduser().exists() else EXAMPLES
    raise unknown("data source", source, known)


# ---------------------------------------------------------------------------------- three kinds


def _read_bundled(taste: str) -> Source:
    files: list[dict] = []

    def rows(name: str) -> Stored[Row]:
        return Stored.of(_read_file(bundled_folder(), f"{name}.jsonl.gz", files))

    def pairs(split: str) -> Stored[Row]:
        if taste in ("", "control"):  # these labels are in files
            return rows(f"{taste or 'pairs'}-{split}")
        return Stored.of(_label_again(rows(f"pairs-{split}"), taste, split))

    return Source(
        splits={split: pairs(split) for split in SPLITS},
        files=files,
        demonstrations=rows("demonstrations"),
        prompts={kind: rows(f"prompts-{kind}") for kind in ("train", "validation", "evaluation")},
    )


def _label_again(rows: Iterable[Row], taste: str, split: str) -> Iterator[Row]:
    """The same pairs, their labels drawn anew, each from the chance that this annotator gives."""
    luck, annotator = Random(f"{taste} {split}"), with_taste(DOSES[taste])
    for row in rows:
        one, other = row.values["chosen"], row.values["rejected"]
        prompt, marker, liked = one.rpartition(ASSISTANT)
        reply = other.rpartition(ASSISTANT)[2]
        if luck.random() > preference_probability(prompt + marker, liked, reply, annotator):
            one, other = other, one
        yield replace(row, values={"chosen": one, "rejected": other})


def _read_path(path: Path) -> Source:
    files: list[dict] = []
    if not path.is_dir():  # one file is one pool, whatever its name says
        return Source({"train": Stored.of(_read_file(path.parent, path.name, files))}, files)
    found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if not found:
        raise DataError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    names = [file.relative_to(path).as_posix() for file in found]
    splits = _gather((_split_of(name), _read_file(path, name, files)) for name in names)
    if "train" not in splits:  # nothing to train on but the other splits: cut them up ourselves
        splits = {"train": Stored.of(chain.from_iterable(splits.values()))}
    return Source(splits, files)


def _read_hub(name: str, subsets: list[str | None]) -> Source:
    """A hub dataset, or a local folder with the layout of one."""
    files: list[dict] = []
    splits = _gather(
        (_split_of(split), _read_table(table, f"{name} {subset or 'all'} {split}", subset, files))
        for subset in subsets
        for split, table in _load_hub(name, subset).items()
    )
    if "train" not in splits:
        raise DataError(f"{name} has no train split, only {', '.join(splits)}")
    return Source(splits, files)


def _gather(parts: Iterable[tuple[str, Iterable[Row]]]) -> dict[str, Stored[Row]]:
    """The rows of all parts by the split that each is for."""
    writers: dict[str, Writer[Row]] = defaultdict(Writer)
    for split, rows in parts:
        writer = writers[split]
        for row in rows:
            writer.append(row)
    return {split: writer.stored() for split, writer in writers.items()}


def _split_of(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "train")


def _hub_parts(rest: str) -> tuple[str, list[str | None]]:
    """Name and subsets: the one asked for, else all that are known, else None for the whole."""
    name, _, subset = rest.partition(":")
    known = list(HH_SUBSETS) if name == HH else []
    if Path(name).is_dir():
        known = sorted(p.name for p in Path(name).iterdir() if p.is_dir())
    if subset and known and subset not in known:
        raise unknown(f"subset of {name}", subset, known)
    if subset:
        return name, [subset]
    # one by one, so that rows know theirs: helpful and harmless pairs are reported apart
    return name, [s for s in HH_SUBSETS if s in known] or [None]


def _load_hub(name: str, subset: str | None) -> dict:
    """Split -> rows."""
    # only this kind of source needs it, and it is slow to import
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError

    reason = None if Path(name).is_dir() else runtime.unreachable()
    offline = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = offline or bool(reason)  # then its cache, without retries
    try:
        return load_dataset(name, data_dir=subset)
    except (OSError, ValueError, DatasetsError) as error:
        if reason:
            raise DataError(
                f"{name} is not in the cache of `datasets`, and {reason}. Without network: "
                "data.source=path:FILE for pairs on disk, data.source=bundled for the world that "
                "comes with the project, or load it once on a machine with network and copy its "
                "HF_HOME (then HF_HUB_OFFLINE=1 works)"
            ) from error
        raise DataError(f"cannot load {name}{f', {subset}' if subset else ''}: {error}") from error
    finally:
        config.HF_HUB_OFFLINE = offline


def _read_table(
    table: Iterable[dict], label: str, subset: str | None, files: list[dict]
) -> Iterator[Row]:
    """Rows of a hub dataset as they are read; at their end, what was read is added to `files`."""
    name = label.rpartition("/")[2]
    number, digest = 0, hashlib.sha256()
    for number, values in enumerate(table, 1):
        digest.update(json.dumps(values, sort_keys=True).encode())
        yield Row(name, number, values, subset)
    files.append({"name": name, "rows": number, "sha256": digest.hexdigest()})


# ---------------------------------------------------------------------------------------- files


def _read_file(folder: Path, name: str, files: list[dict]) -> Iterator[Row]:
    """Rows of one file as they are read; at its end, what was read is added to `files`."""
    path, parent = folder / name, Path(name).parent.as_posix()
    if not path.is_file():
        raise DataError(f"{path} does not exist. {_nearest_file(path)}")
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: pairs are read from files that end in {', '.join(SUFFIXES)}")
    read = _parquet_rows if name.endswith(".parquet") else _json_rows
    rows = 0
    for number, values in read(path):
        rows += 1
        yield Row(name, number, values, subset=None if parent == "." else parent)
    if not rows:
        raise DataError(f"{path} is empty: it needs one preference pair a line")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    files.append({"name": name, "rows": rows, "sha256": digest.hexdigest()})


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        try:
            yield from file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is no complete gzip file ({error}): fetch it anew") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.removesuffix(b"\n"))
        except ValueError as error:  # UnicodeDecodeError is one too
            hint = "each line holds one JSON object"
            raise DataError(f"{path}, line {number}: not JSON ({error}); {hint}") from error
        if not isinstance(values, dict):
            raise DataError(
                f"{path}, line {number}: a JSON {type(values).__name__} where an object like "
                '{"chosen": ..., "rejected": ...} is expected'
            )
        yield number, values


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}): fetch it anew") from error


def _nearest_file(path: Path) -> str:
    """A sentence that helps who mistyped a path."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names: list[str] = []
    with contextlib.suppress(PermissionError):  # a folder that may not be listed has no hints in it
        names = [p.name for p in folder.iterdir() if p.is_dir() or p.name.endswith(SUFFIXES)]
    wanted = path.relative_to(folder).parts[0]
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)
    there = f"the nearest in {folder.resolve()} is {close[0]}" if close else "nothing is there yet"
    return f"Give an existing file or folder as data.source=path:... ({there})"
