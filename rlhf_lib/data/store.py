"""Records on disk that read like a list: only the rows that are asked for are in memory.

They stand pickled in a file that is mapped into memory. The file has no name: it is gone when
nothing reads it any more, even where the process was killed, and no two processes share one. It
lies in the folder for temporary files (`TMPDIR` says where), which should not itself be memory.
"""

from __future__ import annotations

import mmap
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")

READS = 32  # records that are read before their pages are let go: each brings in some 64 kB


class Stored(Sequence[T]):
    """A sequence of records. A slice of it is a list of records."""

    def __init__(self, mapped: mmap.mmap, starts: np.ndarray) -> None:
        self._mapped, self._starts = mapped, starts
        self._reads = 0

    @classmethod
    def of(cls, records: Iterable[T]) -> Stored[T]:
        """All `records`, written as they come."""
        writer: Writer[T] = Writer()
        for record in records:
            writer.append(record)
        return writer.stored()

    def select(self, rows: np.ndarray) -> Stored[T]:
        """The records at `rows`, integers (N,), in that order: a view, nothing is copied."""
        return Stored(self._mapped, self._starts[rows])

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._read(start) for start in self._starts[index]]
        return self._read(self._starts[index])

    def _read(self, start: int) -> T:
        self._reads += 1
        # pages that were read count as this process's memory until the system wants them back
        if self._reads % READS == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)
        return pickle.loads(memoryview(self._mapped)[start:])


class Writer(Generic[T]):
    """Takes records one by one and hands them back as `Stored`."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._starts = array("q")
        self._end = 0

    def __del__(self) -> None:
        self._file.close()  # where writing was given up

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, record: T) -> None:
        self._starts.append(self._end)
        self._end += self._file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL))

    def stored(self) -> Stored[T]:
        self._file.write(b"\0")  # no empty file can be mapped
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        return Stored(mapped, np.array(self._starts))
