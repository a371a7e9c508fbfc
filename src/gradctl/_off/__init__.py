"""`gradctl.off`: gradients are off for the whole process, in every thread, until they are on again.

Nothing is touched before the first use; torch is imported by it. How it works is in `_switch` and `_slot`.
"""

from __future__ import annotations

import functools
import numbers
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from gradctl._errors import UsageError

if TYPE_CHECKING:
    from gradctl._off._engine_report import EngineReport

F = TypeVar("F", bound=Callable[..., Any])

DRAIN: Final = 30.0  # seconds


class off:  # noqa: N801  (a verb at the place of call, as torch.no_grad is)
    """Switch gradients off in the whole process.

    While it is on, no operation in any thread, Python's or C++'s, running already or started later, records a graph,
    whatever `torch.enable_grad` says there, and every backward is refused with `BackwardRefused`, as is everything else
    that would otherwise return zeros (torch.func, forward-mode AD). Values are those of `torch.no_grad()`, bit for bit,
    and so is the cost. Flags are left alone: `p.requires_grad` tells the truth, tensors and models that are made here
    train normally afterwards, and a graph from before can be differentiated afterwards. Processes that are started
    meanwhile start with gradients off.

    Three forms::

        with gradctl.off():
            serve()

        @gradctl.off
        def evaluate(): ...

        switch = gradctl.off().start()
        ...
        switch.remove()

    It nests, may be held by several threads at once (gradients come back when the last one lets go), may be entered
    again while it is held, and may be left in another thread. A decorated generator holds it while its body runs, not
    between items; a decorated coroutine until it is done.

    Args:
        function: what to decorate, for `@gradctl.off` without parentheses.
        strict: also refuse asking for a gradient (`requires_grad_()`, `x.requires_grad = True`, `nn.Parameter(...)`),
            and let an optimizer's step raise `TornStep` where its forward overlapped a turn of the switch.
        drain_seconds: how long to wait for backwards that are running in other threads, in seconds; they would lose
            gradients.

    Raises:
        SwitchFailed: a running backward did not end in time; everything is as before.
    """

    @overload
    def __new__(cls, function: F, /) -> F: ...

    @overload
    def __new__(cls, /, *, strict: bool = ..., drain_seconds: float = ...) -> off: ...

    def __new__(
        cls,
        function: Callable[..., Any] | None = None,
        /,
        *,
        strict: bool = False,
        drain_seconds: float = DRAIN,
    ) -> Any:
        """Return the switch, or the decorated function."""
        if function is None:
            return object.__new__(cls)
        return cls(strict=strict, drain_seconds=drain_seconds)(function)

    def __init__(
        self, function: Callable[..., Any] | None = None, /, *, strict: bool = False, drain_seconds: float = DRAIN
    ) -> None:
        if not isinstance(drain_seconds, numbers.Real) or not drain_seconds >= 0:
            raise UsageError(
                f"drain_seconds={drain_seconds!r}", what="a time of 0 seconds or more is needed", fix="drain_seconds=30"
            )
        self._strict = bool(strict)
        self._drain_seconds = float(drain_seconds)
        self._holds: list[None] = []  # its append and pop are atomic: it may be entered and left in any thread
        self._started: dict[str, object] = {}  # so is its setdefault: of two threads that start it, one does

    def __enter__(self) -> off:
        self._enter()
        self._holds.append(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._holds.pop()
        except IndexError:
            raise UsageError("this gradctl.off() was left more often than it was entered") from None
        self._leave()

    def start(self) -> off:
        """Switch off until `remove`; does nothing if this switch has been started.

        Returns:
            This switch.
        """
        return self._start(None)

    def _start(self, by: str | None) -> off:
        if not self._started:
            _the_switch().start(strict=self._strict, drain_seconds=self._drain_seconds, by=by)
            mine = object()
            if self._started.setdefault("hold", mine) is not mine:
                self._leave()
        return self

    def remove(self) -> None:
        """Take `start` back; does nothing if this switch is not started."""
        if self._started.pop("hold", None) is not None:
            self._leave()

    def __call__(self, function: F) -> F:
        """Decorate a function, generator, coroutine or asynchronous generator."""
        from gradctl._off._decorate import decorate

        return decorate(function, functools.partial(off, strict=self._strict, drain_seconds=self._drain_seconds))

    def __repr__(self) -> str:
        return f"gradctl.off(strict={self._strict}, drain_seconds={self._drain_seconds:g})"

    def _enter(self) -> None:
        _the_switch().enter(strict=self._strict, drain_seconds=self._drain_seconds)

    def _leave(self) -> None:
        _the_switch().leave(strict=self._strict)


# torch.compile stops at these calls, runs them as they are, and goes on behind them: dynamo looks for this mark.
for _method in (off.__enter__, off.__exit__, off.start, off.remove):
    _method._torchdynamo_disable = True  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]


def is_off() -> bool:
    """Return whether gradients are off in this process.

    `torch.is_grad_enabled()` keeps telling the mode of the thread that asks.
    """
    state = sys.modules.get("gradctl._off._state")
    return state is not None and state.is_shut


@functools.cache
def _the_switch() -> Any:
    from gradctl._off import _switch

    return _switch


def engine_report() -> EngineReport:
    """Return which engine switches gradients off here, and why; see `EngineReport`."""
    from gradctl._off._engine_report import engine_report

    return engine_report()


_from_environment: list[off] = []


def start_from_environment(by: str = "the process that started this one") -> off:
    """Switch off for the life of this process, because its parent said so; a second call does nothing.

    Args:
        by: who that was, for the message of a refusal: "switched off by ...".

    Returns:
        The switch that holds gradients off.
    """
    if not _from_environment:
        _from_environment.append(off())
    return _from_environment[0]._start(by)


def began_off() -> bool:
    """Return whether this process, or the one that it was forked from, has started with gradients off, and still is."""
    return bool(_from_environment) and is_off()


def uninstall() -> None:
    """Take out everything that the first use has put in place and that passes through since.

    Raises:
        SwitchFailed: gradients are off.
    """
    switch = sys.modules.get("gradctl._off._switch")
    if switch is not None:
        switch.uninstall()
