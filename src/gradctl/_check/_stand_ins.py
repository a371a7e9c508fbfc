"""Stand-ins in higher precision for all tensors that a function holds, put in their places and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from gradctl._check._reached import Place, Reached, places_of
from gradctl._finite_difference._trees import replaced, tensors
from gradctl._freeze._rows import Rows


class StandIns:
    """Puts other tensors where a function holds its own, for the length of a block; then all is as before.

    Parameters, buffers and attributes of modules are objects of their own meanwhile, so that whoever holds the real
    ones (an optimizer, another thread's reader) sees nothing. Attributes that a forward sets are put back as well.

    Args:
        reached: what the function refers to.
    """

    def __init__(self, reached: Reached) -> None:
        self.modules = _unique(reached)
        self.places: list[Place] = [
            *reached.places,
            *(place for name, module in self.modules for place in places_of(module, name)),
        ]
        self._saved: list[tuple[Module, dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]] = []
        self._fixed: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._buffers: set[int] = set()
        self.convert: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return every tensor once, with the first name that leads to it."""
        found: dict[int, tuple[str, Tensor]] = {}
        for place in self.places:
            for name, tensor in tensors(place.value, place.name):
                found.setdefault(id(tensor), (name, tensor))
        return list(found.values())

    def __enter__(self) -> StandIns:
        for _, module in self.modules:
            inner = (module._parameters, module._buffers, module._modules)
            self._saved.append((module, dict(vars(module)), [(each, dict(each)) for each in inner]))
        self._buffers = {id(place.value) for place in self.places if place.kind == "buffer"}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self.places:
            place.put(place.value)
        self._put_attributes_back()
        self._fixed.clear()

    def _put_attributes_back(self) -> None:
        for module, attributes, inner in self._saved:
            vars(module).clear()
            vars(module).update(attributes)
            for held, before in inner:
                held.clear()
                held.update(before)

    def start(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Begin with other stand-ins: `convert` makes them from the real tensors."""
        self.convert = convert
        self._fixed.clear()

    def install(self, leaves: Mapping[int, Tensor]) -> None:
        """Put everything in its place: leaves for the tensors with these ids, stand-ins for all others."""
        self._put_attributes_back()
        for place in self.places:
            place.put(replaced(place.value, lambda _, tensor: self._stand_in(tensor, leaves.get(id(tensor)))))

    def _stand_in(self, tensor: Tensor, leaf: Tensor | None) -> Tensor:
        if leaf is not None:
            return leaf
        known = self._fixed.get(id(tensor))
        if known is not None and known[1]._version == known[2]:
            return known[1]
        new = self.convert(tensor.detach())
        if new.dtype == tensor.dtype:  # no copy yet
            new = new.clone()
        if isinstance(tensor, Parameter):
            new = Parameter(new, requires_grad=False)
        if id(tensor) not in self._buffers:  # a forward changes buffers in place; kernels do so without telling
            self._fixed[id(tensor)] = (tensor, new, new._version)
        return new


def _unique(reached: Reached) -> list[tuple[str, Module]]:
    """Return every module once, by FQN; below the name of its variable when there are several roots."""
    roots = reached.modules
    found: dict[int, tuple[str, Module]] = {}
    for variable, root in roots:
        prefix = variable if len(roots) > 1 else ""
        for name, module in root.named_modules():
            found.setdefault(id(module), (".".join(part for part in (prefix, name) if part), module))
    return list(found.values())


def hooks_of(tensors: Sequence[Tensor]) -> list[list[Callable[[Tensor], Tensor | None]]]:
    """Return the gradient hooks of each tensor, less those of `freeze`, which keep rows at zero by design."""
    return [
        [hook for hook in (tensor._backward_hooks or {}).values() if getattr(hook, "__func__", None) is not Rows.zeroed]
        for tensor in tensors
    ]
