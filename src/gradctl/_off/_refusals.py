"""What is refused while gradients are off, because it would return zeros or lose something without a word.

Each entry is a subscription to a tap, made at the first use of the switch; while gradients are on it passes through.

Not refused, because torch offers no place to do it: calling a node of a graph by hand (`y.grad_fn(g)`), which runs that
one node's derivative; the built-in node types are C types whose call cannot be replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gradctl import _taps
from gradctl._off import _backwards, _state

Call = Callable[..., Any]


def subscribe() -> list[_taps.Handle]:
    """Put every refusal in place; none refuses before the switch is turned."""
    refusals: list[tuple[_taps.AttributeTap, Callable[[Call], Call]]] = [
        (_taps.functorch_grad, _refuser("torch.func grad, vjp or jacrev")),
        (_taps.functorch_jvp, _refuser("torch.func jvp, jacfwd or linearize")),
        (_taps.dual_level, _refuser("forward-mode AD")),
        # A level that was entered before still computes tangents: they are refused where they would be read.
        (_taps.dual_value, _refuser("forward-mode AD")),
        (_taps.functional_grad, _refuser("torch.autograd.functional")),
        (_taps.retain_grad, _retain_grad),
        (_taps.jit_save, _jit_save),
    ]
    handles = [_taps.engine.subscribe(_backwards.veto, order="veto")]
    try:
        handles += [tap.subscribe(wrap, order="veto") for tap, wrap in refusals]
        handles.append(_taps.rpc_backward.subscribe(_refuser("distributed backward"), order="veto"))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return handles


def _refuser(what: str) -> Callable[[Call], Call]:
    def wrap(inner: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            if _state.is_shut:
                _state.refuse(what)
            return inner(*args, **kwargs)

        return call

    return wrap


def _retain_grad(inner: Call) -> Call:
    """On a leaf it does nothing, as ever; torch would complain that the leaf requires no gradient."""

    def retain_grad(tensor: Any) -> None:
        if not _state.is_shut:
            return inner(tensor)
        if tensor.is_leaf and tensor.requires_grad:
            return None
        if tensor.requires_grad:
            _state.refuse("retain_grad of a tensor that was made before")
        return inner(tensor)

    return retain_grad


def _jit_save(inner: Call) -> Call:
    """A script module is written by C++, which would write that none of its parameters requires a gradient."""

    def save(module: Any, *args: Any, **kwargs: Any) -> Any:
        if _state.is_shut:
            names = [name for name, flag in _flags(module) if flag]
            if names:
                _state.refuse(
                    f"saving a script module ({names[0]} would be written as not requiring a gradient)",
                    fix="save it before or after, or after requires_grad_(False); torch.save is exact here too",
                )
        return inner(module, *args, **kwargs)

    return save


def _flags(module: Any) -> list[tuple[str, bool]]:
    parts: Any = sys.modules["torch._C"]
    found = [
        (name, bool(tensor.requires_grad))
        for table in (parts.ParameterDict(module), parts.BufferDict(module))
        for name, tensor in table.items()
    ]
    for name, child in parts.ModuleDict(module).items():
        found += [(f"{name}.{inner}", flag) for inner, flag in _flags(child)]
    return found
