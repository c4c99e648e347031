"""Made-up cells, and the page that they become: what the report's tests share."""

from __future__ import annotations

from typing import Any

from nbformat.v4 import new_code_cell, new_notebook, new_output

from rlhf_lib.report.exporters import RlhfHTMLExporter

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'


def code(*outputs: Any, tags: tuple[str, ...] = (), source: str = "secret_source()") -> Any:
    metadata = {"tags": list(tags)}
    return new_code_cell(source, execution_count=1, outputs=list(outputs), metadata=metadata)


def shown(mime: str, value: str, **metadata: Any) -> Any:
    return new_output("display_data", {mime: value}, metadata=metadata)


def stream(text: str, name: str = "stdout") -> Any:
    return new_output("stream", text=text, name=name)


def page(*cells: Any) -> str:
    """The `<main>` of the HTML report of one notebook."""
    whole, _ = RlhfHTMLExporter().from_notebook_node(new_notebook(cells=list(cells)))
    return whole.partition("<main")[2]
