"""A stage of a user's own that has no section of settings."""

from __future__ import annotations

from rlhf_lib.catalogue import Record
from rlhf_lib.runs import Work

RECORD = Record("mine", "Mine", runs="tests/study/own_stage.py:count", needs=("sft",))


def count(work: Work) -> dict:
    return {"counted": 1}
