"""How notebooks show what was measured: figures, tables and sentences with looked-up numbers."""

from __future__ import annotations

import base64
import inspect
import io
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure


def show(figure: Figure, caption: str) -> None:
    """Display a figure as vector and bitmap, numbered and captioned in the report."""
    display(figure_bundle(figure), raw=True, metadata={"caption": caption, "kind": "figure"})


def table(frame: pd.DataFrame, caption: str) -> None:
    """Display a table without its index, numbered and captioned in the report."""
    display(table_bundle(frame), raw=True, metadata={"caption": caption, "kind": "table"})


def say(template: str, **values: object) -> None:
    """Display Markdown whose numbers are looked up: `say("{r[accuracy]:.1%}", r=...)`.

    Raises KeyError, which fails the notebook, for a number that was not measured.
    """
    display({"text/markdown": sentence(template, **values), "text/plain": template}, raw=True)


def source(function: object) -> None:
    """Display the library's own source of a function: the notebook cannot drift from it."""
    code = inspect.getsource(function).rstrip()  # type: ignore[arg-type]
    display({"text/markdown": f"```python\n{code}\n```", "text/plain": code}, raw=True)


def sentence(template: str, **values: object) -> str:
    """The template with every `{...}` looked up; raises KeyError naming what is missing."""
    try:
        return " ".join(template.format(**values).split())
    except (KeyError, IndexError, TypeError) as error:
        raise KeyError(f"no measurement for {error} in the sentence: {template[:80]!r}") from error


def figure_bundle(figure: Figure) -> dict[str, str]:
    """SVG and PNG of a figure; the SVG holds no date, so that equal figures give equal files."""
    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rlhf_lib"}):  # names within the file are drawn from it
        figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=120)
    encoded = base64.b64encode(png.getvalue()).decode()
    return {"image/svg+xml": svg.getvalue(), "image/png": encoded, "text/plain": "figure"}


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """The figure as `stem`.svg and `stem`.png."""
    bundle = figure_bundle(figure)
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    svg.write_text(bundle["image/svg+xml"], encoding="utf-8")
    png.write_bytes(base64.b64decode(bundle["image/png"]))
    return [svg, png]


def table_bundle(frame: pd.DataFrame) -> dict[str, str]:
    with pd.option_context("display.max_colwidth", None):  # pandas would cut replies off
        html = frame.to_html(index=False, border=0, na_rep="–")
    return {"text/html": html, "text/plain": frame.to_string(index=False)}


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
