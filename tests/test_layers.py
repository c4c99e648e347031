"""The library's shape: imports point downward, methods stand alone, files stay short.

Imports are read from the source, not from a running program, so an import inside a function counts
as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "rlhf_lib"
MAX_LINES = 300

# A module may import from its own layer and from those below. Every file must have its place here.
LAYERS: dict[int, tuple[str, ...]] = {
    1: ("config", "profiles", "runtime", "phases", "batches", "ops", "kl"),
    2: ("attention", "logprobs", "losses", "preference_losses", "advantages"),
    3: (
        "controllers",
        "lora",
        *("world", "world_grammar", "world_words", "world_tokenizer"),
        *(
            "data",
            "store",
            "files",
            "splits",
            "audit",
            "encoding",
            "dialogues",
            "sources",
            "hub",
            "models",
            "smollm2",
            "runs",
            "learner",
        ),
    ),
    4: ("generation", "rollout"),
    5: ("sft", "reward_model", "ppo", "grpo", "dpo"),
    6: (
        *("build_world", "world_card"),
        *("evaluation", "heldout", "text_measures", "judges", "groups", "openai_judge"),
        *("build_probes", "probes", "probe_stage", "probe_tables"),
        *(
            "intervals",
            "summary",
            "second_opinion",
            "policy_summary",
            "reward_summary",
            "frontier",
            "learning_curve",
        ),
        *("plots", "plots_reward", "plots_probes", "plots_frontier"),
        *("display", "result_tables", "cost_tables", "verdict", "choices"),
        *("widgets", "exercises", "exercises_reward", "exercises_evaluation"),
    ),
    7: (
        "report",
        "benchmark_text",
        "study",
        "schedule",
        "book",
        "readme",
        "__main__",
    ),  # and report_*
}
METHODS = frozenset(LAYERS[5])
# Pure functions of tensors. The standard library lends them words for types and records, no more.
PURE = frozenset({"ops", "kl", "losses", "preference_losses", "advantages"})
PURE_MAY_IMPORT = frozenset({"__future__", "collections", "dataclasses", "math", "typing", "torch"})

MODULES = sorted(path.stem for path in LIBRARY.glob("*.py") if path.stem != "__init__")


def layer_of(module: str) -> int | None:
    """The layer of a module of the library, or None for one that has no place in the table."""
    if module.startswith("report_"):
        return 7
    return next((layer for layer, names in LAYERS.items() if module in names), None)


def imports_of(source: str, package: str = LIBRARY.name) -> tuple[set[str], set[str]]:
    """Modules of the library, and top-level names of other packages, that a module imports."""
    own: set[str] = set()
    other: set[str] = set()

    def note(dotted: str) -> None:
        top, _, rest = dotted.partition(".")
        if top != package:
            other.add(top)
        elif rest:
            own.add(rest.partition(".")[0])

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                note(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else None, node.module)))
            if base == package:  # `from rlhf_lib import ops`: the names are the modules
                own.update(alias.name for alias in node.names)
            else:
                note(base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    note(argument.value.replace(".", f"{package}.", argument.value[0] == "."))
    return own, other


def read_imports(module: str) -> tuple[set[str], set[str]]:
    """`imports_of` for a module's file. `from rlhf_lib import __version__` names no module."""
    own, other = imports_of((LIBRARY / f"{module}.py").read_text(encoding="utf-8"))
    return {name for name in own if name in MODULES}, other


@pytest.mark.parametrize(
    ("source", "own", "other"),
    [
        ("import torch.nn as nn, math", set(), {"torch", "math"}),
        ("import rlhf_lib.ppo", {"ppo"}, set()),
        ("from rlhf_lib import ops, kl", {"ops", "kl"}, set()),
        ("from rlhf_lib.losses import dpo_loss", {"losses"}, set()),
        ("from . import dpo", {"dpo"}, set()),
        ("from .world import gold_reward", {"world"}, set()),
        ("def f():\n    from rlhf_lib.grpo import train", {"grpo"}, set()),
        ("importlib.import_module('rlhf_lib.sft')", {"sft"}, set()),
        ("importlib.import_module('.sft', 'rlhf_lib')", {"sft"}, set()),
        ("from torch.nn import functional", set(), {"torch"}),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, own: set[str], other: set[str]) -> None:
    assert imports_of(source) == (own, other)


def test_every_module_has_a_layer() -> None:
    assert MODULES, f"no module found in {LIBRARY}"
    missing = [module for module in MODULES if layer_of(module) is None]
    assert not missing, f"give {missing} a place in LAYERS of {Path(__file__).name}"


def test_no_module_is_in_two_layers() -> None:
    names = [name for layer in LAYERS.values() for name in layer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    own, _ = read_imports(module)
    above = {name for name in own if (layer_of(name) or 0) > (layer_of(module) or 0)}
    assert not above, f"{module} (layer {layer_of(module)}) imports {sorted(above)} from above it"


def test_the_package_itself_imports_no_module_of_its_own() -> None:
    # `import rlhf_lib.ops` runs __init__ first: what that imports, every module depends on.
    assert not read_imports("__init__")[0]


@pytest.mark.parametrize("module", sorted(PURE & set(MODULES)))
def test_pure_modules_import_torch_and_each_other_only(module: str) -> None:
    own, other = read_imports(module)
    assert own <= PURE, f"{module} imports {sorted(own - PURE)}"
    assert other <= PURE_MAY_IMPORT, f"{module} imports {sorted(other - PURE_MAY_IMPORT)}"


def test_the_proofs_stand_on_the_library_and_not_the_other_way_round() -> None:
    users = {module for module in MODULES if "proofs" in read_imports(module)[1]}
    assert users == {"__main__", "book"}, "only the command line and the report call the proofs"


@pytest.mark.parametrize("module", sorted(METHODS & set(MODULES)))
def test_methods_never_import_each_other(module: str) -> None:
    own, _ = read_imports(module)
    assert not own & METHODS, f"{module} imports {sorted(own & METHODS)}"


def test_no_import_goes_in_a_circle() -> None:
    remaining = {module: read_imports(module)[0] for module in MODULES}
    while free := {module for module, own in remaining.items() if not own & remaining.keys()}:
        remaining = {module: own for module, own in remaining.items() if module not in free}
    assert not remaining, f"among these, each imports another: {sorted(remaining)}"


@pytest.mark.parametrize("folder", ["rlhf_lib", "proofs", "tests", "benchmarks"])
def test_no_file_is_long(folder: str) -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, so holding more than one idea: {long}"
