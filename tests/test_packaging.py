"""What is installed is whole; Docker, conda and make say the same as `pyproject.toml`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTALLED = set(re.search(r'-e "\.\[(.*)\]"', MAKEFILE)[1].split(","))  # type: ignore[index]


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def test_every_package_is_listed() -> None:
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "rlhf_lib").rglob("*.py")}
    ours = {".".join(folder.parts) for folder in found} | {"rlhf_lib.report.templates"}
    beside = {name for name in SETUPTOOLS["packages"] if name.startswith("rlhf_lib.bundled")}
    assert set(SETUPTOOLS["packages"]) == ours | beside
    for name in SETUPTOOLS["package-data"].keys() - {"rlhf_lib.report.templates"}:
        assert name in beside
    places = {ROOT / folder for folder in SETUPTOOLS["package-dir"].values()}
    assert all(folder.is_dir() for folder in places)
    held = {path.parent for path in (ROOT / "data").rglob("*") if path.is_file()}
    assert len([name for name in beside if ".data" in name]) == len(held)


def test_a_hosted_notebook_gets_nothing_new_under_its_kernel() -> None:
    """Floors as low as what Colab runs with, and no tools for PDF in the core."""
    hosted = {
        "ipykernel": "6.17.1",
        "ipywidgets": "7.7.1",
        "numpy": "2.0.2",
        "pandas": "2.2.2",
        "matplotlib": "3.10.0",
        "scikit-learn": "1.6.1",
    }
    core = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    for one in core:
        assert one.specifier.contains(hosted.get(one.name, "9999")), one
    assert not {one.name for one in core} & names(EXTRAS["report"])
    assert {"jupyter", "jupyterlab"} <= names(EXTRAS["lab"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what a wheel of this checkout installs."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("rlhf_lib", "data", "notebooks", "figures/tuning"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", "-w", str(made), str(source)], check=True)
    (file,) = made.glob("*.whl")
    zipfile.ZipFile(file).extractall(made / "site")
    return made / "site"


@pytest.mark.slow
def test_a_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """The data and the notebooks are in it: nothing of a checkout is needed."""

    def run(*arguments: str) -> str:
        environ = os.environ | {"PYTHONPATH": str(wheel)}
        command = [sys.executable, "-m", "rlhf_lib", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("run", "--profile", "smoke", "--only", "01_dataset")
    (executed,) = tmp_path.glob("runs/smoke/notebooks/01_dataset.ipynb")
    outputs = str(nbformat.read(executed, as_version=4).cells)
    assert "stage" in run("status", "--profile", "smoke") or "dataset" in outputs
    assert (wheel / "rlhf_lib" / "bundled" / "tuning" / "laptop.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    where = "from rlhf_lib import runtime; print(runtime.bundled_folder())"
    environ = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(wheel / "rlhf_lib" / "bundled" / "data")


# ----------------------------------------------------------------------------- conda and Docker


def test_conda_installs_what_make_does_by_the_same_floors() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert plain[1:] == ["pip", "make"], "all else, and its floors, come from pyproject.toml"
    python = plain[0].removeprefix("python=")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python)
    constraints, package = pip
    assert (ROOT / constraints.removeprefix("-c ")).is_file()
    extras = package.removeprefix("-e .[").removesuffix("]").split(",")
    assert set(extras) == INSTALLED == EXTRAS.keys()


def test_every_floor_is_held_by_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = [Requirement(line.partition("#")[0]) for line in re.findall(r"^[a-z].*", lock, re.M)]
    wanted = [*PROJECT["project"]["dependencies"], *chain.from_iterable(EXTRAS.values())]
    for one in map(Requirement, wanted):
        found = [pin for pin in pins if pin.name == one.name.lower().replace("_", "-")]
        assert found, f"{one.name} is not in requirements.lock: make lock"
        for pin in found:
            (version,) = (spec.version for spec in pin.specifier)
            assert one.specifier.contains(version), (one, version)


def lines_of(word: str) -> list[str]:
    """The arguments of each line of the Dockerfile that begins with this word."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{word} (.*)$", joined, re.M)


def test_the_image_is_of_a_python_that_we_support_and_no_root() -> None:
    (base,) = lines_of("FROM")
    python = base.removeprefix("python:").removesuffix("-slim")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python)
    (user,) = lines_of("USER")
    assert user == "rlhf"
    assert f'--uid "$UID" {user}' in " ".join(lines_of("RUN"))
    after = DOCKERFILE[DOCKERFILE.index("\nUSER ") :]
    assert "COPY --chown=rlhf . ." in after
    assert "make setup" in after, "the environment is that user's"


@pytest.mark.parametrize("index", ["", "https://example.org/cpu"])
def test_the_image_s_own_lines_of_installing_run(index: str, tmp_path: Path) -> None:
    """As far as that goes without an engine: what make would do, in a folder of what is copied.

    That `make setup` itself succeeds in a fresh folder is what every run of `.ci/run` begins with.
    """
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    skipped = [line.removeprefix("**/") for line in ignored if line and line[0] != "#"]
    shutil.copytree(ROOT, tmp_path / "rlhf", ignore=shutil.ignore_patterns(*skipped, "figures"))
    (make,) = [line for line in lines_of("RUN") if line.startswith("make ")]
    done = subprocess.run(
        ["sh", "-ec", make.replace("make ", "make --dry-run ", 1)],
        cwd=tmp_path / "rlhf",
        env=os.environ | {"PIP_ARGS": "--retries 9", "TORCH_INDEX": index},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear .venv" in done.stdout, "the checkout's own environment is not copied"
    assert "--retries 9" in done.stdout
    assert (f"--extra-index-url {index}" in done.stdout) is bool(index)
    (command,) = lines_of("CMD")
    targets = re.findall(r'"make", "([a-z-]+)"', command)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets)


def test_nothing_that_git_ignores_is_copied_into_an_image() -> None:
    def patterns(file: str) -> set[str]:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        kept = (line.strip("/").removeprefix("**/") for line in lines)
        return {line for line in kept if line and line[0] != "#"}

    of_editors = {".DS_Store", ".idea", ".vscode", "*.swp", "*.py[cod]"}
    ignored = patterns(".gitignore") - of_editors
    assert ignored | {".git", ".venv-bench"} == patterns(".dockerignore")
    for name in re.findall(r"(?<=-f )\S+|(?<=-c )\S+", DOCKERFILE):
        assert (ROOT / name).is_file()
