"""A notebook's kernel: where its relative folders lie, and which parameters it was given."""

from __future__ import annotations

import ast
from pathlib import Path

from IPython.core.getipython import get_ipython

from rlhf_lib.settings import SettingsError, unknown

PARAMETERS = ("PROFILE", "SEED", "RUN_DIR", "OVERRIDES")
INJECTED = "# Parameters"  # how the cell begins that papermill writes its parameters into


def in_checkout(folder: Path) -> Path:
    """A relative folder, below the checkout that the notebook at hand lies in, if it lies in one.

    Jupyter opens a notebook in its own folder: there, "runs" would be another one than that of the
    study which the command line ran. To a program its folder is where it was started.
    """
    if get_ipython() is None:
        return folder
    here = Path.cwd()
    roots = (above for above in (here, *here.parents) if (above / "notebooks").is_dir())
    return next((r for r in roots if (r / "notebooks/01_dataset.ipynb").is_file()), here) / folder


def check_parameters() -> None:
    """Raises SettingsError for a parameter that papermill was given and no notebook has.

    papermill sets whatever it is told to: a misspelt name would leave the default in force.
    """
    shell = get_ipython()
    cells = [] if shell is None else shell.user_ns.get("In", [])
    for cell in cells:
        if not cell.startswith(INJECTED):
            continue
        for node in ast.parse(cell).body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if (name := ast.unparse(target)) not in PARAMETERS:
                    raise unknown("parameter", name, PARAMETERS)


def check_folder(folder: object) -> Path:
    """Raises SettingsError for a RUN_DIR that is no folder's name."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise SettingsError(f"RUN_DIR={folder!r}: name the folder that runs are written to")
    return Path(folder)
