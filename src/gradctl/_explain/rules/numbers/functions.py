"""Custom Functions that return no gradient, hooks that return zero, and edits that backward cannot see."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain.rules import Rule
from gradctl._explain.rules.numbers.zeros import silent
from gradctl._lineage import Hit, Node, Site, live_leaves

_OTHERS = ("torch.", "gradctl.")
"""What these return is right, or meant: `gradctl.scale(x, 0)`."""


def custom_function_none(context: Context) -> Iterable[Candidate]:
    """A custom Function got a gradient and returned None, or zero, for an input that parameters stand behind."""
    groups: dict[Any, list[tuple[int, Hit, str]]] = defaultdict(list)
    for key, facts in context.parameters():
        killer = facts.killers.get("none")
        if killer is None or context.is_hand_written(facts):
            continue
        states = [state for _, state in facts.states]
        last = states[-1] if states else "none"
        if last != "none" or not (context.finished or killer[1] >= 2):
            continue
        for hit in (killer[0], *killer[0].detail.get("others", ())):
            if hit.detail["forward_class"] is not None and hit.detail["edge"] >= 0:
                groups[hit.detail["forward_class"]].append((key, hit, "None"))
                break
    for entry in silent(context):
        for hit in entry.hits:
            if hit.detail["forward_class"] is not None and hit.detail["edge"] >= 0 and hit.kind == "zero":
                groups[hit.detail["forward_class"]].append((entry.key, hit, "zero"))
                break
    for function, group in groups.items():
        if f"{function.__module__}.".startswith(_OTHERS):
            continue
        _, hit, what = group[0]
        where = return_line(function, hit.detail["edge"], what) or (hit.node.site if hit.node is not None else None)
        number = count(len(group), "parameter")
        gets = "gets" if len(group) == 1 else "get"
        yield Candidate(
            "custom_function_none",
            where,
            f"{number} {gets} {'no gradient' if what == 'None' else 'a gradient of zero'}",
            f"{function.__qualname__}.backward returns {what} for an input that they stand behind",
            confidence=0.93 if what == "None" else 0.8,
            evidence=((hit.node.site, "where it is applied"),) if hit.node is not None else (),
            parameters=tuple([key for key, _, _ in group]),
            node=hit.node,
            explains="none" if what == "None" else "zero",
        )


def return_line(function: Any, edge: int, what: str) -> Site | None:
    """Return the `return` of a custom backward that gives `what` for that input; its `def` where no line does."""
    backward = inspect.unwrap(getattr(function, "backward", None) or function)
    backward = getattr(backward, "__func__", backward)
    code = getattr(backward, "__code__", None)
    if code is None:
        return None
    try:
        lines, start = inspect.getsourcelines(backward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return Site(code.co_filename, code.co_firstlineno, code.co_qualname)
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    chosen = [node for node in returns if _gives(node.value, edge, what)]
    line = (chosen or returns[-1:] or [None])[0]  # type: ignore[list-item]
    number = start + (line.lineno - 1 if line is not None else _def_line(tree))
    return Site(code.co_filename, number, code.co_qualname)


def _def_line(tree: ast.Module) -> int:
    first = tree.body[0]
    return first.lineno - 1


def _gives(value: ast.expr | None, edge: int, what: str) -> bool:
    if isinstance(value, ast.Tuple):
        wanted = value.elts[edge] if edge < len(value.elts) else None
        return wanted is not None and _gives(wanted, edge, what)
    if what == "None":
        return value is None or (isinstance(value, ast.Constant) and value.value is None)
    return value is not None and "zeros" in ast.dump(value)


def data_inplace_saved(context: Context) -> Iterable[Candidate]:
    """A value was changed through `.data` after an operation had saved it for its backward."""
    for mutation, node, function in context.facts.data_edits.values():
        leaves = _leaves(context, node)
        words = "assigning to .data" if mutation.op == "data.__set__" else f"`{mutation.op}` through .data"
        yield Candidate(
            "data_inplace_saved",
            place(mutation.stack),
            f"the gradient of {count(len(leaves), 'parameter')} is wrong, without an error",
            f"{words} changes what `{function}` had saved for its backward; the version counter does not see it",
            confidence=0.85,
            evidence=((node.site, "where the value was saved"),),
            parameters=leaves,
            node=node,
            explains="wrong",
        )


def _leaves(context: Context, node: Node) -> tuple[int, ...]:
    wanted = live_leaves(node)
    return tuple([key for key, facts in context.parameters() if id(facts.node) in wanted])


RULES: list[Rule] = [custom_function_none, data_inplace_saved]
