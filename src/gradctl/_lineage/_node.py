"""What is remembered of one tensor: the operation that made it, from what, where, and whether the gradient survived."""

from __future__ import annotations

import weakref
from types import CodeType
from typing import Any, Literal

from torch import Tensor

from gradctl._lineage._frames import Site, Stack, site

Cut = Literal["detach", "data", "rewrap", "variable", "parameter", "constant", "dtype", "grad_off", "inference", "op"]
"""How an output lost the history of its inputs.

`detach`: `.detach()`, `.detach_()`. `data`: `.data`. `rewrap`: `torch.tensor(t)` and kin. `variable`: `Variable(t)`.
`parameter`: `nn.Parameter(t)`. `constant`: `autograd.grad` without create_graph. `dtype`: the output is of integers or
booleans. `grad_off`, `inference`: the mode was off. `op`: an operation without a derivative.
"""


class Region:
    """A stretch in which gradients were off, from entry on.

    Attributes:
        kind: "no_grad", "inference", or the name of a custom Function whose forward runs with gradients off.
        stack: user frames at the entry.
        decorated: the decorated function's code, if a decorator entered it.
        within: the innermost line of an installed package (not torch's) that entered it, or whose decorator did, as an
            entry of a stack; None where the user's own code did.
        library: what of torch entered it: "sample" (a distribution), "checkpoint", "optimizer", "function"; "gradctl"
            for one of ours; or None.
        frame: id of the user frame that entered it and of its code; the frame may be gone.
        generator: whether that frame belongs to a generator.
        open: whether it has not been left yet.
        still_open: whether it was open when a call failed, or when tracing ended.
        left_on: whether it was so though the frame that entered it no longer ran.
        resumed: whether a later exit brought it back (a mode left in the wrong order).
    """

    __slots__ = (
        "decorated", "frame", "generator", "kind", "left_on", "library", "open", "resumed", "stack", "still_open",
        "within",
    )  # fmt: skip

    def __init__(self, kind: str, stack: Stack) -> None:
        self.kind = kind
        self.stack = stack
        self.decorated: Any = None
        self.library: str | None = None
        self.within: tuple[CodeType, int] | None = None
        self.frame: tuple[int, int] = (0, 0)
        self.still_open = False
        self.left_on = False
        self.generator = False
        self.open = True
        self.resumed = False


_NOTHING: frozenset[int] = frozenset()


class Node:
    """One value that a torch operation made, or a leaf.

    Attributes:
        op: name of the operation, "leaf" for what was there when first seen, "unknown" for what was made out of sight.
        stack: user frames, innermost first; for a registered parameter where it was registered.
        inputs: nodes of the tensor arguments; emptied for old generations (see `generation`).
        live_inputs: for each input, whether it required a gradient at that time.
        requires_grad: whether the value required a gradient.
        live: whether it has a grad_fn.
        trainable: whether its value depends on a parameter or another leaf that requires a gradient, through cuts too.
        leaf: whether it is a leaf that requires, or may require, a gradient.
        cut: how the history of its inputs was lost; None if it was not, or there was none.
        meant: positions of the inputs from which the program keeps the gradient away by a call of gradctl.
        region: the innermost region with gradients off when it was made.
        generation: number of backward calls that had been made.
        seq: order of making.
        shape, dtype: of the value.
        storage: address of its storage's record, by which in-place changes are matched; 0 where it has none.
        ref: weak reference to the tensor.
        scalars: Python numbers among the arguments (used to find where a number came from).
        grads: ids of the leaves whose `.grad` it was computed from, with the order of the newest reading, or None.
        extra: further facts of single operations (`create_graph` of autograd.grad, the class of a custom Function...).
    """

    __slots__ = (
        "__weakref__", "cut", "dtype", "extra", "generation", "grads", "inputs", "leaf", "live", "live_inputs", "meant",
        "op", "ref", "region", "requires_grad", "scalars", "seq", "shape", "stack", "storage", "trainable",
    )  # fmt: skip

    def __init__(
        self, op: str, stack: Stack, inputs: tuple[Node, ...], live_inputs: tuple[bool, ...], generation: int, seq: int
    ) -> None:
        self.op = op
        self.stack = stack
        self.inputs = inputs
        self.live_inputs = live_inputs
        self.generation = generation
        self.seq = seq
        self.requires_grad = False
        self.live = False
        self.leaf = False
        self.trainable = False
        self.cut: Cut | None = None
        self.meant: frozenset[int] = _NOTHING
        self.region: Region | None = None
        self.shape: tuple[int, ...] = ()
        self.dtype: Any = None
        self.ref: weakref.ref[Tensor] | None = None
        self.scalars: tuple[Any, ...] = ()
        self.storage = 0
        self.extra: Any = None
        self.grads: dict[int, int] | None = None

    @property
    def site(self) -> Site | None:
        """The innermost user line."""
        return site(self.stack[0]) if self.stack else None

    @property
    def lost(self) -> bool:
        """Whether an input required a gradient and the output kept no history of it, and no call of gradctl said so."""
        return not self.live and not self.meant and self.op != "leaf" and any(self.live_inputs)

    @property
    def wanted(self) -> tuple[Node, ...]:
        """The inputs without those that no gradient is meant for."""
        if not self.meant:
            return self.inputs
        return tuple([parent for position, parent in enumerate(self.inputs) if position not in self.meant])

    def tensor(self) -> Tensor | None:
        """Return the tensor if it is still there."""
        return self.ref() if self.ref is not None else None

    def __repr__(self) -> str:
        place = self.site
        return (
            f"<{self.op} at {place.file.rpartition('/')[2]}:{place.line} " if place else f"<{self.op} "
        ) + f"live={self.live} cut={self.cut} generation={self.generation}>"


class _Entry(weakref.ref[Tensor]):
    __slots__ = ("key", "value")

    key: int
    value: Any


class TensorMap:
    """Values by tensor identity; an entry goes when its tensor does. Keeps no tensor alive."""

    def __init__(self) -> None:
        entries: dict[int, _Entry] = {}
        self._entries = entries

        def gone(entry: _Entry) -> None:
            if entries.get(entry.key) is entry:
                del entries[entry.key]

        self._gone = gone

    def get(self, tensor: Tensor) -> Any:
        """Return the value of that tensor, or None."""
        entry = self._entries.get(id(tensor))
        return entry.value if entry is not None and entry() is tensor else None

    def set(self, tensor: Tensor, value: Any) -> weakref.ref[Tensor]:
        """Remember a value for that tensor; return the weak reference that stands for it."""
        entry = _Entry(tensor, self._gone)  # type: ignore[arg-type]
        entry.key = id(tensor)
        entry.value = value
        self._entries[entry.key] = entry
        return entry

    def drop(self, tensor: Tensor) -> None:
        """Forget the value of that tensor."""
        self._entries.pop(id(tensor), None)

    def items(self) -> list[tuple[Tensor, Any]]:
        """Return what is alive now; the list holds the tensors only as long as the caller does."""
        return [(tensor, entry.value) for entry in list(self._entries.values()) if (tensor := entry()) is not None]

    def __len__(self) -> int:
        return len(self._entries)
