"""Code by name, the user's own included: `package.module:name` or `FILE.py:name`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_lib.kernel import users
from rlhf_lib.settings import SettingsError

# files of the user's as they were when Python imported them: later edits have not been run
IMPORTED: dict[Path, bytes] = {}


def resolve(name: str) -> Any:
    """The object behind `package.module:name` or `FILE.py:name`.

    A file's folder is searched for what it imports. Raises SettingsError for what is not there.
    """
    module, colon, attribute = name.rpartition(":")
    if not colon or not attribute:
        raise SettingsError(f"{name!r}: name it as package.module:name or FILE.py:name")
    path = user_file(module) if module.endswith(".py") else None
    if path is not None:
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        module = path.stem
    elif (folder := os.environ.get("RLHF_FOLDER", "")) not in ("", *sys.path):
        sys.path.insert(0, folder)
    known = set(sys.modules)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # of the user's code, whatever it does
        raise SettingsError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        for other in sys.modules.keys() - known:
            file = Path(getattr(sys.modules[other], "__file__", None) or "")
            # some modules name a file that is not there
            if file.suffix == ".py" and file.is_file() and is_own(file.resolve()):
                IMPORTED[file.resolve()] = file.read_bytes()
    if path is not None and getattr(found, "__file__", None) != str(path):
        raise SettingsError(f"{name}: Python has another {module}; give the file another name")
    if not hasattr(found, attribute):
        near = difflib.get_close_matches(attribute, vars(found), n=1)
        raise SettingsError(
            f"{name}: module {module} has no attribute {attribute!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return getattr(found, attribute)


def user_file(name: str) -> Path:
    """Where `FILE.py` is. Raises SettingsError if it is not there."""
    path = users(name).resolve()
    if not path.is_file():
        raise SettingsError(f"{name}: there is no file {path}")
    return path


@cache
def is_own(file: Path) -> bool:
    """Whether a file is the user's: neither Python's, nor an installed package's, nor ours."""
    places = [Path(place) for place in sysconfig.get_paths().values()]
    return not any(file.is_relative_to(place) for place in [*places, Path(__file__).parent])
