"""`strict=True`: asking for a gradient is refused where it is asked, not only where it would be computed.

`requires_grad_()`, `x.requires_grad = True`, `Module.requires_grad_()` and `nn.Parameter(...)`. Not reached, because
they are C functions that are called directly: `torch.ones(..., requires_grad=True)` and the other factories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradctl import _taps
from gradctl._off import _state

_FIX = "ask for it when gradients are on, or switch off without strict=True"


class Strict:
    """The refusals of strict mode; nothing stands anywhere while nobody asked for it."""

    def __init__(self) -> None:
        self._handles: list[_taps.Handle] = []
        self._property: property | None = None

    def shut(self) -> None:
        """Put the refusals in place; may be repeated."""
        if not self._handles:
            self._handles = [
                _taps.requires_grad_call.subscribe(_refuse_true("requires_grad_()"), order="veto"),
                _taps.module_requires_grad.subscribe(_refuse_true("Module.requires_grad_()"), order="veto"),
                _taps.parameter_made.subscribe(_refuse_parameter, order="veto"),
            ]
        if self._property is None:
            self._property = _guarded_flag()
            torch.Tensor.requires_grad = self._property  # type: ignore[assignment]

    def open(self) -> None:
        """Take them back where what stands there is ours; may be repeated."""
        ours, self._property = self._property, None
        if ours is not None and vars(torch.Tensor).get("requires_grad") is ours:
            del torch.Tensor.requires_grad
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()


def _refuse_true(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def requires_grad_(it: Any, requires_grad: bool = True) -> Any:
            if requires_grad and _state.is_shut and _state.strict:
                _state.refuse(what, fix=_FIX)
            return inner(it, requires_grad)

        return requires_grad_

    return wrap


def _refuse_parameter(inner: Callable[..., Any]) -> Callable[..., Any]:
    def new(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
        if requires_grad and _state.is_shut and _state.strict:
            _state.refuse("nn.Parameter(...)", fix=_FIX + ", or pass requires_grad=False")
        return inner(cls, data, requires_grad)

    return new


def _guarded_flag() -> property:
    flag: Any = torch._C.TensorBase.requires_grad

    def get(tensor: Any) -> Any:
        return flag.__get__(tensor)

    def put(tensor: Any, value: Any) -> None:
        if value and _state.is_shut and _state.strict:
            _state.refuse("requires_grad = True", fix=_FIX)
        flag.__set__(tensor, value)

    return property(get, put, flag.__delete__, flag.__doc__)
