"""`gradctl.recompute`: a module or function whose intermediate results are made again in backward."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, Final, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import Module

from gradctl import _torch_private as private
from gradctl._errors import UsageError
from gradctl._recompute import _region
from gradctl._recompute._notes import Keep, Made, RegionPlan
from gradctl._recompute._operations import is_attention, is_matmul
from gradctl._recompute._rerun import Rerun
from gradctl._recompute._storage import Verify

Kind = Literal["nothing", "matmul", "attention"]
Engine = Literal["tape", "rerun"]
F = TypeVar("F", bound=Callable[..., Any])
_PLANS: Final = 8
_LOSSES: Final = 3


def _matmul(made: Made) -> bool:
    return is_matmul(made.function) or is_attention(made.function)


def _attention(made: Made) -> bool:
    return is_attention(made.function)


_KINDS: dict[str, Keep | None] = {"nothing": None, "matmul": _matmul, "attention": _attention}


class Recompute:
    """A function whose intermediate results are dropped after its forward and made again in backward.

    What its operations did is learned in the first call for each kind of input (shapes, dtypes, modes), so that later
    calls note only what is needed. A call that does something else keeps what it cannot make again.

    Args:
        function: what to call.
        keep: which saved results to keep.
        verify: what of a dropped result is remembered, to compare it with what is made again.
    """

    def __init__(self, function: Callable[..., Any], *, keep: Keep | None, verify: Verify) -> None:
        self.function = function
        self.keep = keep
        self.verify: Verify = verify
        self._plans: dict[Any, RegionPlan] = {}
        self._lost: dict[Any, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; the same values, and in backward the same gradients, bit for bit."""
        return _eagerly(self._call)(args, kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind like a function, so that it decorates methods."""
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> Any:
        return functools.partial(type(self), keep=self.keep, verify=self.verify), (self.function,)

    def of(self, function: Callable[..., Any]) -> Recompute:
        """Return the same for another function."""
        return type(self)(function, keep=self.keep, verify=self.verify)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_recorded():
            return self.function(*args, **kwargs)
        key = kind_of(args, kwargs)
        plan = self._plans.get(key)
        out, tape = _region.run(self.function, args, kwargs, plan=plan, keep=self.keep, verify=self.verify)
        if plan is None:
            if self._lost.get(key, 0) < _LOSSES:
                if len(self._plans) >= _PLANS:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[key] = tape.learn()
        elif tape.lost_at is not None or tape.position != len(plan.functions):
            self._plans.pop(key, None)  # the same function may have lost its way inside of itself, or in another thread
            self._lost[key] = self._lost.get(key, 0) + 1
        return out


class RunAgain(Recompute):
    """A function whose intermediate results are dropped after its forward, and which is run again in backward."""

    def __init__(self, function: Callable[..., Any], *, keep: Keep | None, verify: Verify) -> None:
        super().__init__(function, keep=keep, verify=verify)
        self._rerun = Rerun(function, verify=verify)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_recorded():
            return self.function(*args, **kwargs)
        self._rerun.function = self.function
        return self._rerun.call(args, kwargs)


class Recomputed:
    """A module whose results are made again in backward, until it is removed; also a context manager.

    Args:
        module: whose `forward` is wrapped, in this instance only.
        run: what is called in its place.
    """

    def __init__(self, module: Module, run: Callable[[Callable[..., Any]], Recompute]) -> None:
        self.module = module
        self._before = module.__dict__.get("forward", _MISSING)
        if isinstance(self._before, _Forward):
            raise UsageError(
                f"this {type(module).__name__} is recomputed already",
                what="recompute() was called on it before, and not undone",
                why="a region inside of itself would make everything again twice",
                fix="handle.remove() first, or leave it as it is",
            )
        self._ours = _Forward(run(module.forward))
        self._removed = False
        module.__dict__["forward"] = self._ours

    def remove(self) -> None:
        """Give the module its own forward back; a second call does nothing.

        Raises:
            UsageError: something else has wrapped the module's forward since.
        """
        if self._removed:
            return
        if self.module.__dict__.get("forward") is not self._ours:
            raise UsageError(
                f"the forward of this {type(self.module).__name__} was wrapped by something else since",
                what=f"it is {self.module.__dict__.get('forward')!r} now",
                why="taking recompute() away would take that away, or leave recompute() inside of it",
                fix="undo that first (the last wrapper first), then handle.remove()",
            )
        self._removed = True
        if self._before is _MISSING:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._before

    def __enter__(self) -> Recomputed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Forward:
    """The forward of a module that is recomputed; a copy of the module gets one that belongs to the copy."""

    def __init__(self, run: Recompute) -> None:
        self.run = run
        functools.update_wrapper(self, run.function, updated=())
        del self.__wrapped__  # type: ignore[attr-defined]  # a bound method: it would lead a copy to the first module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        owner = getattr(self.run.function, "__self__", None)
        copied = memo.get(id(owner))
        assert copied is not None, "a forward is copied with its module"
        function = getattr(self.run.function, "__func__", self.run.function)
        bound = function.__get__(copied) if owner is not None else copy.deepcopy(function, memo)
        return _Forward(self.run.of(bound))

    def __reduce__(self) -> Any:
        return _Forward, (self.run,)


_MISSING: Final = object()


@overload
def recompute(  # pyright: ignore[reportOverlappingOverload]  (a module is callable, and its own case)
    target: Module, *, keep: Kind | Keep = "nothing", verify: Verify = "full", engine: Engine = "tape"
) -> Recomputed: ...
@overload
def recompute(target: F, *, keep: Kind | Keep = "nothing", verify: Verify = "full", engine: Engine = "tape") -> F: ...


def recompute(target: Any, *, keep: Kind | Keep = "nothing", verify: Verify = "full", engine: Engine = "tape") -> Any:
    """Drop the intermediate results of a module or function and make them again in backward (activation checkpointing).

    The Python code runs once. Its operations are noted below autograd, and in backward the noted operations are called
    again, so that a changed global, an iterator, a counter, NumPy's or Python's random numbers, or a buffer that moves
    (BatchNorm) cannot change the answer: gradients and buffers are bitwise those of the plain program. What the notes
    begin from (inputs, parameters) must not be changed in place before backward; if it was, backward raises.

    Regions nest; keyword arguments, containers and values that are no tensors are passed as they are; outputs that need
    no gradient gain none; `retain_graph` and `create_graph` work. Parts that run under `torch.compile` run uncompiled
    inside of a region. Under `torch.func` it refuses.

    Args:
        target: a module (its `forward` is wrapped, in this instance), or a function.
        keep: which results are kept: "nothing"; "attention", those of fused attention; "matmul", those of matrix
            products, convolutions and attention; or a predicate over `Made` (operation, shape, dtype, bytes, line).
        verify: compare what is made again with what was dropped: "full" (every bit), "sample" (256 elements), "off".
        engine: "tape" as above; "rerun" calls the Python function again in backward, which costs nothing per operation
            and is the faster one for regions of many tiny operations. What the function sees is put back for that
            (random state, modes, buffers, attributes, lists and closure variables in its reach); a run that computes
            anything else than the first raises. What it writes outside of its reach is written twice.

    Returns:
        For a module a handle: `.remove()` gives the module its forward back, and so does leaving `with`. For a function
        a function to call in its place.

    Raises:
        UsageError: the target is neither, or has nothing to recompute; the policy is unknown; or the module is
            recomputed already.
        StaleSource: in backward: what a dropped result is made from was changed.
    """
    if isinstance(keep, str) and keep not in _KINDS:
        raise UsageError(
            f"keep={keep!r} is no policy",
            what='it is "nothing", "attention", "matmul", or a function of what an operation made',
            fix='keep="matmul"',
        )
    if verify not in ("full", "sample", "off"):
        raise UsageError(f'verify={verify!r} is not "full", "sample" or "off"', fix='verify="full"')
    if engine not in ("tape", "rerun"):
        raise UsageError(f'engine={engine!r} is not "tape" or "rerun"', fix='engine="tape"')
    policy = _KINDS[keep] if isinstance(keep, str) else keep
    if engine == "rerun" and policy is not None:
        raise UsageError(
            'engine="rerun" keeps nothing',
            what=f"keep={keep!r} was asked for",
            why="it runs the whole function again; only the tape makes single operations again",
            fix='engine="tape", or leave keep= out',
        )
    make = functools.partial(RunAgain if engine == "rerun" else Recompute, keep=policy, verify=verify)
    _refuse_empty(target)
    if isinstance(target, Module):
        return Recomputed(target, make)
    if callable(target):
        return functools.wraps(target)(make(target))
    raise UsageError(
        f"a {type(target).__name__} cannot be recomputed",
        what="recompute() takes a module or a function",
        fix="pass the module whose forward should drop its results",
    )


def _refuse_empty(target: Any) -> None:
    """Refuse what is callable and has no forward that a region could hold."""
    if isinstance(target, type):
        raise UsageError(
            f"{target.__name__} is a class",
            what="recompute() takes a module or a function",
            fix=f"recompute({target.__name__}(...))",
        )
    if isinstance(target, Module) and type(target).forward is Module.forward and "forward" not in target.__dict__:
        raise UsageError(
            f"{type(target).__name__} has no forward",
            why="it only holds other modules, and is never called itself",
            fix="recompute() each of them: for block in blocks: gradctl.recompute(block)",
        )
    function = target.forward if isinstance(target, Module) else target
    if any(is_one(function) for is_one in _LATER):
        raise UsageError(
            f"{getattr(function, '__qualname__', function)} returns before it has run",
            why="a generator or coroutine computes when it is asked, outside of the region",
            fix="recompute() the functions that it calls",
        )


_LATER = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction


def _eagerly(call: Callable[..., Any]) -> Callable[..., Any]:
    if "torch._dynamo" not in sys.modules:
        return call
    return torch.compiler.disable(call)


def _is_recorded() -> bool:
    """Whether there is a graph to save for, which a region may drop from."""
    if not torch.is_grad_enabled():
        return False
    _refuse_transforms()
    return _region.records_graphs()


def _refuse_transforms() -> None:
    level = private.find("functorch_level")
    if level is not None and level() is not None:
        raise UsageError(
            "recompute() was called inside of a torch.func transform",
            why="torch.func saves tensors where no hook can drop them",
            fix="take gradients with torch.autograd.grad there, or undo recompute() first: handle.remove()",
        )


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what calls with the same operations mostly share."""
    modes = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_default_dtype()
    return modes, tuple(_shape_of(value) for value in args), tuple((key, _shape_of(kwargs[key])) for key in kwargs)


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_shape_of(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _shape_of(part)) for key, part in value.items())
    return value if isinstance(value, (int, float, bool, str, type(None))) else type(value)
