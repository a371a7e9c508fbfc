"""zero_grad_misplaced, grad_cleared, missing_zero_grad: gradients cleared at the wrong time, or never."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._lineage import OptimizerFacts, Site, Taken

_TWICE = 2
_MOST = 0.8
_HALF = 0.5


def goes_on(taken: Taken, *, least: int = _TWICE) -> bool:
    """Whether it happened at the optimizer's last steps, so that nothing shows that it was meant for a while only.

    Gradients of a layer that are dropped during the first epoch, and steps skipped now and then, are meant so.
    """
    return taken.count >= least and taken.at[-1] >= taken.optimizer.steps - 1 and _share(taken) >= _HALF


def _share(taken: Taken) -> float:
    """Return at which share of the steps it happened since it first did, as far as they are remembered."""
    return len(taken.at) / max(1, taken.optimizer.steps - taken.at[0])


def _recurs(taken: Taken) -> bool:
    """Whether it comes back through the whole run, at equal distances: a log line at every tenth step."""
    gaps = [b - a for a, b in itertools.pairwise(taken.at)]
    regular = len(gaps) >= _TWICE and max(gaps) - min(gaps) <= 1
    return regular and taken.optimizer.steps - 1 - taken.at[-1] <= max(gaps) and taken.whole >= taken.count * _MOST


def zero_grad_misplaced(context: Context) -> Iterable[Candidate]:
    """Find `zero_grad()` of an optimizer between backward and step, or between microbatches."""
    for taken in context.facts.taken.values():
        event = taken.event
        by_optimizer = event.kind == "zero_grad" and _is_of_optimizer(context, event.op)
        if taken.kind == "discarded" and _share(taken) >= _MOST and taken.count >= _TWICE:
            yield Candidate(
                "zero_grad_misplaced" if by_optimizer else "grad_cleared",
                place(event.stack),
                f"{count(taken.whole, 'backward')} before {count(taken.count, 'step')} of {taken.optimizer.name} "
                "came to nothing",
                f"{event.op} clears the gradients of one microbatch before the next one is added",
                fix="clear once for each step, after step()",
                confidence=0.8,
                evidence=((place(taken.stack), "step"),),
                parameters=tuple(sorted(taken.keys)),
                explains="order",
                measured={"backwards": float(taken.whole), "steps": float(taken.count)},
            )
        elif taken.kind == "cleared" and by_optimizer and goes_on(taken):
            yield _lost(taken, "zero_grad_misplaced", f"{event.op}() runs after backward() and before step()", 0.97)


def grad_cleared(context: Context) -> Iterable[Candidate]:
    """Find what else clears gradients between backward and step: `.grad = None`, `.grad.zero_()`, a hook."""
    for taken in context.facts.taken.values():
        event = taken.event
        if taken.kind != "cleared" or (event.kind == "zero_grad" and _is_of_optimizer(context, event.op)):
            continue
        words = {"none": ".grad is set to None", "zero_grad": f"{event.op}() runs"}
        what = words.get(event.kind, ".grad is filled with zeros")
        if goes_on(taken):
            yield _lost(taken, "grad_cleared", f"{what} here, between backward() and step()", 0.95)
        elif _recurs(taken):
            yield _lost(taken, "grad_cleared", f"{what} here, between backward() and step(), again and again", 0.75)


def _lost(taken: Taken, slug: str, why: str, confidence: float) -> Candidate:
    keys = tuple(sorted(taken.keys))
    whose = f"all of {taken.optimizer.name}" if taken.whole == taken.count else count(len(keys), "parameter")
    return Candidate(
        slug,
        place(taken.event.stack),
        f"{count(taken.count, 'step')} of {taken.optimizer.steps} without the gradients of {whose}",
        f"{why}, which skips what has no gradient",
        confidence=confidence,
        evidence=(*_callers(taken), (place(taken.stack), "step")),
        parameters=keys,
        explains="order",
        measured={"steps": float(taken.count), "parameters": float(len(keys))},
    )


def _callers(taken: Taken) -> list[tuple[Site | None, str]]:
    return [(place(taken.event.stack, depth), "called from") for depth in (1, 2) if len(taken.event.stack) > depth]


def _is_of_optimizer(context: Context, op: str) -> bool:
    """Whether a `zero_grad` was that of an optimizer, not of a module."""
    name = op.partition(".")[0]
    return any(optimizer.name == name for optimizer in context.facts.optimizers.values())


def missing_zero_grad(context: Context) -> Iterable[Candidate]:
    """Find optimizers that use again, added to the new ones, gradients that they have used already."""
    for optimizer in context.facts.optimizers.values():
        steps = [step for step, _, _ in optimizer.uncleared]
        if len(steps) < _TWICE or steps[-1] < optimizer.steps - 1:
            continue
        if len(steps) < _HALF * (optimizer.steps - steps[0]):
            continue
        keys = frozenset[int]().union(*[found for _, _, found in optimizer.uncleared[-_TWICE:]])
        stack = optimizer.uncleared[-1][1]
        yield Candidate(
            "missing_zero_grad",
            place(stack),
            f"{count(len(steps), 'step')} of {optimizer.steps} used gradients that the step before had used already",
            "nothing clears them between one step and the next backward(), which adds to them",
            confidence=0.95 if len(keys) == len(optimizer.held) else 0.85,
            evidence=(*_backward_of(context, optimizer), (place(optimizer.stack), "optimizer built")),
            parameters=tuple(sorted(keys)),
            explains="order",
            measured={"steps": float(len(steps))},
        )


def _backward_of(context: Context, optimizer: OptimizerFacts) -> list[tuple[Site | None, str]]:
    for backward in reversed(context.facts.backwards):
        if backward.accumulates and backward.leaves & optimizer.held:
            return [(place(backward.stack), "backward")]
    return []
