"""Backwards that are running: counted, awaited before the switch turns, refused once it has.

A backward that is running when gradients go off would lose some of its gradients without a word, because the nodes that
store them ask the same question as the operations do. Every backward that Python starts is counted from the first use
of the switch on; those that were running already at that moment are found by their frames.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from gradctl import _torch_private as private
from gradctl._off import _state

_graph_task: Callable[[], int] = private.get("graph_task")
"""Which backward this thread is inside, -1 for none; known in the engine's own threads too."""

_running: dict[int, int] = {}
"""How many backwards each thread is in, one inside the other; a thread changes its own entry only."""

_waiting: set[int] = set()
"""Threads that are inside a backward of their own and wait for the switch there."""

_cut: set[int] = set()
"""Threads whose backward went on while somebody else kept gradients off."""

_earlier: dict[int, int] = {}
"""Backwards from before the first use: thread, and which frame of it."""


def veto(run: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a backward while gradients are off, count it otherwise."""
    identify = threading.get_ident

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        if _state.is_shut:
            _state.refuse("backward")
        me = identify()
        depth = _running.get(me, 0)
        _running[me] = depth + 1
        try:
            # Asked again after the count is visible to a thread that is about to switch off. What is called from inside
            # of a running backward belongs to it, and is what the switch waits for.
            if _state.is_shut or (_state.closing and not depth and _graph_task() == -1):
                _state.refuse("backward")
            result = run(*args, **kwargs)
            if _state.is_shut or me in _cut:
                _state.refuse(
                    "the rest of this backward (gradients may be partial)",
                    fix="switch off before it starts or after it has ended, or on again before its hook returns",
                )
            return result
        finally:
            if depth:
                _running[me] = depth
            else:
                _running.pop(me, None)
                _cut.discard(me)

    return run_backward


def is_inside() -> bool:
    """Whether this thread is inside a backward."""
    return threading.get_ident() in _running or _graph_task() != -1


def others() -> list[int]:
    """Return the threads whose backwards must end before this thread may turn the switch."""
    if not _running and not _earlier:
        return []
    me = threading.get_ident()
    if _earlier:
        _look_for_ended()
    running = {*_running, *_earlier} - {me}
    # Two hooks that wait for each other's backward would wait for ever. Each goes on; if gradients are off for the rest
    # of one of the two backwards, that one raises when it ends.
    return sorted(running - _waiting if is_inside() else running)


def note_waiting() -> Callable[[], None]:
    """Say that this thread waits for the switch inside its own backward, if it does; returns how to take it back."""
    me = threading.get_ident()
    if me in _waiting or not is_inside():
        return lambda: None
    _waiting.add(me)
    return lambda: _waiting.discard(me)


def note_cut() -> None:
    """Say that somebody else keeps gradients off while this thread's backward goes on, if it is inside one."""
    me = threading.get_ident()
    if me in _running:
        _cut.add(me)


def find_earlier() -> None:
    """Find the backwards that were running before ours were counted; called after counting has begun."""
    _earlier.clear()
    for thread, frame in sys._current_frames().items():
        identity = _backward_frame(frame)
        if identity is not None and thread not in _running:
            _earlier[thread] = identity


def forget(*, keep: int | None = None) -> None:
    """Forget every thread but `keep`: in a forked child the others do not exist."""
    for known in (_running, _earlier):
        for thread in [t for t in known if t != keep]:
            known.pop(thread, None)
    for threads in (_waiting, _cut):
        threads.intersection_update(set() if keep is None else {keep})


def _look_for_ended() -> None:
    frames = sys._current_frames()
    for thread, identity in list(_earlier.items()):
        frame = frames.get(thread)
        if frame is None or _backward_frame(frame) != identity:
            _earlier.pop(thread, None)


def _backward_frame(frame: FrameType | None) -> int | None:
    """Return which frame of a thread is inside the engine: the outermost call of a backward.

    Only its number is kept: a kept frame would keep the tensors of the running program.
    """
    engine = private.find("run_backward_frame")
    code, found = getattr(engine, "__code__", None), None
    while frame is not None:
        if frame.f_code is code:
            found = id(frame)
        frame = frame.f_back
    return found
