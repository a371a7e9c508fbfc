"""Reading gradients: what an optimizer will apply, as plain local tensors whose norms can be taken.

A DTensor is read by its local part, never by an operation of its own: that would be a collective, and ranks sample at
different steps. A sparse gradient is read by its stored values (if it is not coalesced the norm is an upper estimate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl import _torch_private as private

_PLAIN: set[type] = {Tensor}
_PLAIN_PARAMETERS = (Tensor, Parameter)
_REAL = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_no_dispatch: Any = vars(torch._C.TensorBase).get("__torch_dispatch__", None) or Tensor.__dict__["__torch_dispatch__"]
_foreach_norm: Any = private.find("foreach_norm")


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def local_part(tensor: Any) -> Tensor | None:
    """Return `tensor` as a plain strided tensor of this process, or None if it cannot be read without its own code."""
    kind: Any = type(tensor)
    if kind not in _PLAIN_PARAMETERS:
        tensor = getattr(tensor, "_local_tensor", tensor)
        kind = type(tensor)
        if kind not in _PLAIN_PARAMETERS and kind.__torch_dispatch__ is not _no_dispatch:
            return None
    if tensor.layout is not torch.strided:
        if tensor.layout is torch.sparse_coo:
            tensor = tensor._values()
        elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
            tensor = tensor.values()
        else:
            return None
    if tensor.dtype in _REAL and not tensor.is_meta:
        return tensor
    return torch.view_as_real(tensor) if tensor.is_complex() and not tensor.is_meta else None


def are_plain(grads: Sequence[Any]) -> bool:
    """Whether each of `grads` is there and is a plain tensor."""
    return set(map(type, grads)) == _PLAIN


def is_simple(tensors: Sequence[Tensor]) -> bool:
    """Whether one fused norm reads all of `tensors`, plain ones: strided, real, on one device, not of mixed width."""
    if not tensors:
        return False
    devices = {tensor.device for tensor in tensors}
    doubles = {tensor.dtype is torch.float64 for tensor in tensors}
    return (
        len(devices) == 1
        and len(doubles) == 1
        and all(
            tensor.layout is torch.strided and tensor.is_floating_point() and not tensor.is_meta and tensor.numel()
            for tensor in tensors
        )
    )


def stacked_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norms of `tensors` (strided, real, one group of `by_place`) as one vector.

    The norm of 16-bit gradients is taken in float32, where their squares do not overflow.
    """
    dtype = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    if _foreach_norm is not None:
        return torch.stack(_foreach_norm(tensors, 2.0, dtype))
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors])


def by_place(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group the indexes of `tensors` by device, double precision apart."""
    groups: dict[tuple[torch.device, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype is torch.float64), []).append(index)
    return list(groups.values())


def exact_norm(tensor: Tensor) -> float:
    """Return the norm of `tensor` even where squares overflow or vanish in its precision; NaN if it is not finite."""
    if not bool(torch.isfinite(tensor).all()):
        return math.nan
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0.0:
        return 0.0
    return float(torch.linalg.vector_norm(tensor.double() / largest)) * largest
