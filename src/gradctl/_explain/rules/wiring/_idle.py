"""unused_param, late: parameters that trained, and are in no graph since a call that wrote into frozen weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._lineage import ParameterFacts, Site

_STEPS = 3


def unused_param(context: Context) -> Iterable[Candidate]:
    """Find adapters that were merged into the weights beside them and are not computed with any more.

    Evidence: several parameters had gradients up to one step and have had none since, nothing is computed from them,
    and between their last gradient and the next step one line of the program wrote into weights that no optimizer
    holds, which it had not done while they trained.
    """
    groups: dict[int, list[tuple[int, ParameterFacts]]] = {}
    for key, parameter in context.facts.parameters.items():
        if _stopped(parameter):
            groups.setdefault(parameter.last_reached_seq, []).append((key, parameter))
    for last, found in groups.items():
        until = _first_without(context, found)
        if until is None:
            continue
        line, written = _writer(context, last, until)
        if line is None:
            continue
        steps = max(sum(1 for _, state in reversed(p.states) if state == "none") for _, p in found)
        yield Candidate(
            "unused_param",
            line,
            f"{count(len(found), 'parameter')} had gradients before, and none in the last {count(steps, 'step')}",
            f"this line wrote into {count(written, 'frozen parameter')} between their last gradient and the first step "
            "without one; since then nothing is computed from them",
            fix="undo it before training goes on (unmerge_adapter(), enable the adapter again)",
            confidence=0.75,
            parameters=tuple(sorted(key for key, _ in found)),
            explains="none",
            measured={"parameters": float(len(found)), "steps": float(steps)},
        )


def _stopped(parameter: ParameterFacts) -> bool:
    states = [state for _, state in parameter.states]
    if len(states) <= _STEPS or set(states[-_STEPS:]) != {"none"} or parameter.first_reached is None:
        return False
    without = len(states) - next((i for i, s in enumerate(reversed(states)) if s != "none"), len(states))
    return "none" not in states[:without] and any(kind.startswith("unused") for _, kind, _ in parameter.explained)


def _first_without(context: Context, found: list[tuple[int, ParameterFacts]]) -> int | None:
    """Return the order of the first step at which these had no gradient."""
    key, parameter = found[0]
    for optimizer in context.facts.optimizers.values():
        if key in optimizer.held:
            later = [seq for seq in optimizer.step_seqs if seq > parameter.last_reached_seq]
            return later[1] if len(later) > 1 else None
    return None


def _writer(context: Context, first: int, last: int) -> tuple[Site | None, int]:
    """Return the line that wrote into frozen parameters of old in a stretch, and never before it; and into how many."""
    facts = context.facts
    old = {placement.key for placement in facts.registered if placement.seq < first}
    old -= {key for key, parameter in facts.parameters.items() if parameter.states or parameter.reached}
    lines: Counter[Site] = Counter()
    before: set[Site] = set()
    names: dict[Site, set[int]] = {}
    for mutation in facts.mutations:
        line = place(mutation.stack)
        if mutation.in_optimizer or line is None or mutation.tensor_id not in old:
            continue
        if mutation.seq < first:
            before.add(line)
        elif mutation.seq < last:
            lines[line] += 1
            names.setdefault(line, set()).add(mutation.tensor_id)
    chosen = [line for line, _ in lines.most_common() if line not in before]
    return (chosen[0], len(names[chosen[0]])) if len(chosen) == 1 else (None, 0)
