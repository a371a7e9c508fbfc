"""What the source says about how a step follows its backwards: once for each, counted, or after a loop of them."""

from __future__ import annotations

import ast
import linecache
import re
from functools import lru_cache
from typing import Literal

Loop = Literal["counted", "named", "split", ""]
_WORDS = re.compile(r"micro|accum", re.IGNORECASE)
_SPLITS = frozenset({"split", "chunk", "tensor_split", "array_split", "unbind"})
_LONGEST = 20_000
_LOOPS = (ast.For, ast.AsyncFor, ast.While)


@lru_cache(maxsize=64)
def how(file: str, backward: int, step: int) -> Loop:
    """Say what makes several backwards precede one step.

    Args:
        file: the file in which both stand.
        backward: the line of the backward, or of the call in the common function that leads to it.
        step: the line of the step, likewise.

    Returns:
        `counted`: in the loop of the backward, the step waits for a remainder or for a count that says so.
        `named`: the loop of the backward calls its rounds microbatches or accumulation.
        `split`: the loop of the backward goes over the parts of one batch, and carries no state from one to the next.
        Else empty.
    """
    tree = _tree(file)
    if tree is None:
        return ""
    loops = [node for node in ast.walk(tree) if isinstance(node, _LOOPS) and _holds(node, backward)]
    if not loops:
        return ""
    inner = max(loops, key=lambda node: node.lineno)
    if _holds(inner, step):
        return "counted" if _is_counted(inner, backward, step) else ""
    head = _head(inner)
    if _WORDS.search(head):
        return "named"
    if any(isinstance(node, ast.Attribute) and node.attr in _SPLITS for node in _in_head(inner)):
        # truncated backpropagation goes over the parts of a sequence, and detaches the state in between
        detaches = any(isinstance(node, ast.Attribute) and node.attr.startswith("detach") for node in ast.walk(inner))
        return "" if detaches else "split"
    return ""


@lru_cache(maxsize=16)
def _tree(file: str) -> ast.Module | None:
    lines = linecache.getlines(file)
    if not lines or len(lines) > _LONGEST:
        return None
    try:
        return ast.parse("".join(lines))
    except (SyntaxError, ValueError, RecursionError):
        return None


def _holds(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _is_counted(loop: ast.stmt, backward: int, step: int) -> bool:
    for node in ast.walk(loop):
        if not isinstance(node, ast.If) or not _counts(node.test):
            continue
        if _holds(node, step) and not _holds(node, backward):
            return True
        leaves = any(isinstance(inside, ast.Continue) for inside in node.body)
        if leaves and backward < node.lineno <= step:
            return True
    return False


def _counts(test: ast.expr) -> bool:
    remainder = any(isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) for node in ast.walk(test))
    return remainder or _WORDS.search(ast.unparse(test)) is not None


def _in_head(loop: ast.stmt) -> list[ast.AST]:
    if isinstance(loop, ast.While):
        return list(ast.walk(loop.test))
    assert isinstance(loop, ast.For | ast.AsyncFor)
    return [*ast.walk(loop.target), *ast.walk(loop.iter)]


def _head(loop: ast.stmt) -> str:
    if isinstance(loop, ast.While):
        return ast.unparse(loop.test)
    assert isinstance(loop, ast.For | ast.AsyncFor)
    return f"{ast.unparse(loop.target)} in {ast.unparse(loop.iter)}"
