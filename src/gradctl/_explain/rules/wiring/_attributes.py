"""The line of a class that made an attribute."""

from __future__ import annotations

import ast

from gradctl._explain._source import class_sources, flat, statements, targets, text_of, value_of_binding
from gradctl._lineage import Site, Stack, site


def line_of(owner: type, name: str, stack: Stack) -> Site | None:
    """Return the line of a class that made `self.<name>`.

    Args:
        owner: the class of the module.
        name: the attribute.
        stack: where what it holds was made; where several lines assign the attribute, the one that ran then is meant.

    Returns:
        The assignment; where there is none in the class, the line of the class that made the value, or the innermost.
    """
    classes = [
        cls.__qualname__ for cls in owner.__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins")
    ]
    assigned = _assignments(owner, name)
    inside = [site(e) for e in stack if any(e[0].co_qualname.startswith(f"{cls}.") for cls in classes)]
    for line in inside:
        for statement, last in assigned:
            if statement.file == line.file and statement.line <= line.line <= last:
                return statement
    methods = {(line.file, line.function.partition(".<locals>")[0].rpartition(".")[2]) for line in inside}
    for statement, _ in assigned:
        if not inside or (statement.file, statement.function.rpartition(".")[2]) in methods:
            return statement
    if inside:
        return inside[-1]
    return assigned[0][0] if assigned else site(stack[0]) if stack else None


def _assignments(owner: type, name: str) -> list[tuple[Site, int]]:
    """Return the statements of a class that assign `self.<name>` with their last lines, those in `__init__` first."""
    found: list[tuple[Site, int]] = []
    for source, definition in class_sources(owner):
        for method in definition.body:
            if not isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for statement in statements(method):
                if (
                    isinstance(statement, (ast.Assign, ast.AnnAssign))
                    and any(text_of(part) == f"self.{name}" for target in targets(statement) for part in flat(target))
                    and value_of_binding(statement) is not None
                ):
                    where = Site(source.filename, statement.lineno, f"{definition.name}.{method.name}")
                    found.append((where, statement.end_lineno or statement.lineno))
    return sorted(found, key=lambda f: not f[0].function.endswith(".__init__"))
