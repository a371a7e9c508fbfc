"""Whose code a frame is, and where it stood: user frames as `(code, lasti)`, resolved to lines only when asked."""

from __future__ import annotations

import importlib.util
import linecache
import os
import sys
import sysconfig
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import NamedTuple

Stack = tuple[tuple[CodeType, int], ...]
"""User frames, innermost first: the code and the offset of the instruction that was running."""

_DEPTH = 10
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_WATCHING = (_OURS + "_lineage" + os.sep, _OURS + "_taps" + os.sep)
_TORCH = f"{os.sep}torch{os.sep}"
_NOT_USER = tuple(
    {
        os.path.realpath(folder) + os.sep
        for folder in (
            sysconfig.get_paths()["stdlib"],
            sysconfig.get_paths()["platstdlib"],
            sysconfig.get_paths()["purelib"],
            sysconfig.get_paths()["platlib"],
        )
    }
)


class Site(NamedTuple):
    """A place in a source file: path (as the code names it), line from 1, and the function's qualified name."""

    file: str
    line: int
    function: str


class Frames:
    """Tells the user's frames from those of libraries.

    Args:
        into: names of installed packages that count as the user's.
        script: the file that runs; its folder is the user's wherever it lies.
    """

    def __init__(self, into: Sequence[str] = (), script: str | None = None) -> None:
        self._known: dict[str, bool] = {}
        self._packages: dict[str, bool] = {}
        self._folders = tuple(_folder_of(package) for package in into)
        if script is not None:
            self._folders = (*self._folders, os.path.dirname(os.path.realpath(script)) + os.sep)

    def is_user(self, filename: str) -> bool:
        """Whether code of that file is the user's."""
        found = self._known.get(filename)
        if found is None:
            found = self._known[filename] = self._judge(filename)
        return found

    def _judge(self, filename: str) -> bool:
        if filename.startswith("<"):
            return filename.startswith(("<ipython", "<string>", "<stdin>")) and "frozen" not in filename
        path = os.path.realpath(filename)
        if path.startswith(_OURS):
            return False
        if path.startswith(_NOT_USER):
            return path.startswith(self._folders) and "site-packages" in path
        return True

    def is_package(self, filename: str) -> bool:
        """Whether code of that file belongs to an installed package other than torch and gradctl."""
        found = self._packages.get(filename)
        if found is None:
            inside = "site-packages" in filename or "dist-packages" in filename
            torch = _TORCH in filename
            found = inside and not torch and not filename.startswith(_OURS) and not self.is_user(filename)
            self._packages[filename] = found
        return found

    def stack(self, depth: int = _DEPTH, frame: FrameType | None = None) -> Stack:
        """Return the user's frames from `frame` (by default the caller) outward, innermost first."""
        found: list[tuple[CodeType, int]] = []
        known = self._known
        at: FrameType | None = sys._getframe(1) if frame is None else frame
        while at is not None:
            code = at.f_code
            user = known.get(code.co_filename)
            if user is None:
                user = self.is_user(code.co_filename)
            if user:
                found.append((code, at.f_lasti))
                if len(found) == depth:
                    break
            at = at.f_back
        return tuple(found)


def is_own(filename: str) -> bool:
    """Whether code of that file is gradctl's, and acts for the program: it does not only watch it."""
    return filename.startswith(_OURS) and not filename.startswith(_WATCHING)


def own_call() -> str | None:
    """Return the call of gradctl that runs torch now, as the program or a library named it; None where none does.

    A function of the program that gradctl calls in turn is the program's again.
    """
    name: str | None = None
    at: FrameType | None = sys._getframe(1)
    while at is not None:
        file = at.f_code.co_filename
        if is_own(file):
            name = at.f_code.co_name
        elif file.startswith(_WATCHING):
            pass
        elif name is not None or _TORCH not in file:
            return name
        at = at.f_back
    return name


_lines: dict[CodeType, list[int | None]] = {}


def site(entry: tuple[CodeType, int]) -> Site:
    """Return the place of one entry of a stack."""
    code, lasti = entry
    lines = _lines.get(code)
    if lines is None:
        lines = _lines[code] = [position[0] for position in code.co_positions()]
    line = lines[lasti // 2] if 0 <= lasti // 2 < len(lines) else None
    return Site(code.co_filename, line or code.co_firstlineno, code.co_qualname)


def sites(stack: Stack) -> list[Site]:
    """Return the places of a stack, innermost first."""
    return [site(entry) for entry in stack]


def source(place: Site) -> str:
    """Return the source line of a place, without its indentation; empty where there is none."""
    return linecache.getline(place.file, place.line).strip()


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        raise ModuleNotFoundError(package)
    folders = list(spec.submodule_search_locations or [])
    return os.path.realpath(folders[0] if folders else os.path.dirname(str(spec.origin))) + os.sep
