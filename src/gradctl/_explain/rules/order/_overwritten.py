"""grad_overwritten, grad_aliased: the step gets something else than what backward computed."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain._source import source_of
from gradctl._explain.rules.order._cleared import goes_on
from gradctl._lineage import Reused, Shared, Site, Taken

_TWICE = 2


def grad_overwritten(context: Context) -> Iterable[Candidate]:
    """Find assignments to `.grad` after backward that do not come from this step's gradient, or leave zeros."""
    grouped: dict[Site | None, list[Taken]] = {}
    for taken in context.facts.taken.values():
        if taken.kind in ("replaced", "zeroed") and goes_on(taken):
            grouped.setdefault(place(taken.event.stack), []).append(taken)
    for line, found in grouped.items():
        keys = {key for taken in found for key in taken.keys}
        last = max(found, key=lambda taken: taken.count)
        sources = last.event.sources or {}
        zeros = any(taken.kind == "zeroed" for taken in found)
        if zeros:
            how = "what this line leaves in .grad is exactly zero"
        elif not sources:
            how = "what this line writes into .grad does not come from any gradient"
        elif any(taken.foreign for taken in found):
            how = "what this line writes into .grad comes from the gradient of another parameter"
        else:
            how = "what this line writes into .grad was read at an earlier step"
        yield Candidate(
            "grad_overwritten",
            line,
            f"{count(last.count, 'step')} of {last.optimizer.steps} of {last.optimizer.name} did not use the gradients "
            f"that backward() computed for {count(len(keys), 'parameter')}",
            f"{how}; it runs after backward() and before step()",
            confidence=0.95 if zeros else 0.9,
            evidence=((place(last.event.stack, 1), "called from"), (place(last.stack), "step")),
            parameters=tuple(sorted(keys)),
            explains="zero" if zeros else "wrong",
            measured={"steps": float(last.count), "parameters": float(len(keys))},
        )


def grad_aliased(context: Context) -> Iterable[Candidate]:
    """Find parameters that share the memory of one gradient, where that changed what a step used."""
    grouped: dict[Site, list[tuple[tuple[int, int], Shared]]] = {}
    for pair, shared in context.facts.shared.items():
        line = place(shared.setting.stack) if shared.setting is not None else None
        added = shared.added or context.facts.accumulated_into_one.get(frozenset(pair), 0) >= _TWICE
        if line is not None and shared.count >= _TWICE and (shared.edits >= _TWICE or added):
            grouped.setdefault(line, []).append((pair, shared))
    for line, found in grouped.items():
        keys = {key for pair, _ in found for key in pair}
        shared = found[0][1]
        how = (
            "a change in place of one changes the other too"
            if shared.edits
            else "the next backward() adds the gradients of both into it"
        )
        yield Candidate(
            "grad_aliased",
            line,
            f"{len(keys)} parameters had one gradient tensor in {count(shared.count, 'step')}",
            f"`.grad = t` keeps t itself, not a copy: {how}",
            fix="give each a tensor of its own: p.grad = t.clone()",
            confidence=0.85,
            evidence=(
                (place(shared.edit.stack) if shared.edit is not None else None, "changed in place"),
                (place(shared.stack), "step"),
            ),
            parameters=tuple(sorted(keys)),
            explains="wrong",
            measured={"steps": float(shared.count)},
        )


def grad_read_late(context: Context) -> Iterable[Candidate]:
    """Find gradients that were kept without a copy, and used when a later backward had written into them."""
    for reused in context.facts.reused.values():
        if reused.count < _TWICE or (reused.kind == "same" and not _differ(reused)):
            continue
        how = {
            "same": "here it is compared with the gradient of a later backward, which is the same tensor by now",
            "stale": "when it is used here, a later backward or zero_grad() has changed it",
            "put back": "when it is put back here, it is what .grad holds already",
        }[reused.kind]
        yield Candidate(
            "grad_aliased",
            place(reused.read.stack),
            f"{count(len(reused.keys), 'gradient')} kept here changed {count(reused.count, 'time')} before being used",
            f"p.grad is not a copy, and backward() adds into it; {how}",
            fix="keep a copy: [p.grad.clone() for p in params]",
            confidence=0.9,
            evidence=((place(reused.stack), "used"),),
            parameters=tuple(sorted(reused.keys)),
            explains="wrong",
        )


def _differ(reused: Reused) -> bool:
    """Whether the operands of an operation are written as two different things: `a * b`, not `g * g`."""
    source = source_of(reused.stack[0]) if reused.stack else None
    found = source.expression(reused.stack[0]) if source is not None else None
    if isinstance(found, ast.BinOp):
        return ast.dump(found.left) != ast.dump(found.right)
    if isinstance(found, ast.Call):
        operands = [ast.dump(argument) for argument in found.args[:2]]
        if len(operands) == 1 and isinstance(found.func, ast.Attribute):
            operands.append(ast.dump(found.func.value))
        return len(operands) == 2 and operands[0] != operands[1]
    return False
