"""A notebook's kernel: where its relative folders lie, and which parameters it was given."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

from IPython.core.getipython import get_ipython

from rlhf_lib.settings import SettingsError, unknown

PARAMETERS = ("PROFILE", "SEED", "RUN_DIR", "OVERRIDES")
INJECTED = "# Parameters"  # the first line of the cell that papermill writes its parameters into


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


def users(path: str | Path) -> Path:
    """A path as its user meant it: a relative one lies where the command was started, or in the
    checkout that the notebook at hand lies in. `~` is the home folder.

    A study's workers and notebooks compute elsewhere: for them `RLHF_FOLDER` says where it began.
    """
    given = Path(path).expanduser()
    began = os.environ.get("RLHF_FOLDER")
    return Path(began, given) if began else in_checkout(given)


def without_folders(name: str) -> str:
    """A source of data or a model as others may read it: a file's folder is nobody's business.

    `path:/home/me/a.jsonl` becomes `path:a.jsonl`, `./models/mine` becomes `mine`, and what has a
    name of its own, such as `hub:org/name` or `org/name`, keeps it.
    """
    kind, _, rest = name.partition(":")
    if kind == "path":
        files = [rest] if users(rest).exists() else rest.split(",")
        return "path:" + ",".join(Path(part).name for part in files)
    place, behind, subset = rest.partition(":") if kind == "hub" else (name, "", "")
    if place and (place.startswith((".", "/", "~")) or users(place).is_dir()):
        place = users(place).resolve().name
    return f"hub:{place}{behind}{subset}" if kind == "hub" else place


def check_parameters() -> None:
    """Raises SettingsError for a parameter that papermill was given and no notebook has.

    papermill sets whatever it is told to: a misspelt name would leave the default in force.
    """
    shell = get_ipython()
    cells = [] if shell is None else shell.user_ns.get("In", [])
    injected = [cell for cell in cells if cell.splitlines()[:1] == [INJECTED]]
    for node in ast.parse(injected[-1]).body if injected else ():
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if (name := ast.unparse(target)) not in PARAMETERS:
                raise unknown("parameter", name, PARAMETERS)


def check_folder(folder: object) -> Path:
    """The folder that runs are written to. Raises SettingsError for what is no folder's name."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise SettingsError(f"RUN_DIR={folder!r}: name the folder that runs are written to")
    if re.match(r"\w{2,}:/", str(folder)):
        raise SettingsError(
            f"{folder} is an address: trainings are kept in a folder, a mounted one perhaps; pages "
            "and a matrix's results go to addresses (--deliver, --out)"
        )
    return Path(folder).expanduser()
