"""The notebooks' badge and first cell: made from one address, and doing nothing at home."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tools import colab

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/somebody/rlhf"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tool writes into, copied."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    return tmp_path


def cells(checkout: Path, name: str) -> dict[str, nbformat.NotebookNode]:
    notebook = nbformat.read(checkout / "notebooks" / f"{name}.ipynb", as_version=4)
    return {cell.id: cell for cell in notebook.cells}


def texts(checkout: Path) -> dict[str, str]:
    files = [checkout / "pyproject.toml", *sorted((checkout / "notebooks").glob("*.ipynb"))]
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def test_the_notebooks_are_what_the_tool_makes_of_the_stored_address(checkout: Path) -> None:
    before = texts(checkout)
    colab.main([])
    assert texts(checkout) == before, "python -m tools.colab"


@pytest.mark.parametrize("name", NAMES)
def test_an_address_is_written_into_badge_cell_and_project(name: str, checkout: Path) -> None:
    before = texts(checkout)
    colab.main([ADDRESS + ".git"])
    found = cells(checkout, name)
    badge = found[colab.BADGE].source
    place = "colab.research.google.com/github/somebody/rlhf/blob/main/notebooks"
    assert f"({'https://'}{place}/{name}.ipynb)" in badge
    assert f'ADDRESS = "git+{ADDRESS}"' in found["setup"].source
    assert f'colab.begin("{name}", ' in found["setup"].source
    assert f'Repository = "{ADDRESS}"' in texts(checkout)["pyproject.toml"]
    colab.main([])
    assert f'ADDRESS = "git+{ADDRESS}"' in cells(checkout, name)["setup"].source, "stored"
    colab.store(checkout, "")
    colab.main([])
    assert texts(checkout) == before


def test_other_addresses_of_the_project_stay(checkout: Path) -> None:
    path = checkout / "pyproject.toml"
    before = path.read_text().replace(
        "[project.scripts]\n", '[project.urls]\nIssues = "https://x.org"\n\n[project.scripts]\n'
    )
    path.write_text(before)
    colab.store(checkout, ADDRESS)
    urls = tomllib.loads(path.read_text())["project"]["urls"]
    assert urls == {"Repository": ADDRESS, "Issues": "https://x.org"}
    colab.store(checkout, "")
    assert path.read_text() == before
    path.write_text(
        path.read_text().replace("[project.urls]\n", '[project.urls]\nRepository="x"\n')
    )
    colab.store(checkout, ADDRESS)
    assert tomllib.loads(path.read_text())["project"]["urls"] == urls, "however it is spaced"


@pytest.mark.parametrize("address", ["https://example.org/rlhf", "https://github.com/../.."])
def test_another_place_than_github_is_refused(address: str, checkout: Path) -> None:
    before = texts(checkout)
    with pytest.raises(SystemExit, match=r"Colab opens what is at https://github\.com/OWNER/NAME"):
        colab.main([address])
    assert texts(checkout) == before


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_library_is_the_cell_does_nothing(name: str) -> None:
    given = "PROFILE, SEED, RUN_DIR, OVERRIDES = 'laptop', 0, 'runs', ''\n"
    done = run(f"{given}{cells(ROOT, name)['setup'].source}\nprint(PROFILE, RUN_DIR)\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "laptop runs\n", "")


def test_where_it_is_not_and_no_address_is_known_the_way_out_is_said(checkout: Path) -> None:
    colab.store(checkout, "")
    colab.main([])
    source = cells(checkout, "04_ppo")["setup"].source
    done = run(source, "-S", "-I")  # no installed packages
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ModuleNotFoundError: this kernel has no rlhf_lib: open the notebook by `make lab`"
    )


def test_where_it_is_not_it_is_installed_from_the_address(checkout: Path) -> None:
    """pip is a stub that makes the package: importing it right after must work."""
    colab.main([ADDRESS])
    (checkout / "site").mkdir()
    given = (
        "import subprocess, sys; from pathlib import Path\n"
        f"folder = Path({str(checkout / 'site')!r}); sys.path.append(str(folder))\n"
        "def pip(command, check):\n"
        "    assert check and command[1:5] == ['-m', 'pip', 'install', '--quiet'], command\n"
        "    (folder / 'rlhf_lib').mkdir()\n"
        "    (folder / 'rlhf_lib' / '__init__.py').write_text('')\n"
        "subprocess.run = pip\n"
    )
    code = f"{given}{cells(checkout, '04_ppo')['setup'].source}\nimport rlhf_lib\n"
    done = run(code, "-S", "-I")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"installing git+{ADDRESS} ...\n"
