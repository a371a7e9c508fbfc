"""No error, and a parameter that an optimizer holds gets no gradient, or a term of the loss carries none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._cuts import Cut, describe
from gradctl._explain._numbers_in import number_escape
from gradctl._explain._provenance import where_dropped
from gradctl._explain.rules import Rule
from gradctl._explain.rules.cuts import escape_words
from gradctl._lineage import Escape, Node, ParameterFacts, Site, live_leaves, site, sufficient_breaks, sum_of, upstream


class _Missing(NamedTuple):
    """A parameter without a gradient: since when, and what the lineage said."""

    key: int
    facts: ParameterFacts
    since: int
    late: bool
    steps: int
    kind: str
    evidence: Any


def _missing(context: Context) -> list[_Missing]:
    """Return the parameters that are without a gradient to the end, each with its last explanation."""
    found: list[_Missing] = []
    held = context.held()
    for key, facts in context.parameters():
        if not facts.explained or context.is_hand_written(facts):
            continue
        if not facts.requires_grad:
            continue
        step, kind, evidence = facts.explained[-1]
        if step < 0:
            if not facts.reached:
                found.append(_Missing(key, facts, 0, False, 1, kind, evidence))
            continue
        if key not in held:
            continue
        states = list(facts.states)
        without = 0
        for _, state in reversed(states):
            if state != "none":
                break
            without += 1
        if not without:
            continue
        late = without < len(states)
        if late and without < 2:
            continue
        first = states[-without][0]
        step, kind, evidence = next((e for e in facts.explained if e[0] >= first), facts.explained[-1])
        found.append(_Missing(key, facts, first, late, without, kind, evidence))
    return found


def _symptom(group: list[_Missing]) -> str:
    number = count(len(group), "parameter")
    first = group[0]
    verb = "gets" if len(group) == 1 else "get"
    if first.late:
        return f"{number} {verb} no gradient from step {first.since + 1} on, after gradients before"
    return f"{number} {verb} no gradient" + (f" in {count(first.steps, 'step')}" if first.steps > 1 else "")


def cut_on_the_way(context: Context) -> Iterable[Candidate]:
    """Values of a parameter reach the loss, its gradient does not: an operation cut it."""
    groups: dict[tuple[str, Site | None, bool], list[_Missing]] = defaultdict(list)
    cuts: dict[tuple[str, Site | None, bool], tuple[Cut, Node]] = {}
    for missing in _missing(context):
        if missing.kind != "break":
            continue
        node = _likeliest(context, missing.evidence)
        cut = describe(node)
        key = (cut.slug, cut.place, missing.late)
        groups[key].append(missing)
        cuts.setdefault(key, (cut, node))
    for key, group in groups.items():
        cut, node = cuts[key]
        root = _root_of(context, node)
        forced = _forced(root, node)
        evidence = cut.evidence
        slug, where, why = cut.slug, cut.place, cut.why
        if forced is not None:
            slug = "forced_requires_grad"
            where = place(_nearest_cut(forced).stack) or where
            why = f"{cut.why}; requires_grad=True only made a new leaf of the loss, which lets backward() run"
            evidence = ((place(forced.stack), "forced"), *cut.evidence)
        yield Candidate(
            slug,
            where,
            _symptom(group),
            why,
            confidence=0.85 if group[0].late else 0.95,
            evidence=evidence,
            parameters=tuple(m.key for m in group),
            node=node,
            leaf=group[0].facts.node,
            root=root,
        )


def _likeliest(context: Context, nodes: Sequence[Node]) -> Node:
    """Return the break that people did not mean: of several on different ways from a parameter to the loss.

    A value that goes on through layers that train was on the main way; targets, masks and statistics are not.
    """
    if len(nodes) == 1:
        return nodes[0]
    root = _root_of(context, nodes[0])
    behind = upstream([root]) if root is not None else []

    def rank(node: Node) -> tuple[float, int]:
        return describe(node).deliberate - 0.25 * _feeds_layers(node, behind), node.seq

    return min(nodes, key=rank)


def _feeds_layers(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether what a break gives is used together with a parameter that does get a gradient."""
    cone = {id(node)}
    for later in sorted((n for n in nodes if n.seq > node.seq), key=lambda n: n.seq):
        if any(id(parent) in cone for parent in later.inputs):
            cone.add(id(later))
            if any(parent.leaf and live for parent, live in zip(later.inputs, later.live_inputs, strict=False)):
                return True
    return False


def _root_of(context: Context, node: Node) -> Node | None:
    for backward in reversed(context.facts.backwards):
        for root in backward.roots:
            if backward.accumulates and any(found is node for found in upstream([root])):
                return root
    return None


def _forced(root: Node | None, node: Node) -> Node | None:
    """Return the node of `loss.requires_grad = True` if the loss itself, or what it sums, was made a leaf like that."""
    if root is None:
        return None
    joins, parts = sum_of(root)
    return next((n for n in (*joins, *parts) if n.op == "requires_grad_forced"), None)


def _nearest_cut(forced: Node) -> Node:
    """Return the operation nearest to the loss whose output could not have had a history."""
    at = forced
    while at.inputs and at.cut is None:
        at = at.inputs[0]
    return at


def left_as_a_number(context: Context) -> Iterable[Candidate]:
    """A value left as a Python number or an array, and only the number reaches the loss."""
    groups: dict[tuple[str, Site | None], list[_Missing]] = defaultdict(list)
    chosen: dict[tuple[str, Site | None], tuple[Escape, Site | None]] = {}
    for missing in _missing(context):
        if missing.kind != "escape":
            continue
        escapes, roots = missing.evidence
        returned = [(escape, back) for escape in reversed(escapes) if (back := _comes_back(escape, roots)) is not None]
        escape, back = returned[0] if returned else (escapes[-1], None)
        key = (escape_words(escape)[0], place(escape.stack))
        groups[key].append(missing)
        chosen.setdefault(key, (escape, back))
    for (slug, where), group in groups.items():
        escape, back = chosen[slug, where]
        yield Candidate(
            slug,
            where,
            _symptom(group),
            f"{escape_words(escape)[1]} turns the value into plain data here, and only that reaches the loss",
            confidence=0.9 if back else 0.4,
            evidence=((back, "came back"),),
            parameters=tuple(m.key for m in group),
            node=escape.node,
            leaf=group[0].facts.node,
        )


def _comes_back(escape: Escape, roots: Sequence[Node]) -> Site | None:
    """Return where the number of an escape enters a loss again, if names or identity tell."""
    for node in upstream(roots):
        if (node.scalars or not node.inputs) and node.seq > escape.seq:
            found = number_escape(node, [escape])
            if found is not None and found[1] >= 0.9:
                return place(node.stack)
    return None


def unused(context: Context) -> Iterable[Candidate]:
    """A parameter is never used, or what it computes reaches no loss."""
    groups: dict[tuple[str, Site | None], list[_Missing]] = defaultdict(list)
    nodes: dict[tuple[str, Site | None], Node | None] = {}
    all_missing = [m for m in _missing(context) if m.kind in ("unused", "unused_output") and not m.late]
    if not all_missing or any(m.kind == "connected" for m in all_missing):
        return
    context.name_all(context.facts.parameters)
    for missing in all_missing:
        if missing.kind == "unused_output":
            node: Node | None = missing.evidence
            assert node is not None
            key = ("unused_output", where_dropped(node) or place(node.stack))
        else:
            node = None
            key = ("unused_param", place(missing.facts.node.stack))
        groups[key].append(missing)
        nodes[key] = node
    for (slug, where), group in groups.items():
        node = nodes[slug, where]
        stack = node.stack if node is not None else group[0].facts.node.stack[1:]
        benign = all(m.facts.of_library or _routed(context, m) for m in group)
        if slug == "unused_param":
            why = "it is registered here, and nothing is ever computed from it"
        else:
            assert node is not None
            why = f"what it computes (`{node.op}`) never reaches a loss that backward() is called on"
        yield Candidate(
            slug,
            where,
            _symptom(group),
            why,
            confidence=0.4 if benign else 0.75,
            severity="note" if benign else "warning",
            evidence=tuple((site(entry), "computed" if node else "called from") for entry in stack[:3]),
            parameters=tuple(m.key for m in group),
            node=node,
            leaf=group[0].facts.node,
        )


def _routed(context: Context, missing: _Missing) -> bool:
    """Whether a numbered sibling (an expert, a layer that is dropped at random) does get gradients."""
    name = context.name(missing.key)
    if name is None:
        return False
    parts = name.split(".")
    for position, part in enumerate(parts):
        if not part.isdigit():
            continue
        head, tail = parts[:position], parts[position + 1 :]
        for key, facts in context.parameters():
            other = (context.name(key) or "").split(".")
            if facts.reached and other[:position] == head and other[position + 1 :] == tail and other != parts:
                return True
    return False


_LOST_FOR_GOOD = 3


def dead_term(context: Context) -> Iterable[Candidate]:
    """A term of the loss depends on parameters and has no gradient: adding a constant changes nothing."""
    for term in context.facts.dead_terms.values():
        # A term that carries a gradient now and then is switched by the data; one that lost it for good is not.
        if not term.dead or term.dead != term.run or (term.live and term.run < _LOST_FOR_GOOD):
            continue
        part, root, times = term.part, term.root, term.dead
        cuts = [node for node in sufficient_breaks([part]) if not _is_teacher(context, node)]
        if not cuts or _straight_through(part, root):
            continue
        node = cuts[-1]
        cut = describe(node)
        leaves = live_leaves(node)
        ids = tuple(key for key, facts in context.parameters() if id(facts.node) in leaves)
        if not ids:
            continue
        yield Candidate(
            cut.slug,
            cut.place,
            f"a term of the loss is a constant: it was added in {count(times, 'backward')} and trains nothing",
            f"{cut.why}; adding a constant to the loss changes no gradient",
            confidence=0.88 - 0.2 * cut.deliberate * (cut.slug in ("argmax", "comparison")),
            evidence=(*cut.evidence, (place(part.stack), "term"), (place(root.stack), "added")),
            parameters=ids,
            node=node,
            leaf=context.facts.parameters[ids[0]].node,
            root=root,
            explains="wrong",
        )


def _is_teacher(context: Context, node: Node) -> bool:
    """Whether nothing that an optimizer trains is behind a break."""
    held = context.held()
    leaves = live_leaves(node)
    return not any(
        id(facts.node) in leaves and key in held and not context.is_hand_written(facts)
        for key, facts in context.parameters()
    )


def _straight_through(part: Node, root: Node) -> bool:
    """Whether the term is the constant half of `x + (y - x).detach()`: another term of the sum is inside of it."""
    _, parts = sum_of(root)
    inside = {id(node) for node in upstream([part])}
    return any(other.live and id(other) in inside for other in parts) or any(
        other is not part and other.live and _same_values(other, part) for other in parts
    )


def _same_values(live: Node, dead: Node) -> bool:
    """Whether the dead term is computed from the very value that the live one is."""
    return bool({id(n) for n in live.inputs if n.inputs} & {id(n) for n in upstream([dead])} and dead.cut == "detach")


def number_in_the_loss(context: Context) -> Iterable[Candidate]:
    """A term of the loss is a plain number that was read from a value with history."""
    for join, _, times, escapes, _ in context.facts.dead_numbers.values():
        live = [e for e in escapes if e.live and e.generation == join.generation]
        found = number_escape(join, live) if live else None
        if found is None or found[1] < 0.9:
            continue
        escape, confidence = found
        leaves = {id(n) for n in upstream([escape.node], live=True) if n.leaf}
        ids = tuple(key for key, facts in context.parameters() if id(facts.node) in leaves)
        if not ids:
            continue
        slug, how = escape_words(escape)
        yield Candidate(
            slug,
            place(escape.stack),
            f"a term of the loss is a plain number: it was added in {count(times, 'backward')} and trains nothing",
            f"{how} turns the value into plain data here; adding a constant to the loss changes no gradient",
            confidence=confidence - 0.03,
            evidence=((place(join.stack), "added"),),
            parameters=ids,
            node=escape.node,
            leaf=context.facts.parameters[ids[0]].node,
            explains="wrong",
        )


def lost_derivative(context: Context) -> Iterable[Candidate]:
    """One derivative in the loss was computed without create_graph, others beside it with: its term trains nothing."""
    for node, root, times, other in context.facts.lost_derivatives.values():
        leaves = {id(n) for n in upstream(node.inputs) if n.leaf}
        ids = tuple(key for key, facts in context.parameters() if id(facts.node) in leaves and facts.is_parameter)
        yield Candidate(
            "missing_create_graph",
            describe(node).place,
            f"a derivative in the loss is a constant in {count(times, 'backward')}; every parameter gets a gradient, "
            "without its term",
            "torch.autograd.grad without create_graph=True returns a constant; the derivatives beside it are recorded",
            confidence=0.9,
            evidence=((place(other.stack), "recorded"), *((site(e), "called from") for e in node.stack[1:3])),
            parameters=ids,
            node=node,
            root=root,
            explains="wrong",
        )


_JOINS = frozenset({"cat", "concat", "stack", "hstack", "vstack", "add", "__add__", "__radd__", "__iadd__", "add_"})
_LAYERS = frozenset(
    {
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "bilinear",
        "matmul",
        "__matmul__",
        "addmm",
        "mm",
        "bmm",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "rnn_tanh",
        "gru",
        "lstm",
    }
)
_STATISTICS = frozenset(
    [
        "max",
        "amax",
        "min",
        "amin",
        "mean",
        "sum",
        "norm",
        "std",
        "var",
        "vector_norm",
        "median",
        "logsumexp",
        "numel",
        "size",
    ]
)


def cut_on_one_way(context: Context) -> Iterable[Candidate]:
    """`.data` or `torch.tensor()` on one way through the model, while the others still deliver a gradient.

    Targets, weights and statistics are copied on purpose: only what is joined, added or fed to a layer that trains
    counts, and only where the same backward reaches the same parameters by another way.
    """
    for copy, backward, times, meets, words in context.facts.partial_cuts.values():
        leaves = live_leaves(copy)
        ids = tuple(
            key
            for key, facts in context.parameters()
            if id(facts.node) in leaves and key in backward.leaves and not context.is_hand_written(facts)
        )
        if not ids or _STATISTICS & set(words) or _is_loss_sum(backward.roots, meets):
            continue
        layer = meets.op in _LAYERS and any(
            p.leaf and live for p, live in zip(meets.inputs, meets.live_inputs, strict=False)
        )
        if not (meets.op in _JOINS or layer) or _straight_through_join(copy, meets):
            continue
        cut = describe(copy)
        yield Candidate(
            cut.slug,
            cut.place,
            f"one way to {count(len(ids), 'parameter')} carries no gradient in {count(times, 'backward')}; "
            "others do, so that each gets a part only",
            f"{cut.why}; the copy is used in `{meets.op.strip('_')}` together with values that have a history",
            confidence=0.75,
            severity="warning",
            evidence=(*cut.evidence, (place(meets.stack), "joined")),
            parameters=ids,
            node=copy,
            leaf=context.facts.parameters[ids[0]].node,
            root=backward.roots[0],
            explains="wrong",
        )


def _is_loss_sum(roots: Sequence[Node], node: Node) -> bool:
    """Whether an addition joins the terms of the loss itself (see `dead_term`)."""
    return any(node is join for root in roots for join in sum_of(root)[0])


def _straight_through_join(copy: Node, meets: Node) -> bool:
    """Whether `meets` is the addition of `x + (y - x).data`: its live operand is inside of the copy."""
    inside = {id(node) for node in upstream([copy])}
    return any(
        live and id(parent) in inside for parent, live in zip(meets.inputs, meets.live_inputs, strict=False)
    ) and meets.op not in (
        "cat",
        "concat",
        "stack",
        "hstack",
        "vstack",
    )


RULES: list[Rule] = [
    cut_on_one_way,
    cut_on_the_way,
    left_as_a_number,
    unused,
    dead_term,
    number_in_the_loss,
    lost_derivative,
]
