"""`freeze` and `unfreeze`: what one call holds, and how it is let go."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch.nn import Module, Parameter

from gradctl._errors import UsageError
from gradctl._freeze import _flags, _modes, _refusals, _rows, _watch
from gradctl._freeze._layers import Layer
from gradctl._names._modules import own_attributes
from gradctl._names._patterns import Pattern, named_modules, parameters_of, select, unwrapped

F = TypeVar("F", bound=Callable[..., Any])
DropoutMode = Literal["keep", "off"]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; nothing is touched by making one."""

    model: Module
    patterns: tuple[Pattern, ...]
    layer: Layer
    trains: bool
    norm_stats: bool = True
    dropout: DropoutMode = "keep"
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    rows: Mapping[Pattern, Any] | None = None
    nothing_left: Literal["refuse", "allow"] = "refuse"


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter and where it stands: `fully_shard` puts another there."""

    name: str
    module: Module
    key: str
    parameter: Parameter

    def current(self) -> Parameter:
        """Return the parameter that stands there now."""
        found = own_attributes(self.module).get("_parameters", {}).get(self.key)
        return self.parameter if found is None else found  # a parametrization may have taken it elsewhere


class Holding:
    """What one call holds now.

    Args:
        request: what to hold.

    Raises:
        FreezeRefused: it would not hold; nothing was changed.
        PatternMatchesNothing: a pattern names nothing; nothing was changed.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        # Of its own: a decorated function that calls itself holds twice.
        self._layer = Layer(request.layer.call, request.layer.place)
        self._slots: list[Slot] = []
        self._rows: list[Slot] = []
        model = unwrapped(request.model)
        modules = named_modules(model)
        chosen, rows = self._checked(model, parameters_of(modules))
        self.names = tuple(chosen)
        self.row_texts = tuple(f"{choice.text} of {name}" for name, choice in rows)
        with _watch.lock:
            try:
                self._take(model, modules, chosen, rows)
            except BaseException:
                self._let_go()
                raise
            finally:
                _watch.renew()

    def _checked(
        self, model: Module, named: dict[str, Parameter]
    ) -> tuple[dict[str, Parameter], list[tuple[str, _rows.Rows]]]:
        request = self._request
        call = "freeze" if not request.trains else "unfreeze"
        patterns = request.patterns or (() if request.rows else ("*",))
        if not named:
            raise UsageError(f"{call} of {type(model).__name__}", what="it has no parameters")
        chosen = select(named, patterns)
        if patterns and not chosen:
            raise UsageError(f"{call}: nothing is left of what the patterns choose", what=f"{len(patterns)} patterns")
        rows: list[tuple[str, _rows.Rows]] = []
        touched = dict(chosen)
        for pattern, wanted in (request.rows or {}).items():
            found = select(named, [pattern])
            touched |= found
            once = {id(parameter): name for name, parameter in reversed(found.items())}  # of tied ones the first name
            rows += [(name, _rows.read_rows(name, named[name], wanted)) for name in reversed(once.values())]
        _refusals.refuse_half_of_a_tie(named, touched, call, by_rows=touched.keys() - chosen.keys())
        _refusals.refuse_under_ddp(model, chosen, call)
        if request.trains:
            _refusals.refuse_what_cannot_train(chosen)
        elif request.nothing_left == "refuse" and chosen:
            _refusals.refuse_nothing_left(model, named, chosen)
        if request.optimizers:
            why = "they would get gradients and never move" if request.trains else "it is not this optimizer's to move"
            _refusals.refuse_not_in_optimizer(touched, request.optimizers, why)
            if not request.trains:
                _refusals.refuse_lbfgs(request.optimizers)
        return chosen, rows

    def _take(
        self,
        model: Module,
        modules: Mapping[str, Module],
        chosen: dict[str, Parameter],
        rows: list[tuple[str, _rows.Rows]],
    ) -> None:
        request, layer = self._request, self._layer
        seen: set[int] = set()
        for name, parameter in chosen.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                self._slots.append(_slot(modules, name))
                _flags.hold(parameter, layer, trains=request.trains, gone=_watch.renew)
        for name, choice in rows:
            slot = _slot(modules, name)
            self._rows.append(slot)
            site = _rows.Site(name, slot.module, slot.key, slot.parameter)
            _rows.hold(slot.parameter, choice, layer, site=site, gone=_watch.renew)
        if not request.trains and chosen:
            _modes.ask(model, layer, norm_stats=request.norm_stats, dropout=request.dropout)
        _modes.settle()

    def release(self) -> None:
        """Let everything go.

        Raises:
            FreezeRefused: a wrapper that was made meanwhile would not follow; everything stays held.
        """
        if _refusals.is_distributed():
            changing = {slot.name: slot.current() for slot in self._slots if self._changes(slot)}
            verb = "freeze" if self._request.trains else "unfreeze"
            _refusals.refuse_under_ddp(unwrapped(self._request.model), changing, verb)
        with _watch.lock:
            self._let_go()
            _watch.renew()

    def _changes(self, slot: Slot) -> bool:
        """Whether letting go of this parameter changes its flag."""
        flag = _flags.flag_of(slot.parameter) or _flags.flag_of(slot.current())
        return flag is not None and flag.without(self._layer) != flag.value()

    def _let_go(self) -> None:
        layer = self._layer
        for slot in reversed(self._slots):
            current = slot.current()
            if current is not slot.parameter:
                _flags.move(slot.parameter, current, _watch.renew)
            _flags.release(current, layer)
        for slot in reversed(self._rows):
            _rows.release(slot.parameter, layer)
        self._slots, self._rows = [], []
        _modes.withdraw(layer)
        _modes.settle()


def _slot(modules: Mapping[str, Module], name: str) -> Slot:
    path, _, key = name.rpartition(".")
    return Slot(name, modules[path], key, modules[path].get_parameter(key))


class Freeze:
    """Parameters frozen, or unfrozen, until `remove`.

    It is active when it is made. `with` leaves it active and removes it at the end of the block; entered once it has
    been removed, it starts again. As a decorator it is active while the function runs and at no other time.

    Attributes:
        names: FQNs of the parameters that it holds now, whole; empty once it is removed.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._entered = 0
        self._holding: Holding | None = Holding(request)

    @property
    def names(self) -> tuple[str, ...]:
        """FQNs of the parameters that it holds now, whole."""
        return self._holding.names if self._holding is not None else ()

    def start(self) -> Freeze:
        """Hold again after `remove`; the patterns are read anew. Does nothing while it is held."""
        if self._holding is None:
            self._holding = Holding(self._request)
        return self

    def remove(self) -> None:
        """Put everything back that no other freeze holds and nobody has set since; a second call does nothing.

        Raises:
            FreezeRefused: the model was wrapped in DDP meanwhile, which would not follow; it stays as it is.
        """
        if self._holding is not None:
            self._holding.release()
            self._holding = None
            self._entered = 0

    def __enter__(self) -> Freeze:
        self.start()
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered <= 0:
            self.remove()

    def __call__(self, function: F) -> F:
        """Decorate a function, coroutine or generator: held while it runs, and let go of now."""
        decorated: Any = decorate(function, lambda: Freeze(self._request), self._request.layer.call)
        self.remove()
        return decorated

    def __repr__(self) -> str:
        if self._holding is None:
            return f"<{self._request.layer}: removed>"
        held = [f"{len(self.names)} parameters"] if self.names else []
        return f"<{self._request.layer}: {', '.join([*held, *self._holding.row_texts])}>"


# torch.compile stops at these calls, runs them as they are, and goes on behind them: dynamo looks for this mark.
for _method in (Freeze.__enter__, Freeze.__exit__, Freeze.start, Freeze.remove):
    _method._torchdynamo_disable = True  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]


def decorate(function: Any, make: Callable[[], Any], call: str) -> Any:
    """Return `function` inside of `with make()`."""
    if inspect.isasyncgenfunction(function) or isinstance(function, type) or not callable(function):
        raise UsageError(
            f"@gradctl.{call} on {function!r}"[:200],
            what="it decorates functions, coroutines and generators",
            fix="use it as a context manager: with gradctl.freeze(...): ...",
        )
    called: Any = function

    @functools.wraps(function)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        with make():
            return await called(*args, **kwargs)

    @functools.wraps(function)
    def generator(*args: Any, **kwargs: Any) -> Any:
        with make():  # from the first item to the last: between items the consumer trains
            return (yield from called(*args, **kwargs))

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        with make():
            return called(*args, **kwargs)

    if inspect.iscoroutinefunction(function):
        return coroutine
    return generator if inspect.isgeneratorfunction(function) else plain


def request_for(
    model: Module, patterns: Sequence[Pattern], *, place: str, name: str, trains: bool, **options: Any
) -> Request:
    """Make the request of a call; `name` is what was called.

    Raises:
        UsageError: it is no model, or an option has no such value.
    """
    _refusals.refuse_no_model(model, name)
    for option, allowed in (("dropout", ("keep", "off")), ("nothing_left", ("refuse", "allow"))):
        _refusals.refuse_other_than(option, options.get(option, allowed[0]), allowed)
    shown = ", ".join(
        repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
        for pattern in patterns
    )
    return Request(model, tuple(patterns), Layer(f"{name}({shown})", place), trains, **options)
