"""Where preference pairs come from: the bundled world, the hub, or files. Rows with their numbers.

What a row means is the business of `dialogues`; here it is a dictionary that knows its place, so
that every later complaint can name file and line.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from rlhf_lib import runtime
from rlhf_lib.data.store import Stored, Writer
from rlhf_lib.kernel import users
from rlhf_lib.runtime import bundled_folder
from rlhf_lib.settings import UserError, unknown
from rlhf_lib.world.grammar import ASSISTANT
from rlhf_lib.world.rewards import DOSES, preference_probability, with_taste

EXAMPLES = ("bundled", "bundled:control", "hub:Anthropic/hh-rlhf", "path:FILE_OR_FOLDER")
TEXTS = (".jsonl", ".csv", ".tsv", ".json")
SUFFIXES = (*TEXTS, *(f"{suffix}.gz" for suffix in TEXTS), ".parquet")
HH = "Anthropic/hh-rlhf"
NO_DATA = (".", "__MACOSX", "red-team-attempts")  # how names of files and folders begin
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    "training": "train", "val": "validation", "valid": "validation", "dev": "validation",
    "eval": "test", "evaluation": "test", "testing": "test", "heldout": "test",
} | {s: s for s in SPLITS}  # fmt: skip


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

    After `bundled:` stands whose labels: those of an annotator with another taste (`DOSES`). After
    `path:` several files have commas between them, or are a pattern such as `path:more/*.jsonl`.
    Raises SettingsError for a source of another kind, DataError for one that cannot be read.
    """
    kind, _, rest = source.partition(":")
    if source == "bundled" or (kind == "bundled" and rest in DOSES):
        return _read_bundled(rest)
    if kind == "hub" and rest:
        return _read_hub(*_hub_parts(rest))
    if kind == "path" and rest:
        return _read_path(rest)
    known = [*EXAMPLES, f"path:{source}"] if users(source).exists() else EXAMPLES
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


def _read_path(rest: str) -> Source:
    path, files = users(rest), []
    if not path.exists() and ("," in rest or "*" in rest):
        named = [(file.parent, file.name) for file in _several(rest)]
    elif path.is_dir():
        named = [(path, file.relative_to(path).as_posix()) for file in _data_files(path)]
    else:  # one file is one pool, whatever its name says
        return Source({"train": Stored.of(_read_file(path.parent, path.name, files))}, files)
    splits = _gather((_split_of(name), _read_file(folder, name, files)) for folder, name in named)
    if "train" not in splits:  # nothing to train on but the other splits: cut them up ourselves
        splits = {"train": Stored.of(chain.from_iterable(splits.values()))}
    return Source(splits, files)


def _several(rest: str) -> list[Path]:
    """The files of a list with commas between them, or of a pattern."""
    found: list[Path] = []
    for part in filter(None, rest.split(",")):
        path = users(part)
        matched = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        if not matched:
            raise DataError(f"no file matches {path}")
        found += matched
    return found


def _data_files(folder: Path) -> list[Path]:
    """What a folder holds of data. Hidden files are none, nor what a Mac leaves beside files, nor
    the attacks in a clone of the HH repository; `.json` counts where there is nothing else, for it
    holds settings as often.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(NO_DATA) for part in path.relative_to(folder).parts)
    ]
    tables = [path for path in found if not path.name.endswith((".json", ".json.gz"))]
    if not found:
        raise DataError(f"{folder} holds no file that ends in {', '.join(SUFFIXES)}")
    return tables or found


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
    read = _reader(path)
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


# what a file begins with that is not what its name says
STRANGE = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run git lfs pull",
    b"\xff\xfe": "is saved as UTF-16: save it as UTF-8",
    b"\xfe\xff": "is saved as UTF-16: save it as UTF-8",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"BZh": "is packed by bzip2: unpack it",
    b"\xfd7zXZ": "is packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it",
    b"<!doctype html": "is a web page, not the file that it leads to: fetch the file itself",
    b"<html": "is a web page, not the file that it leads to: fetch the file itself",
    b"<?xml": "is XML: write one JSON object a line",
}
PARQUET = b"PAR1"
GZIP = b"\x1f\x8b"


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, dict]]]:
    """What reads the rows of a file. Raises DataError for one that is not what its name says."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        with path.open("rb") as file:
            _check_beginning(path, file.read(64))
        return _parquet_rows
    with _opened(path) as file:
        try:
            head = file.read(64)
        except NOT_GZIP as error:
            raise _damaged(path, error) from error
    _check_beginning(path, head)
    if suffix in (".csv", ".tsv"):
        return _table_rows
    whole = suffix == ".json" and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    return _array_rows if whole else _json_rows


def _check_beginning(path: Path, head: bytes) -> None:
    begins = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, what in STRANGE.items():
        if begins.lower().startswith(start.lower()):
            raise DataError(f"{path} {what}")
    named = path.name.removesuffix(".gz")
    parquet = named.endswith(".parquet")
    if head.startswith(PARQUET) and not parquet:
        raise DataError(f"{path} is a Parquet file: name it .parquet")
    if head.startswith(GZIP) and parquet:
        raise DataError(f"{path} is packed by gzip: unpack it, Parquet is read as it is")
    if begins.startswith((b"{", b"[")) and (parquet or named.endswith((".csv", ".tsv"))):
        raise DataError(f"{path} holds JSON, not a table: name it .jsonl, or .json for one array")
    if b"\0" in head and not head.startswith(PARQUET):
        raise DataError(f"{path} is no text (UTF-16 perhaps): save it as UTF-8")


NOT_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is no complete gzip file ({error}): fetch it anew")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where they are packed, whatever its name says."""
    with path.open("rb") as file:
        packed = file.peek(2).startswith(GZIP)  # type: ignore[attr-defined]
        with gzip.open(file) if packed else file as unpacked:
            yield unpacked  # type: ignore[misc]


def _lines(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        try:
            yield from file
        except NOT_GZIP as error:
            raise _damaged(path, error) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        yield number, _as_object(path, place, _parsed(path, place, line.removesuffix(b"\n")))


def _array_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of one JSON array."""
    for number, values in enumerate(_parsed(path, "the whole", b"".join(_lines(path))), 1):
        yield number, _as_object(path, f"row {number}", values)


def _parsed(path: Path, place: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        hint = "each line holds one JSON object"
        if text.strip() in (b"[", b"{"):
            hint = "it looks like one array or object over several lines: name it .json"
        raise DataError(f"{path}, {place}: not JSON ({error}); {hint}") from error


def _as_object(path: Path, place: str, values: Any) -> dict:
    if not isinstance(values, dict):
        raise DataError(
            f"{path}, {place}: a JSON {type(values).__name__} where an object like "
            '{"chosen": ..., "rejected": ...} is expected'
        )
    return values


def _table_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows below a head line; an empty cell is no value."""
    tab = ".tsv" in path.name
    codecs = chain(["utf-8-sig"], repeat("utf-8"))  # a byte order mark may begin the file
    texts = (line.decode(codec) for line, codec in zip(_lines(path), codecs, strict=False))
    try:
        reader = csv.DictReader(texts, delimiter="\t" if tab else ",", strict=True)
        for number, values in enumerate(reader, 1):
            extra = values.pop(None, None)  # type: ignore[call-overload]
            if extra:
                raise DataError(
                    f"{path}, row {number}: more cells than the head line has names; a cell with "
                    "a comma or a line break stands in quotes"
                )
            yield number, {key: value for key, value in values.items() if value != ""}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error


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
