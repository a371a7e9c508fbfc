"""Where modules that change their input in place were made."""

from __future__ import annotations

import ast
from typing import Any

from gradctl._explain._context import Context
from gradctl._explain._source import source_of
from gradctl._lineage import Site, site, source


def inplace_definition(context: Context, where: Site, module: Any = None) -> Site | None:
    """Return the line that made the in-place module which ran at a line of the user.

    Args:
        context: the facts.
        where: the innermost user line when it ran.
        module: the module, if it is known.

    Returns:
        None when the line calls it by name (then the line is the place), or when it cannot be told which one it was.
    """
    lines: set[Site] = set()
    for placed in context.facts.modules_set:
        child = placed.value()
        if (
            not placed.stack
            or getattr(child, "inplace", False) is not True
            or (module is not None and child is not module)
        ):
            continue
        if f".{placed.name}(" in source(where):
            return None
        lines.add(_argument_line(placed.stack[0], placed.name))
    return next(iter(lines)) if len(lines) == 1 else None


def _argument_line(entry: Any, name: str) -> Site:
    """Return the line of the argument that became the child `name`: `nn.Sequential` numbers its arguments."""
    found = site(entry)
    parsed = source_of(entry)
    call = parsed.expression(entry) if parsed is not None else None
    if isinstance(call, ast.Call) and name.isdigit() and int(name) < len(call.args):
        argument = call.args[int(name)]
        if not any(isinstance(other, ast.Starred) for other in call.args[: int(name) + 1]):
            return found._replace(line=argument.lineno)
    return found
