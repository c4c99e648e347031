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


def test_what_stands_at_the_end_of_a_search_is_said_of_every_method() -> None:
    def trial(method: str, rate: float, steps: int, mean: float | None) -> dict:
        values = {f"{method}.learning_rate": rate, f"{method}.epochs": steps}
        found = {"rater": "gold", "mean": mean, "low": 0.0, "high": 1.0}
        return {"method": method, "values": values, **found}

    trials = [trial("ppo", 0.1, 2, 0.4), trial("ppo", 0.2, 4, 0.9), trial("ppo", 0.1, 8, 0.5)]
    trials += [trial("dpo", 0.2, 4, 0.8), trial("dpo", 0.1, 2, 0.7), trial("dpo", 0.4, 8, 0.6)]
    trials.append(trial("ppo", 0.8, 4, None))
    said = readme.searched(trials).splitlines()
    assert said[2].endswith("| learning_rate=0.1 epochs=8 gold 0.500 [0.000, 1.000] | "
                            "learning_rate (highest) |")  # fmt: skip
    assert said[3].endswith("| no |")
    assert len(readme.searched(trials[:1]).splitlines()) == 3, "one trial is the best and the next"
