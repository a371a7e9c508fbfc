"""What a freeze needs at an optimizer's step, whichever optimizer it is: listened to only while something is held.

Torch's own global step hooks call us; `zero_grad` is intercepted only while a gradient is set aside.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl import _taps
from gradctl._errors import FreezeRefused
from gradctl._freeze import _flags, _rows
from gradctl._freeze._layers import Layer


class _Pending:
    """What is put back after the step that runs now."""

    __slots__ = ("grads", "rows")

    def __init__(self) -> None:
        self.grads: list[tuple[Tensor, Tensor]] = []
        self.rows: list[tuple[Tensor, _rows.Kept]] = []


_pending: weakref.WeakKeyDictionary[Any, _Pending] = weakref.WeakKeyDictionary()
_OPTIMIZER = torch.optim.Optimizer.profile_hook_step.__code__.co_filename
_handles: dict[str, _taps.Handle] = {}
lock = threading.RLock()
"""Held while anything is frozen or released."""


def renew() -> None:
    """Listen to what is needed for what is held now, and to nothing else."""
    with lock:
        frozen = _flags.any_held()
        _listen("step", frozen or _rows.any_held(), _subscribe_step)
        clears = frozen and _flags.any_aside()
        _listen("zero_grad", clears, lambda: _taps.zero_grad.subscribe(_after_zero_grad, order="record"))
        _listen("module_zero_grad", clears, lambda: _taps.module_zero_grad.subscribe(_after_zero_grad, order="record"))


def _listen(name: str, wanted: bool, subscribe: Callable[[], _taps.Handle]) -> None:
    if wanted and name not in _handles:
        _handles[name] = subscribe()
    elif not wanted and name in _handles and not (name == "step" and _is_stepping()):
        _handles.pop(name).remove()


def _is_stepping() -> bool:
    """Whether this thread is in an optimizer's step: torch goes through the hooks then, and ours pass till later."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _OPTIMIZER:
            return True
        frame = frame.f_back
    return False


def _subscribe_step() -> _taps.Handle:
    # As a veto: refuses before anybody else has done anything, and puts back after everybody has.
    return _taps.optimizer_step.subscribe(before=_before_step, after=_after_step, order="veto")


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _flags.any_held() and not _rows.any_held():
        return
    _rows.refuse_lost()
    pending = _Pending()
    is_lbfgs = isinstance(optimizer, torch.optim.LBFGS)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            flag = _flags.flag_of(parameter)
            if flag is not None and flag.is_frozen() and not parameter.requires_grad:
                if is_lbfgs:
                    raise _lbfgs_moves(f"a parameter of shape {list(parameter.shape)}", flag.holder())
                flag.aside = None  # the step that would have consumed it passes
                if parameter.grad is not None:  # somebody fills in zeros where there is none
                    pending.grads.append((parameter, parameter.grad))
                    parameter.grad = None
            for held in _rows.held_of(parameter):
                if is_lbfgs:
                    raise _lbfgs_moves(held.rows.text, held.layer)
                kept = _rows.Kept(parameter, held.rows, optimizer.state.get(parameter) or {})
                pending.rows.append((parameter, kept))
    if pending.grads or pending.rows:
        _pending[optimizer] = pending


def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pending = _pending.pop(optimizer, None)
    if pending is None:
        return
    for parameter, grad in pending.grads:
        if parameter.grad is None:
            parameter.grad = grad
    with torch.no_grad():
        for parameter, kept in pending.rows:
            kept.put_back(optimizer.state.get(parameter) or {})


for _hook in (_before_step, _after_step):  # torch.compile stops at them, runs them as they are, and goes on behind
    _hook._torchdynamo_disable = True  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]


def _lbfgs_moves(what: str, by: Layer | None) -> FreezeRefused:
    return FreezeRefused(
        f"LBFGS would move {what}, frozen by {by}",
        what="it steps all of its parameters along one direction, also those without a gradient",
        why="that direction remembers earlier gradients, and its line search needs the whole step",
        fix="give it only what trains: torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])",
    )


def _after_zero_grad(inner: Callable[..., Any]) -> Callable[..., Any]:
    def zero_grad(holder: Any, *args: Any, **kwargs: Any) -> Any:
        result = inner(holder, *args, **kwargs)
        if isinstance(holder, torch.nn.Module):
            _flags.forget_gradients(holder.parameters())
        else:
            _flags.forget_gradients(parameter for group in holder.param_groups for parameter in group["params"])
        return result

    return zero_grad
