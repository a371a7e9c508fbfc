"""Values of leaves that lost their history in the first steps, whatever became of them: most do no harm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradctl._lineage._facts import Escape
from gradctl._lineage._frames import Stack
from gradctl._lineage._node import Node
from gradctl._lineage._walk import upstream

GENERATIONS = 3
"""Breaks are remembered in so many generations from the first; the facts keep the last two by themselves."""
_MOST = 128
_CUTS = frozenset({"detach", "data", "rewrap", "grad_off", "inference"})


@dataclass(slots=True)
class Break:
    """A line at which values lose their history.

    Attributes:
        node: the first value that lost it, or that left autograd.
        escape: how it left, for a value that became a number or an array.
        stack: user frames there; for a stretch without gradients those at its entry.
        leaves: nodes of the leaves that the history led to.
        in_loss: whether what was lost there is a part of a loss; False for numbers and arrays: nobody can follow them.
        count: number of values.
    """

    node: Node
    escape: Escape | None
    stack: Stack
    leaves: dict[int, Node]
    in_loss: bool = False
    count: int = 0


def note_breaks(
    into: dict[Any, Break], nodes: Iterable[Node], escapes: Iterable[Escape], roots: Iterable[Node]
) -> None:
    """Note the breaks among some values, by the cut and its line; bounded.

    Args:
        into: where to.
        nodes: the values.
        escapes: what left as numbers or arrays.
        roots: of the backwards.
    """
    behind: set[int] | None = None
    for node in nodes:
        if node.cut not in _CUTS or not node.lost:
            continue
        region = node.region
        if region is not None and (region.library is not None or region.within is not None):
            continue
        if behind is None:
            behind = {id(found) for found in upstream(roots)}
        stack = node.stack if region is None else region.stack
        _note(into, (node.cut, stack[:1]), node, None, stack, in_loss=id(node) in behind)
    for escape in escapes:
        if escape.live:
            _note(into, (escape.kind, escape.stack[:1]), escape.node, escape, escape.stack, in_loss=False)


def _note(into: dict[Any, Break], key: Any, node: Node, escape: Escape | None, stack: Stack, *, in_loss: bool) -> None:
    entry = into.get(key)
    if entry is None:
        if len(into) >= _MOST or not stack:
            return
        entry = into[key] = Break(node, escape, stack, {})
    if not entry.count or node.region is not None:  # a stretch cuts at each operation in it
        starts = (
            [node]
            if escape is not None
            else [p for p, live in zip(node.inputs, node.live_inputs, strict=False) if live]
        )
        entry.leaves |= {id(at): at for at in upstream(starts, live=True) if at.leaf}
    entry.in_loss = entry.in_loss or in_loss
    entry.count += 1
