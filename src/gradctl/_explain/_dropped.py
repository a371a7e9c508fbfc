"""Where a value that was computed is left out on its way to its caller, read from the source."""

from __future__ import annotations

import ast
from typing import Any

from gradctl._explain._source import Source, source_of
from gradctl._lineage import Site, Stack, site

Path = tuple[Any, ...]
"""Indices and keys below a name, under which the value lies."""

_LOST = "lost"


def dropped_at(stack: Stack) -> Site | None:
    """Return the line that leaves out the value which the innermost frame of `stack` computed; None if unclear."""
    path: Path = ()
    for entry in stack:
        source = source_of(entry)
        expression = source.expression(entry) if source is not None else None
        if source is None or expression is None:
            return None
        outcome = _follow(source, expression, path)
        if isinstance(outcome, int):
            return site(entry)._replace(line=outcome)
        if outcome is None:
            return None
        path = outcome
    return None


def _follow(source: Source, expression: ast.expr, path: Path) -> int | Path | None:
    """Follow a value from the expression that made it.

    Returns:
        The line where it is left out; or its path in what the function returns; None where it goes elsewhere.
    """
    at: ast.AST = expression
    while True:
        above = source.parent.get(at)
        if isinstance(above, (ast.Tuple, ast.List)) and isinstance(above.ctx, ast.Load):
            if any(isinstance(element, ast.Starred) for element in above.elts):
                return None
            path = ((above.elts.index(at), len(above.elts)), *path) if at in above.elts else path  # type: ignore[arg-type]
        elif isinstance(above, ast.Dict):
            key = next((k for k, v in zip(above.keys, above.values, strict=True) if v is at), None)
            if not isinstance(key, ast.Constant):
                return None
            path = (key.value, *path)
        elif isinstance(above, ast.keyword):
            # A named field of what a constructor makes: Output(logits=...), dict(aux=...).
            call = source.parent.get(above)
            if above.arg is None or not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                return None
            if call.func.id != "dict" and not call.func.id[:1].isupper():
                return None
            path, above = (above.arg, *path), call
        elif isinstance(above, (ast.Subscript, ast.Attribute)) and above.value is at:
            step = _step(above, path)
            if step is None:
                return None
            if step == _LOST:
                return above.lineno
            path = step  # type: ignore[assignment]
        elif isinstance(above, ast.Return):
            return path
        elif isinstance(above, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            target = above.targets[0] if isinstance(above, ast.Assign) else above.target
            return _bound(source, target, path, above)
        elif isinstance(above, ast.Expr):
            return above.lineno
        elif isinstance(above, (ast.IfExp, ast.Await, ast.Starred)):
            pass
        else:
            return None
        at = above


def _step(access: ast.Subscript | ast.Attribute, path: Path) -> Path | str | None:
    """Take one index, slice or attribute off a path; "lost" if it goes elsewhere, None if it cannot be told."""
    if not path:
        return None
    first, rest = path[0], path[1:]
    if isinstance(access, ast.Attribute):
        if isinstance(first, str):
            return (
                rest if first == access.attr else None if access.attr in ("items", "values", "get", "keys") else _LOST
            )
        return None
    index = access.slice
    if isinstance(first, tuple):
        position, length = first
        if isinstance(index, ast.Slice):
            bounds = [_number(part) for part in (index.lower, index.upper, index.step)]
            if "?" in bounds:
                return None
            kept = list(range(length))[slice(*bounds)]  # type: ignore[misc]
            return ((kept.index(position), len(kept)), *rest) if position in kept else _LOST
        number = _number(index)
        if not isinstance(number, int):
            return None
        return rest if (number + length if number < 0 else number) == position else _LOST
    if isinstance(index, ast.Constant):
        return rest if index.value == first else _LOST
    return None


def _number(node: ast.AST | None) -> int | str | None:
    if node is None:
        return None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand)
        return -inner if isinstance(inner, int) else "?"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, int) else "?"


def _bound(source: Source, target: ast.expr, path: Path, statement: ast.AST) -> int | Path | None:
    """Follow a value that was assigned to a target."""
    while isinstance(target, (ast.Tuple, ast.List)):
        if not path or not isinstance(path[0], tuple):
            return None
        position, length = path[0]
        starred = next((i for i, part in enumerate(target.elts) if isinstance(part, ast.Starred)), None)
        if starred is not None:
            behind = len(target.elts) - starred - 1
            if position < starred:
                target, path = target.elts[position], path[1:]
            elif position >= length - behind:
                target, path = target.elts[position - length], path[1:]
            else:
                star = target.elts[starred]
                assert isinstance(star, ast.Starred)
                target, path = star.value, ((position - starred, length - len(target.elts) + 1), *path[1:])
        elif len(target.elts) != length:
            return None
        else:
            target, path = target.elts[position], path[1:]
    if not isinstance(target, ast.Name):
        return None
    line = target.lineno
    return _uses(source, target.id, path, statement, line)


def _uses(source: Source, name: str, path: Path, statement: ast.AST, line: int) -> int | Path | None:
    function = source.function(statement)
    loads = [
        node
        for part in ast.walk(function)
        if isinstance(node := part, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        and (node.lineno > line or bool(source.loops(statement)))
    ]  # fmt: skip
    if not loads:
        return line
    lost: list[int] = []
    for load in loads:
        outcome = _follow_use(source, load, path)
        if outcome is None:
            return None
        if not isinstance(outcome, int):
            return outcome
        lost.append(outcome)
    return lost[-1] if lost else None


def _follow_use(source: Source, load: ast.Name, path: Path) -> int | Path | None:
    above = source.parent.get(load)
    if isinstance(above, (ast.For, ast.AsyncFor, ast.comprehension)) and above.iter is load:
        return None
    return _follow(source, load, path)
