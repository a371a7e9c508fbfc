"""frozen_params where nothing raises: what an optimizer holds was closed again behind its back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._lineage import Facts, FlagChange, OptimizerFacts, Site, site

_STEPS = 2
_PAIRS = 2


@dataclass(slots=True)
class _Closed:
    """One line that closed parameters: how, who had opened them, and for how many steps it has lasted."""

    how: str
    confidence: float
    optimizer: OptimizerFacts
    steps: int
    opened: Site | None
    closed: Site | None
    keys: set[int] = field(default_factory=set[int])


def frozen_params(context: Context) -> Iterable[Candidate]:
    """Find parameters that an optimizer steps in vain because a later call closed what had been opened for it.

    Freezing on purpose looks the same for the parameter; what tells the two apart is the opening: a call that opened
    it and was undone before a single gradient came, or a pair of calls of which the last time only the first one ran.
    """
    facts = context.facts
    history: dict[int, list[FlagChange]] = {}
    for change in facts.flags:
        history.setdefault(change.tensor_id, []).append(change)
    found: dict[Site, _Closed] = {}
    for key, changes in history.items():
        last = changes[-1]
        line = _line(changes)
        if last.to or line is None or last.own is not None:
            continue
        for optimizer in facts.optimizers.values():
            steps = sum(seq > last.seq for seq in optimizer.step_seqs)
            if key not in optimizer.held or steps < _STEPS:
                continue
            judged = _judge(facts, key, changes, optimizer)
            if judged is not None:
                how, confidence, opened = judged
                closed = found.setdefault(line, _Closed(how, confidence, optimizer, steps, opened, place(last.stack)))
                closed.keys.add(key)
                closed.steps = max(closed.steps, steps)
    for line, closed in found.items():
        yield Candidate(
            "frozen_params",
            line,
            f"{count(len(closed.keys), 'parameter')} in {closed.optimizer.name} had no gradient in the last "
            f"{count(closed.steps, 'step')}: requires_grad is False",
            closed.how,
            confidence=closed.confidence,
            evidence=(
                (closed.closed, "closed"),
                (closed.opened, "opened"),
                (place(closed.optimizer.stack), "optimizer built"),
                (place(closed.optimizer.last_step_stack), "step without them"),
            ),
            parameters=tuple(sorted(closed.keys)),
            explains="none",
            measured={"parameters": float(len(closed.keys)), "steps": float(closed.steps)},
        )


def _line(changes: list[FlagChange]) -> Site | None:
    """Return the line of the last change; where a function did it before too, the line that called it this time."""
    last = changes[-1]
    before = {entry for change in changes[:-1] if not change.to for entry in change.stack}
    if last.stack and last.stack[0] in before:
        return next((site(entry) for entry in last.stack if entry not in before), place(last.stack))
    return place(last.stack)


def _judge(
    facts: Facts, key: int, changes: list[FlagChange], optimizer: OptimizerFacts
) -> tuple[str, float, Site | None] | None:
    last = changes[-1]
    opening = next((change for change in reversed(changes) if change.to), None)
    if opening is None:
        return None
    opened = place(opening.stack)
    parameter = facts.parameters.get(key)  # none for what never had a gradient
    trained_since = parameter is not None and parameter.last_reached_seq > opening.seq
    if not trained_since and opening.seq < optimizer.seq < last.seq:
        how = "it was opened, the optimizer was built with it, and this line closes it again before the first step"
        return how, 0.9, opened
    again = [change for change in changes[:-1] if not change.to and change.stack[:1] == last.stack[:1]]
    if not again or opening.stack[:1] == last.stack[:1]:
        return None
    if not trained_since and again[-1].seq < opening.seq:
        how = "this line had closed it before; it was opened since, and is closed again before the first step"
        return how, 0.8, opened
    undone = [(a, b) for a, b in itertools.pairwise(changes) if not a.to and a.stack[:1] == last.stack[:1]]
    at_once = [pair for pair in undone if not _steps_between(optimizer, *pair)]
    if len(at_once) >= _PAIRS and len(at_once) == len(undone):
        return "this line closes it, and every time but the last it was opened again before the next step", 0.8, opened
    return None


def _steps_between(optimizer: OptimizerFacts, first: FlagChange, second: FlagChange) -> int:
    return sum(first.seq < seq < second.seq for seq in optimizer.step_seqs)
