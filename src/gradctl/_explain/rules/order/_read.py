"""non_leaf_grad: `.grad` is read where torch keeps none."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, place
from gradctl._lineage import Node, Site


def non_leaf_grad(context: Context) -> Iterable[Candidate]:
    """Find reads of `.grad` of results, for which backward leaves none."""
    seen: dict[Site, tuple[Node, Site | None, int]] = {}
    for node, stack in context.facts.non_leaf_reads:
        line = node.site or place(stack)
        if line is not None:
            _, read, times = seen.get(line, (node, place(stack), 0))
            seen[line] = (node, read, times + 1)
    for line, (node, read, times) in seen.items():
        yield Candidate(
            "non_leaf_grad",
            line,
            f".grad was None in {times} of {times} reads: the tensor is the result of {node.op.strip('_')}",
            "backward() keeps .grad for leaves only; the gradient went through this result to what it came from",
            confidence=0.85,
            evidence=((read, ".grad read"),),
            node=node,
            explains="none",
        )
