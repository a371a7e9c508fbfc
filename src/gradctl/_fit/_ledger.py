"""A ledger of allocated bytes: every storage that operations of a step make, from birth to death, by device."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from gradctl._fit._allocator import mark
from gradctl._recompute import dispatches

OPERATION: Final = "operation "
"""What the allocator's mark of an operation begins with."""


class Entry:
    """One storage.

    Attributes:
        number: its place in the ledger.
        nbytes: its size.
        device: where it lies.
        born, died: numbers of events; 0 for what was there before, and None while it lives.
        where: what ran when it was made, as the owner of the ledger said.
        operation: what made it.
        tensor: dtype and shape of the tensor that came with it.
    """

    __slots__ = ("born", "device", "died", "nbytes", "number", "operation", "tensor", "where")

    def __init__(
        self, number: int, storage: UntypedStorage, tensor: Tensor, born: int, where: Any, operation: Any
    ) -> None:
        self.number = number
        self.nbytes = storage.nbytes()
        self.device = str(storage.device)
        self.born = born
        self.died: int | None = None
        self.where = where
        self.operation = operation
        self.tensor = (tensor.dtype, tuple(tensor.shape))


class Ledger(TorchDispatchMode):
    """Notes storages as operations make them and as they are freed; a step runs inside of it.

    What kernels allocate for themselves and free before they return is not seen. Backward is seen too, on the thread
    that calls it and on those that torch gives the caller's modes to.

    Attributes:
        entries: every storage.
        events: `(bytes, entry)` of each birth and, negative, of each death, in order.
        where: what runs now; the owner sets it.
        seconds: by `where`, the time of the operations that ran there.
        operations: for each operation `where` it ran, and the number of events after it; the allocator is given a mark
            with its number, so that what it had to give out meanwhile can be told.
    """

    sees_replay = True

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device = device
        self.entries: list[Entry] = []
        self.events: list[tuple[int, Entry]] = []
        self.marks: list[tuple[int, Any]] = []
        self.where: Any = None
        self.seconds: dict[Any, float] = {}
        self.operations: list[tuple[Any, int]] = []
        self._depth = 0
        self._live: dict[int, tuple[weakref.ref[UntypedStorage], Entry]] = {}

    def __enter__(self) -> Ledger:
        """Begin; a second time inside, where dropped contents are made again."""
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        super().__exit__(*error)

    def before(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that are there already: weights, gradients, optimizer state, inputs."""
        for tensor in tensors:
            self._input(tensor)

    def mark(self, label: Any) -> None:
        """Note that something begins here."""
        self.marks.append((len(self.events), label))

    def entry(self, tensor: Tensor) -> Entry | None:
        """Return the entry of a tensor's storage."""
        return self.entry_of(tensor.untyped_storage())

    def entry_of(self, storage: UntypedStorage) -> Entry | None:
        """Return the entry of a storage."""
        found = self._live.get(storage._cdata)
        return found[1] if found is not None and found[0]() is not None else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call an operation and note what it made."""
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if self.where is not None:
            self.seconds[self.where] = self.seconds.get(self.where, 0.0) + time.perf_counter() - begin
        for value in args:
            if isinstance(value, Tensor):
                self._input(value)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._output(value, func)
        mark(f"{OPERATION}{len(self.operations)}")
        self.operations.append((self.where, len(self.events)))
        return out

    def _input(self, tensor: Tensor) -> None:
        if dispatches(tensor) or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if self._device is not None and storage.device != self._device:
            return
        found = self._live.get(storage._cdata)
        if found is None or found[0]() is None:
            if self._depth > 1:  # a copy that replay has made where no mode sees it
                entry = self._add(storage, tensor, len(self.events) + 1, None)
                self.happened(entry.nbytes, entry)
            else:
                self._add(storage, tensor, 0, None)

    def _output(self, tensor: Tensor, operation: Any) -> None:
        if dispatches(tensor) or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if self._device is not None and storage.device != self._device:
            return
        found = self._live.get(storage._cdata)
        if found is None or found[0]() is None:
            entry = self._add(storage, tensor, len(self.events) + 1, operation)
            self.happened(entry.nbytes, entry)

    def happened(self, change: int, entry: Entry) -> None:
        """Note an event; one that is to be heard of is heard of here."""
        self.events.append((change, entry))

    def _add(self, storage: UntypedStorage, tensor: Tensor, born: int, operation: Any) -> Entry:
        entry = Entry(len(self.entries), storage, tensor, born, self.where, operation)
        self.entries.append(entry)
        key = storage._cdata
        live, events, happened = self._live, self.events, self.happened

        def gone(reference: weakref.ref[UntypedStorage]) -> None:
            found = live.get(key)
            if found is not None and found[0] is reference:
                del live[key]
            entry.died = len(events) + 1
            happened(-entry.nbytes, entry)

        live[key] = weakref.ref(storage, gone), entry
        return entry

    # -- what was there -----------------------------------------------------------------------------------------------

    def standing(self, device: str | None = None) -> int:
        """Return the bytes that were there before the first event."""
        return sum(e.nbytes for e in self.entries if e.born == 0 and device in (None, e.device))

    def curve(self, device: str | None = None) -> list[int]:
        """Return the bytes alive after each event, without those that were there before; the first is 0."""
        total = 0
        found = [0]
        for change, entry in self.events:
            if device in (None, entry.device):
                total += change
            found.append(total)
        return found
