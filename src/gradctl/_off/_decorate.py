"""What `@gradctl.off` makes of each kind of function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradctl._errors import UsageError

if TYPE_CHECKING:
    from gradctl._off import off


def decorate(function: Any, make: Callable[[], off]) -> Any:
    """Return `function` with gradients off while its body runs.

    Raises:
        UsageError: it is a class, or no function at all.
    """
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(decorate(function.__func__, make))
    if isinstance(function, type) or not callable(function):
        raise UsageError(
            f"@gradctl.off on {function!r}", what="it decorates functions", fix="decorate the methods that need it"
        )
    if inspect.isasyncgenfunction(function):
        return _async_generator(function, make)
    if inspect.isgeneratorfunction(function):
        return _generator(function, make)
    if inspect.iscoroutinefunction(function):
        return _coroutine(function, make)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with make():
            return function(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _coroutine(function: Any, make: Callable[[], off]) -> Any:
    """Hold the switch until the coroutine is done: what it awaits may be work in another thread."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        with make():
            return await function(*args, **kwargs)

    return call


def _generator(function: Any, make: Callable[[], off]) -> Any:
    """Hold the switch while the body runs; between items the consumer's gradients are its own."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        body = function(*args, **kwargs)
        try:
            with make():
                item = next(body)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    with make():
                        body.close()
                    raise
                except BaseException as error:
                    with make():
                        item = body.throw(error)
                else:
                    with make():
                        item = body.send(sent)
        except StopIteration as end:
            return end.value

    return call


def _async_generator(function: Any, make: Callable[[], off]) -> Any:
    """Hold the switch while an item is being made, across what is awaited for it; not between items."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        body = function(*args, **kwargs)
        try:
            with make():
                item = await anext(body)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    with make():
                        await body.aclose()
                    raise
                except BaseException as error:
                    with make():
                        item = await body.athrow(error)
                else:
                    with make():
                        item = await body.asend(sent)
        except StopAsyncIteration:
            return

    return call
