"""Keeps `torch.compile` and compiled autograd from outliving the switch.

A function that is compiled while gradients are off is forward-only for ever, because dynamo guards on the thread's grad
mode, which says "on". So nothing is compiled while gradients are off: what was compiled before runs compiled, all else
runs eagerly (the stance `eager_on_recompile`). Should something be compiled all the same, the caches are dropped when
gradients come back. torch would make this unnecessary by guarding on a process-wide flag.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gradctl import _torch_private as private
from gradctl._off import _state


_told = False


class OffStance:
    """What dynamo finds in place of its stance while gradients are off; a copy that outlives that says what was before.

    Args:
        before: the stance that stood there.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    @property
    def stance(self) -> str:
        """Return `eager_on_recompile` while gradients are off; a caller's own stance that never compiles stays."""
        before = str(self.before.stance)
        return before if not _state.is_shut or before in ("force_eager", "fail_on_recompile") else "eager_on_recompile"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


class Stance:
    """Dynamo's stance and how many frames it has compiled; dynamo is never imported for it."""

    def __init__(self) -> None:
        self._ours: OffStance | None = None
        self._compiled: int | None = None

    def shut(self) -> None:
        """Put our stance in place if dynamo is loaded; may be repeated."""
        module = _eval_frame()
        if module is None:
            self._compiled = 0  # whatever it compiles from here on, it compiles while gradients are off
            return
        if self._ours is None or module._stance is not self._ours:
            before = module._stance
            self._ours = OffStance(before.before if isinstance(before, OffStance) else before)
            self._compiled = _num_compiled()
        module._stance = self._ours

    def open(self) -> bool:
        """Put back what stood there if what stands there is ours; returns whether something was compiled meanwhile."""
        module, ours, compiled = _eval_frame(), self._ours, self._compiled
        self._ours, self._compiled = None, None
        if module is None:
            return False
        if ours is not None and module._stance is ours:
            module._stance = ours.before
        return compiled is not None and compiled != _num_compiled()


def lock() -> Any | None:
    """Return the lock that is held while something is being compiled, or None when dynamo is not loaded."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)


def skip_us() -> None:
    """Tell dynamo, if it is loaded, to run our own code as it is; to be told so twice changes nothing."""
    global _told
    if not _told and "torch._dynamo" in sys.modules and _eval_frame() is not None:
        skip = private.find("dynamo_skip")
        if skip is not None:
            skip("gradctl")
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
