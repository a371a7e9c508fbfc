"""Which engine keeps threads from recording: the import slot, or the portable one where the slot cannot be used."""

from __future__ import annotations

from typing import Protocol

from gradctl._off._portable import Portable
from gradctl._off._probe import EngineFailed
from gradctl._off._slot import Slots


class Engine(Protocol):
    """One way to keep every thread from recording a graph."""

    name: str
    """`slot` or `portable`."""
    why: str | None
    """Why it is not `slot`, or None."""
    gaps: tuple[str, ...]
    """What still records while it is shut."""

    def shut(self) -> None:
        """Stop recording in every thread; may be repeated, and then also reaches libraries loaded since.

        Raises:
            EngineFailed: it cannot; `open` puts back what was changed.
        """
        ...

    def open(self) -> None:
        """Put back exactly what stood there, where what stands there is still ours; may be repeated."""
        ...

    def remove(self) -> None:
        """Take out what stays in place between `open` and `shut`."""
        ...

    def records(self) -> bool:
        """Whether an operation in this thread records a graph now: the self-test."""
        ...


def choose() -> Engine:
    """Return the engine that works here, not yet in force."""
    try:
        return Slots()
    except EngineFailed as reason:
        return Portable(why=str(reason))
