"""How notebooks are kept: no outputs, one parameters cell, short cells, few modules of ours."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from rlhf_lib import lesson
from rlhf_lib.code_hash import imported_modules

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
NAMES = (
    "01_dataset",
    "02_reward_model",
    "03_sft",
    "04_ppo",
    "05_grpo",
    "06_dpo",
    "07_evaluation",
)
PARAMETERS = {"PROFILE", "SEED", "RUN_DIR", "OVERRIDES"}
MAX_CELL_LINES = 20
MAX_TAUGHT = 6  # modules of ours beside the lesson: more are too many for one chapter


@pytest.fixture(params=NAMES)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    """One notebook as it is stored, not upgraded to a newer format on the way in."""
    return nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_of(source: str) -> dict[str, object]:
    """The names a parameters cell assigns, with their literal values.

    Raises ValueError for anything but plain assignments of literals, which papermill replaces.
    """
    values: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        else:
            raise ValueError(f"not a plain assignment: {ast.unparse(node)}")
        values[ast.unparse(target)] = ast.literal_eval(value)
    return values


def test_the_seven_notebooks_are_there_and_no_other() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(NAMES)


def test_stored_form_is_valid(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


def test_no_outputs_are_stored(notebook: nbformat.NotebookNode) -> None:
    for index, cell in enumerate(code_cells(notebook)):
        assert cell.outputs == [], f"code cell {index} holds outputs; `make hooks` strips them"
        assert cell.execution_count is None, f"code cell {index} holds an execution count"


def test_no_trace_of_a_run_is_stored(notebook: nbformat.NotebookNode) -> None:
    assert not {"papermill", "widgets"} & notebook.metadata.keys()
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & cell.metadata.keys()
        assert "injected-parameters" not in cell.metadata.get("tags", [])


def test_the_first_code_cell_holds_the_parameters(notebook: nbformat.NotebookNode) -> None:
    first, *others = code_cells(notebook)
    assert "parameters" in first.metadata.get("tags", [])
    assert parameters_of(first.source).keys() == PARAMETERS
    for cell in others:
        assert "parameters" not in cell.metadata.get("tags", []), "two cells are tagged parameters"


def test_code_cells_are_short(notebook: nbformat.NotebookNode) -> None:
    for index, cell in enumerate(code_cells(notebook)):
        lines = len(cell.source.splitlines())
        assert lines <= MAX_CELL_LINES, f"code cell {index} has {lines} lines"


def printed_lines(notebook: nbformat.NotebookNode) -> int:
    """Lines of the library's source that a notebook prints with `source(...)`."""
    names: dict[str, object] = {}
    printed = 0
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), "imports", "exec"), names)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "source":
                for argument in node.args:
                    asked = argument.value if isinstance(argument, ast.Starred) else argument
                    if ast.unparse(asked).split(".")[0] not in names:
                        continue  # the variable of a loop
                    found = eval(ast.unparse(asked), names)
                    several = found if isinstance(found, list | tuple) else [found]
                    printed += sum(len(inspect.getsourcelines(f)[0]) for f in several)
    return printed


def test_a_notebook_says_truly_how_long_it_is_read(notebook: nbformat.NotebookNode) -> None:
    """200 words or 25 lines of code a minute; what only a run prints may add a third."""
    folded = [c for c in notebook.cells if "solution" in c.metadata.get("tags", [])]
    hidden = [c for c in code_cells(notebook) if "hide-input" in c.metadata.get("tags", [])]
    prose = [c.source for c in notebook.cells if c.cell_type == "markdown" and c not in folded]
    code = [c.source for c in code_cells(notebook) if c not in hidden]
    lines = sum(len(source.splitlines()) for source in code) + printed_lines(notebook)
    minutes = len(" ".join(prose).split()) / 200 + lines / 25
    said = re.search(r"[Aa]bout (\d+) minutes", notebook.cells[0].source)
    assert said, "the first cell says `about N minutes`"
    assert minutes - 2.5 <= int(said[1]) <= 1.35 * minutes + 5, f"{minutes:.0f} minutes"


def test_a_notebook_says_what_is_learnt_and_opens_with_its_diagram(
    notebook: nbformat.NotebookNode,
) -> None:
    assert 3 <= notebook.cells[0].source.partition("What you learn:")[2].count("\n- ") <= 5
    assert any("pictures.diagram(" in cell.source for cell in notebook.cells[:6])


def test_no_sentence_leads_into_hidden_code(notebook: nbformat.NotebookNode) -> None:
    for before, cell in pairwise(notebook.cells):
        if cell.cell_type == "code" and before.cell_type == "markdown":
            assert not before.source.rstrip().endswith(":"), before.source[-80:]


def named(tree: ast.AST) -> list[str]:
    """What is shown under a name: the third argument of `show` and `table`."""
    return [
        call.args[2].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("show", "table")
        and len(call.args) == 3
        and isinstance(call.args[2], ast.Constant)
    ]


def test_every_link_to_a_figure_or_table_finds_one(notebook: nbformat.NotebookNode) -> None:
    """A link to `#name` becomes "Table 7" in the report, if a cell shows something by that name."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    wanted = {name for text in prose for name in re.findall(r"\]\(#([\w-]+)\)", text)}
    given = [name for cell in code_cells(notebook) for name in named(ast.parse(cell.source))]
    assert wanted == set(given), "and nothing has a name that no link needs"
    assert len(given) == len(set(given))


def test_a_cell_shows_what_it_means_to_and_no_bare_value(notebook: nbformat.NotebookNode) -> None:
    """`naive` at a cell's end prints tensor([[0.3797, ...]]): a sentence says what it is."""
    for cell in code_cells(notebook):
        body = ast.parse(cell.source).body
        bare = body and isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Call)
        assert not bare, cell.source.splitlines()[-1]


@pytest.mark.parametrize(
    "source", ["import os", "SEED = int('1')", "SEED = PROFILE = 1", "PROFILE: str"]
)
def test_the_parameters_reader_refuses_what_papermill_cannot_replace(source: str) -> None:
    with pytest.raises(ValueError, match=r"not a plain assignment|malformed node"):
        parameters_of(source)


def ours(notebook: nbformat.NotebookNode) -> set[str]:
    """The modules of ours that a notebook imports from."""
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    found = set().union(*(imported_modules(tree, "notebooks") for tree in trees))
    return {name for name in found if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()}


def test_a_notebook_imports_the_lesson_and_what_it_teaches(
    notebook: nbformat.NotebookNode,
) -> None:
    taught = ours(notebook) - {"rlhf_lib.lesson", "rlhf_lib.session.colab"}
    assert len(taught) <= MAX_TAUGHT, sorted(taught)
    assert not [name for name in taught if name.startswith(("rlhf_lib.show.", "rlhf_lib.study."))]


def test_the_lesson_hands_on_what_some_notebook_asks_for() -> None:
    asked = set()
    for name in NAMES:
        for cell in code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", nbformat.NO_CONVERT)):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom) and node.module == "rlhf_lib.lesson":
                    asked |= {alias.name for alias in node.names}
    assert sorted(asked) == sorted(name for name in vars(lesson) if not name.startswith("__"))


def test_few_cells_keep_their_layout_from_the_formatter() -> None:
    kept = sum(
        path.read_text(encoding="utf-8").count("fmt: skip") for path in NOTEBOOKS.glob("*.ipynb")
    )
    assert kept <= 5
