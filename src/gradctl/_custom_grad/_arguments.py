"""What every call here asks of its arguments, and the sentences it refuses them with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._errors import UsageError
from gradctl._journal import heard_by, keeps_away

pytree: Any = private.get("pytree")


def differentiable(call: str, name: str, x: Any) -> None:
    """Refuse what can have no gradient.

    Raises:
        UsageError: `x` is no tensor, or one of integers.
    """
    if not isinstance(x, Tensor):
        raise UsageError(f"{call}: {name} is of type {type(x).__name__}, not a tensor", fix=f"pass {name} as a tensor")
    if not (x.is_floating_point() or x.is_complex()):
        raise UsageError(
            f"{call}: {name} is of {word(x.dtype)}, which has no gradient",
            why="only floating and complex tensors have one",
            fix=f"leave the call out, or convert first: {name}.float()",
        )


def real(call: str, name: str, number: Any) -> float:
    """Return `number` as a float.

    Raises:
        UsageError: it is not a finite real number.
    """
    if isinstance(number, float):
        value = number  # a compiled function may hold a symbol here
    elif isinstance(number, bool | str | bytes | complex) or not hasattr(number, "__float__"):
        raise UsageError(f"{call}: {name}={number!r} is not a number", fix=f"a real number as {name}")
    else:
        value = float(number)
    if not -math.inf < value < math.inf:
        raise UsageError(
            f"{call}: {name}={value}", why="it would turn the gradient into inf or nan", fix="a finite number"
        )
    return value


def each(call: str, name: str, x: Any, one: Callable[[Tensor], Tensor]) -> Any:
    """Apply `one` to every tensor of a nested tuple, list or dict; None passes, anything else is refused by its place.

    Raises:
        UsageError: a leaf is no floating or complex tensor, or there is none.
    """
    leaves, spec = pytree.tree_flatten_with_path(x)
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise UsageError(
            f"{call}: {name} is of type {type(x).__name__} and holds no tensor", fix=f"pass {name} as a tensor"
        )
    out: list[Any] = []
    for path, leaf in leaves:
        if leaf is not None:
            differentiable(call, name + pytree.keystr(path), leaf)
        out.append(None if leaf is None else one(leaf))
    return pytree.tree_unflatten(out, spec)


def same(call: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors that would have to share a gradient and cannot.

    Raises:
        UsageError: shapes, dtypes or devices differ.
    """
    if x.shape == other.shape and x.dtype is other.dtype and x.device == other.device:
        return
    for aspect, ours, theirs, fix in (
        ("shape", list(x.shape), list(other.shape), f"bring {name} to the shape of {other_name}"),
        ("dtype", word(x.dtype), word(other.dtype), f"{name}.to({other_name}.dtype)"),
        ("device", x.device, other.device, f"{name}.to({other_name}.device)"),
    ):
        if ours != theirs:
            raise UsageError(
                f"{call}: {name} has {aspect} {ours}, {other_name} has {theirs}",
                why="a gradient has the shape, dtype and device of its tensor; nothing is summed or cast silently",
                fix=fix,
            )


def word(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def say_kept_away(value: Tensor, how: Literal["none", "zero"]) -> None:
    """Say to whoever records the program that it keeps the gradient of a value away; costs a look at an empty list."""
    if not torch.compiler.is_compiling() and heard_by and value.requires_grad:
        keeps_away(value, how)
