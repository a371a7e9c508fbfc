"""The norm of many gradients at once, and changing them all by one factor.

On a CPU most of the time of clipping many small tensors goes into calling an operation for each. Here small gradients
are gathered in a flat scratch buffer with one operation and read with one more; large ones are read where they lie.
Gradients are changed in place, by one operation that takes them all, and only if there is something to change.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradctl import _torch_private as private

_SMALL = 1 << 16  # elements: below, one more call costs more than copying
_GATHERED = 1 << 20  # elements gathered at once, so that the scratch buffer stays within 4 MiB
_FEW = 12  # fewer are read one by one for what gathering costs
_LAYOUTS_KEPT = 16  # a model with experts has another set of gradients in every step
_find = functools.cache(private.find)
_PLAIN = (torch.float32, torch.float64)


class Buckets:
    """Reads the gradients of the same parameters step after step; how they are gathered is decided once."""

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._layouts: dict[tuple[tuple[int, ...], torch.dtype | None], _Layout] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}

    def of(self, parameters: Sequence[Tensor]) -> Gradients:
        """Return the gradients of `parameters`, those that exist."""
        found = [parameter.grad for parameter in parameters]
        gradients = [gradient for gradient in found if gradient is not None]
        owners, missing = parameters, ()
        if len(gradients) != len(found):
            missing = tuple([index for index, gradient in enumerate(found) if gradient is None])
            owners = [owner for owner, gradient in zip(parameters, found, strict=True) if gradient is not None]
        if len(parameters) != len(self._parameters) or not all(map(operator.is_, parameters, self._parameters)):
            self._parameters = list(parameters)
            self._layouts.clear()
        key = (missing, gradients[0].dtype if gradients else None)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.clear()
            layout = self._layouts[key] = _layout_of(gradients)
        return Gradients(owners, gradients, layout, self._scratch)


class Gradients:
    """The gradients of one step.

    Args:
        owners: the parameters.
        tensors: their gradients, which are read and changed.
        layout: how they are gathered.
        scratch: a flat buffer for each dtype, shared from step to step.
    """

    def __init__(
        self, owners: Sequence[Tensor], tensors: list[Tensor], layout: _Layout, scratch: dict[torch.dtype, Tensor]
    ) -> None:
        self.owners = owners
        self.tensors = tensors
        self._layout = layout
        self._scratch = scratch
        self._as_laid_out = False
        if layout.others:
            self._sum_rows(layout.others)

    def norm(self) -> float | Tensor:
        """Return the 2-norm of all gradients taken as one vector, summed in float32 or wider.

        Returns:
            A number if everything is on the CPU; otherwise a tensor [] on one of the devices, without waiting for it.
            NaN or inf if a gradient holds one; also inf, or 0, if a square is outside of what float32 holds: then
            `exact_norm` tells.
        """
        if not self.tensors:
            return 0.0
        layout, squares = self._layout, 0.0
        try:
            for members, shape, numel in layout.gathered:
                flat = self._buffer(layout.dtype, numel)
                torch.cat(members(self.tensors), out=flat.view(shape))
                squares += torch.dot(flat, flat).item()
            for norm in _norms([self.tensors[index] for index in layout.large]):
                value = norm.item()
                squares += value * value  # `**` would raise where this is inf
        except (RuntimeError, NotImplementedError, TypeError):  # not laid out as they were: strides, or sparse
            self._sum_rows(range(len(self.tensors)))
            self._layout = _layout_of(())  # torch's own way, for this once
            return _norm_one_by_one(self.tensors)
        self._as_laid_out = True
        if not layout.others:
            return math.sqrt(squares) if squares == squares else math.nan
        rest = _norm_one_by_one([self.tensors[index] for index in layout.others])
        if isinstance(rest, Tensor):
            return (rest * rest + squares).sqrt()
        return math.hypot(rest, math.sqrt(squares))

    @torch.no_grad()
    def exact_norm(self) -> float:
        """Return the norm, summed in float64; waits for the devices."""
        total = 0.0
        for values in map(_values, self.tensors):
            kind = torch.complex128 if values.is_complex() else torch.float64
            value = float(torch.linalg.vector_norm(_local(values.to(kind))))
            total = math.hypot(total, value)
        return total

    @torch.no_grad()
    def multiply(self, factor: float | Tensor) -> None:
        """Multiply all gradients by `factor`, in place."""
        layout, rest = self._layout, self.tensors
        kernel = _find("unscale_kernel")
        if kernel is not None and self._as_laid_out and layout.small and not isinstance(factor, Tensor):
            # The loss scaler's kernel is the one that takes a whole list in a single call on a CPU.
            for members, _, _ in layout.gathered:
                kernel(list(members(self.tensors)), torch.zeros(()), torch.full((), factor))
            rest = [self.tensors[index] for index in (*layout.large, *layout.others)]
        multiply = _find("foreach_mul")
        for tensors in _by_kind(map(_values, rest)):
            one = factor.to(tensors[0].device) if isinstance(factor, Tensor) else factor
            if multiply is not None:
                multiply(tensors, one)
            else:
                for tensor in tensors:
                    tensor.mul_(one)

    @torch.no_grad()
    def clamp(self, value: float) -> None:
        """Bring every element into [-value, value], in place. NaN stays NaN."""
        dense = [owner for owner, tensor in zip(self.owners, self.tensors, strict=True) if _values(tensor) is tensor]
        torch.nn.utils.clip_grad_value_(dense, value)
        for tensor in self.tensors:
            if (values := _values(tensor)) is not tensor:
                values.clamp_(-value, value)

    def _sum_rows(self, indexes: Iterable[int]) -> None:
        """Let sparse gradients name each row once: what is measured and clamped are the sums."""
        for index in indexes:
            tensor = self.tensors[index]
            if tensor.layout is torch.sparse_coo and not tensor.is_coalesced():
                self.tensors[index] = self.owners[index].grad = tensor.coalesce()

    def _buffer(self, dtype: torch.dtype, numel: int) -> Tensor:
        found = self._scratch.get(dtype)
        if found is None or found.numel() < numel:
            found = self._scratch[dtype] = torch.empty(numel, dtype=dtype)
        return found if found.numel() == numel else found[:numel]


@dataclass(frozen=True, slots=True)
class _Layout:
    """How gradients are read.

    Args:
        gathered: what picks the gradients of one gathering, its shape and its number of elements.
        dtype: of the scratch buffer.
        small: indexes of all that are gathered.
        large: indexes of those that are read where they lie.
        others: indexes of those that torch reads: on other devices, of other dtypes or classes, sparse.
    """

    gathered: tuple[tuple[Any, tuple[int, ...], int], ...]
    dtype: torch.dtype
    small: tuple[int, ...]
    large: tuple[int, ...]
    others: tuple[int, ...]


def _layout_of(tensors: Sequence[Tensor]) -> _Layout:
    plain = [
        index
        for index, tensor in enumerate(tensors)
        if type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.dtype in _PLAIN
        and tensor.is_contiguous()
    ]
    dtype = tensors[plain[0]].dtype if plain else torch.float32
    plain = [index for index in plain if tensors[index].dtype is dtype]
    # Those of the same width lie one after the other without being reshaped, which would be a call for each.
    by_width: dict[tuple[int, ...], list[int]] = {}
    for index in plain:
        tensor = tensors[index]
        if tensor.dim() and tensor.numel() and tensor.numel() <= _SMALL:
            by_width.setdefault(tuple(tensor.shape[1:]), []).append(index)
    gathered: list[tuple[Any, tuple[int, ...], int]] = []
    small: list[int] = []
    for width, indexes in by_width.items():
        if len(indexes) < _FEW:
            continue
        small += indexes
        each = max(1, _GATHERED // max(tensors[index].numel() for index in indexes))
        for start in range(0, len(indexes), each):
            part = indexes[start : start + each]
            rows = sum(tensors[index].shape[0] for index in part)
            pick = operator.itemgetter(*part) if len(part) > 1 else operator.itemgetter(slice(part[0], part[0] + 1))
            gathered.append((pick, (rows, *width), rows * math.prod(width)))
    few = set(small)
    large = tuple(index for index in plain if index not in few)
    others = tuple(sorted(set(range(len(tensors))) - set(plain)))
    return _Layout(tuple(gathered), dtype, tuple(small), large, others)


@torch.no_grad()
def _norm_one_by_one(tensors: Sequence[Tensor]) -> float | Tensor:
    """Return the norm as torch reads it, with 16-bit gradients summed in float32: squares above 65504 are none."""
    norms: list[Tensor] = []
    for group in _by_kind(map(_values, tensors)):
        half = group[0].dtype in (torch.float16, torch.bfloat16)
        norms += _norms(group, torch.float32 if half else None)
    if not norms:
        return 0.0
    device = next((norm.device for norm in norms if not norm.is_cpu), norms[0].device)
    total = torch.linalg.vector_norm(torch.stack([norm.to(device, non_blocking=True).float() for norm in norms]))
    return total.item() if total.is_cpu else total


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Sequence[Tensor]:
    """Return the norm of each tensor, all of one device, dtype and class, summed in `dtype`."""
    foreach = _find("foreach_norm")
    if not tensors or (foreach is not None and type(tensors[0]) is Tensor):
        return foreach(tensors, 2, dtype=dtype) if tensors and foreach is not None else ()
    return [_local(torch.linalg.vector_norm(tensor, dtype=dtype)) for tensor in tensors]


def _values(tensor: Tensor) -> Tensor:
    """Return what a sparse gradient holds; a dense one itself."""
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor


def _local(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, a plain one."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def _by_kind(tensors: Any) -> list[list[Tensor]]:
    grouped: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        grouped.setdefault((tensor.device, tensor.dtype, type(tensor)), []).append(tensor)
    return list(grouped.values())
