"""How notebooks show what was measured: figures, tables and sentences with looked-up numbers."""

from __future__ import annotations

import base64
import html
import inspect
import io
import re
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from textwrap import dedent, shorten
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter, ScalarFormatter


def show(figure: Figure, caption: str, name: str = "") -> None:
    """Display a figure as vector and bitmap over its caption, which the report numbers.

    A link to `#name` in prose becomes one to it, with its number as text.
    """
    captioned(figure_bundle(figure), "figure", caption, name=name, alt=described(figure))


def table(frame: pd.DataFrame, caption: str, name: str = "") -> None:
    """Display a table without its index over its caption, with number and name as in `show`."""
    captioned(table_bundle(frame), "table", caption, name=name)


def captioned(bundle: Mapping[str, Any], kind: str, caption: str, **more: str) -> None:
    """Display a figure or table with its caption: for the report as metadata, for who reads the
    notebook itself, whose front end does not show those, as a line of its own."""
    told = {key: text for key, text in more.items() if text}
    display(bundle, raw=True, metadata={"caption": caption, "kind": kind, **told})
    place = f' id="{html.escape(told["name"])}"' if "name" in told else ""  # where links lead
    line = f'<div{place} style="font-size: 90%; opacity: 0.75">{html.escape(caption)}</div>'
    display({"text/html": line, "text/plain": caption}, raw=True, metadata={"kind": "caption"})


def say(template: str, **values: object) -> None:
    """Display Markdown whose numbers are looked up: `say("{r[accuracy]:.1%}", r=...)`.

    Raises KeyError, which fails the notebook, for a number that was not measured.
    """
    said = sentence(template, **values)
    display({"text/markdown": said, "text/plain": said}, raw=True)


def source(*functions: object) -> None:
    """Display the library's own source of these functions: the notebook cannot drift from it."""
    listings = (dedent(inspect.getsource(f)).rstrip() for f in functions)  # type: ignore[arg-type]
    code = "\n\n\n".join(listings)
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


def described(figure: Figure) -> str:
    """A figure in words for who cannot see it: of each panel its axes, names and values."""
    shared = figure.get_supxlabel(), figure.get_supylabel()
    panels = [_panel(axis, *shared) for axis in figure.axes if axis.get_visible()]
    many = len(panels) > 1
    told = (f"Panel {n}{', ' if text else ''}{text}" for n, text in enumerate(panels, 1))
    return shorten(". ".join(told if many else panels), 1500, placeholder=" …")


def _panel(axis: Axes, below: str, beside: str) -> str:
    """One panel: title, what is drawn over what, values with intervals, and where lines lead."""
    places, formatter = list(axis.get_yticks()), axis.yaxis.get_major_formatter()
    named = not isinstance(formatter, ScalarFormatter | LogFormatter | PercentFormatter)
    rows = dict(zip(places, formatter.format_ticks(places), strict=True)) if named else {}
    percent = axis.xaxis.get_major_formatter()
    unit = 100 / percent.xmax if isinstance(percent, PercentFormatter) else 1
    titles = axis.get_xlabel() or below, "" if named else axis.get_ylabel() or beside
    limits = np.sort(axis.get_xlim()) * unit, np.sort(axis.get_ylim())
    parts = [axis.get_title() or axis.get_title("left")]
    parts += [
        f"{' '.join(title.split())} from {low:.3g} to {high:.3g}"
        for title, (low, high) in zip(titles, limits, strict=True)
        if title
    ]
    bars = [one for one in axis.containers if isinstance(one, ErrorbarContainer)]
    parts += [told for one in bars for told in _intervals(one, rows, unit)]
    spoken = {part for one in bars for part in (one.lines[0], *one.lines[1])}
    for line in (line for line in axis.lines if line not in spoken and line.get_visible()):
        if line.get_linestyle() == "None":  # ticks of single seeds
            continue
        in_data = all(line.get_transform().contains_branch_seperately(axis.transData))
        x, y = np.ma.filled(np.ma.asarray(line.get_data(orig=False), dtype=float), np.nan)
        seen = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if in_data and len(seen) > 1:  # what marks a height, or a place, is told by its name
            first, last = seen[[0, -1]]
            way = f"{y[first]:.3g} at {x[first]:.3g} to {y[last]:.3g} at {x[last]:.3g}"
            parts.append(f"{_name(line) or 'a line'}: {way}")
    for dots in (one for one in axis.collections if isinstance(one, PathCollection) and _name(one)):
        x, y = np.ma.filled(np.ma.mean(dots.get_offsets(), axis=0), np.nan)
        parts.append(f"{_name(dots)}: {y:.3g} at {x:.3g}")
    said = [" ".join(text.get_text().split()) for text in axis.texts]
    return "; ".join(filter(None, [*parts, ", ".join(dict.fromkeys(filter(None, said)))]))


def _intervals(bars: ErrorbarContainer, rows: Mapping[float, str], unit: float) -> Iterator[str]:
    """Each dot with its interval: of a row, or over a place; nothing where some dots have none."""
    dots, _, spans = bars.lines
    if not spans or (dots is not None and len(spans[0].get_paths()) < np.size(dots.get_xdata())):
        return
    upright = bars.has_yerr
    segments = spans[-1 if upright else 0].get_segments()
    if dots is None:  # bars alone, in both directions
        (left, right), (low, high) = spans[0].get_segments()[0][:, 0], segments[0][:, 1]
        yield f"{_name(bars)}: {low:.3g} to {high:.3g} at {left:.3g} to {right:.3g}"
        return
    for x, y, ends in zip(*np.asarray(dots.get_data(orig=False)), segments, strict=True):
        value, (low, high) = (y, ends[:, 1]) if upright else (x * unit, ends[:, 0] * unit)
        name = _name(bars) or rows.get(y, "")
        where = f" at {x:.3g}" if upright else ""
        if np.isfinite(value):
            told = f"{value:.3g} [{low:.3g}, {high:.3g}]" if low < high else f"{value:.3g}"
            yield f"{name}{': ' if name else ''}{told}{where}"


def _name(drawn: Artist | ErrorbarContainer) -> str:
    """Its label, where somebody gave it one."""
    label = str(drawn.get_label() or "")
    return "" if label.startswith("_") else label


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """The figure as `stem`.svg and `stem`.png."""
    bundle = figure_bundle(figure)
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    svg.write_text(bundle["image/svg+xml"], encoding="utf-8")
    png.write_bytes(base64.b64decode(bundle["image/png"]))
    return [svg, png]


def table_bundle(frame: pd.DataFrame) -> dict[str, str]:
    """The frame as HTML and as text. Columns of words stand on the left, those of numbers on the
    right, in styles of their own: front ends would put all of them on the right."""
    with pd.option_context("display.max_colwidth", None):  # pandas would cut replies off
        plain = frame.to_html(index=False, border=0, na_rep="–")
    sides = cycle("right" if _numeric(frame[column]) else "left" for column in frame)
    aligned = _CELL.sub(lambda cell: f'<{cell[1]} style="text-align: {next(sides)}">', plain)
    return {"text/html": aligned, "text/plain": frame.to_string(index=False)}


_CELL = re.compile("<(th|td)>")
_NUMBER = re.compile(r"[+\-−–±<≤≥~▲▼ ]*\.?\d|–?$")


def _numeric(column: pd.Series) -> bool:
    return all(_NUMBER.match(str(cell)) or cell != cell for cell in column)


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
