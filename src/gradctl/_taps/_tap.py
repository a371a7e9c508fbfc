"""One interception of one entry point, shared by all who listen there.

A tap installs one stub where torch (or the standard library) keeps a callable. Subscribers hand in `wrap`, a function
from the inner callable to the wrapping one; the tap composes them (vetoes outermost, then measurements, then records)
and rebinds the stub's inner call, so that a subscription never patches anything a second time.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

Order = Literal["veto", "measure", "record"]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Location = tuple[Any, str]
_RANK: dict[Order, int] = {"veto": 0, "measure": 1, "record": 2}
_MISSING = object()
T = TypeVar("T")

lock = threading.RLock()
"""Held while subscriptions change; never held while a subscriber runs."""


def _renew_lock_in_child() -> None:
    # A forked child may inherit the lock from a thread that no longer exists.
    global lock
    lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_in_child)


class Handle:
    """Takes one subscription back.

    Args:
        undo: called once, under the lock.
    """

    __slots__ = ("_undo",)

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Take the subscription back; a second call does nothing."""
        with lock:
            undo, self._undo = self._undo, None
            if undo is not None:
                undo()


class Tap(Protocol):
    """What every tap can be asked."""

    name: str

    def is_installed(self) -> bool:
        """Whether something of ours stands at this entry point now."""
        ...


class _Subscribers(Generic[T]):
    """Subscribers in their stated order: by `order`, then first come first outermost."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, T]] = []
        self._count = 0

    def add(self, item: T, order: Order) -> tuple[int, int, T]:
        self._count += 1
        entry = (_RANK[order], self._count, item)
        self._entries = sorted([*self._entries, entry], key=lambda e: e[:2])
        return entry

    def discard(self, entry: tuple[int, int, T]) -> None:
        self._entries = [e for e in self._entries if e is not entry]

    def items(self) -> list[T]:
        return [item for _, _, item in self._entries]


class _Site:
    """One place that holds the callable: where it stood, what stood there, and our stub."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self._before = vars(owner).get(name, _MISSING)
        static = inspect.getattr_static(owner, name) if isinstance(owner, type) else None
        binds_class = isinstance(static, classmethod) or type(static).__name__ == "classmethod_descriptor"
        if binds_class:
            assert static is not None
            self.original: Callable[..., Any] = lambda cls, *a, **k: static.__get__(None, cls)(*a, **k)
        elif isinstance(owner, type):
            self.original = static.__func__ if isinstance(static, staticmethod) else static  # type: ignore[assignment]
        else:
            self.original = getattr(owner, name)
        call = self.original

        def stub(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        def rebind(new: Callable[..., Any]) -> None:
            nonlocal call
            call = new

        functools.update_wrapper(stub, getattr(owner, name), updated=())
        self.rebind = rebind
        self._stub: Any = (
            classmethod(stub) if binds_class else staticmethod(stub) if isinstance(static, staticmethod) else stub
        )

    def stands(self) -> bool:
        return vars(self.owner).get(self.name, _MISSING) is self._stub

    def install(self) -> None:
        setattr(self.owner, self.name, self._stub)

    def restore(self) -> bool:
        """Put back what stood here if what stands here is ours; else leave a stub that only passes through."""
        self.rebind(self.original)
        if not self.stands():
            return False
        if self._before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)
        return True

    def was_put_back(self) -> bool:
        """Whether somebody else has restored what stood here before us."""
        return vars(self.owner).get(self.name, _MISSING) is self._before


class AttributeTap:
    """Intercepts a callable kept as an attribute of a module, class or object.

    Args:
        name: what this entry point is called.
        locate: returns every `(owner, attribute)` that holds it; called when the first subscriber comes.
    """

    def __init__(self, name: str, locate: Callable[[], Sequence[Location]]) -> None:
        self.name = name
        self._locate = locate
        self._subscribers: _Subscribers[Wrap] = _Subscribers()
        self._sites: list[_Site] = []

    def subscribe(self, wrap: Wrap, *, order: Order) -> Handle:
        """Wrap the callable until the handle is removed.

        Args:
            wrap: from the inner callable to the one that is called instead. For a method the first argument is
                `self`, for a class method the class.
            order: `veto` (may refuse) is outermost, then `measure`, then `record`.

        Returns:
            The handle; when the last one is removed, what stood there before stands there again.
        """
        with lock:
            self._install()
            entry = self._subscribers.add(wrap, order)
            try:
                self._compose()
            except BaseException:
                self._unsubscribe(entry)
                raise
            return Handle(lambda: self._unsubscribe(entry))

    def is_installed(self) -> bool:
        """Whether a stub of ours stands there or is kept alive below somebody else's patch."""
        return bool(self._sites)

    def _install(self) -> None:
        known = {(id(site.owner), site.name): site for site in self._sites}
        for owner, name in self._locate():
            site = known.get((id(owner), name))
            if site is None:
                site = _Site(owner, name)
                site.install()
                self._sites.append(site)
            elif site.was_put_back():
                site.install()

    def _compose(self) -> None:
        wraps = self._subscribers.items()
        for site in self._sites:
            call = site.original
            for wrap in reversed(wraps):
                call = wrap(call)
            site.rebind(call)

    def _unsubscribe(self, entry: tuple[int, int, Wrap]) -> None:
        self._subscribers.discard(entry)
        if self._subscribers.items():
            self._compose()
        else:
            self._sites = [site for site in self._sites if not site.restore() and not site.was_put_back()]


class _EngineProxy:
    """Stands for torch's engine; everything but `run_backward` is the engine's own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.run_backward: Callable[..., Any] = engine.run_backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class EngineTap:
    """Intercepts every backward that Python starts, in every thread: `run_backward(outputs, *args, **kwargs)`.

    Args:
        locate: returns the class that holds the engine, and the attribute's name.
    """

    def __init__(self, locate: Callable[[], Location]) -> None:
        self.name = "engine"
        self._locate = locate
        self._subscribers: _Subscribers[Wrap] = _Subscribers()
        self._proxy: _EngineProxy | None = None

    def subscribe(self, wrap: Wrap, *, order: Order) -> Handle:
        """Wrap `run_backward` until the handle is removed; see `AttributeTap.subscribe`."""
        with lock:
            owner, name = self._locate()
            if self._proxy is None:
                self._proxy = _EngineProxy(getattr(owner, name))
                setattr(owner, name, self._proxy)
            elif getattr(owner, name) is self._proxy._engine:  # somebody put torch's engine back
                setattr(owner, name, self._proxy)
            entry = self._subscribers.add(wrap, order)
            self._compose()
            return Handle(lambda: self._unsubscribe(entry))

    def is_installed(self) -> bool:
        """Whether our proxy stands there or is kept alive below somebody else's."""
        return self._proxy is not None

    def _compose(self) -> None:
        assert self._proxy is not None
        call = self._proxy._engine.run_backward
        for wrap in reversed(self._subscribers.items()):
            call = wrap(call)
        self._proxy.run_backward = call

    def _unsubscribe(self, entry: tuple[int, int, Wrap]) -> None:
        self._subscribers.discard(entry)
        self._compose()
        if self._subscribers.items():
            return
        owner, name = self._locate()
        assert self._proxy is not None
        if getattr(owner, name) is self._proxy:
            setattr(owner, name, self._proxy._engine)
            self._proxy = None


StepHook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class StepTap:
    """Listens before and after every `Optimizer.step` through torch's own global hooks."""

    def __init__(self) -> None:
        self.name = "optimizer_step"
        self._subscribers: _Subscribers[tuple[StepHook | None, StepHook | None]] = _Subscribers()
        self._hooks: list[Any] = []
        self._rebind: list[Callable[[StepHook], None]] = []

    def subscribe(self, *, before: StepHook | None = None, after: StepHook | None = None, order: Order) -> Handle:
        """Call `before` and `after` around every optimizer step until the handle is removed.

        Args:
            before: called with `(optimizer, args, kwargs)` before the step; `args[0]` is the optimizer. May raise
                only as a veto. May return new `(args, kwargs)` for the step, for example with its closure wrapped.
            after: called likewise after a step that did not raise.
            order: `veto` comes first before the step and last after it.
        """
        with lock:
            if not self._hooks:
                self._install()
            entry = self._subscribers.add((before, after), order)
            self._compose()
            return Handle(lambda: self._unsubscribe(entry))

    def is_installed(self) -> bool:
        """Whether our pair of hooks is registered with torch."""
        return bool(self._hooks)

    def _install(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        before, rebind_before = _step_stub()
        after, rebind_after = _step_stub()
        self._hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        self._rebind = [rebind_before, rebind_after]

    def _compose(self) -> None:
        items = self._subscribers.items()
        self._rebind[0](_in_sequence([before for before, _ in items if before is not None]))
        self._rebind[1](_in_sequence([after for _, after in reversed(items) if after is not None]))

    def _unsubscribe(self, entry: tuple[int, int, tuple[StepHook | None, StepHook | None]]) -> None:
        self._subscribers.discard(entry)
        self._compose()
        if not self._subscribers.items():
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._rebind = [], []


def _nothing(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _in_sequence(hooks: list[StepHook]) -> StepHook:
    if not hooks:
        return _nothing
    if len(hooks) == 1:
        return hooks[0]

    def call_all(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed: Any = None
        for hook in hooks:
            new = hook(optimizer, args, kwargs)
            if new is not None:
                changed = args, kwargs = new
        return changed

    return call_all


def _step_stub() -> tuple[StepHook, Callable[[StepHook], None]]:
    call = _nothing

    def stub(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(optimizer, args, kwargs)

    def rebind(new: StepHook) -> None:
        nonlocal call
        call = new

    return stub, rebind


class RegistrationTap:
    """Hears everything that is registered with a module, through one of torch's own global hooks.

    Args:
        name: what this entry point is called.
        register: the function of `torch.nn.modules.module` that registers a global hook.
    """

    def __init__(self, name: str, register: str) -> None:
        self.name = name
        self._register = register
        self._listeners: _Subscribers[Callable[[Any, str, Any], None]] = _Subscribers()
        self._hook: Any = None

    def subscribe(self, listen: Callable[[Any, str, Any], None]) -> Handle:
        """Call `listen(module, name, what)` for every registration until the handle is removed."""
        with lock:
            entry = self._listeners.add(listen, "record")
            if self._hook is None:
                from torch.nn.modules import module

                self._hook = getattr(module, self._register)(self._heard)
            return Handle(lambda: self._unsubscribe(entry))

    def is_installed(self) -> bool:
        """Whether our hook is registered with torch."""
        return self._hook is not None

    def _heard(self, module: Any, name: str, what: Any) -> None:
        for listen in self._listeners.items():
            listen(module, name, what)

    def _unsubscribe(self, entry: tuple[int, int, Callable[[Any, str, Any], None]]) -> None:
        self._listeners.discard(entry)
        if not self._listeners.items() and self._hook is not None:
            self._hook.remove()
            self._hook = None
