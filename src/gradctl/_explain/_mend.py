"""The line of a finding, mended: code that is derived from that one statement, or nothing."""

from __future__ import annotations

import ast
import linecache
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gradctl._explain._context import Candidate
from gradctl._explain._source import Source, parsed
from gradctl._lineage import Site, site

_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
_MOST_LINES = 6
_SHORT = 60
_LEAVING = frozenset(
    ["Parameter", "Variable", "argmax", "array", "as_tensor", "asarray", "data", "detach", "detach_", "float", "full"]
).union(["int", "item", "long", "numpy", "print", "round", "sign", "str", "tensor", "tolist"])
"""What takes a value out of autograd, or makes no use of its history."""
_WITHOUT_RSAMPLE = frozenset({"multinomial", "bernoulli", "poisson", "binomial"})
_OFF = {"no_grad": ("no_grad", "set_grad_enabled"), "inference_mode": ("inference_mode",)}


class Edit(NamedTuple):
    """A stretch of source, in bytes from the start of the file, and what is to stand there."""

    start: int
    end: int
    text: str


class _File:
    """The bytes of a file: positions of a syntax tree count them."""

    def __init__(self, name: str) -> None:
        self.lines = [line.encode() for line in linecache.getlines(name)]
        self.text = b"".join(self.lines)
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line))

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)

    def of(self, node: ast.expr | ast.stmt) -> str:
        return self.text[self.start(node) : self.end(node)].decode()


def mend(candidate: Candidate) -> str:
    """Return the line of a candidate as it should be written; empty where the line is not simple enough.

    Args:
        candidate: what a rule has found.
    """
    where = candidate.place
    if where is None or (candidate.slug not in _EDITS and candidate.slug not in (*_OFF, "zero_grad_misplaced")):
        return ""
    source = parsed(where.file)
    if source is None:
        return ""
    file = _File(where.file)
    if candidate.slug in _OFF:
        return _decorator(source, file, where, _OFF[candidate.slug])
    if candidate.slug == "zero_grad_misplaced":
        return _order(source, file, where)
    drawn = candidate.node.op if candidate.node is not None else ""
    if candidate.slug not in _EDITS or (candidate.slug == "non_reparam_sample" and drawn in _WITHOUT_RSAMPLE):
        return ""
    return _written(source, file, candidate, where) or _of_number(candidate, source, where)


def _written(source: Source, file: _File, candidate: Candidate, where: Site) -> str:
    found = list(_edits(source, file, where, _EDITS[candidate.slug]))
    whole = [one for one in found if ast.unparse(one[1]).startswith("float(")]
    found = [one for one in found if not any(_within(one[2], other[2]) for other in whole)]
    if len(found) > 1:
        # Several on one line: the one at which the traced operation stood.
        at = _expression(source, candidate, where)
        found = [one for one in found if one[1] is at]
    if len(found) != 1 or _leaves_again(source, found[0][1]):
        return ""
    statement, _, edit = found[0]
    if statement.end_lineno is None or statement.end_lineno - statement.lineno >= _MOST_LINES:
        return ""
    start, end = file.start(statement), file.end(statement)
    new = file.text[start : edit.start].decode() + edit.text + file.text[edit.end : end].decode()
    tree = _parsed(new)
    if tree is None:
        return ""
    if _says_nothing(tree):
        body = _siblings(source, statement)
        return _said("drop this line", file.of(statement)) if len(body) > 1 else ""
    return _said("write", _dedented(new, statement.col_offset))


def _within(inner: Edit, outer: Edit) -> bool:
    return inner != outer and outer.start <= inner.start and inner.end <= outer.end


def _leaves_again(source: Source, part: ast.expr) -> bool:
    """Whether the value is taken out of autograd further on in the same statement: the edit alone mends nothing."""
    for above in source.up(part):
        if isinstance(above, ast.stmt):
            return False
        if isinstance(above, ast.FormattedValue):
            return True
        name = above.func if isinstance(above, ast.Call) else above
        if isinstance(name, ast.Attribute):
            if name.attr in _LEAVING - {"float"} or ast.unparse(name.value) in ("math", "np", "numpy"):
                return True
        elif isinstance(above, ast.Call) and isinstance(name, ast.Name) and name.id in _LEAVING:
            return True
    return False


def _said(what: str, code: str) -> str:
    """Put code behind a word, or below it where it is long: what stands below is not wrapped."""
    return f"{what} `{code}`" if "\n" not in code and len(code) <= _SHORT else f"{what}:\n{code}"


def _dedented(text: str, indent: int) -> str:
    first, *rest = text.split("\n")
    return "\n".join([first, *(line.removeprefix(" " * indent) for line in rest)])


def _parsed(text: str) -> ast.stmt | None:
    try:
        (statement,) = ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError):
        return None
    return statement


def _says_nothing(statement: ast.stmt) -> bool:
    """Whether a statement does nothing any more: `x = x`, `x`."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom))
    if not isinstance(statement, ast.Assign):
        return False
    return all(ast.unparse(target) == ast.unparse(statement.value) for target in statement.targets)


def _edits(
    source: Source, file: _File, where: Site, edit_of: Callable[[_File, ast.expr], Edit | None]
) -> Iterator[tuple[ast.stmt, ast.expr, Edit]]:
    for statement in ast.walk(source.tree):
        if not isinstance(statement, _SIMPLE) or not _covers(statement, where.line):
            continue
        for part in ast.walk(statement):
            if isinstance(part, ast.expr):
                edit = edit_of(file, part)
                if edit is not None:
                    yield statement, part, edit


def _expression(source: Source, candidate: Candidate, where: Site) -> ast.expr | None:
    node = candidate.node
    if node is None or not node.stack or site(node.stack[0])[:2] != where[:2]:
        return None
    return source.expression(node.stack[0])


def _covers(node: ast.stmt | ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _siblings(source: Source, statement: ast.stmt) -> list[ast.stmt]:
    """Return the block that a statement stands in."""
    above = source.parent.get(statement)
    for name in ("body", "orelse", "finalbody"):
        body: Any = getattr(above, name, None)
        if isinstance(body, list) and statement in body:
            return list[ast.stmt](body)
    return [statement]


# ------------------------------------------------------------------------------------------------ one edit for each


def _without(file: _File, whole: ast.expr, attribute: ast.Attribute) -> Edit | None:
    """Take `.name` or `.name()` off the end of an expression; parentheses before it stay."""
    start, end = file.start(whole), file.end(whole)
    dot = file.text.rfind(b".", start, file.end(attribute) - len(attribute.attr.encode()))
    return Edit(start, end, file.text[start:dot].decode().rstrip()) if dot > start else None


def _method(part: ast.expr, *names: str) -> ast.Attribute | None:
    if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr in names:
        return part.func
    return None


def _detach(file: _File, part: ast.expr) -> Edit | None:
    attribute = _method(part, "detach", "detach_")
    if attribute is None or not isinstance(part, ast.Call) or part.keywords:
        return None
    if isinstance(attribute.value, ast.Name) and attribute.value.id == "torch":
        return _argument(file, part)
    return _without(file, part, attribute) if not part.args else None


def _data(file: _File, part: ast.expr) -> Edit | None:
    if not isinstance(part, ast.Attribute) or part.attr != "data" or not isinstance(part.ctx, ast.Load):
        return None
    return _without(file, part, part)


def _item(file: _File, part: ast.expr) -> Edit | None:
    attribute = _method(part, "item")
    if attribute is not None and isinstance(part, ast.Call):
        return _without(file, part, attribute) if not part.args and not part.keywords else None
    if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "float" and part.args:
        inner = _item(file, part.args[0])
        whole = _argument(file, part)
        return whole if inner is None or whole is None else Edit(whole.start, whole.end, inner.text)
    return None


def _argument(file: _File, call: ast.Call) -> Edit | None:
    """Put the only argument of a call in its place."""
    if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
        return None
    (argument,) = call.args
    plain = isinstance(argument, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))
    text = file.of(argument)
    return Edit(file.start(call), file.end(call), text if plain else f"({text})")


def _create_graph(file: _File, part: ast.expr) -> Edit | None:
    if not isinstance(part, ast.Call):
        return None
    for keyword in part.keywords:
        if keyword.arg is None:
            return None
        if keyword.arg == "create_graph":
            if isinstance(keyword.value, ast.Constant) and keyword.value.value is False:
                return Edit(file.start(keyword.value), file.end(keyword.value), "True")
            return None
    name = ast.unparse(part.func)
    if not (name == "grad" or name.endswith("autograd.grad")) or len(part.args) + len(part.keywords) < 2:
        return None
    close = file.end(part) - 1
    before = file.text[file.start(part) : close].decode()
    kept = before.rstrip()
    comma = "" if kept.endswith(",") else ","
    at = close - len(before[len(kept) :].encode())
    return Edit(at, at, f"{comma} create_graph=True") if "#" not in kept.rpartition("\n")[2] else None


def _rsample(file: _File, part: ast.expr) -> Edit | None:
    attribute = _method(part, "sample")
    if attribute is None:
        return None
    end = file.end(attribute)
    return Edit(end - len(b"sample"), end, "rsample")


_EDITS: dict[str, Callable[[_File, ast.expr], Edit | None]] = {
    "detach": _detach,
    "data": _data,
    "item": _item,
    "loss_not_tensor": _item,
    "missing_create_graph": _create_graph,
    "non_reparam_sample": _rsample,
}


def _of_number(candidate: Candidate, source: Source, where: Site) -> str:
    """Say what is to be kept where a loss became a number, when the line itself cannot be mended."""
    if candidate.slug == "loss_not_tensor" and candidate.node is not None:
        return "keep the tensor here, and take its number for the log only"
    return ""


# ------------------------------------------------------------------------------------------------ decorators, order


def _decorator(source: Source, file: _File, where: Site, names: tuple[str, ...]) -> str:
    for node in ast.walk(source.tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if _covers(decorator, where.line) and ast.unparse(called).rpartition(".")[2] in names:
                return f"drop `@{file.of(decorator)}` above {node.name}"
    return ""


def _order(source: Source, file: _File, where: Site) -> str:
    """Say which line has to move, where clearing and backward stand in one block."""
    for statement in ast.walk(source.tree):
        if not isinstance(statement, ast.Expr) or not _covers(statement, where.line):
            continue
        if _method(statement.value, "zero_grad") is None:
            continue
        block = _siblings(source, statement)
        at = block.index(statement)
        for before in reversed(block[:at]):
            if not isinstance(before, ast.Expr):
                continue
            if _method(before.value, "step") is not None:
                break
            if _method(before.value, "backward") is not None:
                moved, above = file.of(statement), file.of(before)
                return f"move `{moved}` above `{above}`" if "\n" not in moved + above else ""
    return ""
