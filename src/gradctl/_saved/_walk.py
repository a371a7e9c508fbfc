"""Reading a graph from its root: what its nodes keep, and which leaves it reaches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl._saved._storage import SavedBytes, Tally

_NODES = 100_000
_SECONDS = 0.25
# Adding up what was read takes about one and a half times as long as reading it.
_READING = 0.4
_RAW = "_raw_saved_"
_OPAQUE = ("torch::autograd::CppNode", "torch::autograd::CopySlices")
_CHAIN = 4

_saved_attributes: dict[type, tuple[str, ...]] = {}


def walk(
    root: Any,
    exclude_storages: Collection[int] = frozenset(),
    *,
    names: Mapping[int, str] | None = None,
    nodes: int = _NODES,
    seconds: float = _SECONDS,
) -> SavedBytes:
    """Add up what the graph below `root` keeps for backward.

    Reads only: no hook and no code of the program runs, nothing is computed, and nothing is raised. What Python
    cannot see is counted in `unread`, what hooks of the program packed away in `packed`.

    Args:
        root: a `grad_fn`, a tensor, or a list of tensors.
        exclude_storages: keys from `storage_keys`, usually of the parameters.
        names: FQN of each parameter by `id`, for the modules of the rows.
        nodes: most nodes to visit.
        seconds: most seconds to spend, about; checked every 256 nodes.
    Returns:
        Bytes by operation and nearest module. An operation that uses no parameter itself belongs to the module
        whose output it was computed from.
    """
    begin = time.perf_counter()
    tally = Tally(exclude_storages)
    graph = Graph()
    packed, fault = 0, None
    try:
        with torch._C.DisableTorchFunctionSubclass():
            graph.read(root, nodes, begin + _READING * seconds)
            modules = _nearest_modules(graph, names or {})
            for index, node in enumerate(graph.nodes):
                where = graph.kind(index)
                if where.startswith(_OPAQUE):
                    tally.unread += 1
                for _, value in saved_values(node):
                    tensors = list(_tensors_in(value))
                    packed += not tensors
                    for tensor in tensors:
                        tally.add(tensor, where, modules[index])
                for tensor in _kept_on_context(node):
                    tally.add(tensor, f"{where} (kept on ctx)", modules[index])
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return SavedBytes(
        total=tally.total,
        count=tally.count,
        rows=tally.rows(),
        nodes=len(graph.nodes),
        seconds=time.perf_counter() - begin,
        complete=graph.complete,
        packed=packed,
        unread=tally.unread,
        fault=fault,
    )


def leaves(root: Any, *, nodes: int = _NODES) -> list[Tensor]:
    """Return the leaf tensors that a backward from `root` accumulates into, each once, in about forward order.

    Args:
        root: a `grad_fn`, a tensor, or a list of tensors.
        nodes: most nodes to visit; leaves beyond them, the farthest from `root`, are left out.
    """
    graph = Graph()
    found: dict[int, Tensor] = {}
    with torch._C.DisableTorchFunctionSubclass():
        graph.read(root, nodes, None)
        for tensor in graph.leaf_roots + [node.variable for node in graph.nodes if hasattr(node, "variable")]:
            found.setdefault(id(tensor), tensor)
    return list(found.values())[::-1]


class Graph:
    """Nodes in breadth-first order from the root, with the indexes of what each leads to."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.next: list[list[int]] = []
        self.leaf_roots: list[Tensor] = []
        self.complete = True

    def read(self, root: Any, limit: int, end: float | None) -> None:
        """Add what is below `root`, up to so many nodes, or to a time of `perf_counter`."""
        indexes: dict[Any, int] = {}
        for node in self._starts(root):
            if node not in indexes:
                indexes[node] = len(self.nodes)
                self.nodes.append(node)
        position = 0
        while position < len(self.nodes):
            if end is not None and not position % 256 and time.perf_counter() > end:
                self.complete = False
            onward: list[int] = []
            for node, _ in self.nodes[position].next_functions:
                if node is None:
                    continue
                index = indexes.get(node)
                if index is None:
                    if not self.complete or len(self.nodes) >= limit:
                        self.complete = False
                        continue
                    index = indexes[node] = len(self.nodes)
                    self.nodes.append(node)
                onward.append(index)
            self.next.append(onward)
            position += 1

    def kind(self, index: int) -> str:
        """Return the operation of a node."""
        return str(self.nodes[index].name())

    def _starts(self, root: Any) -> Iterator[Any]:
        if isinstance(root, Tensor):
            if root.grad_fn is not None:
                yield root.grad_fn
            elif root.requires_grad:
                self.leaf_roots.append(root)
        elif isinstance(root, Sequence):
            many: Sequence[Any] = root
            for one in many:
                yield from self._starts(one)
        elif root is not None:
            yield root


def saved_values(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the saved values of a node as they lie there, each with its name; a freed node has none."""
    kind: Any = type(node)
    attributes = _saved_attributes.get(kind)
    if attributes is None:
        attributes = tuple(name for name in dir(kind) if name.startswith(_RAW))
        if not issubclass(kind, torch.autograd.function.BackwardCFunction):
            # Classes of custom functions come and go; those of operations stay.
            _saved_attributes[kind] = attributes
    for name in attributes:
        try:
            value = getattr(node, name)
        except RuntimeError:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and (found := one.data) is not None:
                yield name.removeprefix(_RAW), found


def _tensors_in(value: Any) -> Iterator[Any]:
    """The tensors in what was saved: the value itself, or the members of what a pack hook of the program made of it."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        yield from (member for member in value if isinstance(member, Tensor))
    elif type(value) is dict:
        yield from (member for member in value.values() if isinstance(member, Tensor))


def _kept_on_context(node: Any) -> Iterator[Any]:
    """Tensors that a custom function keeps as plain attributes of `ctx`."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return
    for value in list(object.__getattribute__(node, "__dict__").values()):
        yield from _tensors_in(value)


def _nearest_modules(graph: Graph, names: Mapping[int, str]) -> list[str | None]:
    """The module of each node: of a parameter that it takes itself, else of the nearest node that it came from."""
    count = len(graph.nodes)
    modules: list[str | None] = [None] * count
    if not names:
        return modules
    consumers: list[list[int]] = [[] for _ in range(count)]
    for index, onward in enumerate(graph.next):
        for target in onward:
            consumers[target].append(index)
    queue: deque[int] = deque()
    for index in range(count):
        # The nearest: an LSTM that reads an embedding takes its own weights, and the embedding's table from afar.
        owners = [found for target in graph.next[index] if (found := _parameter(graph, target, names))]
        if owners:
            owner = min(owners, key=lambda found: found[0])[1]
            modules[index] = owner.rpartition(".")[0] or owner
            queue.append(index)
    owned = list(queue)
    _spread(modules, queue, consumers)
    _spread(modules, deque(owned), graph.next)
    return modules


def _parameter(graph: Graph, index: int, names: Mapping[int, str]) -> tuple[int, str] | None:
    """The parameter that a node stands for, seen through a cast, a transpose or the like, and how far it is."""
    for distance in range(_CHAIN):
        variable = getattr(graph.nodes[index], "variable", None)
        if variable is not None:
            name = names.get(id(variable))
            return None if name is None else (distance, name)
        if len(graph.next[index]) != 1:
            return None
        index = graph.next[index][0]
    return None


def _spread(modules: list[str | None], queue: deque[int], onward: list[list[int]]) -> None:
    while queue:
        index = queue.popleft()
        for target in onward[index]:
            if modules[target] is None:
                modules[target] = modules[index]
                queue.append(target)
