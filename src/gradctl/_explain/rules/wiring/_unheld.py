"""param_not_in_optimizer: a parameter that came, or was opened, after its optimizer had been built."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._lineage import Facts, OptimizerFacts, ParameterFacts, Site, Stack, Stranger, site, source


@dataclass(slots=True)
class _Deed:
    """What left parameters out: the line, how it did it, and how sure that is."""

    place: Site
    how: str
    confidence: float
    optimizer: OptimizerFacts
    keys: set[int] = field(default_factory=set[int])


def unheld(context: Context) -> dict[int, Stranger]:
    """Return the leaves that got gradients before a later step, that no optimizer ever held and nobody updates."""
    facts = context.facts
    last = max((o.last_step_generation for o in facts.optimizers.values()), default=-1)
    return {
        key: stranger
        for key, stranger in facts.strangers.items()
        if not stranger.parameter.states
        and stranger.parameter.first_reached is not None
        and stranger.parameter.first_reached < last
        # Written by hand in every step from its own gradient: trained without an optimizer. A mask is not training.
        and (stranger.parameter.hand_written * 2 < max(stranger.parameter.reached, 1) or key not in facts.read_by_user)
    }


def param_not_in_optimizer(context: Context) -> Iterable[Candidate]:
    """Find parameters whose gradients no optimizer uses although they stand where an optimizer's parameters stood."""
    facts = context.facts
    steppers = [o for o in facts.optimizers.values() if o.steps]
    deeds: dict[tuple[Site, str], _Deed] = {}
    left: dict[int, Stranger] = {}
    for key, stranger in unheld(context).items():
        if not stranger.is_parameter:
            continue
        deed = next(_deeds(facts, steppers, key, stranger), None)
        if deed is None:
            left[key] = stranger
        else:
            deeds.setdefault((deed.place, deed.how), deed).keys.add(key)
    for deed in _rebuilt(facts, steppers, left):
        deeds.setdefault((deed.place, deed.how), deed).keys.update(deed.keys)
    for deed in deeds.values():
        idle = _idle(facts, deed.optimizer, min(_first(facts.strangers[key]) for key in deed.keys))
        times = max(facts.strangers[key].parameter.reached for key in deed.keys)
        made = dict.fromkeys(place(facts.strangers[key].stack) for key in sorted(deed.keys))
        yield Candidate(
            "param_not_in_optimizer",
            deed.place,
            f"{count(len(deed.keys), 'parameter')} got gradients in {count(times, 'backward')}, and no optimizer holds "
            f"{'it' if len(deed.keys) == 1 else 'them'}",
            f"{deed.how}; {deed.optimizer.name} was built before and goes on stepping what it was given",
            fix="load_state_dict(...) without assign=True" if "assign=True" in source(deed.place) else "",
            confidence=deed.confidence,
            evidence=(
                (place(deed.optimizer.stack), "optimizer built"),
                *[(line, "made") for line in list(made)[:2]],
                (place(deed.optimizer.last_step_stack), "step without them"),
            ),
            parameters=(*sorted(deed.keys), *sorted(idle)),
            explains="wiring",
            measured={"parameters": float(len(deed.keys)), "idle": float(len(idle))},
        )


def _deeds(facts: Facts, steppers: list[OptimizerFacts], key: int, stranger: Stranger) -> Iterator[_Deed]:
    """Yield what may have left this parameter out, the surest first."""
    joinings = [
        (joining, line, optimizer)
        for joining in stranger.joinings
        if (line := place(joining.stack)) is not None and (optimizer := _earlier(steppers, joining.seq)) is not None
    ]
    for joining, line, optimizer in joinings:
        if joining.kind == "parameter" and joining.replaced:
            yield _Deed(line, "here it takes the place of a parameter that the optimizer holds", 0.95, optimizer)
    for joining, line, optimizer in joinings:
        if joining.kind == "module" and joining.replaced:
            yield _Deed(line, "here its module takes the place of one that the optimizer holds", 0.95, optimizer)
        elif joining.kind == "module" and joining.trained:
            yield _Deed(line, "here its module enters a model that is being trained", 0.9, optimizer)
    for joining, line, optimizer in joinings:
        if joining.kind == "parameter" and joining.trained:
            yield _Deed(line, "here it is added to a model that is being trained", 0.9, optimizer)
    yield from _opened(facts, steppers, key, stranger)


def _opened(facts: Facts, steppers: list[OptimizerFacts], key: int, stranger: Stranger) -> Iterator[_Deed]:
    """A parameter that was frozen when the optimizer was built was opened later."""
    if not stranger.in_trained_tree:
        return
    changes = [change for change in facts.flags if change.tensor_id == key and change.seq > stranger.born]
    for position, change in enumerate(changes):
        line = place(change.stack)
        optimizer = _earlier(steppers, change.seq)
        if not change.to or optimizer is None or line is None:
            continue
        if any(earlier.to and earlier.seq < optimizer.seq for earlier in changes[:position]):
            continue  # it was open before the optimizer was built, and was left out on purpose
        how = "it was frozen when the optimizer was built, and is opened here without being added"
        yield _Deed(line, how, 0.85, optimizer)


def _rebuilt(facts: Facts, steppers: list[OptimizerFacts], left: dict[int, Stranger]) -> Iterator[_Deed]:
    """Find models that were built or copied after an optimizer whose own parameters have had no gradient since."""
    for optimizer in sorted(steppers, key=lambda o: o.seq):
        mine = {key: stranger for key, stranger in left.items() if stranger.born > optimizer.seq}
        if not mine:
            continue
        idle = _idle(facts, optimizer, min(_first(stranger) for stranger in mine.values()))
        if len(idle) < len(optimizer.held):
            # A part of it was rebuilt: only what looks like the part that has no gradient any more.
            twins = {_like(facts, key) for key in idle}
            mine = {key: stranger for key, stranger in mine.items() if stranger.like in twins}
        if not mine or not idle:
            continue
        old = {entry for key in optimizer.held if key in facts.parameters for entry in facts.parameters[key].node.stack}
        line = _common([stranger.stack for stranger in mine.values()], old)
        if line is not None:
            yield _Deed(line, "they were made here, and what it holds got no gradient since", 0.9, optimizer, set(mine))
            left = {key: stranger for key, stranger in left.items() if key not in mine}


def _like(facts: Facts, key: int) -> tuple[object, ...]:
    for placement in reversed(facts.registered):
        value = placement.value()
        if value is not None and id(value) == key:
            return type(placement.owner()), placement.name, tuple(value.shape)
    return ()


def _common(stacks: list[Stack], old: Container[object]) -> Site | None:
    """Return the innermost frame that all these stacks share and the old parameters do not, outside of constructors."""
    shared = [entry for entry in stacks[0] if all(entry in stack for stack in stacks[1:])]
    outside = [entry for entry in shared if entry[0].co_name != "__init__"]
    for entry in outside:
        if entry not in old:
            return site(entry)
    return site(outside[0]) if outside else place(stacks[0])


def _idle(facts: Facts, optimizer: OptimizerFacts, since: int) -> set[int]:
    """Return what an optimizer holds and stepped without a gradient, from a generation on."""
    return {
        key
        for key in optimizer.held
        if (parameter := facts.parameters.get(key)) is not None
        and parameter.states
        and parameter.states[-1][1] == "none"
        and parameter.last_reached < since
    }


def _earlier(steppers: list[OptimizerFacts], seq: int) -> OptimizerFacts | None:
    """Return the last optimizer built before an event and stepping after it."""
    return max((o for o in steppers if o.seq < seq < o.last_step_seq), key=lambda o: o.seq, default=None)


def _first(stranger: Stranger) -> int:
    parameter: ParameterFacts = stranger.parameter
    return parameter.first_reached or 0
