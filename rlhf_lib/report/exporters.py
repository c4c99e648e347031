"""Executed notebooks become one self-contained HTML page and one PDF.

    jupyter nbconvert --to rlhf_html 04_ppo.ipynb    one notebook (also: --to rlhf_pdf)
    render(paths, out, title="...")                  a study: the same exporters, all its notebooks

pandoc (from `pypandoc-binary`) reads the notebook and writes HTML with MathML, or typst source that
the `typst` package compiles. Nothing else is needed: no TeX, no browser, no network. These packages
are in the extra `report`: nothing else wants them, and they are large.

What a notebook may say:

- cell tags `parameters`, `hide-input`, `remove-input` hide the code; `hide-output`,
  `remove-output` the outputs; `remove-cell` both; `raises-exception` allows an error output;
- a markdown cell tagged `solution`, all of it in one `<details>`, is folded; the PDF has no
  solutions;
- output metadata `{"kind": "figure" | "table", "caption": "..."}` asks for a numbered caption;
- `text/markdown` and `text/latex` outputs are typeset as prose; HTML is read anew, and only its
  text, tables, lists and links to the web are kept;
- a link to `05_grpo.ipynb` leads to that chapter.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from nbconvert.exporters import Exporter
from nbformat import NotebookNode
from traitlets import List
from traitlets.config import Config

from rlhf_lib.report import cleaning
from rlhf_lib.report.cleaning import ReportError, clean_text
from rlhf_lib.report.mathfont import font_data_url, font_path, math_characters
from rlhf_lib.report.scripts import DEJAVU, fonts_for

TOOLS = ("pypandoc", "typst", "ziamath", "brotli")  # packages of the extra `report`
TEMPLATES = Path(__file__).resolve().parent / "templates"
FILTERS = ("safe.lua", "structure.lua", "tables.lua")  # in this order: only the first sees raw HTML
# the last one is what papermill puts before its own parameters cell
HIDE_INPUT_TAGS = {"parameters", "hide-input", "remove-input", "injected-parameters"}
MATH_FONT_PLACEHOLDER = "data:,math-font"
# TeX between dollars or in a bare \begin{...}; formats that would eat or change prose are off.
PANDOC_INPUT = (
    "ipynb+raw_tex+markdown_in_html_blocks-implicit_figures-pandoc_title_block-table_captions"
)


def missing_tools() -> str:
    """Why no report can be rendered here, and the way out; empty where one can."""
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"the report needs {', '.join(missing)}: pip install 'rlhf-lib[report]'"


class _ReportExporter(Exporter):
    """What both exporters share: the cleaning steps, and the call of pandoc."""

    pandoc_options: ClassVar[dict[str, Any]]

    default_preprocessors = List(
        [
            "nbconvert.preprocessors.ExecutePreprocessor",  # for `nbconvert --execute`
            cleaning.CheckExecuted,
            "nbconvert.preprocessors.TagRemovePreprocessor",
            "nbconvert.preprocessors.CoalesceStreamsPreprocessor",
            cleaning.SplitCells,
        ]
    ).tag(config=True)

    @property
    def default_config(self) -> Config:
        config = Config()
        config.CoalesceStreamsPreprocessor.enabled = True
        config.TagRemovePreprocessor.enabled = True
        config.TagRemovePreprocessor.remove_cell_tags = {"remove-cell"}
        config.TagRemovePreprocessor.remove_input_tags = HIDE_INPUT_TAGS
        config.TagRemovePreprocessor.remove_all_outputs_tags = {"remove-output", "hide-output"}
        return config

    def from_notebook_node(  # type: ignore[override]
        self, nb: NotebookNode, resources: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The page as text, or the PDF as bytes.

        Raises ReportError for a notebook that cannot be shown whole.
        """
        nb, resources = super().from_notebook_node(nb, resources, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            return self._finish(self._run_pandoc(nb, Path(folder)), Path(folder)), resources

    def _finish(self, made: str, folder: Path) -> str | bytes:
        """What is exported, from what pandoc made in `folder`."""
        raise NotImplementedError

    def _run_pandoc(self, nb: NotebookNode, folder: Path) -> str:
        """Write the cleaned notebook into `folder`, and return what pandoc makes of it.

        Raises ReportError for any warning of pandoc's: the report would not show what was meant.
        """
        if missing := missing_tools():
            raise ReportError(missing)
        import pypandoc

        nbformat.write(nb, folder / "report.ipynb")
        defaults = {
            "from": PANDOC_INPUT,
            "filters": [{"type": "lua", "path": str(TEMPLATES / name)} for name in FILTERS],
            "input-files": ["report.ipynb"],
            "output-file": "report.out",
            "log-file": "log.json",
            "standalone": True,
            "sandbox": True,  # readers and writers see no file but those named here, and no network
            "eol": "lf",
            "wrap": "none",
            **self.pandoc_options,
        }
        (folder / "defaults.json").write_text(json.dumps(defaults), encoding="utf-8")
        done = subprocess.run(
            # as it stands: by default, pandoc drops outputs that the format cannot hold raw
            [pypandoc.get_pandoc_path(), "--defaults=defaults.json", "--ipynb-output=all"],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise ReportError(f"pandoc stopped ({done.returncode}): {done.stderr.strip()}")
        log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        problems = [_explain(entry, nb) for entry in log if entry["verbosity"] == "WARNING"]
        if problems:
            raise ReportError("\n".join(problems))
        return (folder / "report.out").read_text(encoding="utf-8")


class RlhfHTMLExporter(_ReportExporter):
    """One HTML page that needs no other file, no script and no network."""

    file_extension = ".html"
    output_mimetype = "text/html"
    export_from_notebook = "RLHF report (HTML)"
    pandoc_options: ClassVar = {
        "to": "html5",
        "template": str(TEMPLATES / "report.html"),
        "html-math-method": {"method": "mathml"},
        "embed-resources": True,
        "table-of-contents": True,
        "toc-depth": 2,
        "variables": {"style": (TEMPLATES / "report.css").read_text(encoding="utf-8")},
    }

    def _finish(self, made: str, folder: Path) -> str:
        characters = math_characters(made)
        font = font_data_url(characters) if characters else "data:,"
        return made.replace(MATH_FONT_PLACEHOLDER, font, 1)


class RlhfPDFExporter(_ReportExporter):
    """An A4 document without the code."""

    file_extension = ".pdf"
    output_mimetype = "application/pdf"
    export_from_notebook = "RLHF report (PDF)"
    pandoc_options: ClassVar = {
        "to": "typst",
        "template": str(TEMPLATES / "report.typ"),
        "extract-media": "media",
    }

    def _finish(self, made: str, folder: Path) -> bytes:
        (folder / "report.typ").write_text(made, encoding="utf-8")
        return _compile_typst(folder)


def _explain(entry: dict[str, Any], nb: NotebookNode) -> str:
    """A warning of pandoc's, with the cell it is about where that can be found."""
    text = entry["pretty"]
    if entry["type"] != "CouldNotConvertTeXMath":
        return f"pandoc: {text}"
    # the filter may have rewritten a formula's environment, so compare it without
    formula = entry["contents"]
    body = formula.partition("}")[2].rpartition("\\end")[0] if "\\begin" in formula else formula
    places = [cell.metadata.place for cell in nb.cells if body and body in cell.source]
    where = places[0] if places else "an unknown cell"
    return f"{where}: cannot convert the formula {formula}\nwrite it with simpler TeX ({text})"


def _compile_typst(folder: Path) -> bytes:
    """Compile `folder`/report.typ, with fonts that come with the packages as far as they go."""
    import typst

    source = folder / "report.typ"
    fonts = [str(DEJAVU), str(font_path().parent)]
    own = not fonts_for(source.read_text(encoding="utf-8"))
    try:
        pdf, warnings = typst.compile_with_warnings(
            str(source), root=str(folder), font_paths=fonts, ignore_system_fonts=own
        )
    except typst.TypstError as error:
        raise ReportError(_locate(error, source)) from error
    if warnings:
        raise ReportError("\n".join(_locate(warning, source) for warning in warnings))
    return pdf


def _locate(problem: Any, source: Path) -> str:
    """An error or warning of typst's, with the cell it is about: structure.lua marks each."""
    diagnostic = str(problem.diagnostic)
    found = re.search(r"report\.typ:(\d+)", diagnostic)
    above = source.read_text(encoding="utf-8").splitlines()[: int(found[1])] if found else []
    marks = [text.removeprefix("// cell: ") for text in above if text.startswith("// cell: ")]
    where = marks[-1] if marks else "the report"
    return f"{where} cannot be set by typst: {problem.message}\n{diagnostic}"


def merge(paths: Sequence[Path]) -> NotebookNode:
    """One notebook with the cells of several, each cell remembering where it came from.

    Raises ReportError when there is none, or when a file is missing or no notebook.
    """
    if not paths:
        raise ReportError("a report needs at least one notebook")
    merged = nbformat.v4.new_notebook()
    for chapter, path in enumerate(map(Path, paths)):
        try:
            nb = nbformat.read(path, as_version=4)
        except FileNotFoundError as error:
            raise ReportError(f"{path}: no such notebook; run the study first") from error
        except nbformat.reader.NotJSONError as error:
            raise ReportError(f"{path} is not a notebook; run the study again") from error
        for key in {"kernelspec", "language_info"} & nb.metadata.keys():
            merged.metadata.setdefault(key, nb.metadata[key])  # the first one speaks for all
        for index, cell in enumerate(nb.cells, start=1):
            origin = {"notebook": path.stem, "chapter": chapter, "index": index}
            cell.metadata["report"] = origin
            cell["id"] = f"cell-{len(merged.cells)}"  # copies of a template share their ids
            merged.cells.append(cell)
    return merged


def render(
    notebooks: Sequence[Path],
    out: Path,
    *,
    title: str,
    subtitle: str = "",
    banner: str | None = None,
) -> tuple[Path, Path]:
    """Write `out`/index.html and `out`/report.pdf from executed notebooks, and return their paths.

    With several notebooks, the first is the front page, and each of the others a chapter. `banner`
    is shown on every page. Both files appear at the end, each by a rename, or neither does.

    Raises ReportError, naming the notebook and cell, for what is missing, not executed, failed, or
    cannot be typeset.
    """
    nb = merge(notebooks)
    nb.metadata["report"] = {
        "title": clean_text(title),
        "subtitle": clean_text(subtitle),
        "banner": clean_text(banner or ""),
        "front": len(notebooks) > 1,
    }
    out = Path(out)
    page, _ = RlhfHTMLExporter().from_notebook_node(nb)
    pdf, _ = RlhfPDFExporter().from_notebook_node(nb)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as folder:
        new = Path(folder) / "index.html", Path(folder) / "report.pdf"
        for path, content in zip(new, (page.encode("utf-8"), pdf), strict=True):
            path.write_bytes(content)
        for path in new:
            path.replace(out / path.name)
    return out / "index.html", out / "report.pdf"
