"""What a notebook was given: folders, seeds, overrides and names, right or refused at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import papermill
import pytest
from papermill.translators import PythonTranslator

from rlhf_lib import kernel
from rlhf_lib.settings import SettingsError
from rlhf_lib.study.stages import Study


def test_a_relative_folder_is_the_checkouts_wherever_the_notebook_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebooks = tmp_path / "checkout" / "notebooks"
    notebooks.mkdir(parents=True)
    (notebooks / "01_dataset.ipynb").write_text("{}")
    monkeypatch.chdir(notebooks)
    assert kernel.in_checkout(Path("runs")) == Path("runs"), "a program's is its own"
    monkeypatch.setattr(kernel, "get_ipython", object)
    elsewhere = tmp_path / "elsewhere" / "notebooks"  # somebody's own, of another project
    elsewhere.mkdir(parents=True)
    for here, found in (
        (notebooks, notebooks.parent / "runs"),
        (notebooks.parent, notebooks.parent / "runs"),
        (elsewhere, elsewhere / "runs"),
    ):
        monkeypatch.chdir(here)
        assert kernel.in_checkout(Path("runs")).resolve() == found.resolve()
        assert kernel.in_checkout(tmp_path / "my") == tmp_path / "my"


WRONG = [
    ({"seed": "one"}, r"SEED='one': a seed is a whole number, 0 or above"),
    ({"seed": "1"}, r"SEED='1': a seed is"),
    ({"seed": -1}, r"SEED=-1: a seed is"),
    ({"seed": 1.5}, r"SEED=1\.5: a seed is"),
    ({"seed": True}, r"SEED=True: a seed is"),
    ({"seed": None}, r"SEED=None: a seed is"),
    ({"overrides": 0.02}, r"OVERRIDES=0\.02 names no setting: write ppo\.kl_coef=0\.02"),
    ({"overrides": None}, r"OVERRIDES=None names no setting"),
    ({"overrides": [0.02]}, r"OVERRIDES=0\.02 names no setting"),
    ({"overrides": {"ppo": 0.02}}, r"unknown setting 'ppo'"),
    ({"overrides": {"ppo.kl_coef": [0.02]}}, r"ppo\.kl_coef=\[0\.02\]: a setting is one number"),
    ({"overrides": "methods='a"}, r"No closing quotation"),
    ({"run_dir": 7}, r"RUN_DIR=7: name the folder"),
    ({"run_dir": ""}, r"RUN_DIR='': name the folder"),
    ({"profile": 3}, r"unknown profile '3'"),
    ({"profile": "smoke "}, r"unknown profile 'smoke ': write 'smoke', without the blanks"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_a_parameter_of_the_wrong_type_is_named(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    asked = {"profile": "smoke", "run_dir": tmp_path} | given
    with pytest.raises(SettingsError, match=said):
        Study.open(**asked)
    assert not list(tmp_path.iterdir())


def session(monkeypatch: pytest.MonkeyPatch, *cells: str) -> None:
    """A kernel that has run these cells."""
    shell = SimpleNamespace(user_ns={"In": ["", *cells]})
    monkeypatch.setattr(kernel, "get_ipython", lambda: shell)


def test_a_misspelt_parameter_of_papermill_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def injected(**parameters: object) -> str:
        return PythonTranslator.codify(parameters)

    assert injected(SEED=1).startswith(kernel.INJECTED), f"papermill {papermill.__version__}"
    own = 'PROFILE = "laptop"\nTYPO = 1'
    session(monkeypatch, own, injected(SEED=1, OVERRIDES={"ppo.kl_coef": 0.02}))
    kernel.check_parameters()
    session(monkeypatch, own, injected(SEED=1, OVERIDES="ppo.kl_coef=0.02"))
    said = r"unknown parameter 'OVERIDES': did you mean 'OVERRIDES'\?"
    with pytest.raises(SettingsError, match=said):
        Study.open("smoke")
