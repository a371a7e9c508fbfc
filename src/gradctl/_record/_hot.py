"""The closures that run in every step. They extend one flat list of atoms and do nothing else that can be put off.

No tuple, dict or object survives a step, so that the garbage collector is not woken more often than without us. What
is rare (a row, a norm that is due, a drain, the first step) is a call out of here, inside a guard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl._record import _quiet
from gradctl._record._blocks import BACKWARD, CLIP, DATA, GRAD
from gradctl._record._faults import Faults
from gradctl._record._state import OptimizerState

_get_ident = threading.get_ident
_item: Any = Tensor.item
MOST_STAMPS = 100_000
"""A program that loads data, or asks for gradients, and never steps is drained when so many atoms wait."""


class Hot:
    """What the closures look at: slots that are None while nothing is to be done.

    `before_backward(outputs)` and `after_backward(outputs)` are called around outermost accumulating backwards, the
    latter may return an error to raise, which was asked for; `latest` is the optimizer that stepped last; `scaled` maps
    a thread to (id of the scaled loss, the loss itself, the scale).
    """

    __slots__ = ("after_backward", "before_backward", "latest", "scaled")

    def __init__(self) -> None:
        self.before_backward: Callable[[Any], None] | None = None
        self.after_backward: Callable[[Any], BaseException | None] | None = None
        self.latest: OptimizerState | None = None
        self.scaled: dict[int, tuple[int, Any, Any]] = {}


def step_hooks(
    hot: Hot,
    states: dict[int, OptimizerState],
    extend: Callable[[Any], None],
    clock: Callable[[], float],
    faults: Faults,
    *,
    new: Callable[[Any], OptimizerState | None],
    due: Callable[[OptimizerState, Any, Any, Any], BaseException | None],
    done: Callable[[OptimizerState, Any, float], None],
    drain: Callable[[float], None],
) -> tuple[Any, Any]:
    """Return the hooks before and after an optimizer's step.

    Args:
        hot: the shared slots.
        states: states by `id` of the optimizer.
        extend: takes five atoms at a time.
        clock: seconds.
        faults: where our own faults go.
        new: makes the state of an optimizer that was not seen before.
        due: measures before a step; may return an error to raise, which was asked for.
        done: measures after a step.
        drain: empties the stamps.
    """
    get = states.get

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        state = get(id(optimizer))
        stop = None
        if state is None or state.steps >= state.next_norm or state.steps >= state.next_row:
            try:
                if state is None:
                    state = new(optimizer)
                    if state is None:
                        return
                stop = due(state, optimizer, args, kwargs)
            except Exception as error:
                faults.caught("step", error)
            if state is None:
                return
        if stop is not None:
            raise stop
        state.started = clock()

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        state = get(id(optimizer))
        if state is None:
            return
        now = clock()
        steps = state.steps = state.steps + 1
        extend((state.o, _get_ident(), state.started, now, None))
        hot.latest = state
        try:
            if state.sampling:
                done(state, optimizer, now)
            if steps >= state.flush_at or now > state.flush_time:
                drain(now)
        except Exception as error:
            faults.caught("step", error)

    return before, after


def engine_wrap(
    hot: Hot,
    extend: Callable[[Any], None],
    clock: Callable[[], float],
    faults: Faults,
    *,
    slow_loss: Callable[[Any], Any],
    bad_loss: Callable[[], None],
    waiting: Callable[[], int],
    overflow: Callable[[], None],
) -> Callable[[Any], Any]:
    """Return the wrap of torch's engine.

    Args:
        hot: the shared slots.
        extend: takes five atoms at a time.
        clock: seconds.
        faults: where our own faults go.
        slow_loss: reads a loss that is not a plain number on the CPU: a float, (tensor, scale) for the drain, or None.
        bad_loss: called when a loss is NaN or inf.
        waiting: how many atoms have not been drained.
        overflow: called when they are too many.
    """
    graph_task, function_modes, dispatch_modes = _quiet.graph_task, _quiet.function_modes, _quiet.dispatch_modes

    def wrap(inner: Any) -> Any:
        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            # A backward inside a backward is part of it.
            if graph_task() != -1:
                return inner(outputs, *args, **kwargs)
            accumulates = kwargs.get("accumulate_grad")
            value = None
            try:
                if accumulates:
                    loss = outputs[0]
                    if type(loss) is not Tensor or hot.scaled or function_modes() or dispatch_modes():
                        value = slow_loss(loss)
                    elif loss.is_cpu:
                        if loss.numel() == 1:
                            value = _item(loss)
                    else:
                        value = slow_loss(loss)
                    if type(value) is float and value - value != 0.0:
                        bad_loss()
                    if hot.before_backward is not None:
                        hot.before_backward(outputs)
                elif dispatch_modes():
                    return inner(outputs, *args, **kwargs)  # a compiler traces: nothing is computed
            except Exception as error:
                faults.caught("backward", error)
            begin = clock()
            result = inner(outputs, *args, **kwargs)
            extend((BACKWARD if accumulates else GRAD, _get_ident(), begin, clock(), value))
            if not accumulates and waiting() > MOST_STAMPS:
                overflow()
            if accumulates and hot.after_backward is not None:
                stop = None
                try:
                    stop = hot.after_backward(outputs)
                except Exception as error:
                    faults.caught("backward", error)
                if stop is not None:
                    raise stop
            return result

        return run_backward

    return wrap


def data_wrap(
    extend: Callable[[Any], None], clock: Callable[[], float], waiting: Callable[[], int], overflow: Callable[[], None]
) -> Callable[[Any], Any]:
    """Return the wrap of a data loader's `__next__`; `waiting` and `overflow` as for `engine_wrap`."""

    def wrap(inner: Any) -> Any:
        def next_batch(self: Any) -> Any:
            begin = clock()
            batch = inner(self)
            extend((DATA, _get_ident(), begin, clock(), None))
            if waiting() > MOST_STAMPS:
                overflow()
            return batch

        return next_batch

    return wrap


def clip_wrap(
    extend: Callable[[Any], None], faults: Faults, bad_norm: Callable[[Any, Any], None]
) -> Callable[[Any], Any]:
    """Return the wrap of the function that clips by norm: it is told the norm before clipping.

    Args:
        extend: takes five atoms at a time.
        faults: where our own faults go.
        bad_norm: called with the parameters and the norm when that is NaN or inf.
    """
    dispatch_modes = _quiet.dispatch_modes

    def wrap(inner: Any) -> Any:
        def clip(parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                norm: Any = None
                if type(total_norm) is Tensor:
                    with _quiet.Quiet() if dispatch_modes() else torch._C.DisableTorchFunction():
                        norm = _item(total_norm) if total_norm.is_cpu else (total_norm.detach(), 1.0)
                elif isinstance(total_norm, float):
                    norm = total_norm
                extend((CLIP, _get_ident(), norm, float(max_norm), None))
                if type(norm) is float and norm - norm != 0.0:
                    bad_norm(parameters, total_norm)
            except Exception as error:
                faults.caught("clip", error)
            return inner(parameters, max_norm, total_norm, *args, **kwargs)

        return clip

    return wrap
