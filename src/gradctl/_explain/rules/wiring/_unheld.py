"""param_not_in_optimizer: a parameter that came, or was opened, after its optimizer had been built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.nn import Module, Parameter

from gradctl._explain._context import Candidate, Context, count, place
from gradctl._explain.rules.wiring._ownership import Ownership, holds
from gradctl._lineage import OptimizerFacts, ParameterFacts, Site, Stack, site


@dataclass(slots=True)
class _Deed:
    """What left parameters out: the line, how it did it, and how sure that is."""

    place: Site
    how: str
    confidence: float
    optimizer: OptimizerFacts
    keys: set[int] = field(default_factory=set[int])
    made: list[Site | None] = field(default_factory=list["Site | None"])


def param_not_in_optimizer(context: Context) -> Iterable[Candidate]:
    """Find parameters whose gradients no optimizer uses although they stand where an optimizer's parameters stood."""
    ownership = Ownership(context)
    steppers = ownership.stepping()
    if not steppers:
        return
    deeds: dict[tuple[Site, str], _Deed] = {}
    left: list[tuple[int, ParameterFacts]] = []
    for key, parameter, leaf in ownership.unheld():
        if not isinstance(leaf, Parameter):
            continue
        deed = next(_deeds(context, ownership, steppers, key, parameter), None)
        if deed is None:
            left.append((key, parameter))
            continue
        known = deeds.setdefault((deed.place, deed.how), deed)
        known.keys.add(key)
        known.made.append(place(parameter.node.stack))
    deeds.update(_rebuilt(context, ownership, steppers, left))
    for deed in deeds.values():
        idle = _idle(context, deed.optimizer, min(_first(context, key) for key in deed.keys))
        steps = max(context.facts.parameters[key].reached for key in deed.keys)
        yield Candidate(
            "param_not_in_optimizer",
            deed.place,
            f"{count(len(deed.keys), 'parameter')} got gradients in {count(steps, 'backward')}, and no optimizer holds "
            f"{'it' if len(deed.keys) == 1 else 'them'}",
            f"{deed.how}; {deed.optimizer.name} was built before and goes on stepping what it was given",
            confidence=deed.confidence,
            evidence=(
                (place(deed.optimizer.stack), "optimizer built"),
                *[(made, "made") for made in dict.fromkeys(deed.made)][:2],
                (place(deed.optimizer.last_step_stack), "step without them"),
            ),
            parameters=(*deed.keys, *idle),
            explains="wiring",
            measured={"parameters": float(len(deed.keys)), "idle": float(len(idle))},
        )


def _deeds(
    context: Context, ownership: Ownership, steppers: list[OptimizerFacts], key: int, parameter: ParameterFacts
) -> Iterator[_Deed]:
    """Yield what may have left this parameter out, the surest first."""
    yield from _slot_taken(ownership, steppers, key)
    yield from _module_set(ownership, steppers, key)
    yield from _grown(ownership, steppers, key)
    yield from _opened(context, ownership, steppers, key)


def _slot_taken(ownership: Ownership, steppers: list[OptimizerFacts], key: int) -> Iterator[_Deed]:
    """A parameter was put in the place of one that an optimizer holds: assignment, load_state_dict(assign=True)."""
    for placement in reversed(ownership.owners.get(key, [])):
        before = placement.before() if placement.before is not None else None
        line = place(placement.stack)
        if before is None or id(before) == key or id(before) not in ownership.held or line is None:
            continue
        optimizer = _builder(steppers, placement.seq, {id(before)})
        if optimizer is not None:
            yield _Deed(line, "here it takes the place of a parameter that the optimizer holds", 0.95, optimizer)


def _module_set(ownership: Ownership, steppers: list[OptimizerFacts], key: int) -> Iterator[_Deed]:
    """A module that holds the parameter was set into a model that an optimizer trains."""
    for placement in ownership.owners.get(key, []):
        module = placement.owner()
        if not isinstance(module, Module):
            continue
        seen: set[int] = set()
        queue = [module]
        for at in queue:
            seen.add(id(at))
            for joined in reversed(ownership.places.get(id(at), [])):
                owner, line = joined.owner(), place(joined.stack)
                if not isinstance(owner, Module):
                    continue
                if id(owner) not in seen:
                    queue.append(owner)
                before = joined.before() if joined.before is not None else None
                optimizer = _earlier(steppers, joined.seq)
                if optimizer is None or line is None:
                    continue
                if isinstance(before, Module) and before is not at and ownership.is_held_in(before):
                    yield _Deed(line, "here its module takes the place of one that the optimizer holds", 0.95, optimizer)
                elif any(ownership.is_held_in(m) for m in (owner, *ownership.ancestors(owner, before=joined.seq))):
                    yield _Deed(line, "here its module enters a model that is being trained", 0.9, optimizer)


def _grown(ownership: Ownership, steppers: list[OptimizerFacts], key: int) -> Iterator[_Deed]:
    """A parameter was added to a module that already was part of a model that an optimizer trains."""
    for placement in reversed(ownership.owners.get(key, [])):
        owner, line = placement.owner(), place(placement.stack)
        optimizer = _earlier(steppers, placement.seq)
        if not isinstance(owner, Module) or line is None or optimizer is None:
            continue
        if any(ownership.is_held_in(m) for m in (owner, *ownership.ancestors(owner, before=placement.seq))):
            yield _Deed(line, "here it is added to a model that is being trained", 0.9, optimizer)


def _opened(context: Context, ownership: Ownership, steppers: list[OptimizerFacts], key: int) -> Iterator[_Deed]:
    """A parameter that was frozen when the optimizer was built was opened later."""
    changes = [change for change in context.facts.flags if change.tensor_id == key]
    for position, change in enumerate(changes):
        line = place(change.stack)
        optimizer = _earlier(steppers, change.seq)
        if not change.to or optimizer is None or line is None:
            continue
        if any(earlier.to and earlier.seq < optimizer.seq for earlier in changes[:position]):
            continue  # it was open when the optimizer was built, and was left out on purpose
        for placement in ownership.owners.get(key, []):
            owner = placement.owner()
            if isinstance(owner, Module) and any(
                ownership.is_held_in(m, by=holds(optimizer))
                for m in (owner, *ownership.ancestors(owner, before=change.seq))
            ):
                yield _Deed(
                    line, "it was frozen when the optimizer was built, and is opened here without being added",
                    0.85, optimizer,
                )  # fmt: skip


def _rebuilt(
    context: Context, ownership: Ownership, steppers: list[OptimizerFacts], left: list[tuple[int, ParameterFacts]]
) -> dict[tuple[Site, str], _Deed]:
    """Find models that were built or copied after an optimizer whose own parameters have had no gradient since."""
    found: dict[tuple[Site, str], _Deed] = {}
    for optimizer in sorted(steppers, key=lambda o: o.seq):
        mine = [
            (key, parameter)
            for key, parameter in left
            if _born(context, key, parameter) > optimizer.seq and parameter.first_reached is not None
        ]
        if not mine:
            continue
        since = min(parameter.first_reached or 0 for _, parameter in mine)
        idle = _idle(context, optimizer, since)
        if len(idle) < len(holds(optimizer)):
            twins = {_kind(ownership, key, context) for key in idle}
            mine = [(key, parameter) for key, parameter in mine if _kind(ownership, key, context) in twins]
        if not mine or not idle:
            continue
        old = {entry for key in holds(optimizer) for entry in _stack(context, key)}
        line = _common([_stack(context, key) for key, _ in mine], old)
        if line is None:
            continue
        deed = _Deed(line, "they were made here", 0.9, optimizer, {key for key, _ in mine})
        found.setdefault((line, deed.how), deed)
        left = [(key, parameter) for key, parameter in left if key not in deed.keys]
    return found


def _common(stacks: list[Stack], old: set[object]) -> Site | None:
    """Return the innermost frame that all these stacks share and the old parameters do not, outside of constructors."""
    shared = [entry for entry in stacks[0] if all(entry in stack for stack in stacks[1:])]
    outside = [entry for entry in shared if entry[0].co_name != "__init__"]
    for entry in outside:
        if entry not in old:
            return site(entry)
    return site(outside[0]) if outside else place(stacks[0])


def _stack(context: Context, key: int) -> Stack:
    parameter = context.facts.parameters.get(key)
    if parameter is None:
        return ()
    leaf = parameter.ref()
    made: Stack | None = None if leaf is None else context.tracer.created.get(leaf)
    return made or parameter.node.stack


def _kind(ownership: Ownership, key: int, context: Context) -> tuple[object, ...]:
    placements = ownership.owners.get(key, [])
    owner = placements[-1].owner() if placements else None
    parameter = context.facts.parameters.get(key)
    return type(owner), placements[-1].name if placements else "", parameter.node.shape if parameter is not None else ()


def _born(context: Context, key: int, parameter: ParameterFacts) -> int:
    """Return when a parameter was first set into a module; for a copy, when it was first seen."""
    for placement in context.facts.registered:
        if placement.value() is parameter.ref():
            return placement.seq
    return parameter.node.seq


def _idle(context: Context, optimizer: OptimizerFacts, since: int) -> set[int]:
    """Return what an optimizer holds and stepped without a gradient, from a generation on."""
    found: set[int] = set()
    for key in holds(optimizer):
        parameter = context.facts.parameters.get(key)
        if parameter is not None and parameter.last_reached < since and parameter.states:
            if parameter.states[-1][1] == "none" or not parameter.node.requires_grad:
                found.add(key)
    return found


def _earlier(steppers: list[OptimizerFacts], seq: int) -> OptimizerFacts | None:
    """Return the last optimizer built before an event and stepping after it."""
    found = [o for o in steppers if o.seq < seq < o.last_step_seq]
    return max(found, key=lambda o: o.seq) if found else None


def _builder(steppers: list[OptimizerFacts], seq: int, keys: set[int]) -> OptimizerFacts | None:
    """Return an optimizer that holds these leaves and steps after an event."""
    return next((o for o in steppers if holds(o) & keys and seq < o.last_step_seq), None)


def _first(context: Context, key: int) -> int:
    return context.facts.parameters[key].first_reached or 0
