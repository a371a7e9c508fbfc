"""What a tape notes: contents of storages, the operations that made them, and what a plan says of both."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from gradctl._recompute._storage import Codec, Geometry, Packed, alias, copy_of
from gradctl._recompute._switches import Switches

Maker = tuple[int, int]
"""An operation's position in its region, and which of its outputs (below -1: which argument that it wrote)."""
_keys = itertools.count()


class Version:
    """One content of one storage.

    It leads to the operation that made it, and that to the versions that it read: never back, so that nothing here
    waits for the cycle collector.

    Attributes:
        key: a number of its own.
        maker: what made it; None for one that came from outside.
        operation: the note of the operation that made it, None where there is none.
        held: an alias that keeps the content, None where it must be made again.
        expected: the version counter of `held` when it was taken.
        lent: what the region around this one gave for the content, which it may have dropped itself.
        copy: a copy of the content, where it may change or has been overwritten.
        packed: the content in fewer bytes.
        handles: how many saved tensors wait for it.
        segment: the part of the region that made it.
        used: whether a noted operation reads it.
        mutable: whether it comes from outside and was seen to change.
    """

    __slots__ = (
        "__weakref__", "copy", "expected", "handles", "held", "key", "layout", "lent", "maker", "mutable", "nbytes",
        "operation", "packed", "segment", "storage", "used",
    )  # fmt: skip

    def __init__(
        self, tensor: Tensor, storage: UntypedStorage, maker: Maker | None = None, operation: Operation | None = None
    ) -> None:
        self.key = next(_keys)
        self.storage: weakref.ref[UntypedStorage] = weakref.ref(storage)
        self.maker = maker
        self.operation = operation
        self.held: Tensor | None = None
        self.expected = 0
        self.lent: Any = None
        self.copy: UntypedStorage | None = None
        self.packed: Packed | None = None
        self.handles = 0
        self.segment = 0
        self.used = False
        self.mutable = False
        self.nbytes = storage.nbytes()
        self.layout: tuple[Any, ...] = (tensor.dtype, tuple(tensor.shape))

    def hold(self, tensor: Tensor) -> None:
        """Keep the content, by an alias that notices changes."""
        if self.held is None and self.copy is None:
            self.held = alias(tensor)
            self.expected = self.held._version

    @property
    def at_hand(self) -> bool:
        """Whether the content need not be made again."""
        return self.held is not None or self.copy is not None or self.packed is not None or self.lent is not None

    def keep_copy(self, storage: UntypedStorage) -> None:
        """Keep a copy, because the content is about to be overwritten; what nothing reads needs none."""
        if self.used and (self.held is not None or self.lent is not None):
            self.copy, self.held, self.lent = copy_of(storage), None, None

    def release(self) -> None:
        """Let go of what was kept."""
        self.held = self.copy = self.lent = None


class Reference:
    """An argument of a noted operation: a version, and how the tensor lies in it."""

    __slots__ = ("geometry", "version")

    def __init__(self, version: Version, where: Geometry) -> None:
        self.version = version
        self.geometry = where


class Operation:
    """A note of one operation.

    Attributes:
        function: the `OpOverload`.
        args, kwargs: its arguments, tensors replaced by `Reference`.
        reads: the versions among them.
        writes: each version that it overwrites, with the key of what it makes of it (None: what lies outside).
        makes: for each output the key of a new version and its geometry, None where it made no storage.
        random: the generator and its state before, None if it draws nothing.
        switches: how the switches stood that choose its kernel, None where there are none.
        line: file and line of the program that called it.
    """

    __slots__ = ("args", "function", "index", "kwargs", "line", "makes", "random", "reads", "switches", "writes")

    def __init__(self, function: Any, index: int) -> None:
        self.function = function
        self.index = index
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.reads: list[Version] = []
        self.writes: list[tuple[Version, int | None]] = []
        self.makes: list[tuple[int, Geometry] | None] = []
        self.random: tuple[torch.Generator, Tensor] | None = None
        self.switches: Switches | None = None
        self.line: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """As a person writes it: `aten.mm`."""
        return str(self.function).rpartition(".")[0] or str(self.function)

    def __str__(self) -> str:
        return self.name + (f" ({self.line[0]}:{self.line[1]})" if self.line else "")


@dataclass(frozen=True)
class RegionPlan:
    """What to do in a region whose operations are known.

    Args:
        functions: the operations that it is expected to call, in order.
        note: positions of those that must be noted, and of those that write what lies outside and is read later.
        drop: makers of saved contents that are made again.
        pack: makers of saved contents that are packed, and how.
        cuts: positions at which a new segment begins.
    """

    functions: tuple[Any, ...]
    note: frozenset[int]
    drop: frozenset[Maker]
    pack: dict[Maker, Codec] | None = None
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Made:
    """What a policy is asked about: a content that an operation has just made.

    Args:
        function: the operation, an `OpOverload`.
        shape: of the output.
        dtype: of the output.
        nbytes: bytes of its storage.
        line: file and line of the program that called the operation.
    """

    function: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    line: tuple[str, int] | None

    @property
    def name(self) -> str:
        """The operation's name, such as `aten.mm`."""
        return str(self.function).rpartition(".")[0]


Keep = Callable[[Made], bool]
