"""The math font: a page carries the glyphs of its formulas, and no others."""

from __future__ import annotations

from nbformat.v4 import new_markdown_cell, new_notebook

from rlhf_lib.report.exporters import RlhfHTMLExporter
from rlhf_lib.report.mathfont import font_data_url, math_characters


def test_formulas_carry_their_font() -> None:
    tex = "\\begin{align}a &= \\sqrt{\\mathbb{E}[\\theta]}\\end{align}"
    whole, _ = RlhfHTMLExporter().from_notebook_node(new_notebook(cells=[new_markdown_cell(tex)]))
    assert "<msqrt>" in whole
    assert 'src: url("data:font/woff2;base64,d09GM' in whole
    assert {"𝔼", "θ", "a"} <= math_characters(whole)
    assert font_data_url(frozenset("∑")) == font_data_url.__wrapped__(frozenset("∑"))
    without, _ = RlhfHTMLExporter().from_notebook_node(new_notebook())
    assert "font/woff2" not in without
