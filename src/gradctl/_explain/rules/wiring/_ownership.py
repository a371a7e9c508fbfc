"""Who owns which parameter: the tree of modules as it is now, and what optimizers hold or held."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module, Parameter

from gradctl._explain._context import Context
from gradctl._lineage import OptimizerFacts, ParameterFacts, Placement


class Ownership:
    """The modules of a run, and the leaves that its optimizers know.

    Attributes:
        held: ids of the leaves that an optimizer holds now, or held at one of its steps.
        owners: for each parameter, its placements, oldest first.
        places: for each module, its placements in other modules, oldest first.
    """

    def __init__(self, context: Context) -> None:
        facts = context.facts
        self._context = context
        self.held: set[int] = set(context.held())
        for optimizer in facts.optimizers.values():
            self.held |= holds(optimizer)
        for key, parameter in context.parameters():
            if parameter.states:
                self.held.add(key)
        self.owners = _by_value(facts.registered)
        self.places = _by_value(facts.modules_set)
        self._modules: dict[int, Module] = {}
        for placement in (*facts.registered, *facts.modules_set):
            for reference in (placement.owner, placement.value):
                module = reference()
                if isinstance(module, Module):
                    self._modules[id(module)] = module

    def stepping(self) -> list[OptimizerFacts]:
        """Return the optimizers that made a step and are still alive."""
        return [o for o in self._context.facts.optimizers.values() if o.steps and o.ref() is not None]

    def modules(self) -> list[Module]:
        """Return the modules that are alive."""
        return list(self._modules.values())

    def unheld(self) -> list[tuple[int, ParameterFacts, Tensor]]:
        """Return the leaves that got gradients before a later step of some optimizer, and that no optimizer ever held."""
        last = max((o.last_step_generation for o in self.stepping()), default=-1)
        found: list[tuple[int, ParameterFacts, Tensor]] = []
        for key, parameter in self._context.parameters():
            leaf = parameter.ref()
            if (
                leaf is not None
                and key not in self.held
                and parameter.first_reached is not None
                and parameter.first_reached < last
                and leaf.requires_grad
                and not writes_itself(parameter)
            ):
                found.append((key, parameter, leaf))
        return found

    def is_held_in(self, module: Module, *, by: set[int] | None = None) -> bool:
        """Whether a parameter in the tree below `module` is held, by any optimizer or among `by`."""
        return any(id(parameter) in (self.held if by is None else by) for parameter in module.parameters())

    def ancestors(self, module: Module, *, before: int) -> list[Module]:
        """Return the modules above `module`, nearest first, as far as they were joined before an event.

        Args:
            module: where to begin; it is not among them.
            before: order of the event.
        """
        found: list[Module] = []
        seen = {id(module)}
        queue = [module]
        for at in queue:
            for placement in self.places.get(id(at), ()):
                owner = placement.owner()
                if placement.seq < before and isinstance(owner, Module) and id(owner) not in seen:
                    seen.add(id(owner))
                    found.append(owner)
                    queue.append(owner)
        return found


def holds(optimizer: OptimizerFacts) -> set[int]:
    """Return the ids of the leaves that an optimizer holds now."""
    live = optimizer.ref()
    if live is None:
        return set()
    return {id(p) for group in live.param_groups for p in group["params"]}


def writes_itself(parameter: ParameterFacts) -> bool:
    """Whether the program updates this leaf by hand about as often as it gets a gradient."""
    return parameter.hand_written * 2 >= max(parameter.reached, 1)


def _by_value(placements: Iterable[Placement]) -> dict[int, list[Placement]]:
    found: dict[int, list[Placement]] = {}
    for placement in placements:
        value = placement.value()
        if isinstance(value, (Module, Parameter)):
            found.setdefault(id(value), []).append(placement)
    return found
