"""What helps a reader about: links to papers, ways between chapters, labels of folds, the menu."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf_lib.report.cleaning import ReportError
from rlhf_lib.report.exporters import RlhfHTMLExporter, merge
from tests.report.cells import SVG, code, page, shown


def test_a_paper_is_linked_wherever_prose_names_it() -> None:
    body = page(new_markdown_cell("As in (arXiv:1707.06347, eq. 7). Not arXiv:17."))
    link = '(<a\nhref="https://arxiv.org/abs/1707.06347">arXiv:1707.06347</a>, eq. 7).'
    assert " ".join(link.split()) in " ".join(body.split())
    assert body.count("arxiv.org") == 1


def test_what_a_model_said_makes_no_link() -> None:
    body = page(code(shown("text/plain", "see arXiv:1707.06347")))
    assert "arXiv:1707.06347" in body
    assert "arxiv.org" not in body


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("import torch\n\n# why\nx = 1 < 2", "x = 1 &lt; 2"),
        ("from a import (\n    b,\n    c,\n)\nfrom d import e\nshow(b)", "show(b)"),
        ("@decorated\ndef trial(lib):\n    return lib", "def trial(lib):"),
        ("import torch", "imports"),
        ("y = " + "ä" * 80, "y = " + "ä" * 59 + "…"),
    ],
)
def test_a_fold_says_what_it_holds(source: str, label: str) -> None:
    body = page(new_code_cell(source, execution_count=1))
    assert f"<summary>Code: <code>{label}</code></summary>" in body


@pytest.fixture
def book(tmp_path: Path) -> str:
    """A front page and three chapters."""
    paths = []
    for number, title in enumerate(("The front", "One *thing*", "Another", "The last")):
        path = tmp_path / f"{number}.ipynb"
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {title}\n\ntext")]), path)
        paths.append(path)
    nb = merge(paths)
    nb.metadata["report"] = {"title": "T", "subtitle": "", "banner": "", "front": True}
    made, _ = RlhfHTMLExporter().from_notebook_node(nb)
    return made


def test_a_chapter_ends_with_the_ways_to_its_neighbours(book: str) -> None:
    ends = re.findall(r'<div class="around">(.*?)</div>', book, re.S)
    words = [" ".join(re.sub(r"<[^>]+>", " ", end).split()) for end in ends]
    assert words == ["→ Another", "← One thing → The last", "← Another"]
    for target in re.findall(r'href="#([^"]+)"', "".join(ends)):
        assert f'id="{target}"' in book


def test_the_text_can_be_reached_past_the_contents(book: str) -> None:
    first = book.index('<a class="skip" href="#top">')
    assert first < book.index("<nav") < book.index('<main id="top">')


def test_the_menu_of_a_phone_is_closed_by_following_a_link(book: str) -> None:
    """It is open while the address names it, and a link to a chapter is another address."""
    assert '<nav aria-label="Contents" id="contents">' in book
    assert '<a class="open" href="#contents">' in book
    assert 'id="closed"' not in book, "closing scrolls nowhere"
    assert re.search(r"nav:target \.contents \{\s+display: block;", book)
    assert "<input" not in book


def test_the_dark_is_for_screens_and_figures_go_dark_with_it(book: str) -> None:
    dark = re.findall(r"@media ([^{]*)prefers-color-scheme: dark", book)
    assert dark == ["screen and ("] * 2, "what is printed is printed on white"
    assert "figure.figure img { filter: invert(1)" in book


def test_numbers_have_a_minus_and_words_their_hyphen() -> None:
    html = (
        "<table><thead><tr><th>exercise</th><th>gain</th></tr></thead><tbody>"
        "<tr><td>well-known, -5 below</td><td>-0.40 [-0.81, -0.02]</td></tr></tbody></table>"
    )
    body = page(
        new_markdown_cell("It fell by -0.3 (-1.2 at most) in 03-1."),
        code(shown("text/html", html, kind="table", caption="c")),
    )
    assert "−0.40 [−0.81, −0.02]" in body
    assert "well-known, -5 below" in body, "what somebody wrote stands as it was written"
    assert "by −0.3 (−1.2 at most) in 03-1." in " ".join(body.split())


def test_a_wide_table_uses_the_margin_before_it_is_scrolled(book: str) -> None:
    assert re.search(r"min-width: 60rem\) \{\s+\.table-data \{ width: max-content;", book)


def test_a_link_to_a_name_shows_the_number_and_what_cannot_be_seen_is_told() -> None:
    text = "It stands in [the table of prices](#prices), and [elsewhere](#nowhere)."
    table = shown("text/html", "<p>7</p>", kind="table", caption="Prices.", name="prices")
    alt = "Two <dots>, at 1 and 2"
    figure = shown("image/svg+xml", SVG, kind="figure", caption="Dots.", alt=alt)
    html = page(new_markdown_cell(text), code(figure, table))
    assert '<a href="#table-1">Table 1</a>, and elsewhere.' in html
    assert '<figure class="table" id="table-1">' in html
    assert 'alt="Two &lt;dots&gt;, at 1 and 2"' in html


def test_a_name_is_its_chapters_own_and_only_one_things(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2, 3):
        text = f"# Chapter {number}\n\n[the table](#same), [there](2.ipynb#same)"
        table = shown("text/html", "<p>7</p>", kind="table", caption="C.", name="same")
        paths.append(tmp_path / f"{number}.ipynb")
        cells = [new_markdown_cell(text), code(table)]
        nbformat.write(new_notebook(cells=cells), paths[-1])
    html, _ = RlhfHTMLExporter().from_notebook_node(merge(paths))
    for number in (1, 2, 3):
        assert f'<a href="#table-{number}">Table {number}</a>' in html
    assert html.count('<a href="#table-2">Table 2</a>') == 4
    for cells, said in (
        ([code(table), code(table)], "the name of another"),
        ([code(shown("text/html", "x", kind="table", caption="C.", name="a b"))], "is no name"),
        ([new_markdown_cell("# T\n\n## Same"), code(table)], "is a section and the name"),
    ):
        with pytest.raises(ReportError, match=said):
            page(*cells)


@pytest.mark.parametrize("alt", ["01", "", None, "true"])
def test_an_alternative_text_is_text(alt: str | None) -> None:
    html = page(code(shown("image/svg+xml", SVG, kind="figure", caption="Dots.", alt=alt)))
    assert f'alt="{alt or "Dots."}"' in html
