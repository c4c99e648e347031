"""The library's shape: imports point downward, methods stand alone, files and folders stay small.

Imports are read from the source, not from a running program, so an import inside a function counts
as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rlhf_lib.code_hash import imported_modules

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "rlhf_lib"
MAX_LINES, MAX_MODULES = 450, 8

# A module may import from its own folder, and from those before it in this list.
ORDER = (
    "settings",
    "trackers",
    "profiles",
    "kernel",
    "user_code",
    "records",
    "catalogue",
    "files",
    "code_hash",
    "processes",
    "pools",
    "runtime",
    "flops",
    "checkpoints",
    "runs",
    "objectives",
    "world",
    "data",
    "models",
    "methods",
    "measure",
    "results",
    "show",
    "proofs",
    "course",
    "review",
    "report",
    "study",
    "release",
    "session",
    "lesson",
    "__main__",
)
# what a folder may import of ours, where that is less than all that stands before it
ALONE = {"objectives": {"objectives"}, "world": {"world"}, "report": {"report"}}
SHARED_BY_METHODS = {f"rlhf_lib.methods.{name}" for name in ("learner", "rewards", "rollout")}
# of the library; tools and benchmarks may as well
SHOWS = {"show", "course", "study", "release", "session", "lesson", "__main__"}
# The standard library lends the objectives words for types and records, no more.
PURE = frozenset({"__future__", "collections", "dataclasses", "math", "typing", "torch"})

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(LIBRARY.rglob("*.py"))
}


def folder_of(module: str) -> str:
    """`methods` of `rlhf_lib.methods.ppo`, `runs` of `rlhf_lib.runs`."""
    return module.split(".")[1]


def imports_of(module: str) -> set[str]:
    """Everything that a module imports: modules of ours by their full names, other packages'."""
    package = module.rpartition(".")[0]
    found = imported_modules(ast.parse(MODULES[module].read_bytes()), package)
    ours = {name for name in found if name in MODULES}
    return ours | {name for name in found if name.partition(".")[0] != "rlhf_lib"}


def own(module: str) -> set[str]:
    return {name for name in imports_of(module) if name in MODULES}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn as nn, math", {"torch.nn", "math"}),
        ("import rlhf_lib.methods.ppo", {"rlhf_lib.methods.ppo"}),
        ("from rlhf_lib.objectives import kl", {"rlhf_lib.objectives.kl"}),
        ("from rlhf_lib.objectives.kl import k1", {"rlhf_lib.objectives.kl"}),
        ("from . import dpo", {"rlhf_lib.methods.dpo"}),
        ("from ..objectives.kl import k3", {"rlhf_lib.objectives.kl"}),
        ("def f():\n    from rlhf_lib.methods.grpo import train", {"rlhf_lib.methods.grpo"}),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, found: set[str]) -> None:
    assert found <= set(imported_modules(ast.parse(source), "rlhf_lib.methods"))


def test_every_module_has_its_place() -> None:
    folders = {folder_of(module) for module in MODULES} - {"__init__"}
    assert folders <= set(ORDER), f"give {sorted(folders - set(ORDER))} a place in ORDER"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    folder = folder_of(module)
    if folder == "__init__":
        assert not own(module), "importing any module runs this one first"
        return
    allowed = ALONE.get(folder) or set(ORDER[: ORDER.index(folder) + 1])
    taken = {name for name in own(module) if folder_of(name) not in allowed}
    assert not taken, f"{module} imports {sorted(taken)}"


@pytest.mark.parametrize("module", [m for m in MODULES if folder_of(m) == "objectives"])
def test_objectives_import_torch_and_each_other_only(module: str) -> None:
    other = {name.partition(".")[0] for name in imports_of(module) - own(module)}
    assert other <= PURE, f"{module} imports {sorted(other - PURE)}"


@pytest.mark.parametrize("module", [m for m in MODULES if folder_of(m) == "methods"])
def test_methods_never_import_each_other(module: str) -> None:
    others = {name for name in own(module) if folder_of(name) == "methods"} - SHARED_BY_METHODS
    assert not others, f"{module} imports {sorted(others)}"


@pytest.mark.parametrize("module", MODULES)
def test_only_what_shows_imports_show(module: str) -> None:
    if any(folder_of(name) == "show" for name in own(module)):
        assert folder_of(module) in SHOWS


@pytest.mark.parametrize("module", [m for m in MODULES if m.endswith(".__init__")])
def test_a_folder_hands_no_names_on(module: str) -> None:
    """The path that is shown is where the code is; `lesson` alone hands names on."""
    assert not own(module)


def test_no_import_goes_in_a_circle() -> None:
    remaining = {module: own(module) for module in MODULES}
    while free := {module for module, names in remaining.items() if not names & remaining.keys()}:
        remaining = {module: own for module, own in remaining.items() if module not in free}
    assert not remaining, f"among these, each imports another: {sorted(remaining)}"


@pytest.mark.parametrize("folder", ["rlhf_lib", "tools", "tests", "benchmarks"])
def test_no_file_is_long(folder: str) -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, so holding more than one idea: {long}"


def test_no_folder_is_crowded_and_none_lies_deeper() -> None:
    folders = {folder_of(m) for m in MODULES if m.count(".") > 1}
    counts = {f: sum(m.startswith(f"rlhf_lib.{f}.") for m in MODULES) - 1 for f in folders}
    assert all(count <= MAX_MODULES for count in counts.values()), counts
    assert max(module.count(".") for module in MODULES) == 2


def test_tests_mirror_the_folders() -> None:
    """`tests/methods/test_ppo*.py` tests `methods/ppo.py`, and so on."""
    modules = {tuple(m.split(".")[1:]) for m in MODULES}
    for path in (ROOT / "tests").glob("*/test_*.py"):
        folder, words = path.parent.name, path.stem.split("_")[1:]
        if (LIBRARY / folder).is_dir():
            names = {"_".join(words[:n]) for n in range(1, len(words) + 1)}
            assert any((folder, name) in modules for name in names), path.name
