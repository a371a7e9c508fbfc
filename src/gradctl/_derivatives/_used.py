"""Whether what is asked for is used at all."""

from __future__ import annotations

from typing import Literal

from gradctl._derivatives._graph import Reached
from gradctl._derivatives._variables import Variables
from gradctl._errors import UsageError

Unused = Literal["zeros", "error"]


def hold_used(reached: Reached, of: Variables, unused: Unused, *, what: str) -> None:
    """Refuse when nothing that is asked for is used; and when something is not, if so asked.

    Raises:
        UsageError: names what is not used.
    """
    missing = [name for name, used in zip(of.names, reached.used, strict=True) if not used]
    if len(missing) == len(of.names):
        raise UsageError(
            f"the {what} does not depend on {missing[0] if len(missing) == 1 else 'any of the parameters'}",
            what=f"its graph reaches none of {', '.join(missing[:4])}",
            why="another copy of them was used, or they were detached on the way",
            fix="pass the tensors that it was computed from",
        )
    if missing and unused == "error":
        raise UsageError(
            f"the {what} does not depend on {missing[0]}",
            what=f"{len(missing)} of {len(of.names)} are not used",
            fix="leave it out, or take zeros for it: unused='zeros'",
        )
