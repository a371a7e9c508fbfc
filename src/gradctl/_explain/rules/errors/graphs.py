"""A second backward through the same graph: built once and used often, shared by two losses, or carried over a step."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, NamedTuple

from gradctl._explain._context import Candidate, Context, place
from gradctl._explain._provenance import Carrier, carrier
from gradctl._explain._raised import Raised, raised
from gradctl._explain._source import source_of
from gradctl._explain._words import at, word
from gradctl._explain.rules import Rule
from gradctl._lineage import FREED, ErrorFacts, Node, Site, Stack, grad_fn_of, site

_STORES = frozenset(["__setitem__", "copy_", "index_copy_", "index_put_", "scatter_", "masked_scatter_"])


_Mark = tuple[int, Stack, int]
"""The backward that freed a function: its generation, its user frames, its place in the order of events."""


class _Edge(NamedTuple):
    """A recorded operation that uses a value of a freed part of the graph."""

    consumer: Node
    producer: Node
    mark: _Mark


class Carried(NamedTuple):
    """A value of an earlier step that entered this one.

    Args:
        place: the line that carries it.
        why: how, as a sentence without its full stop.
        evidence: further places.
        node: the value.
    """

    place: Site | None
    why: str
    evidence: tuple[tuple[Site | None, str], ...]
    node: Node


def second_backward(context: Context) -> Iterable[Candidate]:
    """The exception "Trying to backward through the graph a second time"."""
    error = raised(context, "backward through the graph a second time")
    if error is None or error.facts is None or error.facts.graph is None or error.facts.backward is None:
        return
    facts = error.facts
    backward = facts.backward
    assert backward is not None
    freed = {fn: mark for fn in facts.graph.nodes if (mark := fn.metadata.get(FREED)) is not None}
    roots = [fn for root in facts.graph.roots if (fn := grad_fn_of(root)) in freed]
    if roots:
        yield _loss_again(error, facts, freed[roots[0]])
        return
    later, beside = _edges(facts, freed)
    same_line = [edge for edge in later if edge.mark[1][:1] == backward.stack[:1]]
    if not later or (not same_line and not any(_wrapped(edge.consumer, edge.producer) for edge in later)):
        for edge in (later or beside)[:1]:
            yield _shared(error, edge)
        return
    again = {(node.op, node.stack[:1]) for node in context.tracer.log.get(backward.generation, ())}
    wrapped = [
        edge
        for edge in later
        if _wrapped(edge.consumer, edge.producer) or (edge.producer.op, edge.producer.stack[:1]) in again
    ]
    if wrapped:
        yield from _stale(context, error, wrapped[0])
    else:
        yield _once(error, later[0])


def _edges(facts: ErrorFacts, freed: dict[Any, _Mark]) -> tuple[list[_Edge], list[_Edge]]:
    """Return what joins this graph to its freed part, in the order of making.

    Returns:
        Uses by operations that ran after the backward that freed it; and uses by functions that it did not free.
    """
    marks = _behind(facts, freed)
    later: list[_Edge] = []
    beside: list[_Edge] = []
    for function in facts.graph.nodes:
        consumer = facts.graph.site.get(function)
        if consumer is None:
            continue
        for following, _ in function.next_functions:
            mark = marks.get(following)
            producer = facts.graph.site.get(following) if mark is not None else None
            if mark is None or producer is None:
                continue
            if producer.seq < mark[2] < consumer.seq:
                later.append(_Edge(consumer, producer, mark))
            elif function not in freed and following in freed:
                beside.append(_Edge(consumer, producer, mark))
    return sorted(later, key=lambda edge: edge.consumer.seq), sorted(beside, key=lambda edge: edge.consumer.seq)


def _behind(facts: ErrorFacts, freed: dict[Any, _Mark]) -> dict[Any, _Mark]:
    """Return for each function the last backward that freed something behind it that it will miss.

    Sums and views have saved nothing: to go through them twice does no harm.
    """
    consumers: dict[Any, list[Any]] = {}
    for function in facts.graph.nodes:
        for following, _ in function.next_functions:
            if following is not None:
                consumers.setdefault(following, []).append(function)
    found = {function: mark for function, mark in freed.items() if _misses(function)} or dict(freed)
    queue = list(found)
    while queue:
        function = queue.pop()
        for above in consumers.get(function, ()):
            if above not in found or found[above][2] < found[function][2]:
                found[above] = found[function]
                queue.append(above)
    return found


def _misses(function: Any) -> bool:
    for name in dir(function):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                getattr(function, name)
            except RuntimeError as refused:
                if "freed" in str(refused):
                    return True
            except (AttributeError, TypeError):
                continue
    return False


def _loss_again(error: Raised, facts: ErrorFacts, mark: _Mark) -> Candidate:
    root = facts.nodes[0]
    first, backward = place(mark[1]), place(facts.stack)
    again = mark[1][:1] == facts.stack[:1]
    where = root.site if again else first
    why = (
        "the loss was computed once here, and every iteration calls backward() on it"
        if again
        else "this backward() has freed the graph of the loss, and a later line calls backward() on the same loss"
    )
    return Candidate(
        "graph_reused",
        where or backward,
        "backward() was called a second time on a loss whose graph was freed",
        why,
        confidence=0.96 * error.certainty,
        evidence=((root.site, "made"), (first, "freed"), (backward, "backward")),
        root=root,
        node=root,
        explains="error",
    )


def _shared(error: Raised, edge: _Edge) -> Candidate:
    first, backward = place(edge.mark[1]), error.here
    return Candidate(
        "graph_reused",
        first or backward,
        "two backward() calls go through the same part of a graph",
        f"the first backward() freed what both losses share: `{word(edge.producer)}`, made at {at(edge.producer)}",
        "(loss_a + loss_b).backward(), or retain_graph=True in the first call",
        confidence=0.95 * error.certainty,
        evidence=((edge.producer.site, "shared"), (edge.consumer.site, "used again"), (backward, "backward")),
        node=edge.producer,
        root=error.root,
        explains="error",
    )


def _once(error: Raised, edge: _Edge) -> Candidate:
    return Candidate(
        "graph_reused",
        _cache_of(edge.producer) or edge.producer.site or error.here,
        "a value that was computed once is gone backward through twice",
        f"`{word(edge.producer)}` ran once here; the first backward() freed its graph, and the next step uses it",
        "compute it in every iteration, or detach it if it is data",
        confidence=0.93 * error.certainty,
        evidence=(
            (edge.producer.site, "computed"),
            (edge.consumer.site, "used"),
            (place(edge.mark[1]), "freed"),
            (error.here, "backward"),
        ),
        node=edge.producer,
        root=error.root,
        explains="error",
    )


def _cache_of(node: Node) -> Site | None:
    """Return the line of the decorator (`cached_property`, `lru_cache`) that keeps what a function computed."""
    for entry in node.stack:
        source = source_of(entry)
        statement = source.statement(entry) if source is not None else None
        function = source.function(statement) if source is not None and statement is not None else None
        for decorator in getattr(function, "decorator_list", ()):
            if "cache" in ast.unparse(decorator):
                return site(entry)._replace(line=decorator.lineno)
    return None


def _stale(context: Context, error: Raised, edge: _Edge) -> Iterable[Candidate]:
    assert error.facts is not None
    found = _carried(edge.consumer, edge.producer, error.facts.stack)
    dropped = _dropped_detach(context, edge.producer)
    if dropped is not None:
        yield Candidate(
            "detach_unused",
            dropped,
            "detach() returns a new tensor, and nobody keeps it",
            f"the value is what it was before: it carries the graph of the earlier step into {at(edge.consumer)}",
            confidence=0.97 * error.certainty,
            evidence=((found.place, "carried"), (place(edge.mark[1]), "freed"), (error.here, "backward")),
            node=edge.producer,
            root=error.root,
            explains="error",
        )
    yield Candidate(
        "stale_graph_carried",
        found.place,
        "backward() goes into the graph of an earlier step, which has been freed",
        f"{found.why}; that step's backward() freed its graph",
        confidence=0.95 * error.certainty,
        evidence=(*found.evidence, (place(edge.mark[1]), "freed"), (error.here, "backward")),
        node=edge.producer,
        root=error.root,
        explains="error",
    )


def carried(facts: ErrorFacts, *, freed: bool) -> Carried | None:
    """Return the value that links the graph of a failed backward to an earlier iteration; None if none does."""
    edges: list[tuple[Node, Node]] = []
    for function in facts.graph.nodes:
        consumer = facts.graph.site.get(function)
        for following, _ in function.next_functions:
            if following is None or getattr(following, "variable", None) is not None:
                continue
            producer = facts.graph.site.get(following)
            if consumer is None or producer is None or consumer.generation <= producer.generation:
                continue
            if _wrapped(consumer, producer):
                edges.append((consumer, producer))
    if not edges:
        return None
    consumer, producer = max(edges, key=lambda edge: edge[0].generation * 1_000_000_000 - edge[0].seq)
    return _carried(consumer, producer, facts.stack)


def _carried(consumer: Node, producer: Node, outlived: Stack) -> Carried:
    if producer.extra == "in place" and producer.op in _STORES:
        return Carried(
            producer.site,
            f"a value with history was stored into a tensor here, and used at {at(consumer)} a step later",
            ((consumer.site, "used"),),
            producer,
        )
    found = carrier(consumer.stack, producer.stack, outlived)
    if found is not None and found.stored is not None and not _gathers(consumer, producer):
        return Carried(
            found.stored,
            f"`{found.text}` keeps live tensors: what is put in here is used at {at(consumer)} a step later",
            ((found.place, "used"), (producer.site, "made")),
            producer,
        )
    if found is None:
        found = Carrier(consumer.site, "", 0) if consumer.site is not None else None
    if found is None:
        return Carried(None, "a value of an earlier step is used", (), producer)
    name = f"`{found.text}`" if found.text else "a value"
    return Carried(
        found.place,
        f"{name} still holds what `{word(producer)}` made in the step before (at {at(producer)})",
        ((consumer.site, "used"), (producer.site, "made")),
        producer,
    )


def _gathers(consumer: Node, producer: Node) -> bool:
    """Whether the use takes values of this step from the same source too, so that the old ones are left over."""
    return any(
        parent.op == producer.op and parent.stack[:1] == producer.stack[:1] and parent.generation > producer.generation
        for parent in consumer.inputs
    )


def _wrapped(consumer: Node, producer: Node) -> bool:
    """Whether a loop went round between the two: in the first frame that differs, the consumer stands higher."""
    for above, below in zip(reversed(consumer.stack), reversed(producer.stack), strict=False):
        if above[0] is not below[0]:
            return False
        if above[1] != below[1]:
            first, second = site(above).line, site(below).line
            return above[1] < below[1] if first == second else first < second
    return True


def _dropped_detach(context: Context, producer: Node) -> Site | None:
    """Return the line that detached the value and did not keep the result."""
    for nodes in context.tracer.log.values():
        for node in nodes:
            if node.op == "detach" and any(parent is producer for parent in node.inputs):
                where = _not_kept(node.stack)
                if where is not None:
                    return where
    return None


def _not_kept(stack: Stack) -> Site | None:
    for entry in stack:
        source = source_of(entry)
        statement = source.statement(entry) if source is not None else None
        if source is None or statement is None:
            return None
        if isinstance(statement, ast.Expr):
            kept = any(
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr != "detach"
                for node in ast.walk(statement)
            )
            return None if kept else site(entry)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            for loop in source.loops(statement):
                if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and loop.target.id == name:
                    used = any(
                        isinstance(node, ast.Name)
                        and node.id == name
                        and isinstance(node.ctx, ast.Load)
                        and node.lineno > statement.lineno
                        for node in ast.walk(source.function(statement))
                    )
                    return None if used else site(entry)
        if not isinstance(statement, ast.Return):
            return None
    return None


RULES: list[Rule] = [second_backward]
