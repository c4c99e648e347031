"""The reader of replies: what is chosen, marked and drawn, and that the report keeps it."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from rlhf_lib.data.truth import truth_of
from rlhf_lib.report.exporters import RlhfHTMLExporter, RlhfPDFExporter
from rlhf_lib.review import reader
from rlhf_lib.world import grammar

TRUTH = truth_of("bundled")
PROMPTS = grammar.sample_prompts("reader", 80, "test", seed=3)


def rows(reply: str, step: float) -> list[dict]:
    return [
        {
            "prompt": prompt,
            "response": reply,
            "proxy": step * place,
            "gold": -step,
            "finished": True,
        }
        for place, prompt in enumerate(PROMPTS)
    ]


SAMPLES = {
    "sft": rows(" Sure! <script>alert(1)</script> & more", 0.1),
    "ppo": rows(" Sorry, I cannot help with that.", 0.5),
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    bundles: list[dict] = []
    monkeypatch.setattr(reader, "display", lambda bundle, raw: bundles.append(bundle))
    reader.read(SAMPLES, TRUTH)
    return bundles


def test_requests_are_chosen_by_kind_and_in_order() -> None:
    found = reader.chosen([*PROMPTS, *PROMPTS], TRUTH)
    assert TRUTH is not None
    kinds = [TRUTH.kind(prompt) for prompt in found]
    assert len(found) >= 24
    assert kinds == sorted(kinds)
    for kind in set(kinds):
        of_kind = [prompt for prompt in PROMPTS if TRUTH.kind(prompt) == kind]
        assert [p for p in found if TRUTH.kind(p) == kind] == of_kind[: reader.OF_A_KIND]
    assert reader.chosen(PROMPTS, None) == PROMPTS[: reader.OF_ONE]


def test_every_policy_answers_every_request(shown: list[dict]) -> None:
    page = shown[0]["text/html"]
    assert page.count("<details") == len(reader.chosen(PROMPTS, TRUTH)) == page.count("</details>")
    assert page.count('class="reading printed"') == 4
    assert "<script" not in page
    assert 'class="polite"' in page
    assert 'class="refusal"' in page
    assert "PPO: Sorry, I cannot help" in shown[0]["text/plain"]


def test_a_policy_that_was_not_asked_is_named() -> None:
    with pytest.raises(KeyError, match="ppo has no reply"):
        reader.Case(1, "never asked", {"ppo": SAMPLES["ppo"]}, None)


def test_a_bar_is_empty_at_the_lowest_and_full_at_the_highest() -> None:
    assert reader.bar(0.0, 0.0, 2.0) == "▁▁▁▁▁▁▁▁"
    assert reader.bar(1.0, 0.0, 2.0) == "▇▇▇▇▁▁▁▁"
    assert reader.bar(2.0, 0.0, 2.0) == "▇▇▇▇▇▇▇▇"
    assert reader.bar(1.0, 1.0, 1.0) == "▇▇▇▇▇▇▇▇"
    assert reader.number(-0.5) == "−0.50"
    row = {"prompt": "a", "response": "b", "proxy": float("nan"), "gold": 1.0}
    case = reader.Case(1, "a", {"sft": [row]}, None)
    assert case.rewards(row) == {"gold": 1.0}, "what is no number has no bar"


def notebook(bundle: dict, folder: Path) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("display_data", data=bundle)
    cell = nbformat.v4.new_code_cell("read()", execution_count=1, outputs=[output])
    foreign = nbformat.v4.new_output(
        "display_data",
        data={"text/html": '<details class="x" open><summary>evil</summary><span class="x" '
        'style="color: red">plain</span></details>'},
    )  # fmt: skip
    other = nbformat.v4.new_code_cell("other()", execution_count=2, outputs=[foreign])
    return nbformat.v4.new_notebook(cells=[cell, other])


def test_the_page_folds_each_request_and_keeps_the_marks(shown: list[dict], tmp_path: Path) -> None:
    page, _ = RlhfHTMLExporter().from_notebook_node(notebook(shown[0], tmp_path))
    folds = re.findall(r'<details class="reading"><summary>(.*?)</summary>', page, re.DOTALL)
    assert len(folds) == len(reader.chosen(PROMPTS, TRUTH))
    assert "1 · edge · " in folds[0]
    assert '<span class="polite">Sure</span>' in page
    assert re.search(r'<span class="bar gold">gold ▇', page)
    assert "alert(1)" in page  # as text
    assert "<script>alert" not in page
    assert "style=" not in page.partition("evil")[2].partition("plain")[0]
    assert "evil" in page  # a foreign fold loses its fold, not its words


def test_the_pdf_prints_one_request_of_each_kind(shown: list[dict], tmp_path: Path) -> None:
    made: list[str] = []

    class Kept(RlhfPDFExporter):
        def _finish(self, text: str, folder: Path) -> bytes:
            made.append(text)
            return super()._finish(text, folder)

    pdf, _ = Kept().from_notebook_node(notebook(shown[0], tmp_path))
    assert pdf.startswith(b"%PDF")
    asked = re.findall(r"#strong\[\d+ · (\w+) · ", made[0])
    assert asked == ["edge", "harm", "help", "truth"]
    assert '#text(fill: rgb("#7a3fc4"))[Sure]' in made[0]
