"""One bibliography: all that the chapters cite, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_lib.report import references

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def test_every_paper_that_a_chapter_cites_is_listed_and_no_other() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("*.ipynb"))
    assert set(re.findall(r"arXiv:(\d{4}\.\d{5})", text)) == set(references.ARXIV)
    for line in references.PRINTED:
        surname = references._surname(line).split(".")[0].split(",")[0]
        assert surname in text.lower(), line


def test_the_list_is_in_the_order_of_the_authors() -> None:
    lines = references.markdown().splitlines()
    names = [re.sub(r"^- (?:[A-Z]\. )+", "", line)[:4] for line in lines]
    assert names[0] == "Ahma"
    assert names == sorted(names)
    assert len(lines) == len(references.ARXIV) + len(references.PRINTED)
    assert all(re.search(r"(19|20)\d\d", line) and line.endswith(".") for line in lines)
