"""The README says what the exported studies measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import readme

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_is_filled_from_the_exported_results() -> None:
    text = (ROOT / "README.md").read_text()
    named = {name for _, name, _ in readme.BLOCK.findall(text)}
    assert named == {path.name for path in (ROOT / "figures").iterdir()}
    assert readme.fill(text, ROOT / "figures") == text, "run: python -m rlhf_lib readme"


def test_a_block_without_its_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.results\.json"):
        readme.fill("<!-- results: nowhere -->\nold\n<!-- end -->", tmp_path)


def test_the_picture_and_every_local_link_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in readme.LINK.findall(text) if not link.startswith(("http", "#"))]
    assert links, "the README shows at least one picture"
    for link in links:
        assert (ROOT / link.split("#")[0]).exists(), link
