"""Storages, counted once each, and the table of what keeps them alive."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST_ROWS = 100
_SPARSE_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class SavedRow:
    """What one place keeps for backward.

    Args:
        where: the operation (`AddmmBackward0`), or `file:line function`.
        module: FQN of the nearest module, indexes written `*`; None where there is none.
        bytes: storage bytes that no earlier row has counted.
        count: saved values, those that share a storage included.
    """

    where: str
    module: str | None
    bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class SavedBytes:
    """What a graph keeps for backward, parameters excluded.

    Args:
        total: bytes of distinct storages.
        count: saved values.
        rows: most bytes first; they add up to `total`.
        nodes: graph nodes visited; 0 when counted by hooks.
        seconds: what looking cost.
        complete: False when the limit of nodes or time ended the walk early.
        packed: values that a hook of the program replaced by something that holds no tensor, as activation
            checkpointing does: backward makes them again.
        unread: values or nodes whose bytes cannot be read from Python.
        fault: text of what went wrong on our side, None if nothing did.
    """

    total: int
    count: int
    rows: list[SavedRow]
    nodes: int
    seconds: float
    complete: bool = True
    packed: int = 0
    unread: int = 0
    fault: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures leave out, one sentence each."""
        found: list[str] = []
        if not self.complete and self.nodes:
            found.append(f"the graph was read up to its first {self.nodes} nodes")
        elif not self.complete:
            found.append("the hooks stepped aside for torch.func: only what was saved before it is counted")
        if self.packed:
            found.append(f"{self.packed} saved values are recomputed or fetched by hooks of the program, not kept")
        if self.unread:
            found.append(f"{self.unread} saved values cannot be read from Python")
        if self.fault:
            found.append(f"reading stopped: {self.fault}")
        return tuple(found)


def storage_keys(tensors: Iterable[Tensor]) -> set[int]:
    """Return the keys of the storages of `tensors`, as `walk` and `arm_lines` take them in `exclude_storages`."""
    keys: set[int] = set()
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in tensors:
            try:
                keys.update(key for key, _ in pieces(tensor))
            except (NotImplementedError, RuntimeError):
                continue
    return keys


def pieces(tensor: Any) -> list[tuple[int, int]]:
    """Return key and bytes of each storage below `tensor`: one for a plain tensor, the local part for a DTensor.

    Raises:
        NotImplementedError: the layout keeps its data where Python cannot look (MKL-DNN).
        RuntimeError: the tensor is a wrapper that torch's transforms have already closed.
    """
    kind: Any = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        try:
            return pieces(object.__getattribute__(tensor, "_local_tensor"))
        except AttributeError:
            if hasattr(kind, "__tensor_flatten__"):
                inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
                return [piece for part in inner for piece in pieces(part)]
    parts = _SPARSE_PARTS.get(tensor.layout)
    if parts is not None:
        return [piece for part in parts for piece in pieces(getattr(tensor.detach(), part)())]
    storage = tensor.untyped_storage()
    # The address of the storage object: unlike `data_ptr` it is there for meta tensors and materialises nothing.
    return [(storage._cdata, storage.nbytes())]


class Tally:
    """Adds up saved values; a storage counts once, where it is met first.

    Args:
        exclude: keys of storages that count nothing and make no row.
    """

    def __init__(self, exclude: Collection[int]) -> None:
        self._exclude = exclude
        self._seen: set[int] = set()
        self._rows: dict[tuple[str, str | None], list[int]] = {}
        self.total = 0
        self.count = 0
        self.unread = 0

    def add(self, tensor: Any, where: str, module: str | None) -> Any:
        """Count one saved value; what is returned is kept as long as it is."""
        try:
            found = pieces(tensor)
        except (NotImplementedError, RuntimeError, AttributeError):
            self.unread += 1
            return
        found = [(key, size) for key, size in found if key not in self._exclude]
        if not found:
            return
        fresh = sum(size for key, size in dict(found).items() if key not in self._seen)
        self._seen.update(key for key, _ in found)
        row = self._rows.setdefault((where, module), [0, 0])
        row[0] += fresh
        row[1] += 1
        self.total += fresh
        self.count += 1

    def rows(self) -> list[SavedRow]:
        """Return the table, most bytes first; what lies beyond 100 rows is one row."""
        merged: dict[tuple[str, str | None], list[int]] = {}
        for (where, module), (size, count) in self._rows.items():
            row = merged.setdefault((where, pattern(module)), [0, 0])
            row[0] += size
            row[1] += count
        rows = [SavedRow(where, module, size, count) for (where, module), (size, count) in merged.items()]
        rows.sort(key=lambda row: (-row.bytes, -row.count, row.where, row.module or ""))
        if len(rows) > _MOST_ROWS:
            rest = rows[_MOST_ROWS - 1 :]
            other = SavedRow("(other)", None, sum(r.bytes for r in rest), sum(r.count for r in rest))
            rows = [*rows[: _MOST_ROWS - 1], other]
        return rows


def pattern(module: str | None) -> str | None:
    """Write the indexes of a module's FQN as `*`: `h.0.mlp` becomes `h.*.mlp`."""
    return None if module is None else _NUMBER.sub("*", module)
