"""The tables of the docs are what their commands find today."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers.utils import logging

from tools import families, formats
from tools.blocks import write_block

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tool", [formats, families])
def test_a_page_says_what_its_command_finds(tool: object, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shutil.copy(ROOT / formats.PAGE, page)
    shown = logging.get_verbosity()
    try:
        tool.main(page)  # type: ignore[attr-defined]
    finally:
        logging.set_verbosity(shown)
    assert page.read_text() == (ROOT / formats.PAGE).read_text(), f"run python -m {tool.__name__}"


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- one: x -->\nold\n<!-- end -->\nb\n<!-- two: y -->\nkept\n<!-- end -->\n"
    )
    write_block(page, "one", "new \\1")
    assert page.read_text() == (
        "a\n<!-- one: x -->\n\nnew \\1\n\n<!-- end -->\nb\n<!-- two: y -->\nkept\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match="0 blocks 'three'"):
        write_block(page, "three", "")
