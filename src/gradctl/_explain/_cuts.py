"""What a break in the lineage is called, where it stands, and why it cuts: one table row for each kind of cut."""

from __future__ import annotations

import ast
import linecache
import os
import re
from collections.abc import Callable, Sequence
from types import CodeType
from typing import NamedTuple

from gradctl._explain._context import place
from gradctl._lineage import CASTS, COMPARISONS, Node, Region, Site, Stack, site

_PACKAGES = r"(?:site|dist)-packages[/\\]"


class Cut(NamedTuple):
    """A break, described.

    Args:
        slug: the cause.
        place: its line.
        why: what happens there, as a sentence without its full stop.
        evidence: further places with their roles.
        deliberate: how often people cut like this on purpose, from 0 (never) to 1.
        fix: what to change, where the standard fix of the slug is none.
    """

    slug: str
    place: Site | None
    why: str
    evidence: tuple[tuple[Site | None, str], ...] = ()
    deliberate: float = 0.0
    fix: str = ""


def describe(node: Node) -> Cut:
    """Describe the break at a node that lost the history of an input."""
    assert node.cut is not None
    if node.meant:
        return _meant(node)
    return _KINDS[node.cut](node)


def _meant(node: Node) -> Cut:
    why = "a call of gradctl, for example stop(), returns a constant here"
    return Cut("detach", place(node.stack), why, _callers(node), 1.0, "leave one way from the parameters without it")


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
    where = deciding_line(node.stack, "create_graph")
    here = place(node.stack)
    return Cut("missing_create_graph", where, why, ((here, "differentiated"), *_callers(node)), 0.2)


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
        return Cut("nondiff_op", entry, f"{what} ran inside of {region.library}.forward", ran, 0.6)
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
    if region.within is not None:
        return Cut(
            slug, entry, f"{_library(region.within)} runs without gradients", (_inside(region.within), *ran), 0.5
        )
    return Cut(slug, entry, f"{mode} was entered here, and {what} ran in it", ran, 0.5)


def _library(entry: tuple[CodeType, int]) -> str:
    """Return "generate() of transformers" for a line of an installed package."""
    return f"{entry[0].co_name}() of {re.split(_PACKAGES, entry[0].co_filename)[-1].split(os.sep)[0]}"


def _inside(entry: tuple[CodeType, int]) -> tuple[Site, str]:
    return (site(entry) if entry[1] >= 0 else decorator_line(entry[0])), "library"


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


def deciding_line(stack: Stack, keyword: str) -> Site | None:
    """Return the line that decides a keyword of the innermost call.

    That is the line of the keyword, or, where a function only hands its own argument on, the line of its caller, or of
    the default if the caller says nothing.
    """
    where = place(stack)
    name = keyword
    for depth in range(min(len(stack), 4)):
        here = site(stack[depth])
        tree = _tree(here.file)
        argument = _argument(tree, here, name) if tree is not None else None
        if argument is None:
            return where
        where = here._replace(line=argument.lineno)
        function = _enclosing(tree, here)
        if not isinstance(argument, ast.Name) or function is None:
            return where
        arguments = function.args
        named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if argument.id not in named or _assigned(function, argument.id):
            return where
        name = argument.id
        if depth + 1 < len(stack):
            caller = site(stack[depth + 1])
            calling = _tree(caller.file)
            if calling is not None and _argument(calling, caller, name, named) is None:
                default = _default(function, name)
                return where if default is None else here._replace(line=default.lineno)
            where = caller
    return where


def _argument(tree: ast.Module | None, where: Site, name: str, order: Sequence[str] = ()) -> ast.expr | None:
    """Return what a call on that line gives for an argument, by name or by place."""
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.lineno <= where.line <= (node.end_lineno or node.lineno):
            for keyword in node.keywords:
                if keyword.arg == name:
                    return keyword.value
            if name in order:
                position = [a for a in order if a != "self"].index(name)
                if position < len(node.args):
                    return node.args[position]
    return None


def _enclosing(tree: ast.Module | None, where: Site) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    found: ast.FunctionDef | ast.AsyncFunctionDef | None = None
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.lineno <= where.line <= (
            node.end_lineno or 0
        ):
            found = node if found is None or node.lineno > found.lineno else found
    return found


def _assigned(function: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in ast.walk(function))


def _default(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> ast.expr | None:
    arguments = function.args
    placed = [*arguments.posonlyargs, *arguments.args]
    for argument, default in zip(reversed(placed), reversed(arguments.defaults), strict=False):
        if argument.arg == name:
            return default
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if argument.arg == name:
            return default
    return None


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
