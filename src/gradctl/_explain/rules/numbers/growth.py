"""Gradients that are finite, and larger by many orders of magnitude than they can be used for."""

from __future__ import annotations

from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count
from gradctl._explain.rules import Rule

_PASSES = 8
_STEPS = 3


def exploded_grad(context: Context) -> Iterable[Candidate]:
    """A recurrence multiplied the gradient by many orders of magnitude."""
    facts = context.facts.exploded
    if facts is None or context.facts.nonfinite is not None:
        return
    if facts.backwards < min(_STEPS, max(1, context.facts.generation)):
        return
    grown = [(node, times, size) for node, times, size in facts.growth if times >= _PASSES]
    if not grown:
        return
    node, times, _ = max(grown, key=lambda entry: entry[2])
    yield Candidate(
        "exploded_grad",
        node.site,
        f"{count(len(facts.leaves), 'parameter')} with gradients up to {facts.largest:.1e}",
        f"{times} passes through this line multiply the gradient each time",
        confidence=0.75,
        severity="warning",
        parameters=facts.leaves,
        node=node,
        explains="nonfinite",
    )


RULES: list[Rule] = [exploded_grad]
