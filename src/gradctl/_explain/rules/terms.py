"""A term of the loss, or one way through the model, carries no gradient; each parameter may still get one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._cuts import describe
from gradctl._explain._numbers_in import number_escape
from gradctl._explain.rules import Rule
from gradctl._explain.rules.cuts import escape_words
from gradctl._lineage import Node, live_leaves, site, sufficient_breaks, sum_of, upstream

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
    for join, root, times, escapes, _ in context.facts.dead_numbers.values():
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
            root=root,
            left=escape.kind.strip("_"),
            back=join,
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


RULES: list[Rule] = [cut_on_one_way, dead_term, number_in_the_loss, lost_derivative]
