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
from gradctl._lineage import Escape, Node, ParameterFacts, Site, site, sum_of, upstream


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
        if late and without < max(2, 2 * _longest_gap(states[:-without]) + 1):
            continue  # it comes and goes: a first window, a second loss every few steps
        first = states[-without][0]
        step, kind, evidence = next((e for e in facts.explained if e[0] >= first), facts.explained[-1])
        found.append(_Missing(key, facts, first, late, without, kind, evidence))
    return found


def _longest_gap(states: Sequence[tuple[int, str]]) -> int:
    """Return the longest run of steps without a gradient between two steps with one."""
    longest = run = 0
    seen = False
    for _, state in states:
        if state == "none":
            run += seen
        else:
            longest, run, seen = max(longest, run), 0, True
    return longest


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
    chosen: dict[tuple[str, Site | None], tuple[Escape, Node | None]] = {}
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
            evidence=((place(back.stack), "came back"),) if back else (),
            parameters=tuple(m.key for m in group),
            node=escape.node,
            leaf=group[0].facts.node,
            left=escape.kind.strip("_"),
            back=back,
        )


def _comes_back(escape: Escape, roots: Sequence[Node]) -> Node | None:
    """Return the value at which the number of an escape enters a loss again, if names or identity tell."""
    for node in upstream(roots):
        if (node.scalars or not node.inputs) and node.seq > escape.seq:
            found = number_escape(node, [escape])
            if found is not None and found[1] >= 0.9:
                return node if node.stack else None
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


RULES: list[Rule] = [cut_on_the_way, left_as_a_number, unused]
