"""Where a plain number or array in a computation came from: the escape that produced it, with a confidence."""

from __future__ import annotations

from collections.abc import Sequence

from gradctl._explain._provenance import number_source
from gradctl._lineage import Escape, Node


def number_escape(node: Node, escapes: Sequence[Escape]) -> tuple[Escape, float] | None:
    """Return the escape from which the numbers of `node` came.

    Args:
        node: a value without inputs (`torch.tensor(x)`, `from_numpy`, something made out of sight), or an operation
            with plain numbers among its arguments.
        escapes: what left autograd lately, oldest first.

    Returns:
        The escape and how sure it is: 0.95 by the identity of the number, 0.9 by the names on the line, 0.7 by those on
        the caller's line, 0.5 to 0.6 when it merely came before; None when nothing fits.
    """
    before = [escape for escape in escapes if escape.seq < node.seq or not node.stack]
    for escape in reversed(before):
        if escape.result is not None and any(value is escape.result for value in node.scalars):
            return escape, 0.95
    for depth, entry in enumerate(node.stack[:2]):
        found = number_source(entry, before)
        if found is not None:
            return found, 0.9 if depth == 0 else 0.7
    if before and (not node.scalars or not node.inputs):
        places = {escape.stack[:1] for escape in before}
        if len(places) == 1:
            return before[-1], 0.6
        arrays = [escape for escape in before if escape.kind in ("numpy", "__array__", "tolist")]
        if node.op == "from_numpy" and arrays:
            return arrays[-1], 0.55
        return before[-1], 0.5
    return None
