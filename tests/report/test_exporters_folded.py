"""What a reader opens or turns: folded solutions, and widgets with a static twin."""

from __future__ import annotations

from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rlhf_lib.report import exporters
from rlhf_lib.report.cleaning import WIDGET
from rlhf_lib.report.exporters import RlhfPDFExporter
from tests.report.cells import page

SOLUTION = """<details><summary>Solution</summary>

Because $x_1$ is **two**, in a table or a link to [the task](#task):

```python
answer = 1 < 2
```

| a |
|---|
| 7 |

</details>"""


@pytest.fixture
def typst_source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: cells -> the source of their PDF."""
    monkeypatch.setattr(
        exporters, "_compile_typst", lambda folder: (folder / "report.typ").read_text()
    )

    def source(*cells: Any) -> Any:
        return RlhfPDFExporter().from_notebook_node(new_notebook(cells=list(cells)))[0]

    return source


def solution(text: str = SOLUTION) -> Any:
    return new_markdown_cell(text, metadata={"tags": ["solution"]})


def test_a_solution_is_folded_on_the_page() -> None:
    body = page(new_markdown_cell("# T\n\n## Task\n\nSay a number."), solution())
    before, _, rest = body.partition('<details class="solution">')
    folded, end, _ = rest.partition("</details>")
    assert "Say a number" in before
    assert end
    assert folded.count("Solution") == 1, "the summary, and not once more in the text"
    for part in ("<strong>two</strong>", "<msub>", 'task">the task</a>', "<td", "answer"):
        assert part in folded


def test_a_solution_may_hold_no_markup_of_its_own() -> None:
    hostile = SOLUTION.replace("Because", "<script>alert(1)</script> <b onclick=x>Because</b>")
    body = page(solution(hostile))
    assert "<script" not in body
    assert "onclick" not in body
    assert body.count("<details") == body.count("</details>") == 1


def test_the_pdf_has_the_task_and_not_its_solution(typst_source: Any) -> None:
    source = typst_source(
        new_markdown_cell("Say a number."), solution(), new_markdown_cell("Next.")
    )
    assert "Say a number." in source
    assert "Next." in source
    assert "two" not in source
    assert "Solution" not in source


def test_prose_without_the_tag_is_not_folded(typst_source: Any) -> None:
    plain = new_markdown_cell(SOLUTION)
    assert "<details" not in page(plain)
    assert "two" in typst_source(plain)


def widget(**twin: str) -> Any:
    data = {WIDGET: {"model_id": "x"}, "text/plain": "VBox(children=())", **twin}
    metadata = {"caption": "The twin.", "kind": "table"} if twin else {}
    output = new_output("display_data", data, metadata=metadata)
    return new_code_cell("1", execution_count=1, outputs=[output])


def test_of_a_widget_the_report_shows_the_twin() -> None:
    body = page(widget(**{"text/html": "<table><tr><td>first page</td></tr></table>"}))
    assert "first page" in body
    assert "Table 1." in body
    assert "VBox" not in body


def test_a_widget_without_a_twin_leaves_nothing() -> None:
    body = page(new_markdown_cell("Before."), widget())
    assert "VBox" not in body
    assert 'class="output' not in body
