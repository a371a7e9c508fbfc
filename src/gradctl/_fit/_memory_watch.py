"""Watching one step for `gradctl.memory`: every storage with its place, what is saved, and what the allocator did.

Facts only; what they mean is read off in `_memory_facts`. Everything is taken back when the step is over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl import _saved, _taps
from gradctl import _torch_private as private
from gradctl._fit._allocator import Allocated, Change, died, mark, unseen
from gradctl._fit._ledger import Entry, Ledger
from gradctl._names._modules import class_name
from gradctl._names._patterns import named_modules

Phase = Literal["forward", "backward", "optimizer"]
_NODES: Final = 100_000
_COPIES: Final = frozenset({"aten._to_copy.default", "aten.clone.default"})
_CHAIN: Final = 4


class Place(NamedTuple):
    """What ran when a storage was made: the phase, the line and the module, autograd's number, and the operation's."""

    phase: Phase
    line: str | None
    module: str | None
    node: int | None
    operation: int


class Fact:
    """One value that autograd saved.

    Attributes:
        entry: its storage.
        nbytes: of the value itself, which may be less or (expanded) more than its storage.
        line, module: where the forward was.
        born, released: numbers of ledger events between which it was saved; `released` is None while it is.
        dead: why no gradient needs it, if none does.
        head: whether it belongs to what comes after the last layer with weights.
    """

    __slots__ = ("born", "dead", "dtype", "entry", "head", "line", "module", "nbytes", "released", "shape")

    def __init__(self, entry: Entry, tensor: Tensor, line: str, module: str | None, born: int) -> None:
        self.entry = entry
        self.nbytes = tensor.numel() * tensor.element_size()
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.line = line
        self.module = module
        self.born = born
        self.released: int | None = None
        self.dead: str | None = None
        self.head = False


class _Token:
    """Lives as long as autograd keeps the saved value that it came with."""

    __slots__ = ("_ledger", "fact")

    def __init__(self, fact: Fact, ledger: Ledger) -> None:
        self.fact = fact
        self._ledger = ledger

    def __del__(self) -> None:
        self.fact.released = len(self._ledger.events)


class _Packs(_saved.Tally):
    def __init__(self, ledger: _StepLedger) -> None:
        super().__init__(())
        self.facts: list[Fact] = []
        self._ledger = ledger

    def add(self, tensor: Any, where: str, module: str | None) -> Any:
        super().add(tensor, where, module)
        entry = self._ledger.known(tensor)
        if entry is None:
            return None
        fact = Fact(entry, tensor, where, module, len(self._ledger.events))
        self.facts.append(fact)
        return _Token(fact, self._ledger)


class _StepLedger(Ledger):
    """A ledger that knows where each storage was made, and puts its events among the allocator's."""

    def __init__(self, modules: dict[int, str]) -> None:
        super().__init__()
        self.phase: Phase = "forward"
        self.over = False
        self.copies: dict[int, int] = {}
        self.called: list[tuple[str, Place]] = []
        self._places = _saved.Places(modules)
        self._of_node: dict[int, tuple[str | None, str | None]] = {}
        self._node = private.get("current_node")
        self._number = private.get("sequence_number")

    def known(self, tensor: Tensor) -> Entry | None:
        """Return the entry of a tensor's storage, which is noted as having been there if it is new."""
        try:
            self._input(tensor)
            return self.entry(tensor)
        except (NotImplementedError, RuntimeError):
            return None  # no storage that Python can see

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        place = self._place()
        self.where = place
        self.called.append((str(func), place))
        mark(f"call {place.operation}")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if str(func) in _COPIES and isinstance(out, Tensor):
            made, source = self.known(out), self.known(args[0])
            if made is not None and source is not None and made is not source:
                self.copies[made.number] = self.copies.get(source.number, source.number)
        return out

    def happened(self, change: int, entry: Entry) -> None:
        super().happened(change, entry)
        if self.over:
            return
        mark(f"event {len(self.events)}")
        if change < 0 and entry.born == 0:
            died(entry.nbytes, entry.device)

    def _place(self) -> Place:
        number = len(self.called)
        node = self._node()
        if node is not None:
            of = int(node._sequence_nr())
            line, module = self._of_node.get(of, (None, None))
            return Place("backward", line, module, of, number)
        line, module = self._places.at(sys._getframe(2))
        if self.phase != "forward":
            return Place(self.phase, None if self.phase == "backward" else line, None, None, number)
        of = int(self._number()) - 1
        if torch.is_grad_enabled():
            self._of_node.setdefault(of, (line, module))
        return Place("forward", line, module, of, number)


@dataclass
class Facts:
    """What one step did.

    Attributes:
        ledger: its storages.
        events: the ledger's events up to the end of the step.
        changes: what the allocators did.
        saved: every value that autograd saved.
        weights, gradients, states, inputs: numbers of entries, with the names of what they are.
        modules: the outermost modules that were called.
        equal: groups of saved storages with the same content.
        head: autograd's numbers of the operations after the last layer with weights; None if that was not seen.
        backwards: how often backward was called.
        returned: what the step returned.
        seen_saved: whether saved values could be watched, to the end.
        faults: what went wrong in here.
    """

    ledger: _StepLedger
    events: list[tuple[int, Entry]] = field(default_factory=list[tuple[int, Entry]])
    changes: list[Change] = field(default_factory=list[Change])
    saved: list[Fact] = field(default_factory=list[Fact])
    weights: dict[int, str] = field(default_factory=dict[int, str])
    gradients: dict[int, str] = field(default_factory=dict[int, str])
    states: set[int] = field(default_factory=set[int])
    inputs: set[int] = field(default_factory=set[int])
    modules: list[str] = field(default_factory=list[str])
    equal: list[list[Entry]] = field(default_factory=list[list[Entry]])
    head: set[int] | None = None
    backwards: int = 0
    returned: Any = None
    seen_saved: bool = True
    faults: list[str] = field(default_factory=list[str])
    starts: dict[str, int] = field(default_factory=dict[str, int])


class StepWatch:
    """Watches what this thread does, from `begin` to `end`.

    Args:
        models: modules that are known beforehand; others are noted when they are called.
        optimizers: those whose state there is.
        on_model: called with a module that is met for the first time; what it allocates does not count.
    """

    def __init__(
        self,
        models: Iterable[Module] = (),
        optimizers: Iterable[Optimizer] = (),
        *,
        on_model: Callable[[Module], None] | None = None,
    ) -> None:
        self._names: dict[int, str] = {}
        self._models = list(models)
        self._optimizers = list(optimizers)
        self._on_model = on_model
        self._ledger = _StepLedger(self._names)
        self._packs = _Packs(self._ledger)
        self._allocated = Allocated()
        self._stack = ExitStack()
        self._roots: set[int] = set()
        self._params: dict[int, str] = {}
        self._gradients: dict[int, int] = {}
        self._no_modes = private.get("no_dispatch_modes")
        self.facts = Facts(self._ledger)

    def begin(self) -> None:
        """Begin to watch.

        Raises:
            UsageError: a profiler of the program is running.
        """
        stack, facts = self._stack, self.facts
        for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            facts.starts[f"cuda:{device}"] = torch.cuda.memory_allocated(device)
        try:
            stack.enter_context(self._allocated)
            for optimizer in self._optimizers:
                self._meet_optimizer(optimizer)
            for model in self._models:
                self._meet(model)
            for handle in (
                _taps.engine.subscribe(self._around_engine, order="measure"),
                _taps.optimizer_step.subscribe(before=self._steps, after=self._stepped, order="measure"),
                _taps.module_called.subscribe(self._around_module, order="measure"),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self._ledger)
            watch = _saved.arm_lines(modules=self._names, hooks_disabled=_HooksDisabled(), tally=self._packs)
            if watch is None:
                facts.seen_saved = False
            else:
                stack.callback(self._disarm, watch)
        except BaseException:
            stack.close()
            raise

    def end(self) -> Facts:
        """Stop watching and return what was seen; everything is as it was."""
        facts = self.facts
        for optimizer in self._optimizers:
            self._note_state(optimizer)
        facts.events = list(self._ledger.events)
        self._ledger.over = True  # what dies later is none of this step, and must leave no mark in another one
        self._stack.close()
        facts.changes = self._allocated.changes
        facts.saved = self._packs.facts
        for optimizer in self._optimizers:
            for place, param in enumerate(_parameters(optimizer)):
                entry = self._ledger.known(param)
                if entry is not None and entry.number not in facts.weights:
                    facts.weights[entry.number] = f"parameter {place}"
        facts.gradients = {number: self._params[key] for number, key in self._gradients.items()}
        known = {*facts.weights, *facts.gradients, *facts.states}
        facts.inputs = {number for number in facts.inputs if number not in known}
        facts.inputs |= {e.number for e in self._ledger.entries if e.born == 0 and e.number not in known}
        return facts

    def _disarm(self, watch: Any) -> None:
        found = watch.disarm()
        self.facts.seen_saved = found.complete
        if found.fault:
            self.facts.faults.append(found.fault)

    # -- what there is ------------------------------------------------------------------------------------------------

    def _meet(self, model: Module) -> None:
        facts = self.facts
        kind = class_name(model)
        prefix = "" if not facts.modules else f"{kind}."
        facts.modules.append(kind)
        self._roots.add(id(model))
        for path, module in named_modules(model).items():
            self._names.setdefault(id(module), f"{prefix}{path}" if path else kind)
        for module in model.modules():
            self._names.setdefault(id(module), kind)
        named = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in [*named.items(), *model.named_buffers()]:
            entry = self._ledger.known(tensor)
            if entry is not None:
                facts.weights.setdefault(entry.number, prefix + _bare(name))
        for name, param in named.items():
            self._meet_parameter(prefix + _bare(name), param)
        if self._on_model is not None:
            with unseen(), self._no_modes():
                self._on_model(model)

    def _meet_parameter(self, name: str, param: Tensor) -> None:
        key = id(param)
        new = key not in self._params
        if new or self._params[key] == "":
            self._params[key] = name  # that of a model, also where its optimizer was met first
        if not new:
            return
        self._note_gradient(param)
        if param.requires_grad and param.is_leaf:
            hook = param.register_post_accumulate_grad_hook(self._note_gradient)
            self._stack.callback(hook.remove)

    def _note_gradient(self, param: Tensor) -> None:
        entry = self._ledger.known(param.grad) if param.grad is not None else None
        if entry is not None:
            self._gradients[entry.number] = id(param)

    def _meet_optimizer(self, optimizer: Optimizer) -> None:
        for param in _parameters(optimizer):
            self._meet_parameter("", param)
        self._note_state(optimizer)

    def _note_state(self, optimizer: Optimizer) -> None:
        for values in list(optimizer.state.values()):
            for value in list(values.values()) if isinstance(values, dict) else ():
                entry = self._ledger.known(value) if isinstance(value, Tensor) else None
                if entry is not None and entry.number not in self.facts.weights:
                    self.facts.states.add(entry.number)

    # -- what happens -------------------------------------------------------------------------------------------------

    def _around_module(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Module, /, *args: Any, **kwargs: Any) -> Any:
            self._called(module, args, kwargs)
            return inner(module, *args, **kwargs)

        return call

    def _called(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in self._names:
            self._meet(module)
        if id(module) in self._roots:
            for tensor in _tensors_in([args, kwargs]):
                entry = self._ledger.known(tensor)
                if entry is None or tensor.requires_grad or entry.number in self.facts.weights:
                    continue
                if entry.born == 0 or entry.where.module is None:
                    self.facts.inputs.add(entry.number)

    def _around_engine(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._ledger.phase
            self.facts.backwards += 1
            try:
                with unseen(), self._no_modes():
                    self._look(outputs)
            except Exception as fault:
                self.facts.faults.append(f"{type(fault).__name__}: {fault}")
            self._enter("backward")
            try:
                return inner(outputs, *args, **kwargs)
            finally:
                self._enter(before)

        return run_backward

    def _steps(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._enter("optimizer")

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._note_state(optimizer)
        self._enter("forward")

    def _enter(self, phase: Phase) -> None:
        self._ledger.phase = phase
        mark(f"phase {phase}")

    # -- the graph ----------------------------------------------------------------------------------------------------

    def _look(self, outputs: Any) -> None:
        graph = _saved.Graph()
        graph.read(outputs, _NODES, None)
        values: list[tuple[Tensor, Fact]] = []
        head = _head(graph)
        if head is not None:
            self.facts.head = (self.facts.head or set()) | {int(graph.nodes[i]._sequence_nr()) for i in head[1]}
        for index, node in enumerate(graph.nodes):
            dead = _dead(node)
            for name, value in _saved.saved_values(node):
                if type(value) is not tuple or len(value) != 3 or type(value[2]) is not _Token:
                    continue
                fact = value[2].fact
                values.append((value[0], fact))
                if dead is not None and name == "input":
                    fact.dead = dead
                if head is not None and index in head[0]:
                    fact.head = True
        self._compare(values)

    def _compare(self, values: list[tuple[Tensor, Fact]]) -> None:
        """Find saved storages with equal content."""
        groups: dict[Any, dict[int, tuple[Tensor, Fact]]] = {}
        for tensor, fact in values:
            whole = fact.nbytes == fact.entry.nbytes and fact.nbytes > 0
            if whole and fact.entry.number not in self.facts.weights and not fact.dtype.is_complex:
                key = fact.dtype, fact.shape, fact.entry.device
                groups.setdefault(key, {}).setdefault(fact.entry.number, (tensor, fact))
        for found in groups.values():
            if len(found) < 2:
                continue
            by_hash: dict[int, list[tuple[Tensor, Fact]]] = {}
            for tensor, fact in found.values():
                by_hash.setdefault(int(torch.hash_tensor(tensor).view(torch.int64)), []).append((tensor, fact))
            for alike in by_hash.values():
                same = [fact.entry for tensor, fact in alike if torch.equal(tensor, alike[0][0])]
                if len(same) > 1:
                    self.facts.equal.append(same)


class _HooksDisabled:
    def subscribe(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], /) -> Any:
        return _taps.saved_hooks_disabled.subscribe(wrap, order="measure")


def _head(graph: Any) -> tuple[set[int], set[int]] | None:
    """Return the nodes after the last layer with weights, and these with that layer's; None if no layer was found."""
    inner: set[int] = set()
    edge: set[int] = set()
    waiting = [0] if graph.nodes else []
    while waiting:
        index = waiting.pop()
        if index in inner or index in edge:
            continue
        if any(_is_parameter(graph, target) for target in graph.next[index]):
            edge.add(index)
            continue
        inner.add(index)
        waiting += graph.next[index]
    return (inner, inner | edge) if edge else None


def _is_parameter(graph: Any, index: int) -> bool:
    for _ in range(_CHAIN):
        if hasattr(graph.nodes[index], "variable"):
            return True
        if len(graph.next[index]) != 1:
            return False
        index = graph.next[index][0]
    return False


def _dead(node: Any) -> str | None:
    """Say why the saved input of a node is needed by no gradient; None if one needs it, or it is not known."""
    name = node.name()
    if name not in ("ConvolutionBackward0", "NativeBatchNormBackward0"):
        return None
    edges = node.next_functions
    if len(edges) < 2 or edges[1][0] is not None:
        return None
    if name == "ConvolutionBackward0":
        return "the weight is frozen: its gradient alone needs the input"
    if node._saved_training:
        return None
    return "the weight is frozen and the statistics are fixed: no gradient needs the input"


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in _tensors_in(one)]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in _tensors_in(one)]
    return []


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod")) or name
