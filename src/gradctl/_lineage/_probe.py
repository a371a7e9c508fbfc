"""The numbers of a backward: how large each gradient is that flows, and which function made it vanish or break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradctl import _torch_private as private
from gradctl._lineage._facts import BackwardFacts, Hit, NonfiniteFacts, ParameterFacts
from gradctl._lineage._node import Node
from gradctl._lineage._numbers import (
    describe,
    largest,
    leaf_behind,
    magnitude,
    norm_of,
    read_numbers,
    readable,
    saved_by,
)
from gradctl._lineage._tracer import NODE, Tracer

if TYPE_CHECKING:
    from gradctl._lineage._backward import Graph

TINY = 1e-18
HUGE = 1e12
_EARLY = 3
_SWALLOWERS = 3
_RANK = {"none": 0, "zero": 1, "tiny": 2, "nonfinite": 3, "ok": 4}


def kind_of(value: float | None) -> str:
    """Return what a size means: "none", "zero", "tiny", "nonfinite" or "ok"."""
    if value is None:
        return "none"
    if value - value != 0.0:
        return "nonfinite"
    return "zero" if value == 0.0 else "tiny" if value < TINY else "ok"


class Probe:
    """Hooks on every function of one graph, for one run of the engine.

    Args:
        tracer: where the facts go.
        graph: the graph that runs.
        backward: the facts of the run.
    """

    def __init__(self, tracer: Tracer, graph: Graph, backward: BackwardFacts) -> None:
        self._tracer = tracer
        self._graph = graph
        self._backward = backward
        self._handles: list[Any] = []
        self._order: list[int] = []
        self._edges: dict[tuple[int, int], float | None] = {}
        self._late: list[tuple[tuple[int, int], Tensor]] = []
        self._odd = False
        self._seen: dict[int, dict[str, Any]] = {}
        self._broken: dict[str, Any] | None = None
        self._dispatch_off = private.get("disable_dispatch")
        self._suspects: set[Any] = tracer.facts.constants.setdefault("suspects", set())

    def attach(self) -> None:
        """Register the hooks."""
        for position, function in enumerate(self._graph.nodes):
            if getattr(function, "variable", None) is None:
                self._handles.append(function.register_hook(self._hook(position, function)))

    def detach(self) -> None:
        """Take the hooks back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _key(self, function: Any) -> Any:
        node = self._graph.site.get(function)
        return function.name(), node.stack[:1] if node is not None else ()

    def _hook(self, position: int, function: Any) -> Callable[..., None]:
        order, edges, tracer = self._order, self._edges, self._tracer

        def seen(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
            if tracer.disabled:
                return
            order.append(position)
            odd = False
            try:
                with torch._C.DisableTorchFunction(), self._dispatch_off():
                    for number, grad in enumerate(outgoing):
                        if grad is None:
                            edges[position, number] = None
                            odd = True
                            continue
                        if grad.layout is torch.sparse_coo:
                            grad = grad._values()
                        if not readable(grad):
                            edges[position, number] = 1.0
                        elif grad.device.type == "cpu":
                            size = edges[position, number] = magnitude(grad)
                            odd = odd or not TINY <= size < HUGE
                        else:
                            edges[position, number] = 1.0
                            self._late.append(((position, number), norm_of(grad)))
                    if odd:
                        self._odd = True
                        self._look(position, function, outgoing, incoming)
            except Exception as fault:
                tracer.disable(fault)

        return seen

    def _look(
        self, position: int, function: Any, outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]
    ) -> None:
        """Keep what explains an odd gradient, while what the function saved is still there."""
        arrived = [largest(grad) for grad in incoming if grad is not None and readable(grad)]
        came = max(arrived, default=None)
        if any(size != size for size in arrived):
            came = float("nan")
        found: dict[str, Any] = {"incoming": came}
        self._seen[position] = found
        sizes = [self._edges[position, number] for number in range(len(outgoing))]
        if came is None or came == 0.0:
            return
        broken = came - came == 0.0 and any(kind_of(size) == "nonfinite" for size in sizes)
        if broken and self._broken is None and self._tracer.facts.nonfinite is None:
            self._broken = found
            found["saved"] = look_at_saved(function, self._tracer)
            found["masked"] = _zero_where_broken(outgoing, incoming)
        elif self._backward.generation < _EARLY or self._key(function) in self._suspects:
            wanted = [size is not None and size < TINY and (came >= TINY or size == 0.0) for size in sizes]
            if any(wanted):
                found["saved"] = look_at_saved(function, self._tracer)
        found["dtypes"] = [None if grad is None else grad.dtype for grad in outgoing]
        found["empty"] = any(grad is not None and grad.numel() == 0 for grad in incoming)

    def read(self, leaves: Sequence[tuple[Any, Tensor]]) -> None:
        """Write what became of the gradient of each leaf, and the first function that broke one."""
        if not self._order:
            return
        for (edge, _), size in zip(self._late, read_numbers([norm for _, norm in self._late]), strict=True):
            self._edges[edge] = size
            self._odd = self._odd or not TINY <= size < HUGE
        facts = self._tracer.facts
        if not self._odd:
            for _, leaf in leaves:
                parameter = facts.parameters.get(id(leaf))
                if parameter is not None:
                    parameter.norm = 1.0
                    _forget(parameter, "ok")
            self._all_finite()
            return
        arrived, swallowers, first_broken = self._flow()
        bad = [leaf for function, leaf in leaves if kind_of(arrived.get(function, 0.0)) == "nonfinite"]
        root_bad = any(size - size != 0.0 for size in self._backward.root_sizes)
        if bad or root_bad:
            self._nonfinite(first_broken, bad, arrived)
        else:
            self._all_finite()
            self._exploded([leaf for fn, leaf in leaves if (arrived.get(fn) or 0.0) > HUGE])
        for function, leaf in leaves:
            value = arrived.get(function)
            parameter = facts.parameters.get(id(leaf))
            if parameter is None:
                if value is not None:
                    continue
                parameter = self._tracer.parameter(leaf)
            parameter.norm = value
            kind = kind_of(value)
            _forget(parameter, kind)
            if kind in ("ok", "nonfinite"):
                continue
            hits = [self._hit(kind, *edge) for edge in swallowers.get(function, ())]
            for hit in hits:
                hit.leaf = id(leaf)
                self._suspects.add(self._key(self._graph.nodes[hit.detail["position"]]))
            known = parameter.killers.get(kind)
            if hits:
                hits[0].detail["others"] = hits[1:]
                parameter.killers[kind] = (hits[0], 1 if known is None else known[1] + 1)

    def _flow(self) -> tuple[dict[Any, float | None], dict[Any, list[tuple[int, int]]], tuple[int, int] | None]:
        """Follow the gradients from the roots on.

        Returns:
            What arrived at each function that was reached (a leaf's included), which edges swallowed what does not
            arrive there, and the first edge that is not finite though what its function got was.
        """
        nodes = self._graph.nodes
        arrived: dict[Any, float | None] = {}
        roots: set[Any] = {root.grad_fn for root in self._graph.roots}
        swallowers: dict[Any, list[tuple[int, int]]] = {}
        first: tuple[int, int] | None = None
        for position in self._order:
            function: Any = nodes[position]
            came = 1.0 if function in roots else arrived.get(function)
            measured = self._seen.get(position, {}).get("incoming", came)
            lost: list[tuple[int, int]] = swallowers.get(function, [])
            if _RANK[kind_of(measured)] < _RANK[kind_of(came)] and kind_of(measured) != "nonfinite":
                lost = [(position, -1)]  # the sum of what arrived cancels, or a hook emptied it
            came_kind = kind_of(measured)
            for number, (child, _) in enumerate(function.next_functions):
                if child is None or (position, number) not in self._edges:
                    continue
                size = self._edges[position, number]
                kind = kind_of(size)
                if kind == "nonfinite" and came_kind != "nonfinite" and first is None:
                    first = (position, number)
                before = arrived.get(child)
                if child not in arrived or before is None:
                    arrived[child] = size
                elif size is not None:
                    arrived[child] = max(before, size) if before == before and size == size else float("nan")
                if kind in ("none", "zero", "tiny"):
                    mine = [(position, number)] if _RANK[kind] < _RANK[came_kind] else lost
                    into = swallowers.setdefault(child, [])
                    into += [edge for edge in mine if edge not in into][: _SWALLOWERS - len(into)]
        return arrived, swallowers, first

    def _hit(self, kind: str, position: int, number: int) -> Hit:
        function = self._graph.nodes[position]
        seen = self._seen.get(position, {})
        dtypes = seen.get("dtypes") or ()
        return Hit(
            kind, function.name(), self._graph.site.get(function), seen.get("incoming") or 0.0,
            self._backward.generation, self._backward.step,
            detail={
                "position": position,
                "edge": number,
                "saved": seen.get("saved", {}),
                "masked": seen.get("masked"),
                "empty": seen.get("empty", False),
                "dtype": dtypes[number] if 0 <= number < len(dtypes) else None,
                "size": self._edges.get((position, number)),
                "forward_class": getattr(type(function), "_forward_cls", None),
                "after": self._after(function) if kind == "nonfinite" or number < 0 else (),
            },
        )  # fmt: skip

    def _after(self, function: Any) -> tuple[tuple[str, Node | None], ...]:
        """Return the names and nodes of the functions that used the output of `function`, nearest first."""
        consumers: dict[Any, list[Any]] = {}
        for other in self._graph.nodes:
            for following, _ in other.next_functions:
                if following is not None:
                    consumers.setdefault(following, []).append(other)
        found: list[Any] = []
        queue = [function]
        for at in queue:
            for above in consumers.get(at, ()):
                if above not in found and len(found) < 24:
                    found.append(above)
                    queue.append(above)
        return tuple([(above.name(), self._graph.site.get(above)) for above in found])

    def _all_finite(self) -> None:
        tracer, facts = self._tracer, self._tracer.facts
        found, key = facts.nonfinite, loss_of(self._backward)
        facts.whole_losses.add(key)
        facts.withheld.pop(key, None)
        if found is not None and not found.steps:
            if (other := loss_of(found.backward)) != key:
                facts.withheld[other] = found  # it may go on: this one says nothing of that loss
            facts.recovered += 1  # nobody used it: a loss scaler, or the program itself, left that step out
            facts.passed, facts.nonfinite = found, None
            tracer.forward.paused = False
        tracer.forward.clear()

    def _nonfinite(
        self, first: tuple[int, int] | None, bad: Sequence[Tensor], arrived: dict[Any, float | None]
    ) -> None:
        tracer, facts, backward = self._tracer, self._tracer.facts, self._backward
        key = loss_of(backward)
        if facts.nonfinite is not None:
            facts.nonfinite.backwards += 1
            if loss_of(facts.nonfinite.backward) == key:
                facts.nonfinite.run += 1
                facts.nonfinite.last = backward.generation
            return
        if (known := facts.withheld.pop(key, None)) is not None:
            known.backwards += 1
            known.run += 1
            known.last = backward.generation
            facts.nonfinite = known
            tracer.forward.paused = True
            tracer.forward.clear()
            return
        finite = [size for size in self._edges.values() if size is not None and size - size == 0.0]
        hit = None if first is None else self._hit("nonfinite", *first)
        facts.nonfinite = NonfiniteFacts(
            backward=backward,
            hit=hit,
            flags=list(tracer.forward.flags),
            leaves=tuple([id(leaf) for leaf in bad]),
            step=backward.step,
            generation=backward.generation,
            largest=max(finite, default=0.0),
            growth=self._growth() if hit is not None else (),
            first=key not in facts.whole_losses,
            last=backward.generation,
        )
        tracer.forward.paused = True
        tracer.forward.clear()

    def _exploded(self, grown: Sequence[Tensor]) -> None:
        facts, backward = self._tracer.facts, self._backward
        if not grown or facts.nonfinite is not None:
            return
        before = 0 if facts.exploded is None else facts.exploded.backwards
        facts.exploded = NonfiniteFacts(
            backward, None, [], tuple([id(leaf) for leaf in grown]), backward.step, backward.generation,
            max(size for size in self._edges.values() if size is not None), self._growth(), before + 1,
        )  # fmt: skip

    def _growth(self) -> tuple[tuple[Node, int, float], ...]:
        """Return the sites that the engine ran most often until a gradient broke, with how often and the last size."""
        sizes: dict[Any, tuple[Node, int, float]] = {}
        for position in self._order:
            node = self._graph.site.get(self._graph.nodes[position])
            for number in range(8):
                size = self._edges.get((position, number))
                if size is not None and size - size == 0.0 and node is not None and node.stack:
                    known = sizes.get(node.stack[:1])
                    sizes[node.stack[:1]] = (
                        node, 1 + (known[1] if known else 0), max(size, known[2] if known else 0.0)
                    )  # fmt: skip
        return tuple(sorted(sizes.values(), key=lambda entry: -entry[1])[:4])


def loss_of(backward: BackwardFacts) -> Any:
    """Return what tells the loss of a backward from the others of a program: the lines that made it and run it."""
    root = next(iter(backward.roots), None)
    return root.stack[:1] if root is not None else (), backward.stack[:1]


def _forget(parameter: ParameterFacts, kind: str) -> None:
    for other in [key for key in parameter.killers if key in _RANK and key != kind]:
        del parameter.killers[other]


def _zero_where_broken(outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> bool | None:
    """Whether every broken entry came from a gradient of exactly zero; None where shapes do not tell."""
    for grad in outgoing:
        if grad is None or not readable(grad):
            continue
        broken = ~grad.isfinite()
        if not bool(broken.any()):
            continue
        for came in incoming:
            if came is not None and came.shape == grad.shape:
                return not bool(came[broken].any())
        return None
    return None


def look_at_saved(function: Any, tracer: Tracer) -> dict[str, Any]:
    """Return what a function saved: each tensor described, with its node and the leaf that it is; and plain numbers."""
    found: dict[str, Any] = {}
    for name, value in saved_by(function):
        if isinstance(value, Tensor):
            entry = found[name] = describe(value)
            leaf = leaf_behind(value)
            entry["leaf"] = id(leaf) if leaf is not None else None
            made: Any = value.grad_fn
            entry["node"] = tracer.map.get(value) or (made.metadata.get(NODE) if made is not None else None)
            entry["trainable"] = value.requires_grad
        elif isinstance(value, (int, float, bool)):
            found[name] = {"number": value}
        elif isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
            found[name] = {"numbers": tuple(value)}
    return found
