"""Where values went in the program's source: what carried them, where they were stored, dropped, or came back from."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import NamedTuple

from gradctl._explain._source import (
    Entry,
    Function,
    Source,
    base_name,
    binds,
    container_of,
    definitions,
    parameters,
    reads,
    same_place,
    source_of,
    statements,
    value_of_binding,
)
from gradctl._lineage import Escape, Node, Site, Stack, site

_DEEP = 6


class Carrier(NamedTuple):
    """What carried a value from where it was made to where it was used.

    Args:
        place: the line at which the carried value is read: where a local variable is passed on, or an attribute used.
        text: its name in the source.
        level: how many frames further out than the use that line is.
        stored: the line that put it into a container by a method (`queue.append(x)`); None for what was assigned.
    """

    place: Site
    text: str
    level: int
    stored: Site | None = None


def carrier(use: Stack, made: Stack, outlived: Stack) -> Carrier | None:
    """Return the variable that carried a value made at `made` to a use at `use`; None if the source does not tell.

    A local variable of a loop is read in the frame of the loop, an attribute in the frame that uses it.

    Args:
        use: where the value was used.
        made: where it was made.
        outlived: the frames that went on running in between; no other keeps its local variables.
    """
    running = {code for code, _ in outlived}
    given = _given(made)
    wanted: set[str] | None = None
    for level, entry in enumerate(use[:_DEEP]):
        source = source_of(entry)
        statement = source.statement(entry) if source is not None else None
        if source is None or statement is None:
            return None
        expression = source.expression(entry)
        looked_at = reads(expression) if level == 0 and expression is not None else reads(statement)
        if level and wanted is not None and isinstance(expression, ast.Call):
            looked_at = _passed(expression, wanted, source, use[level - 1]) or looked_at
        names, ends = _behind(source, statement, looked_at)
        for text in names:
            for bound, where, stored in given:
                if _carries(text, bound, entry, where, running):
                    return Carrier(site(entry), text, level, stored)
        wanted = {base_name(text) for text in ends if base_name(text) in parameters(source.function(statement))}
        if not wanted:
            return None
    return None


def _given(made: Stack) -> list[tuple[str, Entry, Site | None]]:
    """Return the places that hold a value made at `made`, in each frame that returned it, and what put it in there."""
    found: list[tuple[str, Entry, Site | None]] = []
    for entry in made[:_DEEP]:
        source = source_of(entry)
        statement = source.statement(entry) if source is not None else None
        if source is None or statement is None:
            continue
        known = {text: _put(statement, text, entry) for text in binds(statement)}
        # What is assigned from it later in the same function holds it too.
        for later in statements(source.function(statement)):
            if later.lineno > statement.lineno and any(text in known for text in reads(later)):
                known = {text: _put(later, text, entry) for text in binds(later)} | known
        found += [(text, entry, stored) for text, stored in known.items()]
    return found


def _put(statement: ast.stmt, text: str, entry: Entry) -> Site | None:
    """Return the line if it puts a value where it outlives the call: into a container, or into a closure's variable."""
    outlives = container_of(statement) == text or (text in entry[0].co_freevars and text in binds(statement))
    return site(entry)._replace(line=statement.lineno) if outlives else None


def _behind(source: Source, statement: ast.stmt, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the places that `texts` at a statement may have their values from, and those with no definition before."""
    found: list[str] = []
    ends: list[str] = []
    queue = [(text, statement) for text in texts]
    while queue and len(found) < 60:
        text, at = queue.pop(0)
        if text in found:
            continue
        found.append(text)
        defined = definitions(source, text, at)
        if not defined or "." in text:
            ends.append(text)
        for other in defined:
            value = value_of_binding(other)
            if value is not None:
                queue += [(part, other) for part in reads(value)]
    return found, ends


def _carries(read: str, bound: str, reader: Entry, writer: Entry, running: set[CodeType]) -> bool:
    if "." in read and "." in bound:
        return same_place(read, bound)
    if not same_place(read, bound):
        return False
    # A local variable: the same function, and at the read there is a definition before it, or around a loop.
    if reader[0] is not writer[0]:
        return _is_global(read, reader) and _is_global(bound, writer)
    source = source_of(reader)
    statement = source.statement(reader) if source is not None else None
    if source is None or statement is None:
        return False
    if isinstance(source.function(statement), ast.Module) or _is_global(read, reader):
        return True
    if reader[0] not in running:
        return False
    return bool(_bound_before(source, statement, read))


def _bound_before(source: Source, statement: ast.stmt, text: str) -> list[ast.stmt]:
    return definitions(source, text, statement) or definitions(source, base_name(text), statement)


def _is_global(text: str, entry: Entry) -> bool:
    name = base_name(text)
    code = entry[0]
    return code.co_name == "<module>" or (name not in code.co_varnames and name not in code.co_cellvars)


def _passed(call: ast.Call, wanted: set[str], source: Source, callee: Entry) -> list[str]:
    """Return the places that a call passes for some parameters of the function that it runs."""
    inner = source_of(callee)
    statement = inner.statement(callee) if inner is not None else None
    if inner is None or statement is None:
        return []
    names = parameters(inner.function(statement))
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    found: list[str] = []
    for name, argument in zip(names, call.args, strict=False):
        if isinstance(argument, ast.Starred):
            return []
        if name in wanted:
            found += reads(argument)
    for keyword in call.keywords:
        if keyword.arg in wanted:
            found += reads(keyword.value)
    return found


# ------------------------------------------------------------------------------------------------ numbers


def number_source(entry: Entry, escapes: Sequence[Escape]) -> Escape | None:
    """Return the escape whose number is used, by one of the names there, at the line of a frame.

    An escape fits when its frames pass the line in question, or a line that defined a name used there, or one that
    such a definition used in turn; within a function called on the way, when it feeds what that function returns. The
    shortest chain counts, then the newest escape.

    Args:
        entry: a frame of the consumer.
        escapes: what left autograd before, oldest first.
    """
    source = source_of(entry)
    statement = source.statement(entry) if source is not None else None
    if source is None or statement is None or not escapes:
        return None
    lines = _slice(source, statement)
    best: tuple[int, int] | None = None
    found: Escape | None = None
    for escape in escapes:
        for depth, frame in enumerate(escape.stack):
            far = lines.get((frame[0].co_filename, site(frame).line))
            if far is None or (frame[0] is not entry[0] and not _same_class(source, statement, frame)):
                continue
            if not _reaches(escape.stack[: depth + 1]):
                continue
            key = (-far, escape.seq)
            if best is None or key > best:
                best, found = key, escape
            break
    return found


def _slice(source: Source, statement: ast.stmt) -> dict[tuple[str, int], int]:
    """Return the lines that feed a statement, in its function and the methods beside it, with their distance."""
    lines: dict[tuple[str, int], int] = {}
    queue = [(statement, 0)]
    seen: set[ast.stmt] = set()
    while queue:
        at, far = queue.pop(0)
        if at in seen:
            continue
        seen.add(at)
        for line in range(at.lineno, _head_end(at) + 1):
            lines.setdefault((source.filename, line), far)
        if far >= _DEEP:
            continue
        value = at if at is statement else value_of_binding(at)
        for text in reads(value) if value is not None else ():
            defined = definitions(source, text, at) or _attribute_definitions(source, text, at)
            queue += [(other, far + 1) for other in defined]
    return lines


def _head_end(statement: ast.stmt) -> int:
    body = getattr(statement, "body", None)
    if isinstance(body, list) and body and isinstance(first := body[0], ast.stmt):
        return max(statement.lineno, first.lineno - 1)
    return statement.end_lineno or statement.lineno


def _attribute_definitions(source: Source, text: str, at: ast.stmt) -> list[ast.stmt]:
    """Return the statements of other methods of the class that assign an attribute, or store into it."""
    owner = source.class_of(at)
    if "." not in text or owner is None:
        return []
    return [
        statement
        for part in owner.body
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
        for statement in statements(part)
        if any("." in bound and same_place(text, bound) for bound in binds(statement))
    ]


def _same_class(source: Source, statement: ast.stmt, frame: Entry) -> bool:
    owner = source.class_of(statement)
    return owner is not None and f"{owner.name}." in frame[0].co_qualname


def _reaches(frames: Stack) -> bool:
    """Whether a number that left in the innermost of these frames may be what the outermost line received.

    In each function in between it has to feed what that function returns, or an attribute or container.
    """
    for entry in frames[:-1]:
        source = source_of(entry)
        statement = source.statement(entry) if source is not None else None
        if source is None or statement is None:
            return True
        if isinstance(statement, ast.Expr) and not binds(statement):
            if not isinstance(statement.value, (ast.Yield, ast.YieldFrom, ast.Await)):
                return False
            continue
        if isinstance(statement, ast.Return) or any("." in bound or "[" in bound for bound in binds(statement)):
            continue
        if isinstance(statement, (ast.If, ast.While, ast.Assert)):
            return False
        known = set(binds(statement))
        function = source.function(statement)
        changed = True
        while changed:
            changed = False
            for other in statements(function):
                value = value_of_binding(other)
                if value is not None and any(base_name(text) in known or text in known for text in reads(value)):
                    new = set(binds(other)) - known
                    changed = changed or bool(new)
                    known |= new
        if not _returns(function, known):
            return False
    return True


def _returns(function: Function, names: set[str]) -> bool:
    if isinstance(function, ast.Lambda):
        return True
    if any("." in name or "[" in name for name in names):
        return True
    for statement in statements(function):
        given = (
            statement.value
            if isinstance(statement, ast.Return)
            else statement.value.value
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield)
            else None
        )
        if given is not None and any(base_name(text) in names for text in reads(given)):
            return True
    return isinstance(function, ast.Module)


# ------------------------------------------------------------------------------------------------ dropped values


def where_dropped(node: Node) -> Site | None:
    """Return the line at which a computed value was left out; None if the source does not tell.

    That is a slice or an index that passes it by, an unpacked name that nobody reads, a call whose result is not kept.
    """
    from gradctl._explain._dropped import dropped_at

    return dropped_at(node.stack)
