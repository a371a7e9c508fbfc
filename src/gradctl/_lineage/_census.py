"""Who owns a leaf whose gradient no optimizer uses: asked while the program runs, kept as plain facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from gradctl._lineage._facts import Hidden, Joining, OptimizerFacts, ParameterFacts, Placement, Stranger
from gradctl._lineage._tracer import Tracer

_MOST = 20_000
_DEPTH = 3
_WIDTH = 512
_OWN = frozenset(vars(Module())) - {"training"}


def note_strangers(tracer: Tracer, optimizer: OptimizerFacts, leaves: set[int]) -> None:
    """Note the leaves that a backward reached and that no optimizer holds, or held at any step of its own.

    Args:
        tracer: where the facts go.
        optimizer: the optimizer that is about to step.
        leaves: ids of the leaves that backwards reached since its last step.
    """
    facts = tracer.facts
    placed = len(facts.registered) + len(facts.modules_set)
    unknown: dict[int, ParameterFacts] = {}
    for key in leaves - optimizer.held:
        parameter = facts.parameters.get(key)
        if parameter is None or parameter.states:
            continue
        known = facts.strangers.get(key)
        if known is None or known.parameter is not parameter or known.placed != placed:
            unknown[key] = parameter
    if not unknown:
        return
    census = _Census(tracer)
    wanted = {key: leaf for key, p in unknown.items() if key not in census.held and (leaf := p.ref()) is not None}
    if not wanted:
        return
    hidden = census.hidden(wanted)
    for key, leaf in wanted.items():
        facts.strangers[key] = census.stranger(leaf, unknown[key], tuple(hidden.get(key, ())), placed)


class _Census:
    def __init__(self, tracer: Tracer) -> None:
        facts = tracer.facts
        self._tracer = tracer
        self.held: set[int] = set()
        for optimizer in facts.optimizers.values():
            live = optimizer.ref()
            if live is not None:
                self.held.update(id(p) for group in live.param_groups for p in group["params"])
        self._ever = self.held | {key for key, p in facts.parameters.items() if p.states and p.ref() is not None}
        self._owners = _by_value(facts.registered)
        self._above = _by_value(facts.modules_set)
        self._trains: dict[int, bool] = {}

    def stranger(self, leaf: Tensor, parameter: ParameterFacts, hidden: tuple[Hidden, ...], placed: int) -> Stranger:
        placements = self._owners.get(id(leaf), [])
        owner = placements[-1].owner() if placements else None
        created = self._tracer.created.get(leaf)
        return Stranger(
            parameter,
            isinstance(leaf, Parameter),
            tuple(self._joinings(placements)),
            any(
                self._trained(module)
                for p in placements
                if isinstance(at := p.owner(), Module)
                for module in (at, *self._ancestors(at, 1 << 62))
            ),
            hidden,
            created or parameter.node.stack,
            placements[0].seq if placements else parameter.node.seq,
            (type(owner), placements[-1].name if placements else "", tuple(leaf.shape)),
            placed,
        )

    def _joinings(self, placements: list[Placement]) -> Iterator[Joining]:
        for placement in reversed(placements):
            owner = placement.owner()
            before = placement.before() if placement.before is not None else None
            if not isinstance(owner, Module):
                continue
            replaced = before is not None and before is not placement.value() and id(before) in self._ever
            trained = any(self._trained(m) for m in (owner, *self._ancestors(owner, placement.seq)))
            yield Joining("parameter", placement.stack, placement.seq, replaced, trained)
        queue = [owner for placement in placements if isinstance(owner := placement.owner(), Module)]
        seen = {id(module) for module in queue}
        for at in queue:
            for placement in reversed(self._above.get(id(at), [])):
                owner = placement.owner()
                if not isinstance(owner, Module):
                    continue
                before = placement.before() if placement.before is not None else None
                replaced = isinstance(before, Module) and before is not at and self._trained(before)
                trained = any(self._trained(m) for m in (owner, *self._ancestors(owner, placement.seq)))
                yield Joining("module", placement.stack, placement.seq, replaced, trained)
                if id(owner) not in seen:
                    seen.add(id(owner))
                    queue.append(owner)

    def _trained(self, module: Module) -> bool:
        found = self._trains.get(id(module))
        if found is None:
            found = self._trains[id(module)] = any(id(parameter) in self._ever for parameter in module.parameters())
        return found

    def _ancestors(self, module: Module, before: int) -> list[Module]:
        """Return the modules above one, nearest first, as far as they were joined before an event."""
        found: list[Module] = []
        seen = {id(module)}
        queue = [module]
        for at in queue:
            for placement in self._above.get(id(at), ()):
                owner = placement.owner()
                if placement.seq < before and isinstance(owner, Module) and id(owner) not in seen:
                    seen.add(id(owner))
                    found.append(owner)
                    queue.append(owner)
        return found

    def hidden(self, wanted: dict[int, Tensor]) -> dict[int, list[Hidden]]:
        """Return on which attributes of trained modules these leaves hang without being registered."""
        facts = self._tracer.facts
        modules: dict[int, Module] = {}
        for placement in (*facts.registered, *facts.modules_set):
            for reference in (placement.owner, placement.value):
                module = reference()
                if isinstance(module, Module):
                    modules[id(module)] = module
        found: dict[int, list[Hidden]] = {}
        nodes = {id(facts.parameters[key].node): key for key in wanted}
        for module in list(modules.values())[:_MOST]:
            listed: set[int] | None = None
            for name, value in _attributes(module):
                tensors = list(_tensors_in(value, 0))
                if not tensors:
                    continue
                keys = {id(tensor) for tensor in tensors} & wanted.keys()
                derived = {key for tensor in tensors if (key := self._leaf_behind(tensor, nodes)) is not None}
                if not keys and not derived:
                    continue
                if listed is None:
                    listed = {id(parameter) for parameter in module.parameters()}
                if not any(self._trained(m) for m in (module, *self._ancestors(module, 1 << 62))):
                    continue
                layers = _modules_in(value)
                for key in (keys | derived) - listed:
                    found.setdefault(key, []).append(
                        Hidden(
                            type(module), name, type(value).__name__, bool(layers), name in module._buffers,
                            key in derived, isinstance(value, Tensor),
                            len(layers) == 1 and not layers[0].training, isinstance(value, dict),
                        )
                    )  # fmt: skip
        return found

    def _leaf_behind(self, tensor: Tensor, nodes: dict[int, int]) -> int | None:
        """Return the leaf of which a tensor is the result, through a few operations."""
        node = self._tracer.map.get(tensor)
        for _ in range(4):
            if node is None or not node.live:
                return None
            node = next((parent for parent, live in zip(node.inputs, node.live_inputs, strict=False) if live), None)
            if node is not None and id(node) in nodes:
                return nodes[id(node)]
        return None


def _by_value(placements: Iterable[Placement]) -> dict[int, list[Placement]]:
    found: dict[int, list[Placement]] = {}
    for placement in placements:
        value = placement.value()
        if value is not None:
            found.setdefault(id(value), []).append(placement)
    return found


def _attributes(module: Module) -> Iterator[tuple[str, Any]]:
    own = {name: value for name, value in vars(module).items() if name not in _OWN and not name.startswith("__")}
    own |= {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    for cls in type(module).__mro__:
        if cls is Module:
            break
        own |= {name: value for name, value in vars(cls).items() if isinstance(value, Tensor) and name not in own}
    yield from own.items()


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Module):
        yield from value.parameters()
    elif depth < _DEPTH:
        items: Any = ()
        if isinstance(value, dict):
            items = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = list(value)
        elif (
            type(value).__module__ not in ("builtins", "torch") and not isinstance(value, type) and not callable(value)
        ):
            items = list(getattr(value, "__dict__", {}).values())
        for item in items[:_WIDTH]:
            yield from _tensors_in(item, depth + 1)


def _modules_in(value: Any) -> list[Module]:
    if isinstance(value, Module):
        return [value]
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
    return [module for item in items[:64] for module in _modules_in(item)]
