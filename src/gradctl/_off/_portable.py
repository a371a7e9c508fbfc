"""The fallback engine, which touches no memory: every Python thread leaves autograd out of its own dispatch.

A thread that is started while gradients are off does so before it runs anything. One that was running is reached by a
profile function that takes itself out when it is first called, which is at the next call or return in that thread. What
this does not reach is in `GAPS`, and is announced: it is a fallback.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from gradctl import _taps
from gradctl import _torch_private as private

GAPS = (
    "threads that C++ made: std::thread, RPC workers, pthreads that call Python, torch.jit.fork",
    "C++ autograd functions under a grad-mode guard of their own",
    "a thread that stays inside of one C call, until it returns",
    "a profiler that runs in another thread (sys.setprofile, cProfile) is ended",
)
_KEYS = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")


class Portable:
    """Keeps Python threads from recording.

    Args:
        why: why the slot is not used.
    """

    name: str = "portable"
    gaps: tuple[str, ...] = GAPS

    def __init__(self, *, why: str) -> None:
        self.why: str | None = why
        self._off = False
        self._keys: tuple[Any, ...] = tuple(getattr(private.get("dispatch_key"), name) for name in _KEYS)
        self._is_excluded = private.get("dispatch_is_excluded")
        self._exclude = private.get("dispatch_exclude")
        self._excluded = threading.local()
        self._handles: list[_taps.Handle] = []
        self._leaf = torch.ones((), device="cpu", requires_grad=True)
        self._in_every_other_thread = _injection(self._follow)

    def shut(self) -> None:
        """Reach this thread now, new ones as they start, and running ones at their next call; may be repeated."""
        self._off = True
        if not self._handles:
            self._handles = [
                _taps.thread_start.subscribe(self._start, order="veto"),
                # An inference mode puts back, when it is left, the dispatch state that it found.
                _taps.inference_left.subscribe(self._leave_inference, order="veto"),
            ]
        self._follow()
        self._in_every_other_thread()

    def open(self) -> None:
        """Let autograd back into every thread that we left it out of; may be repeated."""
        was_off, self._off = self._off, False
        self._follow()
        if was_off:
            self._in_every_other_thread()

    def remove(self) -> None:
        """Take the taps out."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def records(self) -> bool:
        """Whether an operation in this thread records a graph now."""
        with torch.enable_grad():
            return (-self._leaf).requires_grad

    def _follow(self) -> None:
        """Make this thread's dispatch agree with the switch."""
        mine: tuple[Any, ...] = getattr(self._excluded, "keys", ())
        if self._off:
            new = tuple(key for key in self._keys if not self._is_excluded(key))
            for key in new:
                self._exclude(key, True)
            self._excluded.keys = tuple({*mine, *new})
        elif mine and not torch.is_inference_mode_enabled():  # else when it is left: it keeps the same keys out
            for key in mine:
                self._exclude(key, False)
            self._excluded.keys = ()

    def _start(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def start_new_thread(function: Callable[..., Any], *rest: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                self._follow()
                return function(*args, **kwargs)

            return inner(run if self._off else function, *rest)

        return start_new_thread

    def _leave_inference(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def __exit__(*args: Any) -> Any:  # noqa: N807
            left = inner(*args)
            self._follow()
            return left

        return __exit__


def _injection(call: Callable[[], None]) -> Callable[[], None]:
    """Return what runs `call` once in every other Python thread, at that thread's next Python call or return."""
    return _public_injection(call) if sys.version_info >= (3, 12) else _injection_3_11(call)


def _public_injection(call: Callable[[], None]) -> Callable[[], None]:
    def once(frame: FrameType, event: str, arg: Any) -> None:
        sys.setprofile(None)
        call()

    def inject() -> None:
        here, new_threads = sys.getprofile(), threading.getprofile()
        set_everywhere: Any = threading.setprofile_all_threads  # pyright: ignore[reportAttributeAccessIssue]
        set_everywhere(once)
        threading.setprofile(new_threads)  # type: ignore[arg-type]
        sys.setprofile(here)

    return inject


_Profile = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def _injection_3_11(call: Callable[[], None]) -> Callable[[], None]:
    """Python 3.11 has no public way: set a C profile function in the state of every thread."""

    def function(name: str, result: Any, *arguments: Any) -> Any:
        return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))

    pointer = ctypes.c_void_p
    set_here = function("PyEval_SetProfile", None, pointer, pointer)
    set_there = function("_PyEval_SetProfile", ctypes.c_int, pointer, pointer, ctypes.py_object)
    this_thread = function("PyThreadState_Get", pointer)
    interpreter = function("PyInterpreterState_Get", pointer)
    first = function("PyInterpreterState_ThreadHead", pointer, pointer)
    following = function("PyThreadState_Next", pointer, pointer)

    @_Profile
    def once(_: object, frame: int, event: int, arg: int) -> int:  # pyright: ignore[reportUnusedParameter]
        set_here(None, None)
        call()
        return 0

    def inject() -> None:
        me, state = this_thread(), first(interpreter())
        while state:
            if state != me:
                set_there(state, ctypes.cast(once, pointer), "gradctl")
            state = following(state)

    _KEPT.append(once)  # a thread may come round when this engine is long gone
    return inject


_KEPT: list[Any] = []
