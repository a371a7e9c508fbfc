"""Numbers of tensors, read cheaply: whether one is zero, tiny or not finite, and what an operand looked like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_HALVES = (torch.float16, torch.bfloat16)
_SURE = 1e-9
_SURE_HIGH = 1e9
_PLAIN = (Tensor, Parameter)


def readable(tensor: Tensor) -> bool:
    """Whether the numbers of that tensor may be read at all: a plain one, strided, not empty, with data."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        and tensor.device.type != "meta"
        and not tensor.is_nested
        and tensor.numel() > 0
    )


def magnitude(tensor: Tensor) -> float:
    """Return the rough size of a readable tensor: exact where it is zero, tiny, huge or not finite.

    The sum runs fifty times as fast as the maximum norm and shows NaN, infinity and most sizes; only where it does not
    decide, the largest entry is looked for.
    """
    dtype = tensor.dtype
    if dtype.is_complex:
        return largest(tensor)
    total = (tensor.sum(dtype=torch.float32) if dtype in _HALVES else tensor.sum()).item()
    return abs(total) if _SURE < abs(total) < _SURE_HIGH else largest(tensor)


def largest(tensor: Tensor) -> float:
    """Return the largest absolute entry; NaN where there is one, inf where one is infinite."""
    tensor = tensor.detach()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    low, high = torch.aminmax(tensor)
    low, high = low.item(), high.item()
    return math.nan if low != low or high != high else max(-low, high)


def norm_of(tensor: Tensor) -> Tensor:
    """Return the largest absolute entry as a tensor, without waiting for a device."""
    return torch.linalg.vector_norm(tensor.detach(), float("inf"))


def sizes_of(tensors: Sequence[Tensor]) -> tuple[float, ...]:
    """Return the rough size of each tensor that can be read."""
    wanted = [tensor for tensor in tensors if readable(tensor)]
    return tuple(read_sizes(wanted))


def read_numbers(values: Sequence[Tensor]) -> list[float]:
    """Read 0-dim tensors of any dtypes and devices with one transfer for each kind."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for position, value in enumerate(values):
        groups.setdefault((value.dtype, value.device), []).append(position)
    numbers = [0.0] * len(values)
    for positions in groups.values():
        read = torch.stack([values[position] for position in positions]).tolist()
        for position, number in zip(positions, read, strict=True):
            numbers[position] = float(number)
    return numbers


def read_sizes(tensors: Sequence[Tensor]) -> list[float]:
    """Return the rough sizes of readable tensors; waits once for each device."""
    late = {position: norm_of(tensor) for position, tensor in enumerate(tensors) if tensor.device.type != "cpu"}
    numbers = dict(zip(late, read_numbers(list(late.values())), strict=True))
    return [
        numbers[position] if position in numbers else magnitude(tensor.detach())
        for position, tensor in enumerate(tensors)
    ]


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return what an operand looked like: shape, share of zeros, ends of the finite numbers, NaN and infinities."""
    found: dict[str, Any] = {"shape": tuple(tensor.shape), "dtype": tensor.dtype}
    tensor = tensor.detach()
    if tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return found
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    found["zeros"] = 1.0 - float(torch.count_nonzero(tensor)) / tensor.numel()
    if tensor.dtype.is_floating_point:
        found["nan"] = int(tensor.isnan().sum())
        found["high"] = int((tensor == math.inf).sum())
        found["low"] = int((tensor == -math.inf).sum())
        if found["nan"] or found["high"] or found["low"]:
            tensor = tensor[tensor.isfinite()]
    if tensor.numel() and tensor.dtype is not torch.bool:
        found["min"], found["max"] = float(tensor.min()), float(tensor.max())
    return found


def saved_by(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that a function saved for its backward, as far as they can be read.

    Only for functions that have run: what a hook unpacks (a checkpoint) may be asked for once, and the engine is first.
    """
    if getattr(type(function), "_forward_cls", None) is not None:
        try:
            yield from ((f"tensor{position}", value) for position, value in enumerate(function.saved_tensors))
        except Exception:  # freed, or a hook of the program refuses
            return
        return
    for name in dir(function):
        if name.startswith("_saved_"):
            try:
                value = getattr(function, name)
            except Exception:  # freed, or a hook of the program refuses
                continue
            yield name[7:], value


def leaf_behind(value: Tensor) -> Tensor | None:
    """Return the leaf that a saved value is, or is a view or cast of; None for computed values."""
    function: Any = value.grad_fn
    if function is None:
        return value
    for _ in range(8):
        following = function.next_functions
        if len(following) != 1 or following[0][0] is None:
            return None
        function = following[0][0]
        if (leaf := getattr(function, "variable", None)) is not None:
            return leaf
        if not function.name().startswith(_ONLY_SHAPES):
            return None
    return None


_ONLY_SHAPES = (
    "T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Unsqueeze", "Squeeze", "ToCopy", "Clone", "Reshape",
    "Alias", "Slice", "Select",
)  # fmt: skip
