"""Keeps `torch.compile` and compiled autograd from outliving the switch.

A function that is compiled while gradients are off is forward-only for ever, because dynamo guards on the thread's grad
mode, which says "on". So nothing is compiled while gradients are off: what was compiled before runs compiled, all else
runs eagerly (as under the stance `eager_on_recompile`). Should something be compiled all the same, the caches are
dropped when gradients come back. torch would make this unnecessary by guarding on a process-wide flag.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from gradctl import _taps
from gradctl import _torch_private as private
from gradctl._off import _state

_told = False
_NEVER_COMPILE = ("force_eager", "fail_on_recompile")


class Stance:
    """Dynamo's answer to "may this be compiled?", and how many frames it has compiled; dynamo is never imported for it.

    Dynamo keeps its stance in a global that it reads several times in one decision, so it must not be turned under
    another thread's hands: the decision itself is intercepted, once, and stays so until `remove`.
    """

    def __init__(self) -> None:
        self._handle: _taps.Handle | None = None
        self._compiled: int | None = None

    def shut(self) -> None:
        """Let nothing be compiled from here on; may be repeated."""
        module = _eval_frame()
        if module is None:
            self._compiled = 0  # whatever it compiles from here on, it compiles while gradients are off
            return
        if self._handle is None and private.find("dynamo_callback") is not None:
            self._handle = _taps.dynamo_callback.subscribe(functools.partial(_run_only, module), order="veto")
        if self._compiled is None:
            self._compiled = _num_compiled()

    def open(self) -> bool:
        """Let dynamo decide again; returns whether something was compiled meanwhile."""
        compiled, self._compiled = self._compiled, None
        return compiled is not None and compiled != _num_compiled()

    def remove(self) -> None:
        """Take the interception out."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _run_only(module: Any, decide: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap dynamo's decision: while gradients are off, what was compiled before runs and all else runs eagerly."""

    def callback_from_stance(callback: Any) -> Any:
        if _state.is_shut and module._stance.stance not in _NEVER_COMPILE:
            return False  # as the stance eager_on_recompile answers
        return decide(callback)

    return callback_from_stance


def lock() -> Any | None:
    """Return the lock that is held while something is being compiled, or None when dynamo is not loaded."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)


def skip_us() -> None:
    """Tell dynamo, if it is loaded, to run what stands at the taps as it is; what takes part in a forward is traced."""
    global _told
    if not _told and "torch._dynamo" in sys.modules and _eval_frame() is not None:
        skip = private.find("dynamo_skip")
        if skip is not None:
            for package in ("_off", "_taps"):
                skip(f"gradctl.{package}")
        _told = True


def drop() -> None:
    """Drop what dynamo has compiled; it is compiled again when it is next called."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset_code_caches()


def _eval_frame() -> Any | None:
    # A module that another thread is importing right now may be there without its names.
    module = sys.modules.get("torch._dynamo.eval_frame")
    return module if hasattr(module, "_stance") else None


def _num_compiled() -> int:
    return int(getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 0))


class CompiledAutograd:
    """The C++ engine's question to Python, "do you want to compile this backward?", answered with a refusal.

    It is asked in every thread, for backwards that C++ and TorchScript start too. Who turns on compiled autograd
    meanwhile gets it when gradients are back.
    """

    def __init__(self) -> None:
        self._module: Any = private.get("autograd_compiler")
        self._set: Callable[..., Any] = self._module.set_autograd_compiler
        self._asked_for: tuple[Any, bool] | None = None

    def shut(self) -> None:
        """Put the refusal in place; may be repeated."""
        before = self._set(_refuse_compiled, False)
        if before[0] is not _refuse_compiled:
            self._asked_for = before

    def open(self) -> None:
        """Put back what stood there, or what was asked for meanwhile; may be repeated."""
        if self._asked_for is not None:
            self._set(*self._asked_for)
            self._asked_for = None

    def veto(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Keep what a program sets while gradients are off until they are back."""
        self._set = inner

        def set_autograd_compiler(compiler: Any, *rest: Any) -> Any:
            if not _state.is_shut or self._asked_for is None:
                return inner(compiler, *rest)
            before, self._asked_for = self._asked_for, (compiler, *rest)  # type: ignore[assignment]
            return before

        return set_autograd_compiler


def _refuse_compiled(*args: Any, **kwargs: Any) -> Any:
    _state.refuse("backward")
