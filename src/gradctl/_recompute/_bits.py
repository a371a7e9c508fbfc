"""What the tensors of a batch are, in one number each: cheap for many small ones, and aware of order.

A sum of words would not see rows that changed places, as another random permutation makes them. So words are added into
rows of an odd length first, and these are weighed by position; a row that moves by any power of two is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._recompute._storage import Verify, fingerprint

_no_dispatch = private.get("no_torch_dispatch")
_ROW: Final = 509
_WEIGHTS: Final = np.random.default_rng(0).integers(1, 2**63 - 1, _ROW, dtype=np.int64) | 1
_SAMPLES: Final = 256
_SMALL: Final = 16384
"""Words up to which tensors are looked at together, in a copy."""

Saved = tuple[int, Tensor]
"""A saved tensor, after the identity of its storage."""


def bits_of(batch: Sequence[Saved], verify: Verify) -> Any:
    """Return what tells these tensors from others: it differs when any of their bits differ, but for chance.

    A tensor that stands there twice is looked at once, and a storage that is there in pieces is looked at as a whole.

    Args:
        batch: the tensors, with the identity of their storages.
        verify: "full", or "sample" for 256 words of each tensor.
    """
    with _no_dispatch():
        return _bits_of(batch, verify)


def _bits_of(batch: Sequence[Saved], verify: Verify) -> Any:
    shapes = tuple([(tensor.shape, tensor.dtype) for _, tensor in batch])
    pieces: dict[int, dict[Any, Tensor]] = {}
    for storage, tensor in batch:
        where = (tensor.data_ptr(), tensor.shape) if tensor.layout is torch.strided else id(tensor)
        pieces.setdefault(storage, {})[where] = tensor
    found: list[Any] = []
    small: list[Any] = []
    for views in pieces.values():
        tensors = list(views.values())
        if len(tensors) > 1 and verify == "full" and _is_whole(tensors):
            first = tensors[0].detach()
            tensors = [first.as_strided((first.untyped_storage().nbytes() // first.itemsize,), (1,), 0)]
        for tensor in tensors:
            if not tensor.is_cpu or tensor.layout is not torch.strided:
                found.append(_elsewhere(tensor, verify))
                continue
            words, tail = _words(tensor)
            if tail:
                found.append(tail)
            if verify == "sample":
                words = words[:: len(words) // _SAMPLES + 1]
            if len(words) <= _SMALL:
                small.append(words)
            else:
                found.append(_sum_of(words))
    if small:
        found.append(_sum_of(np.concatenate(small) if len(small) > 1 else small[0]))
    return shapes, found


def _is_whole(views: list[Tensor]) -> bool:
    return sum(view.nbytes for view in views) == views[0].untyped_storage().nbytes()


def _words(tensor: Tensor) -> tuple[Any, bytes]:
    """Return a tensor's elements as they lie in memory, in words of eight bytes, and the bytes that are left."""
    dtype = tensor.dtype
    if dtype is torch.uint8 and tensor.dim() == 1:
        return _NOTHING, b""  # the workspace of the fused CPU LSTM, of which nobody has written all bytes
    tensor = tensor.detach()
    try:
        flat: Any = tensor.numpy().ravel("K")
    except (TypeError, RuntimeError):  # a dtype that NumPy does not have, a lazy conjugate
        plain = tensor.resolve_conj().resolve_neg().contiguous()
        flat = plain.reshape(-1).view(_SAME_SIZE.get(plain.itemsize, torch.uint8)).numpy()
    nbytes = flat.nbytes
    if nbytes & 7:
        raw = flat.view(np.uint8)
        return raw[: nbytes & ~7].view(np.int64), raw[nbytes & ~7 :].tobytes()
    return flat.view(np.int64), b""


def _sum_of(words: Any) -> Any:
    count = len(words)
    if count <= _ROW:
        return int(words.dot(_WEIGHTS[:count]))
    rows = count // _ROW
    whole = rows * _ROW
    added = np.add.reduce(words[:whole].reshape(rows, _ROW), 0)
    return int(added.dot(_WEIGHTS)), int(words[whole:].dot(_WEIGHTS[: count - whole]))


def _elsewhere(tensor: Tensor, verify: Verify) -> Any:
    """Look at a tensor that NumPy cannot look at: on another device, or sparse."""
    if tensor.layout is not torch.strided:
        return [_elsewhere(part, verify) for part in _parts(tensor.detach())]
    with torch.no_grad():
        raw = tensor.detach().resolve_conj().resolve_neg()
        if raw.is_cpu:
            return _bits_of([(0, raw)], verify)  # a part of a sparse one
        if raw.numel() == 0 or verify != "full":
            return fingerprint(raw, verify)
        flat = raw.contiguous().reshape(-1).view(torch.uint8)
        some = flat[:: flat.numel() // 65536 + 1].to(torch.int64)
        return fingerprint(raw, verify), int((some * torch.arange(1, some.numel() + 1, device=flat.device)).sum())


_NOTHING: Final = np.zeros(0, dtype=np.int64)
_SAME_SIZE: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]
