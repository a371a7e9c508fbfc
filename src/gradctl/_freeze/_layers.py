"""Who holds a flag at what: the layers that freezes and unfreezes lay over it, the last one on top."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One call that holds flags. Compared by identity: two equal calls are two layers.

    Args:
        call: what was called, as text: `freeze('encoder.*')`.
        place: where, `file:line`.
    """

    call: str
    place: str

    def __str__(self) -> str:
        return f"{self.call} at {self.place}"


class Stack:
    """A flag's own value and the layers over it.

    Whoever sets the flag in between wins: `take_over` finds that it is not what we wrote last, ends every layer and
    makes the new value the flag's own.

    Args:
        base: the flag as it is without us.
    """

    __slots__ = ("base", "layers", "written")

    def __init__(self, base: bool) -> None:
        self.base = base
        self.written = base
        self.layers: list[tuple[Layer, bool]] = []

    def value(self) -> bool:
        """Return what the flag is to be."""
        return self.layers[-1][1] if self.layers else self.base

    def holder(self) -> Layer | None:
        """Return the layer on top."""
        return self.layers[-1][0] if self.layers else None

    def take_over(self, current: bool) -> bool:
        """End every layer if the flag was set by somebody else since we wrote it; return whether it was."""
        if current == self.written:
            return False
        self.layers.clear()
        self.base = self.written = current
        return True

    def without(self, layer: Layer) -> bool:
        """Return what the flag would be without one layer."""
        left = [trains for held, trains in self.layers if held is not layer]
        return left[-1] if left else self.base

    def drop(self, layer: Layer) -> bool:
        """Take one layer out, wherever it lies; return whether it was there."""
        before = len(self.layers)
        self.layers = [entry for entry in self.layers if entry[0] is not layer]
        return len(self.layers) != before


def place_of_call() -> str:
    """Return `file:line` of the nearest running code outside of gradctl, relative where it lies below the cwd."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    file = frame.f_code.co_filename
    try:
        relative = os.path.relpath(file)
    except (ValueError, OSError):  # another drive; a cwd that is gone
        relative = file
    return f"{os.path.basename(file) if relative.startswith('..') else relative}:{frame.f_lineno}"
