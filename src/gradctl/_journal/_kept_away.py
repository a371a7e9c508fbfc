"""Values from which a program keeps the gradient away by a call of gradctl: said to whoever records the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

How = Literal["none", "zero"]
"""What comes back instead: no gradient, or one of zeros."""
Listener = Callable[["Tensor", How], None]

heard_by: list[Listener] = []
"""Who is told; empty in a program that is not recorded. Not to be read under torch.compile, which would guard on it."""


class Hearing:
    """A listener until it is removed.

    Args:
        listener: called with each value before its gradient is kept away.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        heard_by.append(listener)

    def remove(self) -> None:
        """Hear no more; a second call does nothing."""
        if self._listener in heard_by:
            heard_by.remove(self._listener)


def keeps_away(value: Tensor, how: How) -> None:
    """Say that the program keeps the gradient of a value away.

    Args:
        value: it, with the history that is not gone back.
        how: what comes back instead.
    """
    for listener in tuple(heard_by):
        listener(value, how)
