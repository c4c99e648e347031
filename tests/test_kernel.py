"""What a notebook was given: folders, seeds, overrides and names, right or refused at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import papermill
import pytest
from papermill.translators import PythonTranslator

from rlhf_lib import kernel
from rlhf_lib.settings import SettingsError
from rlhf_lib.study.stages import Study

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("path:/home/me/a.jsonl", "path:a.jsonl"),
        ("path:/home/me/a.jsonl,more/b.csv", "path:a.jsonl,b.csv"),
        ("hub:org/name:part", "hub:org/name:part"),
        ("hub:/home/me/prefs:part", "hub:prefs:part"),
        ("hub:models/mine", "hub:mine"),
        ("path:a,b/c.jsonl", "path:c.jsonl"),
        ("bundled:half", "bundled:half"),
        ("org/name", "org/name"),
        ("tiny", "tiny"),
        ("", ""),
        ("/home/me/models/mine", "mine"),
        ("./mine", "mine"),
        ("models/mine", "mine"),
        ("models/gone", "models/gone"),
    ],
)
def test_what_others_read_names_no_folder(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "c.jsonl").touch()
    monkeypatch.setenv("RLHF_FOLDER", str(tmp_path))
    assert kernel.without_folders(name) == shown


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


def test_a_relative_path_lies_where_its_user_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLHF_FOLDER", raising=False)
    assert kernel.users("pairs.jsonl") == Path("pairs.jsonl")
    assert kernel.users("~/x") == Path.home() / "x"
    monkeypatch.setenv("RLHF_FOLDER", str(tmp_path))  # a study's worker, elsewhere
    assert kernel.users("pairs.jsonl") == tmp_path / "pairs.jsonl"
    assert kernel.users("/data/pairs.jsonl") == Path("/data/pairs.jsonl")
    monkeypatch.delenv("RLHF_FOLDER")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_dataset.ipynb").write_text("{}")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(kernel, "get_ipython", object)
    assert kernel.users("pairs.jsonl").resolve() == tmp_path.resolve() / "pairs.jsonl"


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
    ({"run_dir": "s3://bucket/runs"}, r"s3://bucket/runs is an address: trainings are kept in"),
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
    session(monkeypatch, own, injected(OVERIDES="x"), injected(OVERRIDES="x"))
    kernel.check_parameters()  # corrected, and run again
    session(monkeypatch, "# Parameters of my sweep\nrates = [1, 2]\n%matplotlib inline")
    kernel.check_parameters()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"SEDE": 1}, "unknown parameter 'SEDE': did you mean 'SEED'?"),
        ({"SEED": "one"}, "SEED='one': a seed is a whole number, 0 or above"),
        ({"OVERRIDES": 0.02}, "OVERRIDES=0.02 names no setting"),
    ],
)
def test_papermill_ends_at_the_first_cell_that_would_do_anything(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    asked = {"PROFILE": "smoke", "RUN_DIR": str(tmp_path / "runs")} | given
    notebook = ROOT / "notebooks" / "01_dataset.ipynb"
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(notebook, tmp_path / "out.ipynb", asked, progress_bar=False)
    assert error.value.ename == "SettingsError"
    assert said in error.value.evalue
    assert not (tmp_path / "runs").exists()


QUIET = Path(sys.prefix) / "etc" / "ipython" / "ipython_kernel_config.json"


@pytest.mark.slow
@pytest.mark.skipif(not QUIET.exists(), reason="an environment that `make setup` has not made")
def test_papermill_s_own_command_makes_no_noise_and_reads_yaml(tmp_path: Path) -> None:
    """An OVERRIDES of a YAML file arrives as a mapping; no kernel warns of its own machine."""
    first = nbformat.v4.new_code_cell("OVERRIDES = ''", metadata={"tags": ["parameters"]})
    told = nbformat.v4.new_code_cell(
        "from rlhf_lib.profiles import load_profile\n"
        "print(load_profile('smoke', OVERRIDES).ppo.kl_coef)"
    )
    notebook = nbformat.v4.new_notebook(cells=[first, told])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    (tmp_path / "given.yaml").write_text("OVERRIDES: {ppo: {kl_coef: 0.07}}\n")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "-f", "given.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without encryption" not in done.stderr
    assert "0.07" in (tmp_path / "out.ipynb").read_text()
