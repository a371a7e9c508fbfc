"""Where in the user's source a call of torch came from: numbered places, and whether a library stood in between."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from types import CodeType, FrameType
from typing import NamedTuple

_DEPTH = 12
_MOST = 150
"""Places that are numbered; a program that comes from more is not one whose loop can be read."""
_TEXT = 240
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PASSED, _USER, _LIBRARY = range(3)
_STEPS_FOR_THE_USER = tuple(_OURS + name for name in ("_step", "_precision", "_derivatives", "_custom_grad"))
"""Our own calls that run a backward for their caller, as a trainer of a library does."""


def _folders(*names: str) -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.realpath(paths[name]) + os.sep for name in names})


_STDLIB = _folders("stdlib", "platstdlib")
_PACKAGES = _folders("purelib", "platlib")


class Stand(NamedTuple):
    """A frame of the user's code: the frame's id, its code and the line it stood at."""

    frame: int
    code: CodeType
    line: int


class Call(NamedTuple):
    """A call of torch.

    Args:
        site: number of its place in the user's source; -1 if there is none.
        direct: the user's code called torch itself, no library in between.
        stack: the user's frames, innermost first.
        gradient: a backward was handed a gradient of its own.
    """

    site: int
    direct: bool
    stack: tuple[Stand, ...]
    gradient: bool = False


NOWHERE = Call(-1, False, ())


class Places:
    """Numbers the places of the user's source."""

    def __init__(self) -> None:
        self._kinds: dict[str, int] = {}
        self._numbers: dict[tuple[str, int], int] = {}

    def here(self, depth: int = 2) -> Call:
        """Return where the call came from.

        Args:
            depth: how many frames of ours stand above the call.
        """
        frame: FrameType | None = sys._getframe(depth)
        kinds = self._kinds
        direct, gradient = True, False
        stack: list[Stand] = []
        while frame is not None and len(stack) < _DEPTH:
            code = frame.f_code
            name = code.co_filename
            kind = kinds.get(name)
            if kind is None:
                kind = kinds[name] = _kind(name)
            if kind == _USER:
                stack.append(Stand(id(frame), code, frame.f_lineno))
            elif kind == _LIBRARY:
                direct = direct and bool(stack)
            elif code.co_name == "backward" and not stack:
                gradient = gradient or _hands_in_a_gradient(frame)
            frame = frame.f_back
        if not stack:
            return NOWHERE
        return Call(self._number(stack[0].code.co_filename, stack[0].line), direct, tuple(stack), gradient)

    def quick(self, depth: int = 2) -> int:
        """Return the number of the place of a call, and nothing else."""
        frame: FrameType | None = sys._getframe(depth)
        kinds = self._kinds
        while frame is not None:
            name = frame.f_code.co_filename
            kind = kinds.get(name)
            if kind is None:
                kind = kinds[name] = _kind(name)
            if kind == _USER:
                return self._number(name, frame.f_lineno)
            frame = frame.f_back
        return -1

    def _number(self, file: str, line: int) -> int:
        key = (file, line)
        number = self._numbers.get(key)
        if number is None:
            if len(self._numbers) >= _MOST:
                return -1
            number = self._numbers[key] = len(self._numbers)
        return number

    def known(self) -> list[tuple[str, int]]:
        """Return file and line of every place, in order of the numbers."""
        return list(self._numbers)


def text_of(file: str, line: int) -> str:
    """Return the source line of a place without its indentation; empty where there is none."""
    return linecache.getline(file, line).strip()[:_TEXT]


def _kind(filename: str) -> int:
    if filename.startswith("<"):
        shown = filename.startswith(("<ipython", "<string>", "<stdin>"))
        return _USER if shown else _PASSED
    path = os.path.realpath(filename)
    if path.startswith(_OURS):
        return _LIBRARY if path.startswith(_STEPS_FOR_THE_USER) else _PASSED
    if path.startswith(_PACKAGES) or f"{os.sep}site-packages{os.sep}" in path:
        return _PASSED if f"{os.sep}torch{os.sep}" in path else _LIBRARY
    return _PASSED if path.startswith(_STDLIB) else _USER


def _hands_in_a_gradient(frame: FrameType) -> bool:
    """Whether this frame of `Tensor.backward` or `autograd.backward` was given a gradient: it may be a factor."""
    found = frame.f_locals
    return found.get("gradient") is not None or found.get("grad_tensors") is not None
