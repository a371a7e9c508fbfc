"""Which variable, attribute or container holds a tensor, and the line that put it there."""

from __future__ import annotations

import ast
import inspect
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import Tensor

from gradctl._explain._raised import Raised
from gradctl._explain._source import (
    Source,
    binds,
    class_sources,
    container_of,
    parsed,
    reads,
    statements,
    value_of_binding,
)
from gradctl._lineage import Node, Site, Stack, site


@dataclass(frozen=True, slots=True)
class Holder:
    """What holds a tensor.

    Args:
        kind: "container" (a list, a dictionary, ... ), "attribute" of an object.
        name: in the source: `curve`, `self.last`.
        owner: the class of the object, for an attribute.
        code: the function whose local variable the container is, None for an attribute.
    """

    kind: Literal["container", "attribute"]
    name: str
    owner: type | None
    code: CodeType | None


def holder_in(error: Raised, tensor: Tensor) -> Holder | None:
    """Return what holds the tensor: a container in a frame of the traceback, or an attribute of an object there."""
    found: Holder | None = None
    for frame, _ in reversed(error.frames):
        for name, value in list(frame.f_locals.items()):
            if _inside(value, tensor, 2) and frame.f_code in [entry[0] for entry in error.stack]:
                return Holder("container", name, None, frame.f_code)
    for frame, _ in reversed(error.frames):
        for value in list(frame.f_locals.values()):
            found = _of_object(value, tensor) or next(
                (held for part in _parts(value) if (held := _of_object(part, tensor)) is not None), None
            )
            if found is not None:
                return found
    return None


def _inside(value: Any, tensor: Tensor, depth: int) -> bool:
    if type(value) not in (list, tuple, dict, deque, set) or depth == 0 or len(value) > 100_000:
        return False
    parts = value.values() if type(value) is dict else value
    return any(part is tensor or _inside(part, tensor, depth - 1) for part in parts)


def _parts(value: Any) -> Iterator[Any]:
    modules = getattr(value, "__dict__", {}).get("_modules")
    if isinstance(modules, dict):
        for child in modules.values():
            yield child
            yield from _parts(child)


def _of_object(value: Any, tensor: Tensor) -> Holder | None:
    own = getattr(value, "__dict__", None)
    if not isinstance(own, dict) or isinstance(value, (Tensor, type)) or inspect.ismodule(value):
        return None
    for name, held in list(own.items()):
        if held is tensor:
            return Holder("attribute", f"self.{name}", type(value), None)
        if name not in ("_parameters", "_modules") and _inside(held, tensor, 2):
            kind: Literal["container", "attribute"] = "attribute" if name == "_buffers" else "container"
            return Holder(kind, f"self.{name}", type(value), None)
    return None


def stored_at(holder: Holder, node: Node | None, stack: Stack) -> Site | None:
    """Return the line that put the tensor into its holder, found in the source; None where there is none."""
    lines: list[tuple[bool, bool, Site]] = []
    for source, function, filename in _scopes(holder, stack):
        for statement in statements(function):
            if not any(_is(bound, holder.name) for bound in binds(statement)):
                continue
            value = value_of_binding(statement)
            if value is None or _is_empty(value):
                continue
            by_method = container_of(statement) is not None or not isinstance(statement, (ast.Assign, ast.AnnAssign))
            if holder.kind == "container" and not by_method and not _sets_item(statement):
                continue
            where = Site(filename, statement.lineno, getattr(function, "name", "<module>"))
            lines.append((_near(source, statement, node), by_method, where))
    if not lines:
        return None
    return max(lines, key=lambda line: (line[0], line[1]))[2]


def _scopes(holder: Holder, stack: Stack) -> Iterator[tuple[Source, Any, str]]:
    """Yield the functions in which the holder may be filled."""
    if holder.owner is not None:
        for source, definition in class_sources(holder.owner):
            for method in definition.body:
                if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield source, method, source.filename
    files = {entry[0].co_filename for entry in stack}
    for filename in files:
        source = parsed(filename)
        if source is None:
            continue
        if holder.code is not None and filename == holder.code.co_filename:
            yield source, source.tree, filename
        for part in ast.walk(source.tree):
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield source, part, filename


def _is(bound: str, name: str) -> bool:
    if "." in name and "." in bound:
        return bound.rpartition(".")[2].partition("[")[0] == name.rpartition(".")[2]
    return bound == name or bound.startswith(name + "[")


def _is_empty(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) or (isinstance(value, (ast.List, ast.Tuple)) and not value.elts)


def _sets_item(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and any(isinstance(target, ast.Subscript) for target in statement.targets)


def _near(source: Source, statement: ast.stmt, node: Node | None) -> bool:
    """Whether the stored value is what the tensor's own line defined: same line, or a name that it bound."""
    if node is None:
        return False
    value = value_of_binding(statement)
    names = reads(value) if value is not None else []
    for entry in node.stack:
        if entry[0].co_filename != source.filename:
            continue
        made = source.statement(entry)
        if made is statement or (made is not None and any(text in names for text in binds(made))):
            return True
        if made is not None and site(entry).line == statement.lineno:
            return True
    return False
