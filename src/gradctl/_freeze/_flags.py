"""The `requires_grad` of parameters under freezes: who holds it, and the gradient that was set aside.

An optimizer passes over a parameter whose `.grad` is None: neither momentum nor weight decay moves it then, and its
state stays. So freezing takes the gradient away with the flag. It is given back when the parameter trains again,
unless it was consumed meanwhile: a step of an optimizer that holds the parameter passed, or gradients were cleared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor

from gradctl._freeze._layers import Layer, Stack


class Flag(Stack):
    """The layers over one parameter's `requires_grad`.

    Args:
        parameter: kept weakly.
        gone: called when the parameter dies.
    """

    __slots__ = ("_ref", "aside")

    def __init__(self, parameter: Tensor, gone: Callable[[], None]) -> None:
        super().__init__(parameter.requires_grad)
        self.aside: Tensor | None = None
        key = id(parameter)

        def died(_: object) -> None:
            _flags.pop(key, None)
            gone()

        self._ref = weakref.ref(parameter, died)

    def is_frozen(self) -> bool:
        """Whether a freeze holds it."""
        return bool(self.layers) and not self.layers[-1][1]


_flags: dict[int, Flag] = {}


def flag_of(parameter: Tensor) -> Flag | None:
    """Return the layers over a parameter, if there are any."""
    return _flags.get(id(parameter))


def is_held_by(parameter: Tensor, layer: Layer) -> bool:
    """Whether `layer` is one of those over a parameter."""
    flag = _flags.get(id(parameter))
    return flag is not None and any(held is layer for held, _ in flag.layers)


def any_held() -> bool:
    """Whether any parameter is held."""
    return bool(_flags)


def any_aside() -> bool:
    """Whether any gradient is set aside."""
    return any(flag.aside is not None for flag in list(_flags.values()))


def hold(parameter: Tensor, layer: Layer, *, trains: bool, gone: Callable[[], None]) -> None:
    """Lay `layer` over the flag: the parameter trains, or does not, until it is released or a later one decides."""
    flag = _flags.get(id(parameter))
    if flag is None:
        flag = _flags[id(parameter)] = Flag(parameter, gone)
    elif flag.take_over(parameter.requires_grad):
        flag.aside = None
    flag.layers.append((layer, trains))
    _write(parameter, flag)


def release(parameter: Tensor, layer: Layer) -> None:
    """Take `layer` off the flag; does nothing if somebody has set the flag since."""
    flag = _flags.get(id(parameter))
    if flag is None:
        return
    if flag.take_over(parameter.requires_grad):
        flag.aside = None
    elif flag.drop(layer):
        _write(parameter, flag)
    if not flag.layers:
        del _flags[id(parameter)]


def move(old: Tensor, new: Tensor, gone: Callable[[], None]) -> None:
    """Let `new`, which stands in the model for `old` now (`fully_shard` replaces parameters), have its layers."""
    was = _flags.pop(id(old), None)
    if was is None:
        return
    flag = _flags.get(id(new))
    if flag is None:
        flag = _flags[id(new)] = Flag(new, gone)
        flag.written = was.written  # if `new` has another flag, somebody has set it, and wins
    flag.base = was.base
    flag.layers = [*was.layers, *flag.layers]


def forget_gradients(parameters: Iterable[Tensor]) -> None:
    """Drop the gradients that were set aside: they have been consumed or cleared."""
    for parameter in parameters:
        flag = _flags.get(id(parameter))
        if flag is not None:
            flag.aside = None


def _write(parameter: Tensor, flag: Flag) -> None:
    trains = flag.value()
    if parameter.requires_grad != trains:
        parameter.requires_grad_(trains)
    flag.written = trains
    if flag.is_frozen():
        if parameter.grad is not None:
            flag.aside, parameter.grad = parameter.grad, None
    elif flag.aside is not None:
        if parameter.grad is None:
            parameter.grad = flag.aside
        flag.aside = None
