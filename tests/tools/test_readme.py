"""The README says what the exported studies measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools import readme

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)]+)\)")


def test_the_readme_is_filled_from_the_exported_results() -> None:
    text = (ROOT / "README.md").read_text()
    named = {name for _, kind, name, *_ in readme.BLOCK.findall(text) if kind == "results"}
    assert named == {path.parent.name for path in (ROOT / "figures").glob("*/results.json")}
    assert readme.fill(text, ROOT / "figures") == text, "run: python -m tools.readme"


def test_the_command_fills_a_file(tmp_path: Path) -> None:
    (tmp_path / "figures" / "laptop").mkdir(parents=True)
    results = (ROOT / "tests" / "made_up" / "gold.json").read_text()
    (tmp_path / "figures" / "laptop" / "results.json").write_text(results)
    path = tmp_path / "README.md"
    path.write_text("# Title\n<!-- results: laptop -->\nstale numbers\n<!-- end -->\nlast\n")
    readme.main(path, tmp_path / "figures")
    text = path.read_text()
    assert text.startswith("# Title\n<!-- results: laptop -->\n")
    assert text.endswith("<!-- end -->\nlast\n")
    assert "PPO and GRPO raised gold reward over SFT" in text
    assert "stale" not in text


def test_a_study_of_an_earlier_state_keeps_its_words_and_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "figures" / "laptop").mkdir(parents=True)
    results = json.loads((ROOT / "tests" / "made_up" / "gold.json").read_text()) | {"format": 0}
    (tmp_path / "figures" / "laptop" / "results.json").write_text(json.dumps(results))
    once = readme.fill("<!-- results: laptop -->\nold words\n<!-- end -->", tmp_path / "figures")
    assert f"{readme.EARLIER}\n\nold words\n" in once
    assert readme.fill(once, tmp_path / "figures") == once


def test_a_block_without_its_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.results\.json"):
        readme.fill("<!-- results: nowhere -->\nold\n<!-- end -->", tmp_path)


def test_the_picture_and_every_local_link_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in LINK.findall(text) if not link.startswith(("http", "#"))]
    assert links, "the README shows at least one picture"
    for link in links:
        assert (ROOT / link.split("#")[0]).exists(), link
