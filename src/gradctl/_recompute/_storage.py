"""Storages: how a tensor lies in one, aliases that share its version counter, fingerprints, packing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from gradctl import _torch_private as private

Codec = Literal["bits", "int16"]
Verify = Literal["full", "sample", "off"]
_SAMPLES = 256
_PERIOD = 1021


class Geometry(NamedTuple):
    """How a tensor lies in its storage; strides and offset in elements."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    def view(self, storage: UntypedStorage) -> Tensor:
        """Return the tensor of this geometry on a storage."""
        made = torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.size, self.stride
        )
        return self.marked(made)

    def marked(self, made: Tensor) -> Tensor:
        """Return a tensor with the marks that make it a conjugate or a negative."""
        if self.conj:
            made = _conjugate(made)
        return _negative(made) if self.neg else made


_conjugate = torch.ops.aten._conj.default
_negative = torch.ops.aten._neg_view.default


def geometry(tensor: Tensor) -> Geometry:
    """Return how a tensor lies in its storage."""
    return Geometry(
        tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.is_conj(), tensor.is_neg()
    )


_keep_version = private.get("dispatch_key_guard")
_no_dispatch = private.get("no_torch_dispatch")
_IN_PLACE_OR_VIEW = torch._C.DispatchKey.ADInplaceOrView


def dispatches(tensor: Tensor) -> bool:
    """Whether a tensor's class handles operations itself (DTensor, quantized wrappers): it holds its data elsewhere."""
    kind: Any = type(tensor)
    plain: Any = Tensor
    return kind.__torch_dispatch__ is not plain.__torch_dispatch__


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor on the same storage, without history, that shares the version counter; no mode sees it made."""
    if dispatches(tensor):
        return tensor.detach()  # what holds its tensors inside must be asked itself
    with _no_dispatch(), _keep_version(_IN_PLACE_OR_VIEW, False):
        return tensor.detach()


def copy_of(storage: UntypedStorage) -> UntypedStorage:
    """Return a copy of a storage; no mode sees it made."""
    with _no_dispatch():
        return storage.clone()


def fingerprint(tensor: Tensor, verify: Verify) -> Any:
    """Return a number that differs when the tensor's bits differ, but for a chance of about 2**-64.

    It also sees the same numbers in another order. Changes that are nothing but an even number of flips of the top bits
    of 64-bit words are seen only where they are among 256 evenly spread words. `sample` looks at 256 elements, evenly
    spread. No mode sees it made.
    """
    with _no_dispatch(), torch.no_grad():
        if tensor.numel() == 0 or tensor.is_meta:
            return 0
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        if verify == "sample" and tensor.numel() > _SAMPLES:
            tensor = _spread(tensor)
        if not tensor.is_contiguous():
            tensor = _in_memory_order(tensor)
        raw = tensor.reshape(-1).view(torch.uint8)
        if int(raw.storage_offset()) % 8:
            raw = raw.clone()  # words begin at whole words
        whole = raw.numel() // 8 * 8
        words = raw[:whole].view(torch.int64)
        total = int(_hash(words)) if whole else 0
        tail = raw[whole:]
        return total if tail.numel() == 0 else (total, tuple(tail.tolist()))


def _hash(words: Tensor) -> Tensor:
    """Return a weighted sum of words, modulo 2**64, and of some of them with their bits mixed.

    The weights repeat with a prime period, so that rows and blocks that change places change the sum.
    """
    weights = _weights(words.device)
    whole = words.numel() // _PERIOD * _PERIOD
    total = (words[whole:] * weights[: words.numel() - whole]).sum()
    if whole:
        total += (words[:whole].view(-1, _PERIOD).sum(0) * weights).sum()
    some = words[:: words.numel() // _SAMPLES + 1]
    # A sum cannot tell two flips of a top bit from none: each adds 2**63.
    return total + ((some ^ (some >> 29)) * weights[: some.numel()]).sum()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    odd = torch.randint(-(2**62), 2**62, (_PERIOD,), generator=torch.Generator().manual_seed(1)) * 2 + 1
    return odd.to(device)


def _spread(tensor: Tensor) -> Tensor:
    """Return evenly spread elements, whatever the strides."""
    at = torch.arange(_SAMPLES, device=tensor.device) * (tensor.numel() // _SAMPLES)
    where = torch.full_like(at, int(tensor.storage_offset()))
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        where += at % size * stride
        at = at // size
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())[where]


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor as it lies in memory, and a copy of any other: the same elements for the same geometry."""
    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), -tensor.size(dim)))
    return tensor.permute(order).contiguous()


@dataclass(frozen=True, slots=True)
class Packed:
    """A storage in fewer bytes, exactly.

    Args:
        codec: how.
        data: the bits or the int16 numbers.
        count: elements of the storage.
        value: what a set bit stands for, shape [1].
    """

    codec: Codec
    data: Any
    count: int
    value: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return int(self.data.nbytes)


def pack(storage: UntypedStorage, dtype: torch.dtype, codec: Codec) -> Packed | None:
    """Pack a storage; None when that would not be exact.

    Args:
        storage: what to pack.
        dtype: what its elements are.
        codec: `bits` for a storage that holds zero and one other value, `int16` for int64 indices below 2**15.
    """
    with _no_dispatch(), torch.no_grad():
        flat = torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
        if codec == "int16":
            small = flat.to(torch.int16)
            same = torch.equal(small.to(dtype), flat)
            # Not a part of what was packed: that would hold all of it.
            return Packed(codec, small, flat.numel(), torch.empty(0, dtype=dtype)) if same else None
        mask = flat != 0
        value = flat.amax().reshape(1) if dtype != torch.bool else torch.ones(1, dtype=dtype, device=flat.device)
        if dtype != torch.bool and not torch.equal(torch.where(mask, value, torch.zeros_like(value)), flat):
            return None
        if dtype.is_floating_point and bool((torch.signbit(flat) & ~mask).any()):
            return None  # a zero with a sign is not the zero that comes back
        if flat.is_cpu:
            return Packed(codec, np.packbits(mask.numpy()), flat.numel(), value)
        padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=flat.device)
        padded[: flat.numel()] = mask
        weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=flat.device)
        return Packed(codec, (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8), flat.numel(), value)


def unpack(packed: Packed) -> UntypedStorage:
    """Return the storage that `pack` was given, bit for bit."""
    if packed.codec == "int16":
        return packed.data.to(torch.int64).untyped_storage()
    if isinstance(packed.data, np.ndarray):
        mask = torch.from_numpy(np.unpackbits(packed.data, count=packed.count)).view(torch.bool)
    else:
        shifts = torch.arange(7, -1, -1, device=packed.data.device)
        mask = ((packed.data.unsqueeze(1) >> shifts) & 1).reshape(-1)[: packed.count].to(torch.bool)
    if packed.value.dtype == torch.bool:
        return mask.untyped_storage()
    return torch.where(mask, packed.value, torch.zeros_like(packed.value)).untyped_storage()
