"""Gradients that are exactly zero, or vanishingly small, and stay so: which operation swallowed them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain.rules import Rule
from gradctl._explain.rules.numbers import names
from gradctl._explain.rules.numbers.factors import factor
from gradctl._explain.rules.numbers.single import ENOUGH, cancels, runs_over_one
from gradctl._explain.rules.numbers.verdict import Swallowed, named
from gradctl._lineage import VIEWS, Hit, Node, ParameterFacts, Site, is_own, path

_CASTS = frozenset(["to", "half", "type", "type_as"])
_END = 1e-4


class _Silent(NamedTuple):
    """A parameter whose gradient is zero to the end: since which step, in how many, and what swallowed it."""

    key: int
    facts: ParameterFacts
    since: int
    steps: int
    always: bool
    hits: tuple[Hit, ...]


def silent(context: Context) -> list[_Silent]:
    """Return the parameters whose gradient is zero, or tiny, in all steps from some step on."""
    found: list[_Silent] = []
    stepping = context.facts.steps > 0
    for key, facts in context.parameters():
        killer = facts.killers.get("zero") or facts.killers.get("tiny")
        if killer is None or context.is_hand_written(facts):
            continue
        if not facts.states and stepping and key not in context.facts.read_by_user:
            continue  # nobody uses this gradient: the input of a penalty, for example
        first, backwards = killer
        hits = (first, *first.detail.get("others", ()))
        states = [state for _, state in facts.states]
        if states:
            tail = 0
            for state in reversed(states):
                if state not in ("zero", "ok" if first.kind == "tiny" else "zero"):
                    break
                tail += 1
            if first.kind == "tiny":
                tail = min(tail, backwards)
            always = tail == len(states) or (first.kind == "tiny" and backwards >= facts.reached)
            since = facts.states[len(states) - tail][0] if tail else 0
            before = states[: len(states) - tail]
        else:
            tail, always, since, before = backwards, backwards >= facts.reached, 0, []
        if not tail or not _lasts(context, tail, always, before):
            continue
        found.append(_Silent(key, facts, since, tail, always, hits))
    return found


def _lasts(context: Context, tail: int, always: bool, before: list[Any]) -> bool:
    if always:
        return tail >= ENOUGH or context.finished
    longest = run = 0
    for state in before:
        run = run + 1 if state == "zero" else 0
        longest = max(longest, run)
    return tail >= max(ENOUGH, 4 * longest)


def zero(context: Context) -> Iterable[Candidate]:
    """One finding for each operation that swallows the gradient of parameters for good."""
    groups: dict[tuple[str, Site | None], list[tuple[_Silent, Swallowed]]] = defaultdict(list)
    left: list[_Silent] = []
    for entry in silent(context):
        verdict = _verdict(context, entry)
        if verdict is None:
            left.append(entry)
        else:
            groups[verdict.slug, verdict.place].append((entry, verdict))
    for entry in left:
        _join(entry, groups)
    for (slug, where), group in groups.items():
        yield _candidate(context, slug, where, group)


def _candidate(context: Context, slug: str, where: Site | None, group: list[tuple[_Silent, Swallowed]]) -> Candidate:
    entry, verdict = max(group, key=lambda pair: pair[0].steps)
    number = count(len(group), "parameter")
    small = "exactly zero" if entry.hits[0].kind == "zero" else "vanishingly small"
    when = f"in all {entry.steps} steps" if entry.always else f"from step {entry.since + 1} on, after gradients before"
    confidence = verdict.confidence
    if entry.steps < ENOUGH:
        when = "" if not entry.facts.states else f"in {count(entry.steps, 'step')}"
        confidence = min(confidence, 0.78)
    if not entry.always:
        confidence -= 0.02
    return Candidate(
        slug,
        where,
        f"{number} with a gradient of {small} {when}".strip(),
        verdict.why,
        verdict.fix,
        confidence=confidence,
        severity="note" if confidence < 0.5 else "error" if confidence >= 0.8 else "warning",
        evidence=verdict.evidence,
        parameters=tuple([one.key for one, _ in group]),
        node=verdict.node,
        leaf=entry.facts.node,
        root=None,
        explains="zero",
    )


def _verdict(context: Context, entry: _Silent) -> Swallowed | None:
    found = [verdict for hit in entry.hits if (verdict := _explained(context, entry, hit)) is not None]
    return max(found, key=lambda verdict: verdict.confidence, default=None)


def _explained(context: Context, entry: _Silent, hit: Hit) -> Swallowed | None:
    node = hit.node
    name = names.function(hit.function)
    if node is None or not node.stack:
        return None
    if hit.detail["edge"] < 0:
        return _hooked(context, hit) or cancels(context, node)
    if hit.detail["forward_class"] is not None:
        return None
    if name.startswith(names.FLAT_STEP):
        return Swallowed(
            "zero_grad_sign",
            node.site,
            f"`{named(node)}` is flat between its jumps: its derivative is 0 everywhere",
            node,
            0.95,
        )
    if name in ("Softmax", "LogSoftmax", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"):
        one = runs_over_one(hit, node, name)
        if one is not None:
            return one
    shrunk = hit.kind == "zero" or (hit.detail["size"] or 0.0) < 0.5 * hit.magnitude
    if name.startswith(names.FLAT_RELU) and hit.kind == "zero":
        return _flat(context, entry, hit, node, "zero_grad_relu", "is 0 for all of its inputs, and so is its slope")
    if name.startswith(names.FLAT_CLAMP) and hit.kind == "zero":
        return _flat(
            context,
            entry,
            hit,
            node,
            "zero_grad_clamp",
            "has all of its inputs outside of the range, where its slope is 0",
        )
    if name.startswith(names.SATURATING):
        if not shrunk or not _may_be_saturated(name, hit):
            return None
        out = hit.detail["size"] or 0.0
        return Swallowed(
            "vanished_grad",
            node.site,
            f"`{named(node)}` is saturated: a gradient of {hit.magnitude:.1e} comes out as {out:.1e}",
            node,
            0.85,
        )
    if verdict := factor(context, entry.key, hit, node, name):
        return verdict
    return _underflow(hit, node)


def _may_be_saturated(name: str, hit: Hit) -> bool:
    """Whether the result of a softmax or a sigmoid has an entry close to an end; True where it was not kept.

    A softmax whose entries are summed up again, or all weighed alike, hands on nothing too, and is not saturated.
    """
    if hit.kind != "zero" or name not in ("Softmax", "Sigmoid"):
        return True
    result = hit.detail["saved"].get("result") or {}
    return "min" not in result or result["min"] < _END or result["max"] > 1.0 - _END


def _flat(context: Context, entry: _Silent, hit: Hit, node: Node, slug: str, why: str) -> Swallowed:
    root = _root_of(context, node)
    confidence = 0.9
    if root is not None and _is_penalty(node, root):
        confidence = 0.4  # a margin that is kept: such a loss is meant to be zero when it has nothing to say
    shape = f" ({list(node.shape)})" if node.shape else ""
    return Swallowed(slug, node.site, f"`{named(node)}`{shape} {why}", node, confidence)


def _root_of(context: Context, node: Node) -> Node | None:
    for backward in reversed(context.facts.backwards):
        for root in backward.roots:
            if path(root, node):
                return root
    return None


_REDUCING = frozenset(
    [
        "mean",
        "sum",
        "max",
        "amax",
        "min",
        "amin",
        "square",
        "pow",
        "__pow__",
        "add",
        "__add__",
        "__radd__",
        "__iadd__",
        "stack",
        "cat",
        "mul",
        "__mul__",
        "__rmul__",
        "div",
        "__truediv__",
        "logsumexp",
        "nanmean",
    ]
)


def _is_penalty(node: Node, root: Node) -> bool:
    """Whether a value is only summed up on its way to the loss, as a hinge is: nothing compares it with a target."""
    for at in path(root, node)[1:]:
        op = names.operation(at)
        if op in VIEWS:
            continue
        if op not in _REDUCING:
            return False
        if any(parent.leaf and parent.trainable for parent in at.inputs):
            return False
    return True


def _hooked(context: Context, hit: Hit) -> Swallowed | None:
    for hook in context.facts.hooks:
        if hook.node is hit.node and hook.code is not None and not is_own(hook.code.co_filename):
            where = Site(hook.code.co_filename, hook.code.co_firstlineno, hook.code.co_qualname)
            return Swallowed(
                "grad_overwritten",
                where,
                f"a hook on the result of `{named(hook.node)}` returns a gradient of zero",
                hook.node,
                0.85,
                "return None from the hook to leave the gradient as it is",
                ((hook.node.site, "the value"), (place(hook.stack), "where the hook was registered")),
            )
    return None


def _underflow(hit: Hit, node: Node) -> Swallowed | None:
    if str(hit.detail["dtype"]) != "torch.float16" or not 0.0 < hit.magnitude < 1e-2:
        return None
    if names.function(hit.function).startswith(("Index", "Select", "Slice", "Gather", "Embedding", "Max", "Amax")):
        return None
    return Swallowed(
        "zero_grad_underflow",
        node.site,
        f"behind `{named(node)}` the gradient, {hit.magnitude:.1e}, falls below 6e-8, the smallest float16",
        node,
        0.85,
        evidence=((cast.site, "where the value became float16"),) if (cast := _cast_to_half(node)) is not None else (),
    )


def _cast_to_half(node: Node) -> Node | None:
    """Return the nearest cast to float16 that the program wrote itself, on the way from the parameters to a value."""
    queue, seen = [node], set[int]()
    for at in queue:
        for parent in at.inputs:
            if names.operation(at) in _CASTS and at.dtype is torch.float16 and parent.dtype is not torch.float16:
                return at
            if id(parent) not in seen and parent.trainable:
                seen.add(id(parent))
                queue.append(parent)
    return None


def _join(entry: _Silent, groups: dict[tuple[str, Site | None], list[tuple[_Silent, Swallowed]]]) -> None:
    """Add what reads a dead value to the finding of that value: its own gradient is zero because its input is."""
    for group in groups.values():
        one, verdict = group[0]
        if one.steps != entry.steps:
            continue
        for hit in entry.hits:
            if hit.node is not None and (hit.node is verdict.node or _reads(hit.node, verdict)):
                group.append((entry, verdict))
                return


def _reads(node: Node, verdict: Swallowed) -> bool:
    queue, seen = list(node.inputs), 0
    while queue and seen < 40:
        at = queue.pop(0)
        seen += 1
        if at.op == verdict.node.op and at.site == verdict.node.site:
            return True
        queue += at.inputs
    return False


RULES: list[Rule] = [zero]
