"""Normalisations over a dimension of one entry: the result is the same whatever that entry is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from gradctl._explain._context import Candidate, Context, count
from gradctl._explain.rules import Rule
from gradctl._explain.rules.numbers import names
from gradctl._explain.rules.numbers.verdict import Swallowed, named
from gradctl._lineage import VIEWS, Hit, Node, live_leaves, upstream

ENOUGH = 3
"""So many steps without an exception say that it is meant to go on like this."""
_NOISE = 1e-5
_LEAST = 1e-12
_NORMALISING = names.DIVISION | frozenset(
    [
        "sub",
        "__sub__",
        "__rsub__",
        "__isub__",
        "subtract",
        "rsub",
        "mul",
        "__mul__",
        "__rmul__",
        "__imul__",
        "multiply",
    ]
)
_STATISTICS = frozenset(
    [
        "mean",
        "sum",
        "max",
        "amax",
        "min",
        "amin",
        "median",
        "norm",
        "vector_norm",
        "linalg_vector_norm",
        "linalg_norm",
        "logsumexp",
        "nanmean",
        "nansum",
    ]
)
_ENTRYWISE = names.POWER | frozenset(
    [
        "abs",
        "__abs__",
        "square",
        "sqrt",
        "rsqrt",
        "clamp",
        "clamp_min",
        "clip",
        "add",
        "__add__",
        "__radd__",
        "maximum",
        "exp",
        "log",
        "neg",
        "__neg__",
        "reciprocal",
        "expand",
        "clone",
        "float",
        "double",
    ]
)


def over_one(context: Context) -> Iterable[Candidate]:
    """A normalisation that always ran over one entry: what is left of its gradient is rounding noise."""
    roots = [root for backward in context.facts.backwards for root in backward.roots]
    behind = {id(node) for node in upstream(roots)}
    largest = max((abs(facts.norm) for _, facts in context.parameters() if facts.norm is not None), default=0.0)
    for node, single, calls in context.facts.over_one.values():
        if single < calls or (single < ENOUGH and not context.finished) or id(node) not in behind:
            continue
        wanted = live_leaves(node)
        beside = _reached_beside(roots, node)
        mine = [
            (key, facts)
            for key, facts in context.parameters()
            if id(facts.node) in wanted
            and id(facts.node) not in beside
            and facts.norm is not None
            and abs(facts.norm) <= _NOISE * min(1.0, max(largest, _LEAST / _NOISE))
        ]
        if not mine:
            continue
        yield Candidate(
            "zero_grad_size_one",
            node.site,
            f"{count(len(mine), 'parameter')} with a gradient of zero, but for rounding",
            f"`{named(node)}` runs over a dimension of one entry: the result is the same whatever that entry is",
            confidence=0.9 if single >= ENOUGH else 0.7,
            parameters=tuple([key for key, _ in mine]),
            node=node,
            leaf=mine[0][1].node,
            explains="zero",
        )


def runs_over_one(hit: Hit, node: Node, name: str) -> Swallowed | None:
    """Return the verdict on a softmax or a norm layer by the size that its function saved."""
    saved = hit.detail["saved"]
    result = saved.get("result") or saved.get("output")
    one = False
    if name.endswith("Softmax"):
        level = 1.0 if name == "Softmax" else 0.0
        dim = saved.get("dim", {}).get("number")
        shape = result["shape"] if result else tuple(node.shape)
        if isinstance(dim, int) and shape:
            dim = dim - (1 << 64) if dim >= 1 << 63 else dim
            one = -len(shape) <= dim < len(shape) and shape[dim] == 1
        elif result:
            one = result.get("min") == level == result.get("max")
    elif name in ("NativeLayerNorm", "FusedRmsNorm"):
        numbers = saved.get("normalized_shape", {}).get("numbers")
        one = numbers is not None and all(number == 1 for number in numbers)
    elif (shape := tuple(node.shape)) and "group" in saved:
        one = math.prod(shape[1:]) == saved["group"].get("number")
    if not one:
        return None
    return Swallowed(
        "zero_grad_size_one",
        node.site,
        f"`{named(node)}` runs over a dimension of one entry: the result is the same whatever that entry is",
        node,
        0.93,
    )


def cancels(context: Context, node: Node) -> Swallowed | None:
    """What arrives at a value sums to zero since its only use sets it against its own statistic over one entry.

    Two terms of a loss may cancel as well: that is said only where the statistic is seen, of this very value, and every
    way from the value to the loss leads through it.
    """
    for root in [root for backward in reversed(context.facts.backwards) for root in backward.roots]:
        graph = upstream([root], live=True)
        if not any(at is node for at in graph):
            continue
        for at in graph:
            if (_compares_with_itself(at, node) or _normalises_one(context, at, node)) and not _avoids(root, node, at):
                return Swallowed(
                    "zero_grad_size_one",
                    at.site,
                    f"`{named(at)}` normalises over a dimension of one entry: the result is the same whatever that "
                    "entry is",
                    at,
                    0.8,
                )
        return None
    return None


def _live_inputs(node: Node) -> list[Node]:
    return [parent for parent, alive in zip(node.inputs, node.live_inputs, strict=False) if alive]


def _compares_with_itself(at: Node, value: Node) -> bool:
    if names.operation(at) not in _NORMALISING:
        return False
    inputs = _live_inputs(at)
    return any(_shows(one, value) for one in inputs) and any(_is_statistic(other, value) for other in inputs)


def _normalises_one(context: Context, at: Node, value: Node) -> bool:
    entry: list[Any] | None = context.facts.over_one.get(at.stack[:1])
    if entry is None or entry[0].op != at.op or entry[1] < entry[2]:
        return False
    return any(_shows(one, value) for one in _live_inputs(at))


def _shows(node: Node, value: Node) -> bool:
    """Whether a node is `value`, or a view of it with its gradient."""
    while node is not value and node.op in VIEWS and (parents := _live_inputs(node)):
        node = parents[0]
    return node is value


def _is_statistic(node: Node, value: Node) -> bool:
    """Whether a node is computed entry by entry from a reduction of `value` that had one entry to reduce each time."""
    reduced = False
    for _ in range(16):
        if node is value:
            return reduced
        op = names.operation(node)
        parents = _live_inputs(node)
        if len(parents) != 1:
            return False
        if op in _STATISTICS:
            if math.prod(node.shape) != math.prod(parents[0].shape):
                return False
            reduced = True
        elif op not in VIEWS and op not in _ENTRYWISE:
            return False
        node = parents[0]
    return False


def _avoids(root: Node, value: Node, barrier: Node) -> bool:
    """Whether a way with history leads from `root` to `value` without passing `barrier`."""
    queue, seen = [root], {id(barrier)}
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        if node is value:
            return True
        seen.add(id(node))
        queue += _live_inputs(node)
    return False


def _reached_beside(roots: Iterable[Node], single: Node) -> set[int]:
    """Return the ids of the leaves that `roots` reach on ways that avoid the line of a normalisation."""
    queue, seen, found = list(roots), set[int](), set[int]()
    while queue:
        node = queue.pop()
        if id(node) in seen or (node.op == single.op and node.stack[:1] == single.stack[:1]):
            continue
        seen.add(id(node))
        if node.leaf:
            found.add(id(node))
        queue += _live_inputs(node)
    return found


RULES: list[Rule] = [over_one]
