"""Names of code: a package's, a file's, and what is said of those that lead nowhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_lib.objectives.kl import k1
from rlhf_lib.settings import SettingsError
from rlhf_lib.user_code import IMPORTED, resolve, user_file


def test_a_package_and_a_file_lead_to_what_they_define(user_folder: Path) -> None:
    (user_folder / "far_away.py").write_text(
        "from close_by import ANSWER\n\ndef f(): return ANSWER"
    )
    (user_folder / "close_by.py").write_text("ANSWER = 42")
    assert resolve("rlhf_lib.objectives.kl:k1") is k1
    found = resolve(f"{user_folder}/far_away.py:f")
    assert found() == 42
    assert resolve(f"{user_folder}/../{user_folder.name}/far_away.py:f") is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rlhf_lib.objectives.kl", "name it as package.module:name"),
        ("rlhf_lib.objectives.kl:", "name it as package.module:name"),
        ("rlhf_lib.objectives.kl:k9", "has no attribute 'k9'"),
        ("rlhf_lib.objectives.kl:ful_kl", "has no attribute 'ful_kl'; did you mean 'full_kl'?"),
        ("rlhf_lib.objectives.lk:k1", "No module named 'rlhf_lib.objectives.lk'"),
        ("no/such/file.py:f", "there is no file .*no/such/file.py"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(name)


def test_a_file_under_the_name_of_another_module_is_refused(user_folder: Path) -> None:
    for folder in ("one", "other"):
        (user_folder / folder).mkdir()
        (user_folder / folder / "same_name.py").write_text(f"WHERE = {folder!r}")
    (user_folder / "json.py").write_text("WHERE = 'here'")
    assert resolve(f"{user_folder}/one/same_name.py:WHERE") == "one"
    for wrong in ("other/same_name.py", "json.py"):
        with pytest.raises(SettingsError, match="give the file another name"):
            resolve(f"{user_folder}/{wrong}:WHERE")


def test_a_file_is_looked_for_where_the_study_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "began.py").write_text("")
    monkeypatch.setenv("RLHF_FOLDER", str(tmp_path))
    assert user_file("began.py") == tmp_path / "began.py"
    assert user_file(str(tmp_path / "began.py")) == tmp_path / "began.py"
    monkeypatch.delenv("RLHF_FOLDER")
    with pytest.raises(SettingsError, match=r"began\.py"):
        user_file("began.py")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_a_module_that_fails_at_its_import_is_told_in_a_sentence(
    user_folder: Path, code: str, message: str
) -> None:
    (user_folder / "fails_here.py").write_text(code)
    with pytest.raises(SettingsError, match=rf"fails_here\.py:f: {message}"):
        resolve(f"{user_folder}/fails_here.py:f")


def test_a_package_is_looked_for_where_the_study_began(
    monkeypatch: pytest.MonkeyPatch, user_folder: Path
) -> None:
    (user_folder / "package_there.py").write_text("WHERE = 'there'")
    monkeypatch.setenv("RLHF_FOLDER", str(user_folder))
    assert resolve("package_there:WHERE") == "there"


def test_a_module_that_names_a_file_that_is_not_there_is_no_file_of_the_users(
    user_folder: Path,
) -> None:
    code = "import sys, types\nodd = types.ModuleType('odd_one')\nodd.__file__ = '_odd.py'\n"
    (user_folder / "makes_odd.py").write_text(code + "sys.modules['odd_one'] = odd\nF = 1\n")
    try:
        assert resolve(f"{user_folder}/makes_odd.py:F") == 1
    finally:
        sys.modules.pop("odd_one", None)
    assert not [path for path in IMPORTED if path.name == "_odd.py"]
    assert user_folder / "makes_odd.py" in IMPORTED
