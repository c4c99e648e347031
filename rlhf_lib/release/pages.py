"""The pages of a study, at an address that fsspec knows: s3://bucket/folder, a folder, memory://"""

from __future__ import annotations

from pathlib import Path

from rlhf_lib import files
from rlhf_lib.settings import Profile, UserError
from rlhf_lib.study import book


def check(address: str, only: str) -> None:
    """Raises UserError for what could not be delivered in the end."""
    if only:
        raise UserError("--deliver copies the pages of a whole study: leave --only out")
    files.check_address(address)


def deliver(profile: Profile, run_dir: Path, address: str) -> None:
    """The executed notebooks and the report."""
    report, notebooks = book.report_folder(profile, run_dir), book.notebook_folder(profile, run_dir)
    for folder in (notebooks, report):
        if folder.is_dir():
            files.deliver(folder, files.below(address, folder.name))
    print(f"delivered: {address}")
