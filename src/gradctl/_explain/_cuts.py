"""What a break in the lineage is called, where it stands, and why it cuts: one table row for each kind of cut."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple

from gradctl._explain._context import place
from gradctl._lineage import CASTS, COMPARISONS, Node, Region, Site, site


class Cut(NamedTuple):
    """A break, described.

    Args:
        slug: the cause.
        place: its line.
        why: what happens there, as a sentence without its full stop.
        evidence: further places with their roles.
        deliberate: how often people cut like this on purpose, from 0 (never) to 1.
    """

    slug: str
    place: Site | None
    why: str
    evidence: tuple[tuple[Site | None, str], ...] = ()
    deliberate: float = 0.0


def describe(node: Node) -> Cut:
    """Describe the break at a node that lost the history of an input."""
    assert node.cut is not None
    return _KINDS[node.cut](node)


def _detach(node: Node) -> Cut:
    return Cut("detach", place(node.stack), ".detach() cuts the gradient here", _callers(node), 0.5)


def _data(node: Node) -> Cut:
    return Cut("data", place(node.stack), ".data cuts the gradient here", _callers(node), 0.3)


def _rewrap(node: Node) -> Cut:
    why = f"torch.{node.op}() copies the numbers and drops their history"
    return Cut("rewrap_tensor", place(node.stack), why, _callers(node))


def _variable(node: Node) -> Cut:
    why = "Variable(x) starts a new leaf; the history of x is dropped"
    return Cut("rewrap_tensor", place(node.stack), why, _callers(node))


def _parameter(node: Node) -> Cut:
    why = "nn.Parameter(x) starts a new leaf; the history of x is dropped"
    return Cut("parameter_wrap", place(node.stack), why, _callers(node), 0.1)


def _constant(node: Node) -> Cut:
    why = "torch.autograd.grad without create_graph=True returns a constant"
    return Cut("missing_create_graph", keyword_line(place(node.stack), "create_graph"), why, _callers(node), 0.2)


def _dtype(node: Node) -> Cut:
    here = place(node.stack)
    name = node.op.strip("_")
    kind = str(node.dtype).removeprefix("torch.")
    if node.op in CASTS:
        return Cut("int_cast", here, f".{name}() gives {kind}, which carries no gradient", _callers(node), 0.1)
    if node.op in COMPARISONS:
        return Cut(
            "comparison", here, f"the comparison `{name}` gives constants, without a gradient", _callers(node), 0.3
        )
    return Cut("argmax", here, f"`{name}` gives {kind} indices, which carry no gradient", _callers(node), 0.3)


def _operation(node: Node) -> Cut:
    return Cut("nondiff_op", place(node.stack), f"`{node.op}` has no derivative", _callers(node), 0.2)


def _grad_off(node: Node) -> Cut:
    here = place(node.stack)
    region = node.region
    if region is None:
        return Cut("no_grad", here, f"gradients were off when `{node.op}` ran", (), 0.5)
    return in_region(region, f"`{node.op.strip('_')}`", here)


def in_region(region: Region, what: str, where: Site | None) -> Cut:
    """Describe a stretch without gradients in which `what` ran at `where`."""
    entry = place(region.stack)
    ran = ((where, "ran here"),)
    if region.kind == "function":
        if region.library == "CheckpointFunction":
            why = "checkpoint(use_reentrant=True) records nothing when none of its inputs requires a gradient"
            return Cut("checkpoint_no_grad_input", entry, why, ran)
        return Cut("custom_function_cut", entry, f"{what} ran inside of {region.library}.forward", ran, 0.6)
    if region.library == "sample":
        why = "the distribution's sample() draws without a gradient; rsample() has one"
        return Cut("non_reparam_sample", entry, why, ran, 0.2)
    if region.library == "checkpoint":
        why = "checkpoint(use_reentrant=True) records nothing when none of its inputs requires a gradient"
        return Cut("checkpoint_no_grad_input", entry, why, ran)
    slug = "inference_mode" if region.kind == "inference" else "no_grad"
    mode = "inference mode" if region.kind == "inference" else "no_grad"
    if region.decorated is not None:
        name = region.decorated.co_name
        why = f"all of {name}() runs without gradients, because of its decorator; {what} ran there"
        return Cut(slug, decorator_line(region.decorated), why, ((entry, "called"), *ran), 0.4)
    if region.left_on and region.generator:
        why = "a generator is suspended inside of this region, so that its caller runs without gradients"
        return Cut("grad_mode_left_off", entry, why, ran)
    if region.left_on or (region.kind == "no_grad" and region.still_open and not is_with_block(entry)):
        return Cut(
            "grad_mode_left_off", entry, f"gradients were switched off here and never on again; {what} ran then", ran
        )
    return Cut(slug, entry, f"{mode} was entered here, and {what} ran in it", ran, 0.5)


def is_with_block(entry: Site | None) -> bool:
    """Whether the line of a region's entry is a `with` statement (as opposed to a call that changes the mode)."""
    if entry is None:
        return False
    tree = _tree(entry.file)
    if tree is None:
        return "with " in linecache.getline(entry.file, entry.line)
    return any(
        isinstance(node, (ast.With, ast.AsyncWith))
        and any(item.context_expr.lineno <= entry.line <= (item.context_expr.end_lineno or 0) for item in node.items)
        for node in ast.walk(tree)
    )


def keyword_line(where: Site | None, keyword: str) -> Site | None:
    """Return the line of a keyword argument in the call that begins at a line; the line itself if there is none."""
    tree = _tree(where.file) if where is not None else None
    if where is None or tree is None:
        return where
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.lineno <= where.line <= (node.end_lineno or node.lineno):
            for argument in node.keywords:
                if argument.arg == keyword:
                    return where._replace(line=argument.value.lineno)
    return where


def decorator_line(code: CodeType) -> Site:
    """Return the line of the decorator that turns gradients off, or else the first line of the function."""
    tree = _tree(code.co_filename)
    first = Site(code.co_filename, code.co_firstlineno, code.co_qualname)
    if tree is None:
        return first
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            lines = [decorator.lineno for decorator in node.decorator_list]
            if code.co_firstlineno not in (*lines, node.lineno):
                continue
            for decorator in node.decorator_list:
                text = ast.unparse(decorator)
                if any(word in text for word in ("no_grad", "inference_mode", "set_grad_enabled", "enable_grad")):
                    return Site(code.co_filename, decorator.lineno, code.co_qualname)
            return first
    return first


_trees: dict[str, ast.Module | None] = {}


def _tree(file: str) -> ast.Module | None:
    if file not in _trees:
        try:
            _trees[file] = ast.parse("".join(linecache.getlines(file)))
        except (SyntaxError, ValueError):
            _trees[file] = None
    return _trees[file]


def _callers(node: Node) -> tuple[tuple[Site | None, str], ...]:
    return tuple((site(entry), "called from") for entry in node.stack[1:3])


_KINDS: dict[str, Callable[[Node], Cut]] = {
    "detach": _detach,
    "data": _data,
    "rewrap": _rewrap,
    "variable": _variable,
    "parameter": _parameter,
    "constant": _constant,
    "dtype": _dtype,
    "grad_off": _grad_off,
    "inference": _grad_off,
    "op": _operation,
}
