"""The line of the program that asked for something: the first frame that is neither torch's nor ours."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
from typing import NamedTuple

import gradctl

_CONTEXTLIB = contextlib.__file__


class Site(NamedTuple):
    """A line of the program; its text is read only when it is shown.

    Args:
        file: as the code object names it.
        line: from 1; 0 where there is no Python frame.
        function: name of the function, or without a frame who it was.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        if not self.line:
            return self.place()
        text = linecache.getline(self.file, self.line).strip()
        return f"{self.place()} in {self.function}" + (f": {text}" if text else "")

    def place(self) -> str:
        """Return `file:line`, the file relative to the working directory where it lies below it."""
        return f"{_shown(self.file)}:{self.line}" if self.line else self.function


NOWHERE = Site("", 0, "<no Python frame>")


def find() -> Site:
    """Return the line of the program that led here; if every frame is torch's or ours, the outermost one."""
    frame = sys._getframe(1)
    while True:
        code = frame.f_code
        if not _is_machinery(code.co_filename) or frame.f_back is None:
            return Site(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back


def depth() -> int:
    """Return how many frames lie between the caller and the line of the program, for `warnings.warn`."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and _is_machinery(frame.f_code.co_filename):
        frame, count = frame.f_back, count + 1
    return count


@functools.lru_cache(maxsize=4096)
def _is_machinery(file: str) -> bool:
    return file.startswith(_machinery()) or file == _CONTEXTLIB


@functools.cache
def _machinery() -> tuple[str, ...]:
    import torch

    return os.path.dirname(torch.__file__) + os.sep, os.path.dirname(gradctl.__file__) + os.sep, "<frozen "


def _shown(file: str) -> str:
    try:
        relative = os.path.relpath(file)
    except (ValueError, OSError):  # another drive, or a working directory that is gone
        return file
    return file if relative.startswith(os.pardir) or not os.path.isabs(file) else relative
