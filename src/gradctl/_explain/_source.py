"""The user's source as a tree: which expression a frame stood at, what a statement reads, binds and returns."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

from gradctl._lineage import Site, site

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Module
Entry = tuple[CodeType, int]

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
STORES = frozenset(
    ["append", "add", "insert", "appendleft", "extend", "update", "setdefault", "push", "put", "put_nowait"]
)
"""Methods of containers that keep their argument."""


class Source:
    """One parsed file.

    Args:
        tree: its syntax tree.
        filename: as code objects name it.
    """

    def __init__(self, tree: ast.Module, filename: str) -> None:
        self.tree = tree
        self.filename = filename
        self.parent: dict[ast.AST, ast.AST] = {}
        self._at: dict[tuple[int, int, int, int], ast.expr] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parent[child] = node
            if isinstance(node, ast.expr):
                self._at.setdefault(
                    (node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0), node
                )

    def up(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield what a node stands in, from near to far."""
        at = self.parent.get(node)
        while at is not None:
            yield at
            at = self.parent.get(at)

    def expression(self, entry: Entry) -> ast.expr | None:
        """Return the expression that a frame was evaluating; None where positions are not known."""
        code, lasti = entry
        if lasti < 0:
            return None
        for index, (line, end_line, column, end_column) in enumerate(code.co_positions()):
            if index == lasti // 2:
                if line is None or end_line is None or column is None or end_column is None:
                    return None
                return self._at.get((line, column, end_line, end_column))
        return None

    def statement(self, entry: Entry) -> ast.stmt | None:
        """Return the statement that a frame was in; of a compound statement, its head."""
        found = self.expression(entry)
        if found is not None:
            return self.statement_of(found)
        line = site(entry).line
        best: ast.stmt | None = None
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or node.lineno):
                continue
            if best is None or node.lineno >= best.lineno:
                best = node
        return best

    def statement_of(self, node: ast.AST) -> ast.stmt | None:
        """Return the statement that a node stands in."""
        if isinstance(node, ast.stmt):
            return node
        return next((above for above in self.up(node) if isinstance(above, ast.stmt)), None)

    def function(self, node: ast.AST) -> Function:
        """Return the function that a node stands in, the module where there is none."""
        return next((above for above in self.up(node) if isinstance(above, _FUNCTIONS)), self.tree)

    def class_of(self, node: ast.AST) -> ast.ClassDef | None:
        """Return the class that a node stands in."""
        return next((above for above in self.up(node) if isinstance(above, ast.ClassDef)), None)

    def class_named(self, qualname: str) -> ast.ClassDef | None:
        """Return the class with that qualified name."""
        name = qualname.rpartition(".")[2]
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef) and node.name == name]
        return found[0] if found else None

    def loops(self, node: ast.AST) -> list[ast.stmt]:
        """Return the loops of the same function around a node, innermost first."""
        found: list[ast.stmt] = []
        for above in self.up(node):
            if isinstance(above, _FUNCTIONS):
                break
            if isinstance(above, _LOOPS):
                found.append(above)
        return found


@functools.lru_cache(maxsize=256)
def parsed(filename: str) -> Source | None:
    """Return the tree of a file; None where there is no source that parses."""
    text = "".join(linecache.getlines(filename))
    if not text:
        return None
    try:
        return Source(ast.parse(text), filename)
    except (SyntaxError, ValueError, RecursionError):
        return None


def class_sources(cls: type) -> Iterator[tuple[Source, ast.ClassDef]]:
    """Yield where a class, and what it derives from, are written; torch's own classes are left out."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        codes = [code for value in vars(base).values() if (code := code_of(value)) is not None]
        for code in codes:
            source = parsed(code.co_filename)
            found = source.class_named(code.co_qualname.rpartition(".")[0]) if source is not None else None
            if source is not None and found is not None:
                yield source, found
                break


def code_of(value: Any) -> CodeType | None:
    """Return the code of a function, method, static method or property; of what a decorator wraps."""
    for name in ("__func__", "fget"):
        value = getattr(value, name, None) or value
    return getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)


def attribute_line(cls: type, name: str) -> Site | None:
    """Return the line of a class, or of one that it derives from, that gives `self.name` a value first."""
    for source, definition in class_sources(cls):
        for method in definition.body:
            if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for statement in statements(method):
                    if f"self.{name}" in binds(statement) and value_of_binding(statement) is not None:
                        return Site(source.filename, statement.lineno, f"{cls.__qualname__}.{method.name}")
    return None


def source_of(entry: Entry) -> Source | None:
    """Return the parsed file of a stack entry."""
    return parsed(entry[0].co_filename)


# ------------------------------------------------------------------------------------------------ texts


def text_of(node: ast.AST) -> str | None:
    """Return `x`, `self.x` or `state['h']` as text; None for what is no plain place."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = text_of(node.value)
        return None if base is None else f"{base}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        base = text_of(node.value)
        return None if base is None else f"{base}[{node.slice.value!r}]"
    return None


def reads(node: ast.AST) -> list[str]:
    """Return the places that an expression or statement takes its values from: `x`, `self.x`, `state['h']`.

    The name of a called function is none of them, the object of a called method is.
    """
    found: list[str] = []

    def visit(part: ast.AST) -> None:
        if isinstance(part, ast.Call):
            if isinstance(part.func, ast.Attribute):
                visit(part.func.value)
            elif not isinstance(part.func, ast.Name):
                visit(part.func)
            for argument in (*part.args, *(keyword.value for keyword in part.keywords)):
                visit(argument)
            return
        if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)):
            text = text_of(part)
            if text is not None:
                if (
                    isinstance(getattr(part, "ctx", None), ast.Load)
                    and text not in ("self", "cls")
                    and text not in found
                ):
                    found.append(text)
                return
        if isinstance(part, ast.AugAssign):
            text = text_of(part.target)
            if text is not None:
                found.append(text)
            visit(part.value)
            return
        for child in heads(part) if isinstance(part, ast.stmt) else ast.iter_child_nodes(part):
            visit(child)

    visit(node)
    return found


def heads(statement: ast.stmt) -> list[ast.AST]:
    """Return the expressions of a statement itself, without the statements in its body."""
    return [
        child for child in ast.iter_child_nodes(statement) if isinstance(child, (ast.expr, ast.withitem, ast.keyword))
    ]


def targets(statement: ast.stmt) -> list[ast.expr]:
    """Return what a statement assigns to."""
    if isinstance(statement, ast.Assign):
        return list(statement.targets)
    if isinstance(statement, (ast.AugAssign, ast.AnnAssign, ast.For, ast.AsyncFor)):
        return [statement.target]
    if isinstance(statement, (ast.With, ast.AsyncWith)):
        return [item.optional_vars for item in statement.items if item.optional_vars is not None]
    return []


def binds(statement: ast.stmt) -> list[str]:
    """Return the places that a statement gives a new value to; a container that it stores into is one of them."""
    found: list[str] = []
    for target in targets(statement):
        for part in flat(target):
            text = text_of(part)
            if text is None and isinstance(part, ast.Subscript):
                text = text_of(part.value)
            if text is not None:
                found.append(text)
    stored = container_of(statement)
    if stored is not None:
        found.append(stored)
    return found


def container_of(statement: ast.stmt) -> str | None:
    """Return the container into which a statement puts something by a method: `curve.append(x)`.

    Of a container in a container (`curves["loss"].append(x)`, `curves.setdefault(name, []).append(x)`) the outer one.
    """
    if not isinstance(statement, ast.Expr) or not isinstance(call := statement.value, ast.Call):
        return None
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in STORES or not (call.args or call.keywords):
        return None
    held = call.func.value
    while text_of(held) is None:
        if isinstance(held, ast.Subscript):
            held = held.value
        elif (
            isinstance(held, ast.Call)
            and isinstance(held.func, ast.Attribute)
            and held.func.attr in ("setdefault", "get")
        ):
            held = held.func.value
        else:
            return None
    return text_of(held)


def flat(target: ast.expr) -> list[ast.expr]:
    """Return the single targets of a target that unpacks."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return [part for element in target.elts for part in flat(element)]
    if isinstance(target, ast.Starred):
        return flat(target.value)
    return [target]


def value_of_binding(statement: ast.stmt) -> ast.expr | None:
    """Return the expression whose value a statement binds."""
    if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        return statement.value
    if isinstance(statement, (ast.For, ast.AsyncFor)):
        return statement.iter
    if (
        container_of(statement) is not None
        and isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
    ):
        return statement.value.args[-1] if statement.value.args else statement.value.keywords[-1].value
    return None


def statements(function: Function) -> list[ast.stmt]:
    """Return all statements of a function, in their order, without those of functions and classes inside."""
    found: list[ast.stmt] = []

    def visit(body: Sequence[ast.AST]) -> None:
        for statement in body:
            if isinstance(statement, ast.stmt):
                found.append(statement)
            if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
                continue
            for name in ("body", "orelse", "finalbody"):
                visit(getattr(statement, name, ()))
            for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                visit(part.body)

    if not isinstance(function, ast.Lambda):
        visit(function.body)
    return found


def parameters(function: Function) -> list[str]:
    """Return the names of a function's parameters, in their order, `*` and `**` left out."""
    if isinstance(function, ast.Module):
        return []
    found = function.args
    return [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]


def base_name(text: str) -> str:
    """Return the name at the front of a place: `state` of `state['h'].x`."""
    return text.partition(".")[0].partition("[")[0]


def same_place(read: str, bound: str) -> bool:
    """Whether two texts may be the same place: equal, one inside of the other, or the same attribute of two names."""
    if read == bound or read.startswith((bound + ".", bound + "[")) or bound.startswith((read + ".", read + "[")):
        return True
    if "." not in read or "." not in bound:
        return False
    return read.partition(".")[2].partition("[")[0] == bound.partition(".")[2].partition("[")[0]


def definitions(source: Source, text: str, at: ast.stmt) -> list[ast.stmt]:
    """Return the statements of the same function that may have given `text` the value that is read at a statement.

    They stand before it, or in a loop around both; the nearest before it comes first.
    """
    function = source.function(at)
    around = [set(ast.walk(loop)) for loop in source.loops(at)]
    before: list[ast.stmt] = []
    after: list[ast.stmt] = []
    for statement in statements(function):
        if not any(text == bound or text.startswith((bound + ".", bound + "[")) for bound in binds(statement)):
            continue
        if statement.lineno < at.lineno or (isinstance(statement, _LOOPS) and at in ast.walk(statement)):
            before.append(statement)
        elif any(statement in loop for loop in around):
            after.append(statement)
    return [*reversed(before), *reversed(after)]
