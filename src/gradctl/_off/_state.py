"""What every interception asks: are gradients off, who says so, and how a refusal is worded.

Written only by `_switch`, under its lock; read without one from every thread.
"""

from __future__ import annotations

import threading
from typing import NoReturn

from gradctl._errors import BackwardRefused
from gradctl._off import _site

is_shut = False
"""Whether no thread records a graph now."""

closing: dict[object, None] = {}
"""Those who are about to switch off and wait for backwards that are running; each takes its own entry out again."""

strict = 0
"""How many of those that switched off asked for `strict`."""

where = _site.NOWHERE
"""The line that switched off; without a line, who did."""

FIX = "keep the graph and do this after the switch is back on, or take it out of the part that runs with gradients off"


def since() -> str:
    """Return where gradients were switched off, or by whom where that is no line of this process."""
    by = not where.line and where is not _site.NOWHERE
    return f"off {'by' if by else 'at'} {where}"


def refuse(what: str, *, fix: str = FIX) -> NoReturn:
    """Refuse `what`, asked for in this thread.

    Raises:
        BackwardRefused: always.
    """
    raise BackwardRefused(
        f"{what} refused: gradients are switched off for this process",
        what=f"{_site.find()} [thread {threading.current_thread().name}]",
        why=f"switched {since()}",
        fix=fix,
    )
