"""Files of a run, on disks and on mounts that know less than disks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rlhf_lib import files
from rlhf_lib.files import read_jsonl, write_json, write_jsonl
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.settings import UserError


def stage_of(root: Path) -> Stage:
    return Run.open("smoke", 3, root).stage("sft", {}, {}, "rlhf_lib.methods.sft")


def refusing(number: int):
    """A call to the system that ends with this error."""

    def call(*args: object, **how: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_json_lines_come_back(tmp_path: Path) -> None:
    rows = [{"text": "ü\u2028\n", "number": 1.5}, {}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_json_cannot_hold_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/rows\.json cannot hold this"):
        write_json(tmp_path / "rows.json", {"mean": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOTSUP, errno.EPERM])
def test_without_renames_of_folders_a_copy_is_published_done_last(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    copy = shutil.copy
    monkeypatch.setattr(Path, "rename", refusing(number))
    monkeypatch.setattr(shutil, "copy", lambda *a: (copied.append(a[0].name), copy(*a))[1])
    stage = stage_of(tmp_path).ensure(lambda work: {"answer": 42})
    assert stage.done
    assert stage.result()["answer"] == 42
    assert copied == ["DONE"], "after all else"
    assert not list(stage.path.parent.glob("*.partial"))


def test_another_fault_of_a_rename_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", refusing(errno.EINVAL))
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        stage_of(tmp_path).ensure(lambda work: {})


def test_what_is_discarded_is_emptied_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drive that keeps what is deleted then keeps nothing of any size."""
    sizes = {}

    def trash(folder: Path) -> None:
        sizes.update({p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file()})

    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "deep" / "weights").write_text("large")
    (tmp_path / "elsewhere").write_text("of somebody else")
    (tmp_path / "old" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(shutil, "rmtree", trash)
    files.discard(tmp_path / "old")
    assert sizes["weights"] == 0
    assert (tmp_path / "elsewhere").read_text() == "of somebody else"


# ---------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("locks", [True, False])
def test_one_works_and_who_waits_is_told_for_whom(
    locks: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOTSUP))
    monkeypatch.setattr(files, "PATIENCE", 0.3)
    built = []

    def build(work: Work) -> dict:
        built.append(1)
        time.sleep(files.PATIENCE + 1)
        return {"answer": len(built)}

    with ThreadPoolExecutor(3) as pool:
        stages = list(pool.map(lambda _: stage_of(tmp_path).ensure(build), range(3)))
    assert [stage.result()["answer"] for stage in stages] == [1] * 3
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all(f"is worked on by process {os.getpid()} on " in line for line in said)
    assert all(f", since {time.strftime('%Y-')}" in line for line in said)
    assert not list(tmp_path.glob("smoke/seed-3/*.holder"))


HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
from rlhf_lib import files

def refuse(*args):
    raise OSError(errno.ENOTSUP, "no locks")

fcntl.flock, files.LEASE = refuse, 1.0
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_without_locks_a_machine_that_is_gone_stands_in_nobody_s_way_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hosted session is cut off while it holds the lock, and the next one has another name."""
    path = tmp_path / "sft.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
    (lease,) = tmp_path.glob("*.lease")
    record = lease.read_bytes()
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOTSUP))
    monkeypatch.setattr(files, "LEASE", 1.0)
    began = time.monotonic()
    with files.locked(path):
        assert time.monotonic() - began < 30
        assert lease.read_bytes() != record


@pytest.mark.parametrize("locks", [True, False])
def test_who_was_taken_for_dead_writes_nothing_more(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept longer than its lease wakes up beside the one that took over."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOTSUP))
    stage = stage_of(tmp_path)
    holder = stage.path.with_name(f"{stage.path.name}.holder")

    def taken_over(work: Work) -> dict:
        work.log(0, 1, {})
        holder.write_text("process 2 on another, since today")
        work.log(1, 1, {})
        return {}

    if locks:  # the system's own is never lost
        assert stage.ensure(taken_over).done
        return
    with pytest.raises(UserError, match="worked on by another process now, which took this one"):
        stage.ensure(taken_over)
    assert not stage.done
    lines = (stage.partial / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1, "what the other has is left as it is"
    assert holder.read_text() == "process 2 on another, since today"
    for write in (
        lambda work: work.part("rows", lambda: holder.write_text("process 2")),
        lambda work: work.kept("rows", lambda: torch.full((1,), holder.write_text("process 2"))),
        lambda work: {"of the other": holder.write_text("process 2")},
    ):
        with pytest.raises(UserError, match="worked on by another process now"):
            stage.ensure(write)
        assert {path.name for path in stage.partial.iterdir()} <= {
            "metrics.jsonl", "config.json", "env.json"
        }  # fmt: skip


@pytest.mark.parametrize("address", ["/proc/x", "data:,x", "nowhere://x"])
def test_an_address_that_cannot_be_written_is_said_at_once(address: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        files.check_address(address)


def test_an_address_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    files.check_address(f"{tmp_path}/new")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "new" / "old").write_text("x")
    files.check_address(f"{tmp_path}/new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["old"]


# ------------------------------------------------------------------------------------- mishaps


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOTCONN, "can be written no more (Transport endpoint is not connected): mount"),
        (errno.EIO, "can be written no more (Input/output error): mount its drive again"),
        (errno.EROFS, "can be written no more"),
        (errno.ENOSPC, "no space is left where"),
    ],
)
def test_a_mishap_of_the_disk_is_one_sentence_and_the_run_goes_on_later(
    number: int, said: str, tmp_path: Path
) -> None:
    stage = stage_of(tmp_path)

    def drops(work: Work) -> dict:
        work.part("rows", lambda: [1, 2])
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError) as raised:
        stage.ensure(drops)
    assert said in str(raised.value)
    assert "the same command then goes on from the last state" in str(raised.value)
    stage.ensure(lambda work: {"rows": work.part("rows", lambda: [])})
    assert stage.result()["rows"] == [1, 2], "what was kept is found again"


def test_a_folder_that_vanishes_is_said(tmp_path: Path) -> None:
    stage = stage_of(tmp_path / "drive")

    def drops(work: Work) -> dict:
        (tmp_path / "drive").rename(tmp_path / "unmounted")
        work.log(0, 1, {})
        return {}

    with pytest.raises(UserError, match=r"can be written no more \(No such file or directory\)"):
        stage.ensure(drops)


def test_other_errors_of_files_stay_what_they_are(tmp_path: Path) -> None:
    def reads(work: Work) -> dict:
        (tmp_path / "none").read_text()
        return {}

    with pytest.raises(FileNotFoundError, match="none"):
        stage_of(tmp_path).ensure(reads)


def test_a_mount_that_says_nothing_of_its_size_is_no_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < files.free_space(tmp_path) < sys.maxsize
    nothing = shutil._ntuple_diskusage(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: nothing)
    assert files.free_space(tmp_path) == sys.maxsize
