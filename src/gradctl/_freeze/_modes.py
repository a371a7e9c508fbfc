"""Modules that stay in evaluation mode whatever `model.train()` says.

A held module has a `train` of its own in its instance dictionary: `Module.train` of the modules above calls it like any
other. It remembers what was asked for, which is what the module goes back to. Nothing is hooked: a forward costs what
it did, and `torch.compile` sees a module in evaluation mode.

Which modules are held follows from the flags of the parameters as they are now, so freezes may overlap in any way:
`settle` is called after each change.

A deep copy stays as it is while its own parameters require no gradient, as they do in a copy of a frozen model; then
its `train` is any other. A pickled one loads where there is no gradctl, in the mode that it had, with an ordinary
`train`.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch.nn import Module

from gradctl._freeze import _flags
from gradctl._freeze._layers import Layer
from gradctl._freeze._parts import frozen_part, keeps_statistics


class Train:
    """The `train` of one module.

    Args:
        module: kept weakly.
        base: the mode that was asked for last.
        before: a `train` that already stood in the instance dictionary.
        is_copy: nobody holds it; it stays in evaluation mode while its parameters require no gradient.

    Attributes:
        layer: the freeze that holds the module in evaluation mode.
    """

    __slots__ = ("_before", "_is_copy", "_module", "_written", "base", "layer")

    def __init__(self, module: Module, base: bool, before: Callable[..., Any] | None, *, is_copy: bool = False) -> None:
        self._module = weakref.ref(module)
        self._before = before
        self._is_copy = is_copy
        self.base = self._written = base
        self.layer: Layer | None = None

    def __call__(self, mode: bool = True) -> Any:
        """Do what the module's class does, for its children too, and stay in evaluation mode if held there."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this train() is gone")
        (self._before or functools.partial(type(module).train, module))(mode)
        self.base = mode
        self._write(module)
        return module

    def is_for(self, module: Module) -> bool:
        """Whether it is this module's, and not one that a shallow copy shares."""
        return self._module() is module

    def was_set(self, module: Module) -> bool:
        """Whether somebody else has set the mode since we did."""
        return module.training != self._written

    def hold(self, module: Module, layer: Layer) -> None:
        """Keep the module in evaluation mode."""
        self.layer = layer
        self._write(module)

    def let_go(self, module: Module) -> None:
        """Let the module follow `train()` again, and put back the `train` that it had."""
        is_set = self.was_set(module)
        self.layer = None
        if not is_set:
            self._write(module)
        if self._is_copy or vars(module).get("train") is not self:
            return
        if self._before is None:
            del vars(module)["train"]
        else:
            vars(module)["train"] = self._before

    def _write(self, module: Module) -> None:
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        # Not where somebody has set the flags of its parameters since: they train, and so do its statistics.
        held = not any(own) if self.layer is not None else self._is_copy and bool(own) and not any(own)
        self._written = self.base and not held
        if module.training != self._written:
            module.training = self._written

    def __deepcopy__(self, memo: dict[int, Any]) -> Train:
        module = self._module()
        assert module is not None
        # The copy of the module is being made, and has no attributes yet.
        twin = Train(copy.deepcopy(module, memo), self.base, copy.deepcopy(self._before, memo), is_copy=True)
        twin._written = self._written
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        module = self._module()
        assert module is not None
        return functools.partial, (type(module).train, module)


class _Asker:
    """What one freeze asks of the frozen part of a model.

    Args:
        model: kept weakly.
        layer: the freeze.
        norm_stats: running statistics stand still.
        dropout: "off": so does everything else.
    """

    __slots__ = ("_dropout", "_layer", "_model", "_norm_stats", "ended")

    def __init__(self, model: Module, layer: Layer, *, norm_stats: bool, dropout: Literal["keep", "off"]) -> None:
        self._model = weakref.ref(model)
        self._layer = layer
        self._norm_stats = norm_stats
        self._dropout = dropout
        self.ended: set[int] = set()  # modules of the model whose mode somebody else has set meanwhile, by id

    def is_alive(self) -> bool:
        return self._model() is not None

    def modules(self) -> list[Module]:
        """Return what it wants in evaluation mode now."""
        model = self._model()
        if model is None:
            return []
        return [
            module
            for module in frozen_part(model, lambda parameter: _flags.is_held_by(parameter, self._layer))
            if (self._norm_stats if keeps_statistics(module) else self._dropout == "off")
            and id(module) not in self.ended
        ]


_askers: dict[Layer, _Asker] = {}
_held: dict[int, tuple[weakref.ref[Module], Train]] = {}


def ask(model: Module, layer: Layer, *, norm_stats: bool, dropout: Literal["keep", "off"]) -> None:
    """Hold, from the next `settle` on, what `layer` has frozen whole."""
    if norm_stats or dropout == "off":
        _askers[layer] = _Asker(model, layer, norm_stats=norm_stats, dropout=dropout)


def withdraw(layer: Layer) -> None:
    """Ask no longer."""
    _askers.pop(layer, None)


def settle() -> None:
    """Hold the modules that are asked for as the flags are now, and no others."""
    for module, held in _living():
        if held.was_set(module):
            for asker in _askers.values():
                asker.ended.add(id(module))
    wanted: dict[int, tuple[Module, Layer]] = {}
    for layer, asker in list(_askers.items()):
        if not asker.is_alive():
            del _askers[layer]
        wanted.update((id(module), (module, layer)) for module in asker.modules())
    for module, held in _living():
        if id(module) not in wanted:
            held.let_go(module)
            del _held[id(module)]
    for module, layer in wanted.values():
        held = train_of(module)
        if held is None:
            held = Train(module, module.training, vars(module).get("train"))
            vars(module)["train"] = held
        held.hold(module, layer)
        _held[id(module)] = (weakref.ref(module), held)


def _living() -> list[tuple[Module, Train]]:
    living: list[tuple[Module, Train]] = []
    for key, (ref, held) in list(_held.items()):
        module = ref()
        if module is None:
            del _held[key]
        else:
            living.append((module, held))
    return living


def train_of(module: Module) -> Train | None:
    """Return our `train` of this module, if it has one."""
    own = vars(module).get("train")
    return own if type(own) is Train and own.is_for(module) else None
