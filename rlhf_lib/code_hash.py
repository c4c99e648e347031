"""What a stage runs, as one hash: the code of modules, and of all that they import."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from rlhf_lib import user_code
from rlhf_lib.settings import SettingsError, content_hash

PACKAGE = Path(__file__).resolve().parent
# what they say enters a hash, not how
BY_VALUE = {"rlhf_lib.settings", "rlhf_lib.profiles", "rlhf_lib.catalogue"}


def source_hash(*modules: str) -> str:
    """SHA-256 of what `modules` do, and all that they import of this library or of the user's own.

    A module is named as Python names it, or by the path of its file. Comments, docstrings and
    layout do not count, nor do imports that are written as no import statement. Raises
    SettingsError for a file of the user's that is not there, not what this process has run, or one
    of two under one name.
    """
    seen: dict[str, str] = {}
    files: dict[str, Path] = {}
    waiting = [(name, source_file(name)) for name in modules]
    while waiting:
        name, path = waiting.pop()
        if path is None or name in BY_VALUE:
            continue
        key = path.stem if name.endswith(".py") else name  # wherever the file lies
        if files.setdefault(key, path) != path:
            raise SettingsError(f"{path} and {files[key]} have one name: rename one of them")
        if key in seen:
            continue
        own = user_code.is_own(path)
        text = user_code.IMPORTED.get(path, path.read_bytes()) if own else _library_text(path)
        if own and text != path.read_bytes():
            raise SettingsError(f"{path} has been edited: start Python anew to run it as it is now")
        seen[key], imported = _read_source(path, name, text)
        for other in imported:
            if not own and other.partition(".")[0] != PACKAGE.name:
                continue  # the library imports nothing of the user's
            beside = _root(name, path).joinpath(*other.split("."))
            found = [p for p in (beside.with_suffix(".py"), beside / "__init__.py") if p.is_file()]
            waiting.append((other, found[0] if own and found else source_file(other)))
    return content_hash(seen)


def _root(name: str, path: Path) -> Path:
    """The folder that a module was found from."""
    depth = 0 if name.endswith(".py") else name.count(".") + (path.name == "__init__.py")
    return path.parents[depth]


def source_file(name: str) -> Path | None:
    """The file of a module, or of `FILE.py`; None for one that is not there, or not ours to follow.

    Followed are this library and what is the user's: no installed package, nothing of Python.
    """
    if name.endswith(".py"):
        return user_code.user_file(name)
    root = name.partition(".")[0]
    if root == PACKAGE.name:  # found without importing what is above it
        path = PACKAGE.parent.joinpath(*name.split("."))
        found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
        return found[0] if found else None
    try:
        spec = importlib.util.find_spec(root)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        if not any(place and user_code.is_own(Path(place)) for place in places):
            return None
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # `from module import name`: no such module
        return None
    origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") else None


@cache
def _library_text(path: Path) -> bytes:
    """Kept for as long as Python keeps a module that it has imported."""
    return path.read_bytes()


@cache
def _read_source(path: Path, name: str, text: bytes) -> tuple[str, list[str]]:
    """Hash of a file's code, and every module that it may import, anywhere in it."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise SettingsError(f"{path}, line {error.lineno}: {error.msg}") from error
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imported = imported_modules(tree, package)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported


def imported_modules(tree: ast.AST, package: str) -> list[str]:
    """Modules that a module of `package` imports, wherever in it; names of them that may be one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, package) if node.level else dots
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return sorted(found)
