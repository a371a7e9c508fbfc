"""Whether `-m MODULE` names something that can be run, found out without importing any of it."""

from __future__ import annotations

import difflib
import os
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from gradctl._errors import UsageError


def check_module(name: str, *, verb: str, safe_path: bool = False) -> None:
    """Check that `python -m NAME` would find a module; what is in it is the interpreter's own business.

    Args:
        name: the module, with dots.
        verb: who asks.
        safe_path: the interpreter does not look into the working directory (`-P`).

    Raises:
        UsageError: there is no such module, or it is a package without `__main__`.
    """
    before = list(sys.path)
    if not safe_path:
        sys.path.insert(0, os.getcwd())
    try:
        _check(name, verb)
    finally:
        sys.path[:] = before


def _check(name: str, verb: str) -> None:
    found: ModuleSpec | None = None
    part = ""
    for word in name.split("."):
        parent, part = found, f"{part}.{word}".removeprefix(".")
        if parent is None:
            found = _find(part, None)
        elif _is_open(parent):
            return
        else:
            inside = parent.submodule_search_locations
            found = None if inside is None else _find(part, inside)
        if found is None:
            raise _missing(name, part, parent, verb)
    assert found is not None
    inside = found.submodule_search_locations
    if inside is not None and not _is_open(found) and _find(f"{name}.__main__", inside) is None:
        raise UsageError(
            f"{name} is a package that cannot be run",
            why="it has no __main__.py",
            fix=f"name a module in it: gradctl {verb} -m {name}.{_near('train', inside) or 'MODULE'}",
        )


def _find(name: str, inside: Any) -> ModuleSpec | None:
    for finder in sys.meta_path:
        found = finder.find_spec(name, inside)
        if found is not None:
            return found
    return None


def _is_open(package: ModuleSpec) -> bool:
    """Whether a package may look for its modules elsewhere, once it is imported."""
    if package.submodule_search_locations is None or package.origin is None:
        return False  # no package, or one without code
    try:
        return not package.origin.endswith(".py") or b"__path__" in Path(package.origin).read_bytes()
    except OSError:
        return True


def _missing(name: str, part: str, parent: ModuleSpec | None, verb: str) -> UsageError:
    inside = None if parent is None else parent.submodule_search_locations
    last = part.rpartition(".")[2]
    if name.endswith(".py") and Path(name).is_file():
        return UsageError(f"there is no module {name}", fix=f"a file is run without -m: gradctl {verb} {name}")
    near = _near(last, [os.getcwd()] if parent is None else inside)
    return UsageError(
        f"there is no module {name}",
        why=None if part == name else f"{part} is not found",
        fix=f"did you mean {part.removesuffix(last)}{near}?"
        if near
        else f"name a module that exists; the working directory is {os.getcwd()}",
    )


def _near(name: str, folders: Any) -> str | None:
    names = [module.name for module in pkgutil.iter_modules(list(folders or ()))]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)
