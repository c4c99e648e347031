"""The report: two files from executed notebooks, the same each time, or a message that helps."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import typst
from matplotlib.image import imread
from nbconvert.exporters import get_exporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rlhf_lib.report import exporters
from rlhf_lib.report.cleaning import ReportError
from rlhf_lib.report.exporters import RlhfHTMLExporter, RlhfPDFExporter, merge, render
from rlhf_lib.report.mathfont import font_path
from tests.report.cells import SVG, code, page, shown, stream


def write(folder: Path, name: str, *cells: Any) -> Path:
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def study(folder: Path) -> list[Path]:
    figure = new_output(
        "display_data", {"image/svg+xml": SVG}, metadata={"kind": "figure", "caption": "Reward."}
    )
    front = [code(shown("text/markdown", "The **verdict** is 1.5.")), code(figure)]
    ppo = [
        new_markdown_cell("# PPO\n\nSee [the loss](05_grpo.ipynb#The-loss), [x](09_x.ipynb)."),
        code(figure),
    ]
    grpo = [
        new_markdown_cell("# GRPO\n\n## The loss\n\n$$\\sqrt{\\pi_\\theta}$$ [back](04_ppo.ipynb)"),
        code(
            shown(
                "text/html", "<table><tr><td>1</td></tr></table>", kind="table", caption="Scores."
            )
        ),
    ]
    return [
        write(folder, name, *cells)
        for name, cells in (("00_front", front), ("04_ppo", ppo), ("05_grpo", grpo))
    ]


def test_a_study_becomes_two_files_the_same_each_time(tmp_path: Path) -> None:
    paths = study(tmp_path)
    first = render(paths, tmp_path / "a", title="Study", subtitle="of three", banner="SMOKE RUN")
    second = render(paths, tmp_path / "b", title="Study", subtitle="of three", banner="SMOKE RUN")
    assert [path.name for path in first] == ["index.html", "report.pdf"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["index.html", "report.pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[1].read_bytes().startswith(b"%PDF")

    text = first[0].read_text(encoding="utf-8")
    assert '<div class="banner" role="note">SMOKE RUN</div>' in text
    assert "default-src 'none'; img-src data:" in html.unescape(text)
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
    # numbered over all notebooks, each kind by itself; chapters linked with each other
    for caption in (
        "Figure 1.</strong> Reward",
        "Figure 2.</strong> Reward",
        "Table 1.</strong> Scores",
    ):
        assert caption in text
    assert '<a href="#nb-05_grpo-the-loss">the loss</a>' in text
    assert '<a href="#nb-04_ppo">back</a>' in text
    assert 'id="nb-04_ppo">PPO</h1>' in text
    assert "09_x" not in text


def as_images(folder: Path) -> list[bytes]:
    return typst.compile(
        str(folder / "report.typ"),
        root=str(folder),
        font_paths=[str(font_path().parent)],
        format="png",
        ppi=30,
        ignore_system_fonts=True,
    )  # type: ignore[return-value]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`pages(cells, banner)`: the pages of the PDF as images, (height, width, colours)."""
    monkeypatch.setattr(exporters, "_compile_typst", as_images)

    def draw(cells: list, banner: str = "") -> list:
        nb = new_notebook(cells=cells)
        nb.metadata["report"] = {"title": "T", "subtitle": "", "banner": banner, "front": False}
        return [imread(io.BytesIO(png)) for png in RlhfPDFExporter().from_notebook_node(nb)[0]]

    return draw


@pytest.mark.parametrize("banner", ["SMOKE RUN", ""])
def test_the_banner_heads_every_page_of_the_pdf(pages: Callable, banner: str) -> None:
    images = pages([new_markdown_cell("# A\n\n" + "word " * 2000)], banner)
    assert len(images) > 1
    for image in images:
        head = image[: image.shape[0] // 10]
        red = (head[..., 0] > 0.5) & (head[..., 1] < 0.3)
        assert (red.mean() > 0.05) == bool(banner)


def test_a_long_table_begins_under_its_caption_and_goes_on_over_pages(pages: Callable) -> None:
    rows = "".join(f"<tr><td>{i}</td><td>some words of row {i}</td></tr>" for i in range(120))
    html = f"<table><thead><tr><th>n</th><th>text</th></tr></thead><tbody>{rows}</tbody></table>"
    images = pages(
        [new_markdown_cell("# A"), code(shown("text/html", html, caption="Long.", kind="table"))]
    )
    assert 3 <= len(images) <= 5
    for image in images[1:-1]:  # the title has a page of its own or shares the first
        lower = image[image.shape[0] // 2 : image.shape[0] * 9 // 10]
        assert (lower[..., :3].mean(-1) < 0.7).mean() > 0.005, "half of a page was left empty"


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = study(tmp_path)
    out = tmp_path / "out"
    render(paths, out, title="Old")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(exporters, "_compile_typst", lambda folder: 1 / 0)  # after the HTML is made
    with pytest.raises(ZeroDivisionError):
        render(paths, out, title="New")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_nbconvert_finds_the_exporters_and_one_notebook_is_enough(tmp_path: Path) -> None:
    exporter = get_exporter("rlhf_lib.report.exporters.RlhfHTMLExporter")()
    path = write(tmp_path, "04_ppo", new_markdown_cell("# PPO\n\n[next](05_grpo.ipynb)\n\n## Loss"))
    text, resources = exporter.from_filename(str(path))
    assert resources["output_extension"] == ".html"
    assert "<title>PPO</title>" in text
    assert text.count('<h1 class="title">PPO</h1>') == text.count("<h1") == 1
    assert '<a href="05_grpo.html">next</a>' in text
    pdf, _ = get_exporter("rlhf_lib.report.exporters.RlhfPDFExporter")().from_filename(str(path))
    assert pdf.startswith(b"%PDF")


@pytest.mark.parametrize("exporter", [RlhfHTMLExporter, RlhfPDFExporter])
@pytest.mark.parametrize(
    "tex", [r"$\textcolor{red}{x}$", r"$$\undefinedcommand y$$", r"\begin{align}\oops\end{align}"]
)
def test_a_formula_that_cannot_be_converted_is_named(
    tmp_path: Path, tex: str, exporter: Any
) -> None:
    nb = merge(
        [write(tmp_path, "06_dpo", new_markdown_cell("# DPO"), new_markdown_cell(f"So {tex}"))]
    )
    with pytest.raises(
        ReportError, match=r"06_dpo\.ipynb, cell 2: .*\\(textcolor|undefinedcommand|oops)"
    ):
        exporter().from_notebook_node(nb)


def test_tags_hide_code_outputs_and_cells() -> None:
    for tag in ("parameters", "injected-parameters", "hide-input", "remove-input"):
        body = page(code(stream("kept"), tags=(tag,)))
        assert ("kept" in body, "secret_source" in body) == (True, False), tag
    for tag in ("remove-output", "hide-output"):
        body = page(code(stream("gone"), tags=(tag,)))
        assert ("gone" in body, "secret_source" in body) == (False, True), tag
    body = page(code(stream("gone"), tags=("remove-cell",)))
    assert ("gone" in body, "secret_source" in body) == (False, False)
    assert '<details class="code">' in page(code())


def test_a_removed_first_cell_still_opens_its_chapter(tmp_path: Path) -> None:
    first = write(tmp_path, "00_front", new_markdown_cell("x"))
    second = write(tmp_path, "01_data", code(tags=("remove-cell",)), new_markdown_cell("# Data"))
    third = write(tmp_path, "02_plain", new_markdown_cell("no heading"))
    text = render([first, second, third], tmp_path, title="T")[0].read_text(encoding="utf-8")
    assert '<h1 id="nb-01_data">Data</h1>' in text
    assert '<h1 id="nb-02_plain">02_plain</h1>' in text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (new_code_cell("1 + 1"), r"03_sft\.ipynb, cell 1 was never executed"),
        (
            code(new_output("error", ename="KeyError", evalue="'kl'", traceback=["x"])),
            r"cell 1 failed with KeyError: 'kl'",
        ),
        (code(shown("text/plain", "x", caption="c")), r"03_sft\.ipynb, cell 1: .*kind None"),
    ],
)
def test_unfinished_notebooks_are_refused(tmp_path: Path, cell: Any, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        render([write(tmp_path, "03_sft", cell)], tmp_path / "out", title="T")
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"01_data\.ipynb: no such notebook"):
        render([tmp_path / "01_data.ipynb"], tmp_path, title="T")
    (tmp_path / "x.ipynb").write_text("not json")
    with pytest.raises(ReportError, match=r"x\.ipynb is not a notebook"):
        merge([tmp_path / "x.ipynb"])
    with pytest.raises(ReportError, match="at least one notebook"):
        render([], tmp_path, title="T")


def test_an_error_that_is_meant_is_shown() -> None:
    error = new_output(
        "error", ename="AssertionError", evalue="", traceback=["\x1b[31mAssertionError\x1b[0m"]
    )
    body = page(code(error, tags=("raises-exception",)))
    assert '<div class="output error">' in body
    assert "AssertionError" in body
    assert "\x1b" not in body


def test_without_its_tools_a_report_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "TOOLS", ("json", "no_such_package"))
    with pytest.raises(ReportError, match=r"needs no_such_package: pip install"):
        render(study(tmp_path), tmp_path / "out", title="New")
    assert not (tmp_path / "out").exists()
