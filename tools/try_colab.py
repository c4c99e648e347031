"""Open each notebook alone, in what a hosted session has, and run it from top to bottom.

    python -m tools.try_colab FOLDER [01_dataset ...]

FOLDER gets an environment with Colab's versions, a stub of `google.colab`, and for each notebook an
empty folder that holds it and nothing else. A wheel of this checkout stands in for the address that
the first cell installs from; that cell, in a live kernel, must leave the kernel's own packages as
they are. Profile `smoke`, the bundled data, widgets included. Ends with status 1 where one fails.

What it cannot show: Colab's Python where it is newer (it runs on the Python it is started with),
its GPU, and the real Drive.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools import colab

ROOT = Path(__file__).resolve().parents[1]
HOSTED = {
    "ipykernel": "6.17.1",
    "ipython": "7.34.0",
    "ipywidgets": "7.7.1",
    "numpy": "2.0.2",
    "pandas": "2.2.2",
}
TORCH = "torch==2.13.0"  # a hosted session has one
STUB = {
    "google/colab/__init__.py": "",
    "google/colab/drive.py": "def mount(place):\n    raise NotImplementedError('a stub')\n",
    "hosted.pth": "import google.colab\n",  # loaded when the kernel starts, as there
}
LIST = (
    "import importlib.metadata as m, json; "
    f"print(json.dumps({{n: m.version(n) for n in {sorted(HOSTED)!r}}}))"
)


def main(folder: Path, names: list[str]) -> int:
    """Run the notebooks; returns the number of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, python = _wheel(folder), _environment(folder)
    failed = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        began = time.monotonic()
        problem = _run(folder / path.stem, path, wheel, python)
        failed += bool(problem)
        seconds = time.monotonic() - began
        print(f"{path.stem:<16} {problem or 'runs'}  {seconds:.0f} s", flush=True)
    return failed


def _wheel(folder: Path) -> Path:
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _environment(folder: Path) -> Path:
    """The Python of an environment with a hosted session's versions."""
    place = folder / "environment"
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        wanted = [f"{name}=={version}" for name, version in HOSTED.items()]
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, *wanted], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    for name, text in STUB.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    kernel = place / "share" / "jupyter" / "kernels" / "hosted"
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "hosted", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return python


def _versions(python: Path) -> dict[str, str]:
    done = subprocess.run([python, "-c", LIST], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _run(folder: Path, path: Path, wheel: Path, python: Path) -> str:
    """What is wrong with a notebook in a session of its own; empty where nothing is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "rlhf-lib"], check=True)
    alone = folder / path.name
    shutil.copy(path, alone)
    colab.write(alone, "", source=str(wheel))
    notebook = nbformat.read(alone, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = parameters.source.replace('"laptop"', '"smoke"')
    os.environ.pop("RLHF_BATCH", None)  # somebody looks at it: widgets are drawn
    specs = KernelSpecManager(kernel_dirs=[str(python.parents[1] / "share/jupyter/kernels")])
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="hosted", resources={"metadata": {"path": str(folder)}}
    )
    manager = client.create_kernel_manager()
    manager.kernel_spec_manager = specs
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error).strip().splitlines()[-1]
    finally:
        nbformat.write(notebook, alone)
    said = str(notebook.cells)
    widgets = "application/vnd.jupyter.widget-view+json"
    if path.stem[:2] in ("01", "02", "04", "06", "07") and widgets not in said:
        return "shows no widget"
    if "No GPU is on" not in said or "Runs stay on this machine" not in said:
        return "does not say what the session lacks"
    changed = {n: v for n, v in _versions(python).items() if v != HOSTED[n]}
    return f"changed under the kernel: {changed}" if changed else ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]) > 0)
