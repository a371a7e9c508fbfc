"""Which line made a number of what should be a tensor: a literal that a function returned, a sum of nothing."""

from __future__ import annotations

import ast
import inspect
from types import CodeType, FrameType
from typing import Any

from gradctl._explain._raised import Raised, value_in
from gradctl._explain._source import Function, Source, definitions, parsed, source_of, statements, value_of_binding
from gradctl._lineage import Site, site

_ARITHMETIC = frozenset(["sum", "mean", "average", "float", "int", "max", "min"])


def returned_number(error: Raised, number: Any) -> tuple[Site, str] | None:
    """Return the line that gave the number on which `backward` was called, and why, as a sentence without its stop."""
    if not error.stack or error.frame is None:
        return None
    entry = error.stack[0]
    source = source_of(entry)
    statement = source.statement(entry) if source is not None else None
    if source is None or statement is None:
        return None
    loss = next(
        (part.value for part in ast.walk(statement) if isinstance(part, ast.Attribute) and part.attr == "backward"),
        None,
    )
    if loss is None:
        return None
    return _made(source, loss, statement, error.frame, number, site(entry), 0)


def _made(
    source: Source, value: ast.expr, at: ast.stmt, frame: FrameType | None, number: Any, where: Site, depth: int
) -> tuple[Site, str] | None:
    """Follow an expression that gave the number."""
    if depth > 6:
        return None
    if isinstance(value, ast.Constant):
        return where._replace(line=value.lineno), f"the literal {value.value!r} stands here in place of a tensor"
    if isinstance(value, (ast.Name, ast.Attribute)):
        if isinstance(value, ast.Attribute):
            return None
        found: tuple[Site, str] | None = None
        for defined in definitions(source, value.id, at):
            assigned = value_of_binding(defined)
            if assigned is None or isinstance(defined, (ast.For, ast.AsyncFor)):
                continue
            if isinstance(defined, ast.AugAssign):
                continue  # what was added made no tensor of it, so nothing was added, or numbers
            found = _made(source, assigned, defined, frame, number, where._replace(line=defined.lineno), depth + 1)
            if found is not None:
                return found
        return found
    if isinstance(value, ast.IfExp):
        return _made(source, value.orelse, at, frame, number, where, depth + 1) or _made(
            source, value.body, at, frame, number, where, depth + 1
        )
    if isinstance(value, ast.Call):
        return _called(source, value, at, frame, number, where, depth)
    if isinstance(value, ast.BinOp):
        return _made(source, value.left, at, frame, number, where, depth + 1) or _made(
            source, value.right, at, frame, number, where, depth + 1
        )
    return None


def _called(
    source: Source, call: ast.Call, at: ast.stmt, frame: FrameType | None, number: Any, where: Site, depth: int
) -> tuple[Site, str] | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    here = where._replace(line=call.lineno)
    function = _function(frame, call.func)
    if function is None:
        if name == "sum" and number == 0:
            return here, "sum() of nothing is the number 0"
        return (here, f"{name}() gives a plain number here") if name in _ARITHMETIC | {"item", "tolist"} else None
    code, inner, body = function
    returns = [
        statement for statement in statements(body) if isinstance(statement, ast.Return) and statement.value is not None
    ] if not isinstance(body, ast.Lambda) else []  # fmt: skip
    place = Site(code.co_filename, code.co_firstlineno, code.co_qualname)
    literal: list[tuple[Site, str]] = []
    for statement in returns:
        assert statement.value is not None
        found = _made(inner, statement.value, statement, None, number, place._replace(line=statement.lineno), depth + 1)
        if found is None:
            continue
        constant = isinstance(statement.value, ast.Constant)
        if constant and _differs(statement.value, number):
            continue
        why = f"{code.co_name}() returned the literal {ast.unparse(statement.value)} here" if constant else found[1]
        literal.append((found[0], why))
    return literal[0] if literal else None


def _differs(value: ast.expr, number: Any) -> bool:
    return isinstance(value, ast.Constant) and isinstance(number, (int, float)) and value.value != number


def _function(frame: FrameType | None, called: ast.expr) -> tuple[CodeType, Source, Function] | None:
    """Return the code, source and body of the user function that a call runs; `forward` for a module."""
    if frame is None:
        return None
    try:
        value = value_in(frame, called)
    except LookupError:
        return None
    if not inspect.isroutine(value) and not isinstance(value, type):
        classes = type(value).__mro__
        value = next(
            (vars(cls)[name] for cls in classes for name in ("__call__", "forward") if name in vars(cls)), value
        )
    value = inspect.unwrap(value)
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is None:
        return None
    source = parsed(code.co_filename)
    if source is None:
        return None
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
            if first == code.co_firstlineno:
                return code, source, node
    return None
