"""A sketch: about a thousand elements of a tensor, always the same ones, read through a strided view.

The stride is odd and coprime to every size of the tensor, so that no column is sampled for ever while another is never
seen. Elements are counted in the parameter's own memory order, so that a weight and its gradient are sampled at the
same places whatever the layout of the gradient is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ELEMENTS = 1024


def stride_for(numel: int, sizes: Sequence[int], elements: int = ELEMENTS) -> int:
    """Return the sampling stride for a tensor of `numel` elements: 1 if it is small, else odd and coprime to `sizes`.

    Args:
        numel: number of elements.
        sizes: the tensor's sizes.
        elements: most elements wanted.
    """
    if numel <= elements:
        return 1
    stride = -(-numel // elements) | 1
    while any(math.gcd(stride, size) > 1 for size in sizes):
        stride += 2
    return stride


class Places:
    """Which elements of one parameter are sampled."""

    __slots__ = ("_index", "contiguous", "count", "dense", "numel", "order", "sizes", "stride", "strides")

    def __init__(self, like: Tensor) -> None:
        sizes, strides = like.shape, like.stride()
        self.numel = like.numel()
        self.order = sorted(range(len(sizes)), key=lambda axis: (-strides[axis], axis))
        self.sizes = [sizes[axis] for axis in self.order]
        self.strides = strides
        self.contiguous = like.is_contiguous()
        self.dense = self.contiguous or like.permute(self.order).is_contiguous()
        self.stride = stride_for(self.numel, self.sizes)
        self.count = (self.numel - 1) // self.stride + 1 if self.numel else 0
        self._index: tuple[Tensor, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the sampled elements of `tensor`, shape `[count]`: a view, or a small copy for an odd layout."""
        if self.dense and (tensor.stride() == self.strides or (self.contiguous and tensor.is_contiguous())):
            return tensor.as_strided((self.count,), (self.stride,))
        if not self.sizes:
            return tensor.reshape(1)
        if self._index is None or self._index[0].device != tensor.device:
            flat = torch.arange(0, self.numel, self.stride, device=tensor.device)
            self._index = torch.unravel_index(flat, self.sizes)
        return tensor.permute(self.order)[self._index]


def gather(places: Sequence[Places], tensors: Sequence[Tensor]) -> Tensor:
    """Return all sketches in one float32 vector."""
    parts = [place.of(tensor) for place, tensor in zip(places, tensors, strict=True)]
    return torch.cat([part if part.dtype is torch.float32 else part.float() for part in parts])


def sums(vector: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum of each part of `vector`, part after part `lengths` long."""
    if vector.device.type in ("cpu", "cuda"):
        return torch.segment_reduce(vector, "sum", lengths=lengths)
    owner = torch.arange(len(lengths), device=vector.device).repeat_interleave(lengths)
    return vector.new_zeros(len(lengths)).index_add_(0, owner, vector)
