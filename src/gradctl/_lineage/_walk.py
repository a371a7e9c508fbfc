"""Questions to the lineage: what a value came from, where its gradient was cut, and why a leaf was not reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradctl._lineage._facts import Escape
from gradctl._lineage._node import Node

ADDITIONS = frozenset(
    [
        "add",
        "__add__",
        "__radd__",
        "__iadd__",
        "add_",
        "sub",
        "__sub__",
        "__rsub__",
        "__isub__",
        "sub_",
        "subtract",
        "rsub",
    ]
)
"""Operations that add two values."""
_JOINS = ADDITIONS | frozenset(
    "sum mean stack cat neg __neg__ negative squeeze unsqueeze reshape view to float double half bfloat16 "
    "clone contiguous".split()
)
_SCALINGS = frozenset(
    "mul __mul__ __rmul__ mul_ __imul__ multiply div __truediv__ true_divide divide div_ __itruediv__".split()
)


def upstream(roots: Iterable[Node], *, live: bool = False, wanted: bool = False) -> list[Node]:
    """Return every node that `roots` came from, themselves included.

    Args:
        roots: where to begin.
        live: go through recorded history only.
        wanted: do not go where a call of gradctl keeps the gradient from.
    """
    seen: set[int] = set()
    queue = list(roots)
    found: list[Node] = []
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        found.append(node)
        if live:
            if node.live:
                queue += [parent for parent, alive in zip(node.inputs, node.live_inputs, strict=False) if alive]
        else:
            queue += node.wanted if wanted else node.inputs
    return found


def live_leaves(node: Node) -> set[int]:
    """Return the ids of the leaf nodes that the live inputs of a node reach through recorded history."""
    starts = [parent for parent, alive in zip(node.inputs, node.live_inputs, strict=False) if alive]
    return {id(found) for found in upstream(starts, live=True) if found.leaf}


def breaks(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes that lost the history of an input, in the order of making; not those that were meant to."""
    return sorted((node for node in nodes if node.lost), key=lambda node: node.seq)


def meant_breaks(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes by which a call of gradctl took the history of an input, in the order of making."""
    return sorted((node for node in nodes if node.meant and not node.live), key=lambda node: node.seq)


def sufficient_breaks(roots: Sequence[Node]) -> list[Node]:
    """Return the breaks whose repair alone would reconnect a root, in the order of making.

    From the roots downward it passes what is not cut itself: what merely had nothing to record, and what ran in the
    same stretch without gradients as the break below it.
    """
    seen: set[int] = set()
    queue = list(roots)
    found: list[Node] = []
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.lost:
            found.append(node)
        if node.cut is None:
            queue += node.wanted
        elif node.cut in ("grad_off", "inference") and not node.meant:
            queue += [parent for parent, live in zip(node.inputs, node.live_inputs, strict=False) if not live]
    return sorted(found, key=lambda node: node.seq)


def path(root: Node, leaf: Node) -> list[Node]:
    """Return one shortest chain of values from `leaf` to `root`, both included; empty when there is none."""
    came: dict[int, Node | None] = {id(root): None}
    queue = [root]
    for node in queue:
        if node is leaf:
            chain: list[Node] = []
            at: Node | None = node
            while at is not None:
                chain.append(at)
                at = came[id(at)]
            return chain
        for parent in node.inputs:
            if id(parent) not in came:
                came[id(parent)] = node
                queue.append(parent)
    return []


def sum_of(root: Node) -> tuple[list[Node], list[Node]]:
    """Return what a loss is the sum of: the additions and scalings by numbers that join it, and the terms they join.

    A product of two tensors, or any other operation, is one term.
    """
    joins: list[Node] = []
    parts: list[Node] = []
    seen: set[int] = set()
    queue = [root]
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        scaling = node.op in _SCALINGS and len(node.inputs) == 1
        if (
            node.inputs
            and (node.op in _JOINS or scaling)
            and (node is root or _is_small(node))
            and all(_is_small(parent) for parent in node.inputs)
        ):
            joins.append(node)
            queue += node.inputs
        else:
            parts.append(node)
    return joins, parts


def meeting(copy: Node, nodes: Sequence[Node]) -> tuple[Node | None, tuple[str, ...]]:
    """Return the first operation that joins what came from a copy with a value that has a history.

    Args:
        copy: a value whose history was lost.
        nodes: everything behind a loss, in the order of making.

    Returns:
        The operation, and the names of those between the copy and it.
    """
    cone = {id(copy)}
    words: list[str] = []
    for node in nodes:
        if node.seq <= copy.seq or not any(id(parent) in cone for parent in node.inputs):
            continue
        if node.live:
            return node, tuple(words)
        cone.add(id(node))
        words.append(node.op)
    return None, tuple(words)


def _is_small(node: Node) -> bool:
    return _numel(node) <= 1 or node.op in ("stack", "cat")


def _numel(node: Node) -> int:
    count = 1
    for length in node.shape:
        count *= length
    return count


class Unreached:
    """Why leaves got no gradient from some backwards; one walk answers for all leaves.

    Args:
        roots: nodes of the outputs of those backwards.
        escapes: values that left as numbers or arrays.
        log: recent nodes, for outputs that reach nothing.
    """

    def __init__(self, roots: Sequence[Node], escapes: Sequence[Escape], log: Sequence[Node]) -> None:
        self._roots = roots
        self._escapes = escapes
        self._log = log
        self._behind: set[int] | None = None
        self._kept_away: set[int] | None = None
        self._cuts: dict[int, list[Node]] | None = None
        self._other: dict[int, list[Node]] | None = None
        self._escaped: list[tuple[Escape, set[int]]] | None = None

    def why(self, leaf: Node) -> tuple[str, Any]:
        """Return the reason and its evidence.

        Returns:
            ("break", tuple of Node): operations that cut it, in the order of making; repairing one would reconnect the
                loss, or, where no single repair would, all that lost it.
            ("connected", None): values and history reach it.
            ("meant", None): its values reach the loss only where a call of gradctl keeps the gradient away.
            ("escape", (escapes, roots)): it left as numbers or arrays, oldest first.
            ("unused_output", Node): the last value computed from it reaches no loss.
            ("unused", None): nothing was computed from it.
        """
        if self._behind is None:
            self._prepare()
        assert self._cuts is not None
        assert self._behind is not None
        assert self._other is not None
        found = self._cuts.get(id(leaf)) or self._other.get(id(leaf))
        if found is not None:
            return "break", tuple(found)
        if id(leaf) in self._behind:
            return "connected", None
        if self._kept_away is None:
            self._kept_away = {id(node) for node in upstream(self._roots)} - self._behind
        if id(leaf) in self._kept_away:
            return "meant", None
        if self._escaped is None:
            live = [escape for escape in self._escapes if escape.live or escape.kind in ("numpy", "__array__")]
            self._escaped = [(escape, {id(n) for n in upstream([escape.node], wanted=True)}) for escape in live]
        left = tuple([escape for escape, behind in self._escaped if id(leaf) in behind])
        if left:
            return "escape", (left, tuple(self._roots))
        cone = {id(leaf)}
        last: Node | None = None
        for node in self._log:
            if any(id(parent) in cone for parent in node.inputs):
                cone.add(id(node))
                if node.live or last is None:
                    last = node
        return ("unused", None) if last is None else ("unused_output", last)

    def _prepare(self) -> None:
        behind = upstream(self._roots, wanted=True)
        self._behind = {id(node) for node in behind}
        self._cuts = {}
        self._other = {}
        sufficient = sufficient_breaks(self._roots)
        for found, into in ((sufficient, self._cuts), (breaks(behind), self._other)):
            for node in found:
                for leaf in live_leaves(node):
                    into.setdefault(leaf, []).append(node)


_KNOWN = ("rand", "zeros", "ones", "full", "normal", "new_", "bernoulli", "arange", "eye", "linspace")
_FILLS = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_")
_WALK = 200


def sources_of(value: Node | None) -> dict[int, int] | None:
    """Return whose gradients a value was computed from, with the order of the newest reading; None if unknown."""
    if value is None:
        return None
    for node in upstream([value])[:_WALK]:
        if node.inputs or node.grads:
            continue
        if node.leaf and node.trainable:
            continue  # a weight
        if node.op.startswith(_KNOWN) or node.op in _FILLS:
            continue
        return None
    return dict(value.grads or {})
