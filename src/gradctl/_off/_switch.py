"""The one switch of the process: who holds it, how it is turned, and that it is turned back exactly.

Three facts shape it. It may be asked for anywhere: in a backward hook, a finalizer, a signal handler, in the middle of
its own turn; so its lock is re-entrant, is never held while something is awaited, and every step of a turn may be
repeated: a turn that is interrupted by another is finished by it. A backward that is running would lose gradients; it
is awaited. Turning is cheap, so what is not (finding slots, subscribing to taps) is done at the first use and stays,
passing through, until `uninstall`.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from gradctl import _journal, _taps
from gradctl._errors import SwitchFailed
from gradctl._off import (
    _backwards,
    _children,
    _compiled,
    _engines,
    _function_apply,
    _portable,
    _refusals,
    _site,
    _state,
    _torn,
)
from gradctl._off._probe import EngineFailed
from gradctl._off._strict import Strict

_POLL_SECONDS = 0.0005
T = TypeVar("T")

_lock = threading.RLock()
_holds = 0
_in_force: bool | None = False  # None in the middle of a turn
_installed: _Installed | None = None
_announcements: list[str] = []


class _Installed:
    """What the first use puts in place: the engine, and everything that passes through while gradients are on."""

    def __init__(self) -> None:
        self.engine: _engines.Engine = _engines.choose()
        self.apply = _function_apply.choose()
        self.autograd = _compiled.CompiledAutograd()
        self.stance = _compiled.Stance()
        self.strict = Strict()
        self.handles = [*_refusals.subscribe(), *_children.subscribe()]
        self.handles.append(_taps.autograd_compiler.subscribe(self.autograd.veto, order="veto"))
        self.handles.append(_taps.compile.subscribe(_then(self._meet_dynamo), order="veto"))
        for tap in (_taps.load_library, _taps.library_open, _taps.extension_import):
            self.handles.append(tap.subscribe(_then(self._reach_new_library), order="veto"))
        _backwards.find_earlier()
        if self.engine.why is not None:
            _announce(self.engine)
        if self.apply.gap is not None:
            _announcements.append(f"gradctl.off does not reach all of {self.apply.gap} ({self.apply.why})")

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.stance.remove()
        self.engine.remove()

    def fall_back(self, reason: EngineFailed) -> None:
        self.engine.open()
        self.engine.remove()
        self.engine = _portable.Portable(why=str(reason))
        _announce(self.engine)

    def _meet_dynamo(self) -> None:
        _compiled.skip_us()
        self.stance.shut()

    def _reach_new_library(self) -> None:
        try:
            self.engine.shut()
        except EngineFailed as reason:
            _announcements.append(f"gradctl.off does not reach a library that was just loaded: {reason}")


def enter(*, strict: bool, drain_seconds: float, by: str | None = None) -> None:
    """Take hold of the switch: when this returns, no thread records a graph.

    Args:
        strict: refuse asking for a gradient too.
        drain_seconds: how long to wait for backwards that are running in other threads.
        by: who asks, where that is not a line of the program.

    Raises:
        SwitchFailed: one did not end in that time, or no engine works here; nothing is changed.
    """
    _compiled.skip_us()
    site = _site.find() if by is None else _site.Site("", 0, by)
    with _lock:
        _install()
    me = object()
    try:
        _state.closing[me] = None  # from here on no new backward begins in another thread
        turned = _when_nothing_runs(lambda: _take_hold(site, strict), drain_seconds)
    finally:
        _state.closing.pop(me, None)
    if turned:
        _record(site, "off")
    if _announcements:
        try:
            _warn()
        except BaseException:  # the program makes errors of warnings
            leave(strict=strict)
            raise


def start(*, strict: bool, drain_seconds: float, by: str | None = None) -> None:
    """Take hold of the switch for longer than the caller's block.

    Raises:
        SwitchFailed: also when this thread is inside a backward, the rest of which would lose its gradients.
    """
    if _backwards.is_inside():
        raise SwitchFailed(
            "gradients were not switched off",
            what=f"start() was called inside a running backward, at {_site.find()}",
            why="the rest of that backward would lose its gradients",
            fix="start before or after the backward, or use `with gradctl.off():` inside the hook",
        )
    enter(strict=strict, drain_seconds=drain_seconds, by=by)


def leave(*, strict: bool) -> None:
    """Let go of the switch; the last one to let go turns gradients on again."""
    global _holds
    with _lock:
        assert _holds > 0
        _holds -= 1
        _state.strict -= strict
        site = _state.where
        turned = not _holds
        if not turned:
            _backwards.note_cut()
        compiled = _turn()
    if compiled:
        _compiled.drop()
    if turned:
        _record(site, "on")


def _record(site: _site.Site, state: str) -> None:
    if _journal.current() is not None:
        _journal.emit("off", site=site.place(), state=state)


def engine() -> _engines.Engine | None:
    """Return the engine in use, or None where the switch has not been used."""
    return None if _installed is None else _installed.engine


def uninstall() -> None:
    """Take out everything that the first use has put in place.

    Raises:
        SwitchFailed: gradients are off.
    """
    global _installed
    with _lock:
        if _holds:
            raise SwitchFailed(
                "gradients are off",
                what=f"switched {_state.since()}",
                fix="leave every `with gradctl.off()` and remove() every switch first",
            )
        installed, _installed = _installed, None
        if installed is not None:
            installed.remove()
            _torn.uninstall()


def _install() -> _Installed:
    global _installed
    if _installed is None:
        _installed = _Installed()
    return _installed


def _when_nothing_runs(turn: Callable[[], T], drain_seconds: float) -> T:
    """Call `turn`, under the lock, at a moment at which no backward and no compilation runs in another thread."""
    deadline = None
    stop_waiting: Callable[[], None] | None = None
    try:
        while True:
            # Dynamo's lock is taken inside of ours, and never waited for: a fork, which waits for ours, then leaves no
            # child with a lock of dynamo that nobody will release.
            with _lock:
                compiling = _compiled.lock()
                if compiling is None or compiling.acquire(blocking=False):
                    try:
                        threads = _backwards.others()
                        if not threads:
                            return turn()
                    finally:
                        if compiling is not None:
                            compiling.release()
                    what = f"backward in thread {_names(threads)}"
                else:
                    what = "compilation by torch.compile in another thread"
            if deadline is None:
                deadline = time.monotonic() + drain_seconds
                stop_waiting = _backwards.note_waiting()
            if time.monotonic() >= deadline:
                raise SwitchFailed(
                    "gradients were not switched off",
                    what=f"a {what} did not end within {drain_seconds:g} s; everything is as before",
                    why="one that is running when gradients go off would lose a part of them",
                    fix="switch off at a quiet moment, or wait longer: gradctl.off(drain_seconds=...)",
                )
            time.sleep(_POLL_SECONDS)
    finally:
        if stop_waiting is not None:
            stop_waiting()


def _names(threads: list[int]) -> str:
    known = {thread.ident: thread.name for thread in threading.enumerate()}
    return ", ".join(known.get(thread, str(thread)) for thread in threads)


def _take_hold(site: _site.Site, strict: bool) -> bool:
    global _holds
    turns = not _holds
    _holds += 1
    _state.strict += strict
    try:
        if turns:
            _state.where = site
        _turn()
    except BaseException:
        _holds -= 1
        _state.strict -= strict
        _turn()
        raise
    return turns


def _turn() -> bool:
    """Make what is in force agree with who holds the switch; returns whether something was compiled meanwhile.

    A finalizer or a signal handler may run this in the middle of itself: the inner turn goes the whole way, and the
    outer one looks again before it says that it is done.
    """
    compiled = False
    installed = _installed
    assert installed is not None
    while _in_force is not (_holds > 0):
        if _holds:
            _shut(installed)
        else:
            compiled |= _open(installed)
    (installed.strict.shut if _state.strict else installed.strict.open)()
    return compiled


def _shut(installed: _Installed) -> None:
    global _in_force
    _in_force = None
    _state.is_shut = True  # refusals first: nothing is let in between here and the end
    installed.autograd.shut()
    installed.stance.shut()
    installed.apply.shut()
    try:
        _shut_engine(installed)
    except EngineFailed as reason:
        installed.fall_back(reason)
        try:
            _shut_engine(installed)
        except EngineFailed as reason_too:
            raise SwitchFailed(
                "gradients were not switched off",
                what="no engine passed its self-test here; everything is as before",
                why=f"slot: {reason}; portable: {reason_too}",
                fix="run `gradctl env` and report what it says; torch.no_grad() works thread by thread",
            ) from reason
    _torn.note_toggle(threading.get_ident())
    _in_force = True


def _shut_engine(installed: _Installed) -> None:
    installed.engine.shut()
    if installed.engine.records():
        raise EngineFailed("an operation still recorded a graph")


def _open(installed: _Installed) -> bool:
    global _in_force
    _in_force = None
    installed.engine.open()
    installed.apply.open()
    installed.autograd.open()
    compiled = installed.stance.open()
    _state.is_shut = False
    _torn.note_toggle(threading.get_ident())
    _in_force = False
    return compiled


def _then(follow: Callable[[], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a call so that `follow` runs after it, under the lock, while gradients are off."""

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if _state.is_shut:
                with _lock:
                    if _in_force:
                        follow()
                if _announcements:
                    _warn()
            return result

        return call

    return wrap


def _announce(engine: _engines.Engine) -> None:
    _announcements.append(
        f"gradctl.off uses its portable engine here, which does not reach: {'; '.join(engine.gaps)}. "
        f"The import slot cannot be used: {engine.why}"
    )


def _warn() -> None:
    while _announcements:
        warnings.warn(_announcements.pop(0), RuntimeWarning, stacklevel=_site.depth() + 1)


def _before_fork() -> None:
    _lock.acquire()


def _after_fork_in_parent() -> None:
    _lock.release()


def _after_fork_in_child() -> None:
    # The other threads do not exist here. What they held stays held: a child starts as its parent is, off.
    _backwards.forget(keep=threading.get_ident())
    _state.closing.clear()
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
