"""What a function refers to: modules, tensors and generators, and the places that hold them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from gradctl._finite_difference._trees import tensors

_DEPTH = 4
_OWN = frozenset(vars(Module()))  # hooks, the training flag and the three dicts that are entered by themselves


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value with tensors is held, and how another one is put there.

    Args:
        name: what a person calls it.
        value: what is there.
        put: puts something else there.
        kind: `buffer`s are changed by a forward in ways that leave no trace.
    """

    name: str
    value: Any
    put: Callable[[Any], None]
    kind: str = "value"


@dataclass(slots=True)
class Reached:
    """What was found.

    Args:
        modules: with the name of the variable that holds them; empty for the root.
        places: of tensors outside of modules.
        generators: generators of random numbers.
    """

    modules: list[tuple[str, Module]] = field(default_factory=list[tuple[str, Module]])
    places: list[Place] = field(default_factory=list[Place])
    generators: list[torch.Generator] = field(default_factory=list[torch.Generator])


def reached(fn: Any) -> Reached:
    """Follow closures, the globals that a function names, defaults, partials, methods and attributes."""
    found = Reached()
    seen: set[int] = set()

    def value(name: str, held: Any, put: Callable[[Any], None], depth: int) -> None:
        if isinstance(held, Module):
            if id(held) not in seen:
                seen.add(id(held))
                found.modules.append((name, held))
                found.generators += [
                    v for m in held.modules() for v in vars(m).values() if isinstance(v, torch.Generator)
                ]
        elif isinstance(held, torch.Generator):
            found.generators.append(held)
        elif isinstance(held, (Tensor, list, tuple, dict)):
            parts: list[Any] = (
                [] if isinstance(held, Tensor) else list(held.values() if isinstance(held, dict) else held)
            )
            if tensors(held):
                found.places.append(Place(name, held, put))
            for i, part in enumerate(parts[:64]):
                if not isinstance(part, (Tensor, list, tuple, dict)):
                    value(f"{name}[{i}]", part, _nowhere, depth + 1)
        else:
            inside(name, held, depth)

    def inside(name: str, held: Any, depth: int) -> None:
        if depth > _DEPTH or id(held) in seen or isinstance(held, (type, types.ModuleType, str, bytes, int, float)):
            return
        seen.add(id(held))
        if isinstance(held, functools.partial):
            inside(name, held.func, depth + 1)
            for part in (*held.args, *held.keywords.values()):
                value(name, part, _nowhere, depth + 1)
        elif isinstance(held, types.MethodType):
            value("", held.__self__, _nowhere, depth + 1)
            inside(name, held.__func__, depth + 1)
        elif isinstance(held, types.FunctionType):
            for label, part, put in _of_function(held):
                value(label, part, put, depth + 1)
        elif type(held).__module__.partition(".")[0] not in ("builtins", "torch", "numpy") and hasattr(
            held, "__dict__"
        ):
            for label, part in list(vars(held).items()):
                value(label, part, functools.partial(setattr, held, label), depth + 1)
            call = type(held).__dict__.get("__call__")
            if isinstance(call, types.FunctionType):
                inside(name, call, depth + 1)

    if isinstance(fn, Module):
        value("", fn, _nowhere, 0)
    else:
        inside("", fn, 0)
    return found


def _of_function(fn: types.FunctionType) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    for label, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield label, cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
        except ValueError:
            continue  # not filled yet
    for label in _names(fn.__code__):
        if label in fn.__globals__:
            yield label, fn.__globals__[label], functools.partial(fn.__globals__.__setitem__, label)
    signature = inspect.signature(fn)
    for parameter in signature.parameters.values():
        if parameter.default is not parameter.empty:
            yield parameter.name, parameter.default, _nowhere


def _names(code: types.CodeType) -> set[str]:
    """Return the global names of a function and of the functions inside it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _nowhere(_: Any) -> None:
    """Hold a value for which there is no place to put another: a default, an argument of a partial."""


def places_of(module: Module, name: str) -> Iterator[Place]:
    """Yield the places of one module, without its children: parameters, buffers, and attributes with tensors."""
    dot = f"{name}." if name else ""
    for label, param in module._parameters.items():
        if param is not None:
            yield Place(dot + label, param, functools.partial(module._parameters.__setitem__, label), "parameter")
    for label, buffer in module._buffers.items():
        if buffer is not None:
            yield Place(dot + label, buffer, functools.partial(module._buffers.__setitem__, label), "buffer")
    for label, held in vars(module).items():
        if label not in _OWN and isinstance(held, (Tensor, list, tuple, dict)) and tensors(held):
            yield Place(dot + label, held, functools.partial(module.__dict__.__setitem__, label))
