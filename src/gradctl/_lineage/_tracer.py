"""The tracer of one process: what its modes and taps share, and how a node comes to be."""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl import _torch_private as private
from gradctl._lineage._facts import Escape, Facts, GradEvent, Mutation, ParameterFacts, Reused
from gradctl._lineage._forward import ForwardCheck
from gradctl._lineage._frames import Frames, Stack, own_call
from gradctl._lineage._node import Node, Region, TensorMap
from gradctl._lineage._operations import REWRAPS, VIEWS
from gradctl._lineage._walk import Unreached, sources_of

_GENERATIONS = 2
_BOUNDS = frozenset(
    "clamp_ clamp_min_ clamp_max_ clip_ renorm_ mul_ __imul__ div_ __itruediv__ zero_ fill_ nan_to_num_ "
    "normal_ uniform_ round_ masked_fill_ _foreach_mul_ _foreach_clamp_min_ _foreach_clamp_max_".split()
)
"""In-place changes that keep a weight within bounds, or clear it: not those by which another hand trains it."""
_WAITING = 4096
NODE = "gradctl"
FREED = "gradctl_freed"


class ThreadState:
    """Modes of one thread: which regions are open, and whether torch itself is at work.

    Attributes:
        off, suspended, inference, functions: open regions, innermost last; `suspended` are those that an
            `enable_grad` covers.
        optimizer: depth of optimizer steps (not counting closures), whose own operations are not the program's.
        silent: depth of stretches that are not traced (the engine runs, or we look).
        started: user frames that started this thread; empty for the main one.
    """

    def __init__(self) -> None:
        self.started: Stack = ()
        self.off: list[Region] = []
        self.suspended: list[Region] = []
        self.inference: list[Region] = []
        self.functions: list[Region] = []
        self.optimizer = 0
        self.silent = 0

    def region(self) -> Region | None:
        """The innermost stretch with gradients off."""
        if self.off:
            return self.off[-1]
        return self.functions[-1] if self.functions else None


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.state = ThreadState()


class Tracer:
    """Facts about one traced program.

    Args:
        frames: tells the user's code.
        numerics: check the numbers of forward and backward too.
        on_step: called after the facts of an optimizer step are written, with the tracer.
    """

    def __init__(
        self, frames: Frames, *, numerics: bool = True, on_step: Callable[[Tracer], None] | None = None
    ) -> None:
        self.frames = frames
        self.numerics = numerics
        self.on_step = on_step
        self.facts = Facts()
        self.map = TensorMap()
        self.defined = TensorMap()
        self.created = TensorMap()
        self.stale = TensorMap()
        self.first_reads = TensorMap()
        self.of_library = TensorMap()
        self.through_data = TensorMap()
        self.constants_made = -1
        self.workers: set[int] = {threading.get_ident()}
        self.copies: deque[Node] = deque(maxlen=256)
        self.log: dict[int, list[Node]] = {0: []}
        self.faults: list[str] = []
        self.disabled = False
        self.pid = os.getpid()
        self.forward = ForwardCheck()
        self._seq = 0
        self._threads = _PerThread()
        self._level: Callable[[], Any] = private.get("functorch_level")
        self._recent: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @property
    def here(self) -> ThreadState:
        """The state of this thread."""
        return self._threads.state

    def seq(self) -> int:
        """Return the next number in the order of events."""
        self._seq += 1
        return self._seq

    def blind(self) -> bool:
        """Whether nothing may be looked at now: inside of a torch.func transform, disabled, or in a forked child."""
        return self.disabled or self._level() is not None

    def disable(self, error: BaseException) -> None:
        """Stop tracing after a fault of ours; the program goes on."""
        self.disabled = True
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.faults.append(f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})")

    # ---------------------------------------------------------------------------------------------- nodes

    def new(self, op: str, stack: Stack, inputs: Iterable[Node] = (), live_inputs: Iterable[bool] = ()) -> Node:
        """Return a node that is not in the map yet."""
        node = Node(op, stack, tuple(inputs), tuple(live_inputs), self.facts.generation, self.seq())
        limit = node.generation - _GENERATIONS
        shared = False
        for parent, live in zip(node.inputs, node.live_inputs, strict=True):
            if parent.trainable:
                node.trainable = True
            if parent.grads is not None and parent.grads is not node.grads:
                if node.grads is None:
                    node.grads = parent.grads
                    shared = True
                else:
                    if shared:
                        node.grads, shared = dict(node.grads), False
                    _merge(node.grads, parent.grads)
            if not live and parent.generation < limit:
                parent.inputs = ()  # bounds the memory of long chains of values
                parent.live_inputs = ()
        return node

    def leaf(self, tensor: Tensor) -> Node:
        """Return a node for a tensor that was made out of sight, or for a leaf."""
        grad_fn = grad_fn_of(tensor)
        node = self.new(
            "leaf" if grad_fn is None else "unknown", self.defined.get(tensor) or self.created.get(tensor) or ()
        )
        node.requires_grad = tensor.requires_grad
        node.leaf = grad_fn is None
        node.live = grad_fn is not None
        node.trainable = node.requires_grad or isinstance(tensor, Parameter)
        node.shape = shape_of(tensor)
        node.dtype = tensor.dtype
        node.storage = storage_of(tensor)
        node.ref = self.map.set(tensor, node)
        if grad_fn is not None:
            node.op = grad_fn.name()
            behind = grad_fn.metadata.get(NODE)
            if behind is not None:
                node.inputs, node.live_inputs, node.stack = (behind,), (True,), node.stack or behind.stack
            else:
                grad_fn.metadata[NODE] = node
        return node

    def node(self, tensor: Tensor) -> Node:
        """Return the node of a tensor; makes one for what was not seen before."""
        found: Node | None = self.map.get(tensor)
        if found is None:
            base = tensor._base
            if base is not None:
                found = self.map.get(base)
                if found is not None:
                    return found
            return self.leaf(tensor)
        if found.leaf:
            found.requires_grad = tensor.requires_grad
            found.trainable = found.trainable or found.requires_grad
        elif found.op == "grad" and found.generation < self.facts.generation:
            self._old_gradient(found, tensor)
        return found

    def _old_gradient(self, node: Node, tensor: Tensor) -> None:
        """Note that the program uses a gradient which it has read before it became that of a later backward."""
        if node.scalars and node.scalars[0] != tensor._version and not self.here.silent:
            frame: Any = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename.endswith(("_tracer.py", "_mode.py", "overrides.py")):
                frame = frame.f_back
            if frame is not None and self.frames.is_user(frame.f_code.co_filename):
                self.stale.set(tensor, (node, self.frames.stack()))

    def made(self, op: str, tensor: Tensor, inputs: Sequence[Node], live_inputs: Sequence[bool], stack: Stack) -> Node:
        """Return the new node of an operation's output."""
        node = self.new(op, stack, inputs, live_inputs)
        node.requires_grad = tensor.requires_grad
        grad_fn = grad_fn_of(tensor)
        node.live = grad_fn is not None
        node.shape = shape_of(tensor)
        node.dtype = dtype = tensor.dtype
        node.storage = storage_of(tensor)
        any_live = True in node.live_inputs
        if not node.live:
            node.leaf = node.requires_grad and not any_live
            node.trainable = node.trainable or node.leaf
            state = self.here
            detaches = op in ("detach", "detach_")
            own = own_call() if any_live or (detaches and node.trainable) else None
            if detaches and (own in (None, "stop") or torch.is_grad_enabled()):
                node.cut = "detach"
            elif op == "data.__get__":
                node.cut = "data"
                if any_live:
                    self.copies.append(node)
            elif op in REWRAPS:
                node.cut = "rewrap"
                if any_live:
                    self.copies.append(node)
            elif not (dtype.is_floating_point or dtype.is_complex):
                node.cut = "dtype"
                if state.inference and torch.is_inference_mode_enabled():
                    node.region = state.inference[-1]
            elif torch.is_inference_mode_enabled():
                node.cut = "inference"
                node.region = state.inference[-1] if state.inference else None
            elif not torch.is_grad_enabled():
                node.cut = "grad_off"
                node.region = state.region()
            elif any_live:
                node.cut = "op"
            by_us = own is not None and node.cut in ("detach", "data", "rewrap")
            if by_us or (any_live and node.region is not None and node.region.library == "gradctl"):
                node.meant = frozenset(range(len(node.inputs)))
        else:
            grad_fn.metadata[NODE] = node
        node.ref = self.map.set(tensor, node)
        log = self.log.get(node.generation)
        if log is None:
            log = self.log[node.generation] = []
            for old in [key for key in self.log if key <= node.generation - _GENERATIONS]:
                del self.log[old]
        log.append(node)
        return node

    def look(self, node: Node, tensor: Tensor, arguments: Sequence[Tensor]) -> None:
        """Look at the numbers of a new value."""
        if self.numerics and node.trainable and node.op not in VIEWS:
            self.forward.look(node, tensor, arguments, self.facts.steps)
            if self.forward.waiting >= _WAITING:
                self.forward.settle()

    # ---------------------------------------------------------------------------------------------- events

    def parameter(self, tensor: Tensor) -> ParameterFacts:
        """Return the facts of a leaf; new ones for a leaf not seen before."""
        found = self.facts.parameters.get(id(tensor))
        if found is None or found.ref() is not tensor:
            if found is not None:
                self.facts.parameters[-self.seq()] = found  # it is gone, and its id belongs to another one now
            found = ParameterFacts(weakref.ref(tensor), self.node(tensor), isinstance(tensor, Parameter))
            found.of_library = bool(self.of_library.get(tensor))
            self.facts.parameters[id(tensor)] = found
        found.requires_grad = tensor.requires_grad
        return found

    def escaped(self, tensor: Tensor, kind: str, result: Any, stack: Stack) -> None:
        """Note that a value became a Python number or an array."""
        node = self.node(tensor)
        if node.trainable:
            kept = result if isinstance(result, (float, int, complex)) and not isinstance(result, bool) else None
            self.facts.escapes.append(
                Escape(node, kind, stack, self.facts.generation, self.seq(), kept, tensor.requires_grad)
            )

    def mutated(
        self, op: str, tensors: Sequence[Tensor], versions: Sequence[int], stack: Stack, *, optimizer: bool
    ) -> list[Tensor]:
        """Note which of the tensors were changed in place; return them."""
        changed: list[Tensor] = []
        facts = self.facts
        for tensor, before in zip(tensors, versions, strict=True):
            after = tensor._version
            if after == before:
                continue
            base = tensor._base
            data = self.through_data.get(tensor)
            if data is None and base is not None:
                data = self.through_data.get(base)
            facts.mutations.append(
                Mutation(
                    storage_of(tensor), shape_of(tensor), None if base is None else shape_of(base),
                    before, after, stack, op, facts.generation, self.seq(), optimizer, data is not None,
                    id(tensor) if data is None else data,
                )
            )  # fmt: skip
            if not optimizer:
                self._by_hand(tensor, data, op, stack, tensors)
            elif op in ("zero_", "_foreach_zero_"):
                self._edited(tensor, op, stack, ())  # an optimizer that clears its own gradients
            changed.append(tensor)
        return changed

    def _by_hand(self, tensor: Tensor, data: int | None, op: str, stack: Stack, operands: Sequence[Tensor]) -> None:
        facts = self.facts
        for key in (id(tensor), data, None if tensor._base is None else id(tensor._base)):
            if key is None:
                continue
            parameter = facts.parameters.get(key)
            if parameter is not None and facts.generation > 0 and op not in _BOUNDS and own_call() is None:
                parameter.hand_written += 1
        self._edited(tensor, op, stack, operands)

    def _edited(self, tensor: Tensor, op: str, stack: Stack, operands: Sequence[Tensor]) -> None:
        """Note a change of a gradient in place, and whose gradients it was changed with."""
        base = tensor._base
        owner = self.map.get(tensor)
        whole = base is None or base.numel() == tensor.numel()
        if owner is None and base is not None:
            owner = self.map.get(base)
        if isinstance(owner, Node) and owner.op in ("detach", "view", "view_as", "data.__get__") and owner.inputs:
            owner = owner.inputs[0]  # the same numbers under another shape or name
        if not isinstance(owner, Node) or owner.op != "grad" or not isinstance(owner.extra, int):
            return
        if owner.scalars:
            owner.scalars = (tensor._version if base is None else base._version,)
        others: list[Tensor] = []
        if op.startswith("_foreach_") and len(operands) > 1:
            half = len(operands) // 2
            others = [b for a, b in zip(operands[:half], operands[half:], strict=False) if a is tensor]
        else:
            others = [other for other in operands if other is not tensor]
        sources: dict[int, int] | None = {}
        for other in others:
            found = sources_of(self.map.get(other))
            sources = None if found is None or sources is None else {**sources, **found}
        self.grad_event("edit", [owner.extra], op if whole else "__setitem__", stack, sources=sources)

    def explain_now(self, tensor: Tensor) -> None:
        """Note why a leaf has no gradient after the backwards of late, though no optimizer asks."""
        parameter = self.parameter(tensor)
        roots = [root for b in self.facts.backwards if b.accumulates and not b.failed for root in b.roots]
        if roots and len(parameter.explained) < 3:
            log = [node for key in sorted(self.log) for node in self.log[key]]
            unreached = Unreached(roots, tuple(self.facts.escapes), log)
            parameter.explained.append((-1, *unreached.why(parameter.node)))

    def reused(self, kind: str, read: Node, op: str, stack: Stack, key: int) -> None:
        """Note one use of a gradient that is not what it was when it was read."""
        entry = self.facts.reused.setdefault((kind, read.stack[:1], stack[:1]), Reused(read, kind, op, stack))
        entry.count += 1
        entry.keys.add(key)

    def of_another_worker(self, thread: int) -> bool:
        """Whether that is another thread of the program (not one of the engine's): it trains on its own account."""
        return thread in self.workers and thread != threading.get_ident()

    def grad_event(
        self,
        kind: str,
        ids: Iterable[int],
        op: str,
        stack: Stack,
        value: int = 0,
        *,
        sources: dict[int, int] | None = None,
    ) -> GradEvent:
        """Note that something other than backward touched a gradient."""
        event = GradEvent(
            kind, frozenset(ids), op, stack, self.facts.generation, self.seq(), value, sources, threading.get_ident(),
            own_call() is not None,
        )  # fmt: skip
        self.facts.grad_events.append(event)
        return event


def _merge(mine: dict[int, int], other: dict[int, int]) -> None:
    for key, seq in other.items():
        if seq > mine.get(key, -1):
            mine[key] = seq


def grad_fn_of(tensor: Tensor) -> Any:
    """Return the grad_fn; None where asking raises (a view made under no_grad and then modified)."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage record; 0 for a tensor without one (sparse, or a wrapper)."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return 0


def is_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf; False where asking raises, as for `grad_fn_of`."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return False


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape; empty where asking raises, as for a nested tensor."""
    try:
        return tensor.shape
    except RuntimeError:
        return ()


def open_regions(state: ThreadState) -> tuple[Region, ...]:
    """Return the regions of a thread that are open now, and note in them whether who entered them still runs."""
    running: set[tuple[int, int]] = set()
    frame: Any = sys._getframe(1)
    while frame is not None:
        running.add((id(frame), id(frame.f_code)))
        frame = frame.f_back
    for region in state.off:
        region.still_open = True
        region.left_on = region.frame[0] != 0 and region.frame not in running
    return (*state.off, *state.inference)
