"""Cleaning: text from a model stays text, in both outputs; what a notebook shows is typeset.

typst's own query tells what became of a notebook in the source of the PDF.
"""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typst
from nbformat.v4 import new_markdown_cell, new_notebook, new_output

from rlhf_lib.report import exporters
from rlhf_lib.report.cleaning import MAX_SVG_BYTES, ReportError, clean_text
from rlhf_lib.report.exporters import RlhfPDFExporter
from rlhf_lib.report.mathfont import font_path
from tests.report.cells import SVG, code, page, shown, stream

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmM"
    "IQAAAABJRU5ErkJggg=="
)

# Each must be shown as it stands. They begin with what typst, markdown, TeX or HTML takes for
# its own.
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</style><b>",
    "<!-- x -->",
    "]]>",
    "@ref",
    "@cite[x]",
    "$x$",
    "$$y$$",
    '#import "@preview/x:1.0"',
    "#[x]",
    "#x",
    "<label>",
    "*b*",
    "_e_",
    "`c`",
    "```typ",
    "= x",
    "== x",
    "- x",
    "+ x",
    "1. x",
    "/ x: y",
    "// c",
    "/* c",
    "*/ c",
    "\\",
    "\\#x",
    r"\input{x}",
    "--set",
    "wait...",
    "no-?",
    "~",
    "a~b",
    "'q' \"z\"",
    "{",
    "https://a.b/c",
    "[x](javascript:alert(1))",
    "![x](https://a.b/i.png)",
    "]",
    "[",
    "#]",
    "&amp;",
    "|",
    "{{ x }}",
    "^1",
    "=\u00a0x",
]
UNSAFE = ["a\u202eb", "a\u2066b", "a\x00b", "a\x85b", "a\u2028= b", "a\ud800b"]

# The elements and attributes that a cell's content may have in the page.
HARMLESS = {
    "p",
    "div",
    "pre",
    "code",
    "span",
    "strong",
    "em",
    "del",
    "a",
    "img",
    "figure",
    "figcaption",
    "h1",
    "h2",
    "ul",
    "ol",
    "li",
    "table",
    "thead",
    "tbody",
    "colgroup",
    "col",
    "tr",
    "th",
    "td",
    "header",
    "br",
    "details",
    "summary",
}


def table(rows: list[list[str]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


@pytest.fixture
def pdf_elements(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: cells -> the elements of these kinds that typst sees in the PDF's source."""

    def elements(kinds: str, *cells: Any, **titles: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        first, *others = kinds.split()
        selector = f"selector({first})" + "".join(f".or({kind})" for kind in others)

        def query(folder: Path) -> bytes:
            fonts = [str(font_path().parent)]
            source = typst.Compiler(
                str(folder / "report.typ"),
                root=str(folder),
                font_paths=fonts,
                ignore_system_fonts=True,
            )
            found.extend(json.loads(source.query(selector)))
            return b""

        monkeypatch.setattr(exporters, "_compile_typst", query)
        nb = new_notebook(cells=list(cells))
        blank = {"title": "T", "subtitle": "", "banner": "", "front": False}
        nb.metadata["report"] = blank | titles
        RlhfPDFExporter().from_notebook_node(nb)
        return found

    return elements


class Elements(HTMLParser):
    """Which elements, attributes and text a piece of HTML has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_shown_as_it_stands_in_html() -> None:
    body = page(
        *(
            code(
                stream(f"{text} ({number})\n"),
                shown("text/plain", f"{text} ({number})"),
                shown("text/html", table([[f"{text} ({number})"]])),
                shown("text/plain", "x", kind="table", caption=f"{text} ({number})"),
            )
            for number, text in enumerate(HOSTILE)
        )
    )
    found = Elements("<main" + body)
    assert found.tags <= HARMLESS | {"main"}
    assert {name for name, _ in found.attributes} <= {
        "id",
        "class",
        "style",
        "href",
        "aria-hidden",
        "tabindex",
    }
    words = " ".join(found.text.split())
    for number, text in enumerate(HOSTILE):
        assert words.count(" ".join(f"{text} ({number})".split())) == 4, text


def test_hostile_text_is_shown_as_it_stands_in_the_pdf(pdf_elements: Any) -> None:
    cells = [
        code(shown("text/html", table([[text, f"cell {text}"] for text in HOSTILE]))),
        *(code(shown("text/html", f"<p>{html.escape(text)}</p>")) for text in HOSTILE),
        *(code(shown("text/plain", text), stream(text)) for text in HOSTILE),
        *(code(shown("text/plain", "x", kind="table", caption=text)) for text in HOSTILE),
    ]
    kinds = "enum list terms heading link ref cite image emph math.equation"
    assert pdf_elements(kinds, *cells, title="= a", subtitle="1. b", banner="- c") == []
    raws = [element["text"] for element in pdf_elements("raw", *cells)]
    assert [text.strip() for text in raws[: 2 * len(HOSTILE) : 2]] == HOSTILE


@pytest.mark.parametrize("text", UNSAFE)
def test_control_and_bidi_characters_are_replaced(text: str) -> None:
    bad = {character for character in text if character not in "ab= "}
    reference = f"&#x{ord(bad.copy().pop()):x};"
    body = page(
        code(
            stream(text),
            shown("text/html", f"<p>{text}</p><p>{reference}</p>"),
            shown("text/markdown", f"{text} {reference}"),
            shown("text/plain", "x", kind="table", caption=text),
        ),
        new_markdown_cell(text),
    )
    assert not bad & set(body)
    assert body.count("\ufffd") >= 7


def test_ansi_colours_and_overwritten_lines_go() -> None:
    assert clean_text("\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link") == "red link"
    assert clean_text("10%\r20%\rdone\nnext\r\n") == "done\nnext\n"


# In each, the word "good" is what a reader may see, and "evil" what must not be left.
HTML = [
    "<script>evil()</script>good",
    "<p onclick='evil()' style='color:evil'>good</p>",
    "<a href='javascript:evil()'>good</a>",
    "<a href='data:text/html,evil'>good</a>",
    "<a href='#evil'>good</a>",
    "<img src='https://evil.org/x.png' alt='good'>",
    "<img src='/etc/evil' alt='good'>",
    "<img src=\"data:image/svg+xml,<svg onload='evil()'/>\" alt='good'>",
    "<svg onload='evil()'></svg>good",
    "<style>.evil{}</style>good",
    "<h1 id='evil'>good</h1>",
    "<details open ontoggle='evil()'>good</details>",
    "<form action='https://evil.org'><button>good</button></form>",
    "<math href='evil'><mi>good</mi></math>",
]


@pytest.mark.parametrize("mime", ["text/html", "text/markdown", "cell"])
def test_html_is_read_anew_and_only_its_text_is_kept(mime: str) -> None:
    body = page(*(new_markdown_cell(t) if mime == "cell" else code(shown(mime, t)) for t in HTML))
    assert "evil" not in body
    assert body.count("good") >= len(HTML) - (
        mime != "text/html"
    )  # markdown drops what is no HTML block
    assert Elements("<main" + body).tags <= HARMLESS | {"main"}


def test_no_file_of_this_machine_gets_into_a_report(tmp_path: Path) -> None:
    (tmp_path / "secret.html").write_text("<p>secret</p>")
    (tmp_path / "secret.png").write_bytes(b"secret")
    file = tmp_path.as_posix()
    body = page(
        code(
            shown(
                "text/html",
                f"<iframe src='{file}/secret.html'></iframe><IFRAME src='{file}/secret.html'>",
            )
        ),
        code(
            shown(
                "text/html",
                f"<img src='{file}/secret.png'><object data='{file}/secret.html'></object>",
            )
        ),
        new_markdown_cell(f"![x]({file}/secret.png) <iframe src='{file}/secret.html'></iframe>"),
        new_markdown_cell("the end"),
    )
    assert "the end" in body
    for leak in ("<p>secret", "<img", "c2VjcmV0"):  # the last is the file in base64
        assert leak not in body


def test_prose_in_outputs_is_typeset(pdf_elements: Any) -> None:
    prose = code(
        shown("text/markdown", "**Bold** $x_1$ <eos> `c`\n\n| a | b |\n|---|--:|\n| 1 | 2 |")
    )
    body = page(prose, code(shown("text/latex", r"$\displaystyle \beta$")))
    for part in (
        "<strong>Bold</strong>",
        "<msub><mi>x</mi><mn>1</mn></msub>",
        "&lt;eos&gt;",
        "<mi>β</mi>",
    ):
        assert part in body
    assert '<td style="text-align: right;">2</td>' in body
    assert len(pdf_elements("math.equation", prose)) == 1
    assert len(pdf_elements("table", prose)) == 1


def test_in_the_pdf_too_a_name_is_a_number_and_a_picture_is_told(pdf_elements: Any) -> None:
    prose = new_markdown_cell("See [the table](#prices), [not](#that).")
    table = shown("text/html", "<p>7</p>", kind="table", caption="Prices.", name="prices")
    figure = shown("image/svg+xml", SVG, kind="figure", caption="Dots.", alt='Two "dots" <at> 1')
    link, image = pdf_elements("link image", prose, code(table, figure))
    assert link["dest"] == "<table-1>"
    assert "Table" in json.dumps(link["body"])
    assert image["alt"] == 'Two "dots" <at> 1'


def test_the_pdf_leaves_code_out_and_keeps_outputs(pdf_elements: Any) -> None:
    raws = [element["text"] for element in pdf_elements("raw", code(stream("kept")))]
    assert raws == ["kept"]


def test_what_an_output_is_shown_as(pdf_elements: Any) -> None:
    light = {"image/svg+xml": SVG, "image/png": PNG, "text/plain": "<Figure>"}
    heavy = {
        **light,
        "image/svg+xml": SVG.replace("<rect", "<!--" + "x" * MAX_SVG_BYTES + "--><rect"),
    }
    assert "data:image/svg+xml;base64," in page(code(new_output("display_data", light)))
    assert "data:image/png;base64," in page(code(new_output("display_data", heavy)))
    assert len(pdf_elements("image", code(new_output("display_data", light)))) == 1
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider()"}
    assert "IntSlider" not in page(code(new_output("display_data", widget)))
    with pytest.raises(ReportError, match=r"cell 1 shows only application/json"):
        page(code(new_output("display_data", {"application/json": {}})))


def test_a_caption_that_stands_by_itself_is_left_out() -> None:
    with_line = code(
        shown("text/plain", "x", kind="table", caption="What it holds."),
        shown("text/html", "<div>What it holds.</div>", kind="caption"),
    )
    assert page(with_line).count("What it holds.") == page(with_line).count("Table 1") == 1


def test_progress_bars_go_and_warnings_stay() -> None:
    bars = "\r 10%|█   | 1/10 [00:00<00:01]\r100%|███| 10/10 [00:01<00:00]\n3it [00:00, 9it/s]\n"
    body = page(code(stream(bars, "stderr"), stream("UserWarning: 5% of rows dropped\n", "stderr")))
    assert "it/s" not in body
    assert "10/10" not in body
    assert "UserWarning: 5% of rows dropped" in body


def test_a_wide_table_is_dealt_out_over_panels(pdf_elements: Any) -> None:
    names = ["step"] + [f"objective/long_metric_name_{i}" for i in range(15)]
    wide = code(shown("text/html", table([names, ["1"] + ["-0.12345"] * 15])))
    panels = pdf_elements("table", wide)
    assert len(panels) > 1
    first_cells = [panel["children"][0] for panel in panels]
    assert all("step" in json.dumps(cell) for cell in first_cells)  # the rows keep their name
    assert (
        len(pdf_elements("table", code(shown("text/html", table([["a", "b"], ["1", "2"]]))))) == 1
    )
