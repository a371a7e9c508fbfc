"""`backward()` refused: the loss has no history. What took it, and where."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import CodeType

from torch.nn import Parameter

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._cuts import Cut, describe, in_region
from gradctl._explain._numbers_in import number_escape
from gradctl._explain._source import source_of
from gradctl._explain.rules import Rule
from gradctl._lineage import (
    ErrorFacts,
    Escape,
    Node,
    Site,
    Stack,
    breaks,
    live_leaves,
    meant_breaks,
    site,
    source,
    sufficient_breaks,
    upstream,
)

_MESSAGE = "does not require grad and does not have a grad_fn"
_SYMPTOM = "backward() refused: the loss has no history, so no parameter can get a gradient"


def no_history(context: Context) -> Iterable[Candidate]:
    """The exception "element 0 of tensors does not require grad and does not have a grad_fn"."""
    error = context.facts.error
    if error is None or error.error is not context.error or _MESSAGE not in context.message:
        return
    roots = error.backward.roots if error.backward is not None else error.nodes
    if not roots:
        return
    found = False
    if not error.grad_enabled and error.regions:
        yield _mode_is_off(context, error, roots)
        found = True
    nodes = upstream(roots)
    frozen = _frozen(context, nodes, roots, error)
    if frozen is not None:
        yield frozen
        found = True
    wanted = _wanted(context)
    sufficient = sufficient_breaks(roots)
    behind: dict[tuple[str, Site | None], Candidate] = {}
    # Who stops a gradient by a call of gradctl means it; it is told only where backward() is left without any way.
    for rank, node in enumerate(sufficient or breaks(nodes) or meant_breaks(nodes)):
        cut = describe(node)
        leaves = live_leaves(node)
        reaches = {key for key, facts in context.parameters() if id(facts.node) in leaves}
        confidence = 0.97 if sufficient else 0.8
        confidence -= 0.05 * cut.deliberate * (len(sufficient) > 1) + 0.001 * rank
        if wanted and not reaches & wanted:
            confidence -= 0.1
        if not reaches and node.meant:
            continue
        leaf = next((facts.node for _, facts in context.parameters() if id(facts.node) in leaves), None)
        found = True
        one = _candidate(context, cut, roots, node, leaf, tuple(reaches & wanted or reaches), confidence, error)
        known = behind.get((cut.slug, cut.place))
        if known is not None:  # one region cuts at each operation in it: all that is behind it is lost there
            best = max(known, one, key=lambda c: c.confidence)
            one = replace(best, parameters=tuple(dict.fromkeys((*known.parameters, *one.parameters))))
        behind[cut.slug, cut.place] = one
    yield from behind.values()
    if not found:
        yield from _escaped(context, nodes, roots, error)


def _candidate(
    context: Context,
    cut: Cut,
    roots: Sequence[Node],
    node: Node | None,
    leaf: Node | None,
    parameters: tuple[int, ...],
    confidence: float,
    error: ErrorFacts,
) -> Candidate:
    return Candidate(
        cut.slug,
        cut.place,
        _SYMPTOM,
        f"{cut.why}; nothing that a gradient could follow leads from there to the loss",
        confidence=confidence,
        fix=cut.fix,
        evidence=(*cut.evidence, (place(error.stack), "backward")),
        parameters=parameters,
        node=node,
        leaf=leaf,
        root=roots[0],
        explains="error",
    )


def _mode_is_off(context: Context, error: ErrorFacts, roots: Sequence[Node]) -> Candidate:
    region = error.regions[-1]
    cut = in_region(region, "backward()", place(error.stack))
    leaves = [node for node in upstream(roots) if node.leaf and node.requires_grad]
    ids = tuple(key for node in leaves if (key := context.key_of(node)) is not None)
    node = next((node for node in sufficient_breaks(roots) if node.cut in ("grad_off", "inference")), None)
    behind = live_leaves(node) if node is not None else set[int]()
    return Candidate(
        cut.slug,
        cut.place,
        _SYMPTOM,
        f"gradients are off at the moment of backward(): {cut.why}",
        confidence=0.98,
        evidence=(*cut.evidence, (place(error.stack), "backward")),
        parameters=ids,
        node=node,
        leaf=next((leaf for leaf in leaves if id(leaf) in behind), None),
        root=roots[0],
        explains="error",
    )


def _wanted(context: Context) -> set[int]:
    """Ids of the parameters that the coming step is for: those of the optimizer that was cleared last."""
    for event in reversed(context.facts.grad_events):
        if event.kind == "zero_grad":
            return set(event.ids)
    return set(context.held())


def _frozen(context: Context, nodes: Sequence[Node], roots: Sequence[Node], error: ErrorFacts) -> Candidate | None:
    """Every parameter behind the loss is frozen: by whom."""
    leaves = [node for node in nodes if node.leaf and not node.requires_grad and _is_parameter(context, node)]
    ids = {key for node in leaves if (key := context.key_of(node)) is not None}
    wanted = ids & _wanted(context)
    if not ids or (not wanted and any(node.leaf and node.requires_grad for node in nodes)):
        return None
    ids = wanted or ids
    events = [event for event in context.facts.flags if event.tensor_id in ids and not event.to]
    trained = {key for key in ids if (facts := context.facts.parameters.get(key)) is not None and facts.reached}
    if not events:
        where = place(leaves[0].stack)
        return Candidate(
            "frozen_params",
            where,
            _SYMPTOM,
            f"all {count(len(leaves), 'parameter')} behind the loss were frozen from the start",
            confidence=0.6,
            parameters=tuple(ids),
            root=roots[0],
            explains="error",
        )
    event = events[-1]
    where, evidence = frozen_by(event.stack)
    by = " by gradctl.freeze" if event.own == "freeze" else ""
    why = f"{count(len(ids), 'parameter')} behind the loss {'is' if len(ids) == 1 else 'are'} frozen here{by}"
    if trained:
        why += f"; {'it' if len(ids) == 1 else 'they'} had gradients in earlier steps"
    return Candidate(
        "frozen_params",
        where,
        _SYMPTOM,
        why,
        confidence=0.96 if trained or wanted else 0.85,
        evidence=(*evidence, (place(error.stack), "backward")),
        parameters=tuple(ids),
        root=roots[0],
        explains="error",
    )


def frozen_by(stack: Stack) -> tuple[Site | None, tuple[tuple[Site | None, str], ...]]:
    """Return the line that decided to freeze, and the lines through which it did.

    That is the line of the flag where the flag is worked out there; a helper that sets what it is given leaves the
    decision to its caller.
    """
    places = [site(entry) for entry in stack]
    chosen = places[0] if places else None
    if places and not _works_out_flag(stack[0]):
        inside = next((n for n, p in enumerate(places) if p.function == "<module>"), len(places)) + 1
        chosen = next((p for p in places[:inside] if "requires_grad" not in source(p)), places[0])
    return chosen, tuple((p, "frozen") for p in places if p != chosen)


def _works_out_flag(entry: tuple[CodeType, int]) -> bool:
    """Whether the new value of `requires_grad` is computed on its line, from a name or a pattern for example."""
    found = source_of(entry)
    statement = found.statement(entry) if found is not None else None
    value: ast.expr | None = None
    if isinstance(statement, ast.Assign):
        value = statement.value
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and statement.value.args:
        value = statement.value.args[0]
    return isinstance(value, (ast.Call, ast.Compare, ast.BoolOp, ast.UnaryOp))


def _is_parameter(context: Context, node: Node) -> bool:
    tensor = node.tensor()
    if tensor is not None:
        return isinstance(tensor, Parameter)
    return any(facts.node is node and facts.is_parameter for _, facts in context.parameters())


def _escaped(context: Context, nodes: Sequence[Node], roots: Sequence[Node], error: ErrorFacts) -> Iterable[Candidate]:
    """The loss was built from plain numbers: where they left."""
    generation = context.facts.generation
    escapes = [escape for escape in context.facts.escapes if escape.generation >= generation - 1]
    sources = sorted((n for n in nodes if not n.inputs and not n.requires_grad), key=lambda n: -n.seq)
    for source_node in sources:
        found = number_escape(source_node, escapes)
        if found is not None:
            escape, confidence = found
            yield _from_escape(context, escape, source_node, confidence, roots, error)
            return


def _from_escape(
    context: Context, escape: Escape, source_node: Node, confidence: float, roots: Sequence[Node], error: ErrorFacts
) -> Candidate:
    slug, how = escape_words(escape)
    back = place(source_node.stack)
    leaves = {id(n) for n in upstream([escape.node]) if n.leaf}
    ids = tuple(key for key, facts in context.parameters() if id(facts.node) in leaves)
    leaf = next((context.facts.parameters[key].node for key in ids), None)
    return Candidate(
        slug,
        place(escape.stack),
        _SYMPTOM,
        f"the value left autograd through {how} here and came back as plain data",
        confidence=confidence,
        evidence=((back, "came back"), (place(error.stack), "backward")),
        parameters=ids,
        node=escape.node,
        leaf=leaf,
        root=roots[0],
        left=escape.kind.strip("_"),
        back=source_node,
        explains="error",
    )


def escape_words(escape: Escape) -> tuple[str, str]:
    """Return the slug of an escape, and how it reads in a sentence."""
    if escape.kind in ("__float__", "__int__", "item", "__index__") and _in_constructor(escape):
        return "rewrap_tensor", "torch.Tensor(...)"
    if escape.kind in ("numpy", "__array__", "__dlpack__"):
        return "numpy_roundtrip", ".numpy()" if escape.kind == "numpy" else "numpy"
    return "item", {"__float__": "float()", "__int__": "int()"}.get(escape.kind, f".{escape.kind.strip('_')}()")


def _in_constructor(escape: Escape) -> bool:
    """Whether the number was read by `torch.Tensor([...])`, not by the program: its line has no other conversion."""
    line = source(site(escape.stack[0])) if escape.stack else ""
    made = any(f"{name}(" in line for name in ("torch.Tensor", "FloatTensor", "DoubleTensor", "HalfTensor"))
    return made and not any(word in line for word in (".item()", "float(", "int("))


RULES: list[Rule] = [no_history]
