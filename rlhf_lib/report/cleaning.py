"""Cleaning steps between an executed notebook and its report, as nbconvert preprocessors.

In the order they run: `CheckExecuted` refuses a notebook that is not finished, and notes in each
cell where it stands; `SplitCells` keeps one harmless representation of each output, numbers the
captions and gives every output a cell of its own. The last is done because pandoc reads a cell's
metadata but not an output's: after it, all that `templates/structure.lua` has to know stands in the
cell's metadata.
"""

from __future__ import annotations

import html
import re

from nbconvert.preprocessors import Preprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

# What a reader is shown, best first. A latex or markdown output becomes a markdown cell.
MIME_TYPES = (
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/markdown",
    "text/html",
    "text/latex",
    "text/plain",
)
WIDGET = "application/vnd.jupyter.widget-view+json"
MAX_SVG_BYTES = 2_000_000  # beyond this a browser and a PDF reader crawl; the png is shown instead
CAPTION_WORDS = {"figure": "Figure", "table": "Table"}
SOLUTION_TAG = "solution"
ALT = "alt: "  # before an alternative text: pandoc would read "01" as a number

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, except tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks: they reorder text
    "\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff"  # line ends, non-characters, surrogates
    "\U000e0000-\U000e007f]"  # invisible tags
)
_REFERENCE = re.compile(r"&(?:#(\d{1,9})|#[xX]([\da-fA-F]{1,9})|([A-Za-z][A-Za-z\d]*));?")
_PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+(?:\.\d+)?(?:it|s)/(?:s|it)\b|\?it/s")
_OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\n\r])")


class ReportError(ValueError):
    """A notebook that cannot become a report. The message names the notebook and the way out."""


def clean_text(text: str) -> str:
    """Text as a terminal would show it, uncoloured; control and bidi characters become U+FFFD."""
    text = _ANSI.sub("", text).replace("\r\n", "\n")
    text = _OVERWRITTEN.sub("", text).replace("\r", "")
    return _UNSAFE.sub("\ufffd", text)


def _clean_markup(text: str) -> str:
    """Clean text whose character references (`&rlm;`, `&#x202e;`) stand for safe characters too."""

    def replace(match: re.Match[str]) -> str:
        decimal, hexadecimal, _ = match.groups()
        if decimal or hexadecimal:  # `html.unescape` would take some for what they are not
            code = int(decimal) if decimal else int(hexadecimal, 16)
            meant = chr(code) if code <= 0x10FFFF else "\0"
        else:
            meant = html.unescape(match[0])
        return "\ufffd" if _UNSAFE.search(meant) else match[0]

    return _REFERENCE.sub(replace, clean_text(text))


class CheckExecuted(Preprocessor):
    """Raise ReportError for a code cell that was not run, or that failed.

    An error in a cell tagged `raises-exception` is meant, and is shown.
    """

    enabled = True

    def preprocess_cell(self, cell, resources, index):
        source = cell.metadata.get("report", {})  # of a chapter, written by `merge`
        name = source.get("notebook") or resources.get("metadata", {}).get("name", "notebook")
        where = f"{name}.ipynb, cell {source.get('index', index + 1)}"  # counted from 1
        cell.metadata["place"] = where
        if cell.cell_type != "code" or not cell.source.strip():
            return cell, resources
        if cell.execution_count is None:
            raise ReportError(f"{where} was never executed; run the whole notebook first")
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors and "raises-exception" not in cell.metadata.get("tags", ()):
            raise ReportError(
                f"{where} failed with {clean_text(errors[0].ename)}: "
                f"{clean_text(errors[0].evalue)[:500]}; mend it, run the notebook again, or tag "
                "the cell `raises-exception` if the error is part of the lesson"
            )
        return cell, resources


def _clean(output: NotebookNode, where: str) -> tuple[str, str, dict] | None:
    """MIME type, content and metadata of an output's one representation; None: nothing is shown.

    Of a widget its static twin stays, where it has one. Progress bars go, and so do captions that
    stand by themselves for who reads the notebook: each is in its output's metadata as well.
    """
    if output.output_type in ("error", "stream"):
        failed = output.output_type == "error"
        text = "\n".join(output.traceback) if failed else _without_progress_bars(output)
        text = clean_text(text).strip("\n")
        kind = "error" if failed else output.name
        return ("text/plain", text, {"kind": kind}) if text.strip() else None
    if output.metadata.get("kind") == "caption":
        return None
    data = {mime: value for mime, value in output.data.items() if mime != WIDGET}
    mime = _best_mime(data)
    if WIDGET in output.data and mime in (None, "text/plain"):
        return None  # `text/plain` is only the name of a widget that has no twin
    if mime is None:
        raise ReportError(
            f"{where} shows only {', '.join(output.data) or 'nothing'}; "
            f"a report can hold {', '.join(MIME_TYPES)}"
        )
    value = data[mime]
    if mime in ("text/html", "text/markdown"):
        value = _clean_markup(value)
    elif mime.startswith("text/"):
        value = clean_text(value)
    return mime, value, output.metadata


def _without_progress_bars(output: NotebookNode) -> str:
    if output.name != "stderr":
        return output.text
    lines = clean_text(output.text).split("\n")
    return "\n".join(line for line in lines if not _PROGRESS_BAR.search(line))


def _best_mime(data: dict[str, str]) -> str | None:
    held = [mime for mime in MIME_TYPES if mime in data]
    heavy = len(data.get("image/svg+xml", "").encode(errors="replace")) > MAX_SVG_BYTES
    if heavy and held[1:2] in (["image/png"], ["image/jpeg"]):
        return held[1]
    return held[0] if held else None


class SplitCells(Preprocessor):
    """One cell for each thing shown: prose, folded code, or one output with its numbered caption.

    Prose tagged `solution` is folded in HTML, and left out of the PDF, which cannot fold. An output
    asks for a number with the metadata `{"kind": "figure" | "table", "caption": "..."}`.
    """

    enabled = True

    def preprocess(self, nb, resources):
        self._numbers = dict.fromkeys(CAPTION_WORDS, 0)
        cells: list[NotebookNode] = []
        chapter, self._names = None, set()
        for cell in nb.cells:
            if cell.metadata.get("report", {}).get("chapter") != chapter:
                self._names = set()  # each chapter has its own
            for part in self._parts(cell):
                part.metadata.place = cell.metadata.place
                source = cell.metadata.get("report", {})
                if source.get("chapter") != chapter:
                    chapter = source.chapter
                    # "nb-" also keeps pandoc from reading a name such as 01 as a number
                    part.metadata.chapter = "nb-" + source.notebook
                part.id = f"cell-{len(cells)}"  # new ids are random; a report is always the same
                cells.append(part)
        nb.cells = cells
        nb.nbformat, nb.nbformat_minor = 4, 5
        kept = {"kernelspec", "language_info", "report"} & nb.metadata.keys()
        nb.metadata = {key: nb.metadata[key] for key in sorted(kept)}
        return nb, resources

    def _parts(self, cell):
        if cell.cell_type == "markdown":
            role = "solution" if SOLUTION_TAG in cell.metadata.get("tags", ()) else "prose"
            part = new_markdown_cell(_clean_markup(cell.source), metadata={"role": role})
            if cell.get("attachments"):
                part.attachments = cell.attachments
            yield part
        if cell.cell_type != "code":
            return  # a raw cell is meant for other programs
        hidden = cell.metadata.get("transient", {}).get("remove_source")
        if cell.source.strip() and not hidden:
            source = clean_text(cell.source)
            yield new_code_cell(source, execution_count=1, metadata={"role": "code"})
        for output in cell.outputs:
            if found := _clean(output, cell.metadata.place):
                yield self._output(*found, cell.metadata.place)

    def _output(self, mime, value, given, where):
        kind = given.get("kind")
        metadata = {"role": "output", "kind": kind or "result"}
        if "caption" in given:
            if kind not in CAPTION_WORDS:
                raise ReportError(
                    f"{where}: an output with a caption has kind {kind!r} in its metadata; "
                    f"set it to {' or '.join(CAPTION_WORDS)}"
                )
            self._numbers[kind] += 1
            text = " ".join(clean_text(str(given["caption"])).split())
            metadata["caption"] = f"{CAPTION_WORDS[kind]} {self._numbers[kind]}. {text}"
            if alt := " ".join(clean_text(str(given.get("alt") or "")).split()):
                metadata["alt"] = ALT + alt
            if name := given.get("name"):
                metadata["name"] = self._named(name, where)
        if mime in ("text/markdown", "text/latex"):
            return new_markdown_cell(value, metadata=metadata)
        bare = new_output("display_data", {mime: value})
        return new_code_cell("", execution_count=1, outputs=[bare], metadata=metadata)

    def _named(self, name, where):
        """The name, checked: a link could not find another, and would not know which of two."""
        if not re.fullmatch(r"[A-Za-z][\w-]*", str(name)):
            raise ReportError(f"{where}: {name!r} is no name for a link: take letters and hyphens")
        if name in self._names:
            raise ReportError(f"{where}: {name!r} is the name of another figure or table as well")
        self._names.add(name)
        return name
