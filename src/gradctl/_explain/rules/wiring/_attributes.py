"""The line of a class that made an attribute."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch.nn import Module

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
    classes = [cls for cls in owner.__mro__ if cls is not Module and issubclass(cls, Module)]
    assigned = [line for cls in classes for line in _assignments(cls, name)]
    inside = [site(e) for e in stack if any(e[0].co_qualname.startswith(f"{cls.__qualname__}.") for cls in classes)]
    for line in inside:
        for statement, last in assigned:
            if statement.file == line.file and statement.line <= line.line <= last:
                return statement
    methods = {(line.file, line.function.partition(".<locals>")[0]) for line in inside}
    for statement, _ in assigned:
        if (statement.file, statement.function) in methods or not inside:
            return statement
    if inside:
        return inside[-1]
    return assigned[0][0] if assigned else site(stack[0]) if stack else None


@functools.lru_cache(maxsize=256)
def _assignments(cls: type, name: str) -> tuple[tuple[Site, int], ...]:
    """Return the statements of a class that assign `self.<name>` with their last lines, those in `__init__` first."""
    try:
        file = inspect.getsourcefile(cls)
        lines, first = inspect.getsourcelines(cls)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return ()
    if file is None:
        return ()
    found: list[tuple[Site, int]] = []
    for method in ast.walk(tree):
        if not isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for statement in ast.walk(method):
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                targets = [statement.target]
            else:
                continue
            parts = [p for t in targets for p in (t.elts if isinstance(t, (ast.Tuple, ast.List)) else [t])]
            if any(isinstance(part, ast.Attribute) and part.attr == name for part in parts):
                line = first + statement.lineno - 1
                last = first + (statement.end_lineno or statement.lineno) - 1
                found.append((Site(file, line, f"{cls.__qualname__}.{method.name}"), last))
    return tuple(sorted(found, key=lambda f: not f[0].function.endswith(".__init__")))
