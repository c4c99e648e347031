"""Write into the notebooks where they come from: Colab's badge, and what a lone notebook installs.

    make colab REPOSITORY=https://github.com/OWNER/NAME        (python -m tools.colab ADDRESS)

The address stands in pyproject.toml, under [project.urls]; all else is made from it. Without one a
notebook that finds no library says how to get it, and has no badge.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BADGE = "badge"  # id of its cell, and `setup` that of the cell that installs
ON_GITHUB = re.compile(r"https://github\.com/\w[\w.-]*/\w[\w.-]*")
TABLE, KEY = "[project.urls]", "Repository"
MARKDOWN = (
    "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb)"
)
SETUP = """\
# @title On Colab: get the library, a GPU and a folder. Anywhere else this does nothing.
import importlib.util
import subprocess
import sys

ADDRESS = "{source}"
if importlib.util.find_spec("rlhf_lib") is None:
    if not ADDRESS:
        raise ModuleNotFoundError(
            "this kernel has no rlhf_lib: open the notebook by `make lab` in the project's folder, "
            "or install that folder (`pip install FOLDER`) into this kernel's Python"
        )
    print(f"installing {{ADDRESS}} ...")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", ADDRESS], check=True)
    importlib.invalidate_caches()
if "google.colab" in sys.modules:
    from rlhf_lib.session import colab

    PROFILE, RUN_DIR = colab.begin("{name}", PROFILE, SEED, RUN_DIR, OVERRIDES)"""
# folded in Jupyter and on Colab, and no part of the report
FOLDED = {
    "cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["remove-cell"],
}  # fmt: skip
METADATA = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}


def main(arguments: list[str]) -> None:
    """Write the address that is given, else the one that stands in pyproject.toml."""
    address = arguments[0].rstrip("/").removesuffix(".git") if arguments else stored(ROOT)
    if address and not ON_GITHUB.fullmatch(address):
        raise SystemExit(f"{address}: Colab opens what is at https://github.com/OWNER/NAME")
    store(ROOT, address)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        write(path, address)
        print(path.relative_to(ROOT))


def stored(root: Path) -> str:
    """The address in pyproject.toml; empty where there is none."""
    found = re.search(rf'^{KEY}\s*=\s*"(.*)"$', (root / "pyproject.toml").read_text(), re.M)
    return found[1] if found else ""


def store(root: Path, address: str) -> None:
    """Write the address into pyproject.toml, in the place of the one before."""
    path = root / "pyproject.toml"
    text = re.sub(rf'^{KEY}\s*=\s*".*"\n', "", path.read_text(encoding="utf-8"), flags=re.M)
    if address:
        line = f'{KEY} = "{address}"\n'
        if f"{TABLE}\n" in text:
            text = text.replace(f"{TABLE}\n", f"{TABLE}\n{line}")
        else:
            text = text.replace("[project.scripts]\n", f"{TABLE}\n{line}\n[project.scripts]\n")
    else:
        text = text.replace(f"{TABLE}\n\n", "")  # nothing else was in it
    path.write_text(text, encoding="utf-8")


def write(path: Path, address: str, source: str = "") -> None:
    """The notebook at `path` with its badge and its cell; `source`: what pip installs instead."""
    notebook = nbformat.read(path, as_version=4)
    kept = [cell for cell in notebook.cells if cell.id not in (BADGE, "setup")]
    place = next(i for i, cell in enumerate(kept) if "parameters" in cell.metadata.get("tags", []))
    text = SETUP.format(name=path.stem, source=source or (address and f"git+{address}"))
    setup = nbformat.v4.new_code_cell(text, id="setup", metadata=FOLDED)
    kept.insert(place + 1, setup)
    notebook.cells = [*badge(address, path.stem), *kept]
    notebook.metadata |= METADATA
    nbformat.write(notebook, path)


def badge(address: str, name: str) -> list[NotebookNode]:
    """Colab's button, for whoever reads a notebook on GitHub; the report leaves it out."""
    if not address:
        return []
    text = MARKDOWN.format(place=address.removeprefix("https://github.com/"), name=name)
    return [nbformat.v4.new_markdown_cell(text, id=BADGE, metadata={"tags": ["remove-cell"]})]


if __name__ == "__main__":
    main(sys.argv[1:])
