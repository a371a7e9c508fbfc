"""Modules that stay in evaluation mode whatever `model.train()` says.

A held module has a `train` of its own in its instance dictionary: `Module.train` of the modules above calls it like any
other. It remembers what was asked for, which is what the module goes back to. Nothing is hooked: a forward costs what
it did, and `torch.compile` sees a module in evaluation mode.

A deep copy stays as it is while its own parameters require no gradient, as they do in a copy of a frozen model; then
its `train` is any other. A pickled one loads where there is no gradctl, in the mode that it had, with an ordinary
`train`.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from gradctl._freeze._layers import Layer, Stack


class Train(Stack):
    """The `train` of one module, and the layers over its mode: True is training.

    Args:
        module: kept weakly.
        training: its mode.
        before: a `train` that already stood in the instance dictionary.
        is_copy: no layer holds it; it stays in evaluation mode while its parameters require no gradient.
    """

    __slots__ = ("_module", "before", "is_copy")

    def __init__(
        self, module: Module, training: bool, before: Callable[..., Any] | None, *, is_copy: bool = False
    ) -> None:
        super().__init__(training)
        self._module = weakref.ref(module)
        self.before = before
        self.is_copy = is_copy

    def __call__(self, mode: bool = True) -> Any:
        """Do what the module's class does, for its children too, and stay in evaluation mode if held there."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this train() is gone")
        (self.before or functools.partial(type(module).train, module))(mode)
        if not self.layers and not self.is_copy:
            return module  # taken back, and called through somebody's wrapper
        self.base = mode
        self.write(module)
        return module

    def value(self) -> bool:
        """Return the mode that the module is to be in."""
        if self.layers or not self.is_copy:
            return self.base and super().value()
        module = self._module()
        own = [] if module is None else list(module.parameters(recurse=False))
        return self.base and not (own and not any(parameter.requires_grad for parameter in own))

    def write(self, module: Module) -> None:
        """Set the mode."""
        self.written = self.value()
        if module.training != self.written:
            module.training = self.written

    def __deepcopy__(self, memo: dict[int, Any]) -> Train:
        module = self._module()
        assert module is not None
        # The copy of the module is being made, and has no attributes yet.
        twin = Train(copy.deepcopy(module, memo), self.base, copy.deepcopy(self.before, memo), is_copy=True)
        twin.written = self.written
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        module = self._module()
        assert module is not None
        return functools.partial, (type(module).train, module)


def hold(module: Module, layer: Layer, *, trains: bool) -> Train:
    """Keep a module in evaluation mode, or let it follow `train()` again, until released or a later layer decides."""
    held = train_of(module)
    if held is None:
        held = Train(module, module.training, vars(module).get("train"))
        vars(module)["train"] = held
    else:
        held.take_over(module.training)
    held.layers.append((layer, trains))
    held.write(module)
    return held


def release(module: Module, held: Train, layer: Layer) -> None:
    """Take `layer` off the mode; changes no mode if somebody has set `module.training` since."""
    if not held.take_over(module.training) and held.drop(layer):
        held.write(module)
    if held.layers or held.is_copy or vars(module).get("train") is not held:
        return
    if held.before is None:
        del vars(module)["train"]
    else:
        vars(module)["train"] = held.before


def train_of(module: Module) -> Train | None:
    """Return our `train` of this module, if it has one."""
    own = vars(module).get("train")
    return own if type(own) is Train and own._module() is module else None
