"""Whether what a backward returned can be the gradients of its inputs; torch sums, casts and skips without a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradctl._custom_grad._arguments import pytree, word
from gradctl._custom_grad._pack import Layout
from gradctl._errors import BadVjp


@dataclass(slots=True)
class Expected:
    """What the gradients of one call must look like.

    Args:
        call: the name of the function, for messages.
        parameters: the name of each argument.
        layout: how the arguments are nested.
        like: shape, dtype and device of each tensor in them.
        autocast_dtype: the dtype of autocast in forward, in which a gradient may come back too; None without autocast.
    """

    call: str
    parameters: tuple[str, ...]
    layout: Layout | tuple[Layout, ...] | str | None
    like: list[tuple[torch.Size, torch.dtype, torch.device]]
    autocast_dtype: torch.dtype | None

    def names(self) -> list[str]:
        """Return the name of each tensor: `x`, `pair[0]`."""
        if not isinstance(self.layout, tuple):
            return list(self.parameters)
        both = zip(self.parameters, self.layout, strict=True)
        return [name for parameter, layout in both for name in layout.names(parameter)]


def returned(expected: Expected, grads: Any, needed: Sequence[bool]) -> list[Tensor | None]:
    """Return one gradient for each tensor in the arguments, None where none is needed.

    Raises:
        BadVjp: count, structure, shape, dtype or device do not fit, or a gradient is missing.
    """
    flat = _flat(expected, grads)
    out: list[Tensor | None] = []
    for number, grad in enumerate(flat):
        need, (shape, dtype, device) = needed[number], expected.like[number]
        if grad is None:
            if need:
                raise _missing(expected, number)
        elif not isinstance(grad, Tensor):
            raise _wrong(expected, number, "type", type(grad).__name__, "Tensor")
        elif grad.shape != shape:
            raise _wrong(expected, number, "shape", list(grad.shape), list(shape))
        elif grad.dtype is not dtype:
            if grad.dtype is not expected.autocast_dtype or dtype is not torch.float32:
                raise _wrong(expected, number, "dtype", word(grad.dtype), word(dtype))
            grad = grad.to(dtype)  # as autocast does for its own operations
        elif grad.device != device:
            raise _wrong(expected, number, "device", grad.device, device)
        out.append(grad if need else None)
    return out


def _flat(expected: Expected, grads: Any) -> Sequence[Any]:
    count = len(expected.parameters)
    if count == 1 and not isinstance(grads, tuple | list):
        grads = (grads,)
    if not isinstance(grads, tuple | list) or len(grads) != count:
        got = f"{len(grads)} gradients" if isinstance(grads, tuple | list) else f"one {type(grads).__name__}"
        raise BadVjp(
            f"custom_vjp({expected.call}): backward returned {got} for {count} arguments",
            what=f"the arguments are {', '.join(expected.parameters)}",
            fix="a tuple with one gradient for each argument, None for one that has none",
        )
    if not isinstance(expected.layout, tuple):  # plain tensors
        return grads
    flat: list[Any] = []
    for name, entry, layout in zip(expected.parameters, grads, expected.layout, strict=True):
        if entry is None:
            flat += [None] * sum(layout.holes)
            continue
        leaves, spec = ([entry], layout.spec) if layout.spec.is_leaf() else pytree.tree_flatten(entry)
        if spec != layout.spec:
            raise BadVjp(
                f"custom_vjp({expected.call}): backward returned another structure for {name}",
                what=f"got {type(entry).__name__} with {len(leaves)} leaves, {name} has {len(layout.holes)}",
                fix=f"a gradient nested as {name} is, None for what has none",
            )
        for leaf, hole in zip(leaves, layout.holes, strict=True):
            _fits(expected, name, leaf, hole)
            flat += [leaf] if hole else []
    return flat


def _fits(expected: Expected, name: str, entry: Any, hole: bool) -> None:
    if not hole and entry is not None:
        raise BadVjp(
            f"custom_vjp({expected.call}): backward returned a gradient for {name}, which is no tensor",
            why="a value that is no tensor has no gradient",
            fix=f"None in the place of {name}",
        )


def _missing(expected: Expected, number: int) -> BadVjp:
    name = expected.names()[number]
    return BadVjp(
        f"custom_vjp({expected.call}): backward returned None for {name}, which requires a gradient",
        why="torch would skip it in silence, and what lies before it would not train",
        fix=f"its gradient, torch.zeros_like({name}) if that is 0; or call with gradctl.stop({name})",
    )


def _wrong(expected: Expected, number: int, aspect: str, got: Any, want: Any) -> BadVjp:
    name = expected.names()[number]
    silent = {
        "shape": "torch would sum it to that shape in silence where it can",
        "dtype": "torch would cast it in silence",
        "device": "a gradient lies beside its tensor",
    }
    fixes = {
        "shape": f"sum over what was broadcast: grad.sum_to_size({name}.shape)",
        "dtype": f"grad.to({name}.dtype)",
        "device": f"grad.to({name}.device)",
    }
    return BadVjp(
        f"custom_vjp({expected.call}): backward returned {aspect} {got} for {name}, which has {aspect} {want}",
        why=silent.get(aspect),
        fix=fixes.get(aspect, "a tensor"),
    )
