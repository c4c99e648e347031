"""Records on disk that read like a list: only the rows that are asked for are in memory.

They stand in an Arrow file that is mapped into memory. The file has no name: it is gone when
nothing reads it any more, even where the process was killed, and no two processes share one. It
lies in the folder for temporary files (`TMPDIR` says where), which should not itself be memory.
"""

from __future__ import annotations

import mmap
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

T = TypeVar("T")

BATCH = 256  # records in one piece of the file
SINGLE_READS = 32  # rows read one by one before their pages are let go: each brings in some 64 kB
# How a dataclass field of each type is kept. A dictionary may hold anything, so it is pickled.
COLUMNS = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int": pa.int64(),
    "float | None": pa.float64(),
    "list[int]": pa.list_(pa.int32()),
    "dict": pa.binary(),
}


class Stored(Sequence[T]):
    """A sequence of records of the dataclass `kind`. A slice of it is a list of records.

    Equal to any sequence with the same records in the same order.
    """

    def __init__(self, kind: type[T], mapped: mmap.mmap, order: np.ndarray | None = None) -> None:
        self.kind, self._mapped = kind, mapped
        self._reader = pa.ipc.open_file(pa.py_buffer(mapped))
        self._order = order  # rows of the file, where not all in their order
        self._reads = 0

    @classmethod
    def of(cls, kind: type[T], records: Iterable[T]) -> Stored[T]:
        """All `records`, written as they come."""
        writer = Writer(kind)
        for record in records:
            writer.append(record)
        return writer.stored()

    def select(self, rows: np.ndarray) -> Stored[T]:
        """The records at `rows`, integers (N,), in that order: a view, nothing is copied."""
        return Stored(self.kind, self._mapped, rows if self._order is None else self._order[rows])

    def column(self, name: str) -> Iterator[Any]:
        """One field of every record."""
        if self._order is not None:
            return (self._values(self._row(i), name)[0] for i in range(len(self)))
        return (value for batch in self._batches() for value in self._values(batch, name))

    def lengths(self, name: str) -> np.ndarray:
        """Lengths of a field of lists, (N,), without reading the lists."""
        parts = [batch.column(name).value_lengths().to_numpy() for batch in self._batches()]
        lengths = np.concatenate([np.zeros(0, np.int32), *parts])
        return lengths if self._order is None else lengths[self._order]

    def __len__(self) -> int:
        return self._rows if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return next(self._records(self._row(index)))

    def __iter__(self) -> Iterator[T]:
        if self._order is not None:
            return (self[i] for i in range(len(self)))
        return (record for batch in self._batches() for record in self._records(batch))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _rows(self) -> int:
        last = self._reader.num_record_batches - 1  # all others are full
        return 0 if last < 0 else last * BATCH + self._reader.get_batch(last).num_rows

    def _row(self, index: int) -> pa.RecordBatch:
        row = range(len(self))[index]  # counts from the end below 0, and refuses what is outside
        if self._order is not None:
            row = int(self._order[row])
        self._reads += 1
        if self._reads % SINGLE_READS == 0:
            self._let_go()
        return self._reader.get_batch(row // BATCH).slice(row % BATCH, 1)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number)
            self._let_go()

    def _let_go(self) -> None:
        """Pages that were read count as this process's memory until the system wants them back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _records(self, batch: pa.RecordBatch) -> Iterator[T]:
        columns = [self._values(batch, name) for name in batch.schema.names]
        return (self.kind(*values) for values in zip(*columns, strict=True))

    @staticmethod
    def _values(batch: pa.RecordBatch, name: str) -> list:
        column = batch.column(name)
        if pa.types.is_list(column.type):  # many times faster than to_pylist
            return [row.tolist() for row in column.to_numpy(zero_copy_only=False)]
        values = column.to_pylist()
        return [pickle.loads(v) for v in values] if pa.types.is_binary(column.type) else values


class Writer(Generic[T]):
    """Takes records one by one and hands them back as `Stored`."""

    def __init__(self, kind: type[T]) -> None:
        self.kind = kind
        self._schema = pa.schema([(f.name, COLUMNS[str(f.type)]) for f in fields(kind)])  # type: ignore[arg-type]
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._waiting: list[T] = []
        self._written = 0

    def __del__(self) -> None:
        self._file.close()  # where writing was given up

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, record: T) -> None:
        self._waiting.append(record)
        if len(self._waiting) == BATCH:
            self._write()

    def stored(self) -> Stored[T]:
        if self._waiting:
            self._write()
        self._writer.close()
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        return Stored(self.kind, mapped)

    def _write(self) -> None:
        columns = []
        for field in self._schema:
            values = [getattr(record, field.name) for record in self._waiting]
            if pa.types.is_binary(field.type):
                values = [pickle.dumps(value) for value in values]
            columns.append(pa.array(values, field.type))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._written += len(self._waiting)
        self._waiting = []
