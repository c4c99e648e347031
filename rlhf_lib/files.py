"""Files of a run: nobody sees half of one, two writers take turns, and a disk's mishaps are said.

Some folders are mounts, such as a cloud drive in a hosted notebook: it may know no locks, rename no
folder, keep what is deleted (and count it), and drop while it is written to.
"""

from __future__ import annotations

import _thread
import errno
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout
from fsspec.core import url_to_fs

from rlhf_lib.settings import UserError

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
NO_RENAMES = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT}
GONE = {errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EROFS}
IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EACCES}  # no drive's fault
SPARE = 1 << 24  # bytes: a disk with less is full
PATIENCE = 1.0  # seconds that a lock is waited for in silence
PROBE = ".rlhf_lib"  # a file that is written and removed, to see that one can be
LEASE = 120.0  # seconds without a sign of life from its holder, then another takes the lock


def write_json(path: Path, value: object) -> None:
    """Raises UserError for what JSON cannot hold, numbers that are not finite among it."""
    replace_text(path, _json(path, value, indent=2))


def plain(value: dict) -> dict:
    """A value as it is read again from the JSON that it is written to."""
    return json.loads(json.dumps(value, default=float))


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


def publish(folder: Path, target: Path, last: str) -> None:
    """Give a finished folder its name: one rename, or a copy in which the file `last` comes last.

    What stands there without that file is no whole folder, and goes; with it, another process has
    made the same, and `folder` goes.
    """
    if (target / last).exists():
        discard(folder)
        return
    if target.exists():
        shutil.rmtree(target)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in NO_RENAMES:
            raise
        try:
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns(last))
            shutil.copy(folder / last, target)
        except shutil.Error as problem:  # it has no number: a list of what could not be copied
            raise unwritten(target.parent, problem) from problem
        discard(folder)


def unwritten(folder: Path, why: object) -> OSError:
    """The error for what could not be written there, as the system would have it."""
    if free_space(folder) < SPARE:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {why}")


def empty(folder: Path) -> None:
    """Leave the files in a folder without content: a drive that keeps them keeps nothing large."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there."""
    if folder.is_dir():
        empty(folder)
        shutil.rmtree(folder)


def deliver(folder: Path, address: str) -> None:
    """Copy a folder to an address that fsspec knows, such as s3://bucket/folder.

    Raises UserError where that cannot be written.
    """
    with _named(address, "written"):
        system, target = url_to_fs(address)
        system.makedirs(target, exist_ok=True)
        system.put(f"{folder}/", f"{target}/", recursive=True)


def fetch(address: str, path: Path) -> None:
    """The file of this name that has been delivered there before, if one has."""
    with _named(address, "read"):
        system, source = url_to_fs(address)
        if system.exists(f"{source}/{path.name}"):
            system.get_file(f"{source}/{path.name}", str(path))


def below(address: str, name: str) -> str:
    """The address of something in a folder."""
    return address + name if address.endswith("/") else f"{address}/{name}"


def check_address(address: str) -> None:
    """Raises UserError for one that cannot be written, before anything is computed for it."""
    with _named(address, "written"):
        system, target = url_to_fs(address)
        system.makedirs(target, exist_ok=True)
        system.pipe_file(f"{target}/{PROBE}", b"")
        system.rm_file(f"{target}/{PROBE}")


@contextmanager
def _named(address: str, done: str) -> Iterator[None]:
    """What goes wrong with an address, as one sentence that names it."""
    try:
        yield
    except (OSError, ImportError, ValueError, NotImplementedError) as error:
        raise UserError(f"{address} cannot be {done}: {error}") from error


def free_space(folder: Path) -> int:
    """Bytes that may still be written there; no bound where a mount does not say."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize


def mishap(error: OSError, folder: Path) -> str:
    """What befell the disk that `folder` is on, and the way out; empty where nothing did."""
    if error.errno in FULL:
        return f"no space is left where {folder} is written: make room{GOES_ON}"
    if error.errno in GONE or (error.errno not in IN_THE_WAY and not _is_there(folder)):
        why = error.strerror or str(error)
        return f"{folder} can be written no more ({why}): mount its drive again{GOES_ON}"
    return ""


GOES_ON = "; the same command then goes on from the last state that was saved"


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # a mount that has dropped
        return False


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock `path`. Who has to wait is told for whom, and since when.

    Yields a function that says whether it is still held: a lease is lost by who gives no sign of
    life, such as a machine that sleeps, and when it wakes its work is another's.
    """
    holder = path.with_suffix(".holder")
    lock = _lock(path, holder)
    me = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"

    def mine() -> bool:
        return not isinstance(lock, SoftFileLease) or _text(holder) == me

    try:
        holder.write_text(me)
        yield mine
    finally:
        with suppress(OSError):  # of a drive that has dropped
            if mine():
                holder.unlink()
        lock.release()


def _text(path: Path) -> str:
    """What a file says; nothing where it is gone, and its folder is not."""
    try:
        return path.read_text()
    except FileNotFoundError:
        if not _is_there(path.parent):
            raise
        return ""


def _lock(path: Path, holder: Path) -> BaseFileLock:
    """The lock, taken. Where a mount knows none, a file that is renewed for as long as it is held:
    that of a machine which is gone stands in nobody's way for long.
    """
    try:
        return _take(FileLock(path, fallback_to_soft=False), holder)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    lease = SoftFileLease(
        path.with_suffix(".lease"), lease_duration=LEASE, heartbeat_interval=LEASE / 6,
        on_compromise=lambda _: _give_way(path.stem),
    )  # fmt: skip
    return _take(lease, holder)


def _give_way(name: str) -> None:
    """This process was taken for dead, and another does its work: interrupt this one."""
    print(f"{name} is worked on by another process now: this one gave no sign of life", flush=True)
    _thread.interrupt_main()


def is_held(path: Path) -> bool:
    """Whether a process holds this lock now."""
    lease = path.with_suffix(".lease")
    if lease.exists():
        return time.time() - lease.stat().st_mtime < LEASE
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:  # it knows no locks, or cannot be written: then nobody here holds one
        return False


def _take(lock: BaseFileLock, holder: Path) -> BaseFileLock:
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        who = "another process"
        with suppress(OSError):
            who = holder.read_text() or who
        print(f"{holder.stem} is worked on by {who}: waiting for its result ...", flush=True)
        lock.acquire()
    return lock
