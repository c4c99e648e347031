"""The hash of code: whatever a module runs counts, and nothing that only reads well."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rlhf_lib import code_hash
from rlhf_lib.settings import SettingsError
from rlhf_lib.user_code import resolve


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in folders: top imports middle, middle imports bottom; other stands apart."""
    folder = tmp_path / "rlhf_lib"
    sources = {
        "upper/top": "from rlhf_lib.lower.middle import f\nimport torch",
        "lower/middle": "def f():\n    from ..lower import bottom",
        "lower/bottom": '"""Below."""\nimport rlhf_lib.upper.top\ndef g():\n  "Says."\n  return 1',
        "lower/other": "",
        "settings": "",
    }
    for name, text in sources.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(code_hash, "PACKAGE", folder)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("edited", "changes"),
    [
        ("upper/top", True),
        ("lower/middle", True),
        ("lower/bottom", True),
        ("lower/other", False),
        ("settings", False),
    ],
)
def test_an_edited_source_changes_the_hash_of_what_runs_it(
    edited: str, changes: bool, package: Path
) -> None:
    before = code_hash.source_hash("rlhf_lib.upper.top")
    with open(package / f"{edited}.py", "a") as source:
        source.write("EDITED = True\n")
    assert (code_hash.source_hash("rlhf_lib.upper.top") != before) is changes


def test_words_and_layout_change_no_hash(package: Path) -> None:
    before, bottom = code_hash.source_hash("rlhf_lib.upper.top"), package / "lower" / "bottom.py"
    edit(bottom, '"Says."', '"Says it better."')
    edit(bottom, '"""Below."""', '"""Far below."""  # and why')
    edit(bottom, "return 1", "return  (1)")
    assert code_hash.source_hash("rlhf_lib.upper.top") == before
    edit(bottom, "(1)", "(2)")
    assert code_hash.source_hash("rlhf_lib.upper.top") != before


def test_a_module_of_the_user_counts_with_what_lies_beside_it(tmp_path: Path) -> None:
    sources = {
        "mine": "import helper, torch\nfrom rlhf_lib.objectives.kl import k1\n",
        "helper": "WEIGHT = 1\nimport far\n",
        "far": "WEIGHT = 1\n",
        "unread": "WEIGHT = 1\n",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    hashes = [code_hash.source_hash(str(tmp_path / "mine.py"))]
    for name in ("unread", "helper", "far"):
        edit(tmp_path / f"{name}.py", "1", "2")
        hashes.append(code_hash.source_hash(str(tmp_path / "mine.py")))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in sources:
        (moved / f"{name}.py").write_text((tmp_path / f"{name}.py").read_text())
    assert code_hash.source_hash(str(moved / "mine.py")) == hashes[-1]


def test_a_file_of_the_user_hides_no_module_of_the_same_name(package: Path, tmp_path: Path) -> None:
    (tmp_path / "top.py").write_text("WEIGHT = 1\n")
    modules = "rlhf_lib.upper.top", str(tmp_path / "top.py")
    before = code_hash.source_hash(*modules)
    edit(package / "upper" / "top.py", "import torch", "import math")
    assert code_hash.source_hash(*modules) != before


def test_a_file_of_the_user_that_python_has_run_otherwise_is_refused(user_folder: Path) -> None:
    mine, helper = user_folder / "mine_here.py", user_folder / "helper_here.py"
    mine.write_text("from helper_here import WEIGHT\n")
    helper.write_text("WEIGHT = 1\n")
    before = code_hash.source_hash(str(mine))
    edit(helper, "1", "3")
    assert code_hash.source_hash(str(mine)) != before, "nothing has run yet"
    edit(helper, "3", "1")
    assert resolve(f"{mine}:WEIGHT") == 1
    for file, new in ((mine, "from helper_here import WEIGHT  # \n"), (helper, "WEIGHT = 2\n")):
        old = file.read_text()
        file.write_text(new)
        with pytest.raises(SettingsError, match=rf"{file.name} has been edited: start Python anew"):
            code_hash.source_hash(str(mine))
        file.write_text(old)
    assert code_hash.source_hash(str(mine)) == before
    with pytest.raises(SettingsError, match=r"there is no file .*no\.py"):
        code_hash.source_hash(str(user_folder / "no.py"))


def test_packages_beside_a_file_of_the_user_count_and_installed_ones_do_not(
    tmp_path: Path,
) -> None:
    files = {
        "mine.py": "import parts.core, numpy.random\nfrom parts import more\n",
        "parts/__init__.py": "",
        "parts/core.py": "from .deep import far\n",
        "parts/more.py": "WEIGHT = 1\n",
        "parts/deep/__init__.py": "",
        "parts/deep/far.py": "WEIGHT = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    seen = {code_hash.source_hash(str(tmp_path / "mine.py"))}
    for name in ("parts/more.py", "parts/deep/far.py", "parts/__init__.py"):
        (tmp_path / name).write_text("WEIGHT = 2\n")
        seen.add(code_hash.source_hash(str(tmp_path / "mine.py")))
    assert len(seen) == 4
    assert code_hash.source_file("numpy.random") is code_hash.source_file("json") is None


def test_two_files_of_the_user_under_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"rule_{folder}.py").write_text("import helper_of_both\n")
        (tmp_path / folder / "helper_of_both.py").write_text("WEIGHT = 1\n")
    with pytest.raises(SettingsError, match="have one name: rename one of them"):
        code_hash.source_hash(*(str(tmp_path / f / f"rule_{f}.py") for f in ("one", "two")))


def test_a_file_of_the_user_that_is_no_python_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("WEIGHT = 1\ndef f(:\n")
    with pytest.raises(SettingsError, match=r"mine\.py, line 2: invalid syntax"):
        code_hash.source_hash(str(tmp_path / "mine.py"))


def test_every_form_of_import_is_seen() -> None:
    source = """
import rlhf_lib.objectives.masked, torch
from rlhf_lib.objectives import kl as estimators
from rlhf_lib.objectives.losses import dpo_loss
def f():
    from ..world.rewards import gold_reward
"""
    found = code_hash.imported_modules(ast.parse(source), "rlhf_lib.methods")
    assert {
        "rlhf_lib.objectives.masked",
        "rlhf_lib.objectives.kl",
        "rlhf_lib.objectives.losses",
        "rlhf_lib.world.rewards",
        "torch",
    } <= set(found)


def test_the_hash_of_ppo_covers_its_loss_and_not_that_of_the_notebooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    monkeypatch.setattr(code_hash, "content_hash", lambda seen: read.extend(seen) or "hash")
    code_hash.source_hash("rlhf_lib.methods.ppo")
    names = {name.removeprefix("rlhf_lib.") for name in read}
    assert {"methods.ppo", "methods.rollout", "objectives.losses", "objectives.kl"} <= names
    assert {"objectives.masked", "models.load", "methods.learner", "world.rewards"} <= names
    assert not {"settings", "catalogue", "methods.grpo"} & names
    assert not [n for n in names if n.startswith(("show", "report", "results"))]
