"""Errors about what a gradient does not reach: an input that was not used, parameters that a replica waits for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._cuts import Cut, describe
from gradctl._explain._provenance import where_dropped
from gradctl._explain._raised import Raised, raised
from gradctl._explain.rules import Rule
from gradctl._lineage import Node, Unreached, breaks, upstream


def input_not_in_graph(context: Context) -> Iterable[Candidate]:
    """`autograd.grad` with respect to a tensor that the output does not depend on."""
    error = raised(
        context,
        "appears to not have been used in the graph",
        "differentiated Tensors appears to not have been used",
        "differentiated Tensors does not require grad",
    )
    if error is None or error.facts is None or error.facts.backward is None:
        return
    backward = error.facts.backward
    match = re.search(r"at index (\d+)", error.message)
    index = int(match.group(1)) if match is not None else None
    inputs = backward.inputs if index is None or index >= len(backward.inputs) else backward.inputs[index : index + 1]
    behind = upstream(backward.roots)
    known = {id(node) for node in behind}
    for node in inputs:
        if "does not require grad" in error.message:
            if node.requires_grad:
                continue
            # The tensor that is differentiated for, not what it was made from: a detached input is often meant.
            made = Cut("input_not_in_graph", node.site, "") if node.site is not None else None
            if node.lost:
                made = describe(node)
            yield _not_used(error, made, "the tensor does not require a gradient", node, 0.9 if made else 0.75)
            return
        cut = _cut_between(behind, node)
        if cut is not None:
            yield _not_used(error, cut, cut.why, node, 0.96)
            return
        source = next((parent for parent in node.inputs if id(parent) in known), None)
        if source is not None and node.inputs:
            made = Cut("input_not_in_graph", node.site, "")
            yield _not_used(
                error, made, "it is a copy: the output was computed from the tensor that it was made from", node, 0.9
            )
            return
        if id(node) not in known:
            yield _not_used(error, None, "nothing that the output was computed from is this tensor", node, 0.7)
            return


def _cut_between(behind: Sequence[Node], node: Node) -> Cut | None:
    """Describe the first break through which values of `node`, but no history, reached the output."""
    for broken in breaks(behind):
        starts = [parent for parent, live in zip(broken.inputs, broken.live_inputs, strict=False) if live]
        if any(found is node for found in upstream(starts, live=True)):
            return describe(broken)
    return None


def _not_used(error: Raised, cut: Cut | None, why: str, node: Node, confidence: float) -> Candidate:
    return Candidate(
        "input_not_in_graph",
        (cut.place if cut is not None else None) or error.here,
        "a gradient is asked for with respect to a tensor that the output does not depend on",
        f"{why}; the graph of the output does not hold the tensor of shape {list(node.shape)}",
        confidence=confidence * error.certainty,
        evidence=((error.here, "autograd.grad"), (node.site, "input"), *(cut.evidence if cut is not None else ())),
        node=node,
        explains="error",
    )


def waits_for_parameters(context: Context) -> Iterable[Candidate]:
    """DistributedDataParallel waits for gradients of parameters that had no part in the last backward."""
    error = raised(context, "finished reduction in the prior iteration")
    if error is None:
        return
    waiting = _without_gradient(context, error)
    if not waiting:
        return
    backward = next((b for b in reversed(context.facts.backwards) if b.accumulates and not b.failed), None)
    log = [node for key in sorted(context.tracer.log) for node in context.tracer.log[key]]
    unreached = Unreached(backward.roots if backward is not None else (), tuple(context.facts.escapes), log)
    groups: dict[Any, list[tuple[int, Node, str, Any]]] = {}
    for key, node in waiting:
        kind, evidence = _why(context, key, node, unreached)
        if kind == "unused_output" and not evidence.live:
            kind = "unused"  # the replica itself copies its parameters when it is made
        groups.setdefault((kind, node.stack[:1] if kind == "unused" else id(evidence)), []).append(
            (key, node, kind, evidence)
        )
    for group in groups.values():
        keys = tuple([key for key, *_ in group])
        _, node, kind, evidence = group[0]
        slug, where, why = "unused_param", node.site, "defined here and used by nothing in forward()"
        if kind == "unused_output" and isinstance(evidence, Node):
            slug, where = "unused_output", where_dropped(evidence) or evidence.site
            why = "what they compute is left out here, and never reaches the loss"
        elif kind == "break":
            cut = describe(evidence[0])
            slug, where, why = cut.slug, cut.place, cut.why
        elif kind == "escape":
            evidence = evidence[0][-1]
            slug, where, why = (
                "item",
                place(evidence.stack),
                f"the value became a plain number through .{evidence.kind}()",
            )
        yield Candidate(
            slug,
            where,
            f"DistributedDataParallel waits for {count(len(keys), 'gradient')} that never came",
            f"{count(len(keys), 'parameter')} had no part in the last backward: {why}",
            "use the layer, drop it, or DistributedDataParallel(..., find_unused_parameters=True)"
            if slug == "unused_param"
            else "",
            confidence=(0.95 + 0.001 * len(keys) / (len(keys) + 1)) * error.certainty,
            evidence=((node.site, "defined"), (error.here, "raised")),
            parameters=keys,
            leaf=node,
            explains="error",
        )


def _without_gradient(context: Context, error: Raised) -> list[tuple[int, Node]]:
    """Return the parameters of the replica that the last backward did not reach."""
    owners: list[Any] = [frame.f_locals.get("self") for frame, _ in reversed(error.frames)]
    replica: Any = next((owner for owner in owners if _is_replica(owner)), None)
    last = next((b for b in reversed(context.facts.backwards) if b.accumulates and not b.failed), None)
    if replica is None or last is None:
        return []
    found: list[tuple[int, Node]] = [
        (id(parameter), context.tracer.parameter(parameter).node)
        for parameter in replica.parameters()
        if isinstance(parameter, Tensor) and parameter.requires_grad and id(parameter) not in last.leaves
    ]
    return found


def _is_replica(value: Any) -> bool:
    return any(cls.__name__ == "DistributedDataParallel" for cls in type(value).__mro__)


def _why(context: Context, key: int, node: Node, unreached: Unreached) -> tuple[str, Any]:
    facts = context.facts.parameters.get(key)
    if facts is not None and facts.explained:
        _, kind, evidence = facts.explained[-1]
        return kind, evidence
    return unreached.why(node)


RULES: list[Rule] = [input_not_in_graph, waits_for_parameters]
