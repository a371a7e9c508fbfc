"""The numbers of a backward: one maximum norm per gradient that flows, read all at once when the engine is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl._lineage._facts import BackwardFacts, Hit
from gradctl._lineage._tracer import Tracer, read_numbers

if TYPE_CHECKING:
    from gradctl._lineage._backward import Graph

TINY = 1e-30
_WALKS = 200


class Probe:
    """Hooks on every function of one graph, for one run of the engine.

    Args:
        tracer: where the hits go.
        graph: the graph that runs.
        backward: the facts of the run.
    """

    def __init__(self, tracer: Tracer, graph: Graph, backward: BackwardFacts) -> None:
        self._tracer = tracer
        self._graph = graph
        self._backward = backward
        self._handles: list[Any] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._order: list[int] = []
        self._saved: dict[int, dict[str, Any]] = {}

    def attach(self) -> None:
        """Register the hooks, and look at what suspicious functions have saved, while it is still there."""
        suspects = self._tracer.facts.constants.setdefault("suspects", set())
        for position, function in enumerate(self._graph.nodes):
            if suspects and self._key(function) in suspects:
                self._saved[position] = look_at_saved(function)
            register = getattr(function, "register_prehook", None)
            if register is not None:
                self._handles.append(register(self._hook(position)))

    def detach(self) -> None:
        """Take the hooks back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _key(self, function: Any) -> Any:
        node = self._graph.site.get(function)
        return function.name(), node.stack[:1] if node is not None else ()

    def _hook(self, position: int) -> Any:
        order, norms = self._order, self._norms

        def seen(grads: Sequence[Tensor | None]) -> None:
            order.append(position)
            for grad in grads:
                if grad is None or type(grad) not in (Tensor, Parameter) or grad.numel() == 0:
                    continue
                if grad.layout is not torch.strided:
                    if grad.layout is not torch.sparse_coo:
                        continue
                    grad = grad._values()
                    if grad.numel() == 0:
                        continue
                if grad.device.type == "meta" or not (grad.is_floating_point() or grad.is_complex()):
                    continue
                norms.append((position, torch.linalg.vector_norm(grad.detach(), float("inf"))))

        return seen

    def read(self, leaves: Sequence[tuple[Any, Tensor]]) -> None:
        """Read all norms, and find where gradients became none, zero, tiny or non-finite."""
        if not self._order:
            return
        size: dict[int, float] = {}
        for (position, _), number in zip(self._norms, read_numbers([norm for _, norm in self._norms]), strict=True):
            known = size.get(position)
            size[position] = number if known is None or number > known or number != number else known
        index = {function: position for position, function in enumerate(self._graph.nodes)}
        consumers: dict[int, list[int]] = {}
        for position, function in enumerate(self._graph.nodes):
            for following, _ in function.next_functions:
                if following is not None:
                    consumers.setdefault(index[following], []).append(position)
        self._find_nonfinite(size, consumers)
        walks = 0
        facts = self._tracer.facts
        for function, leaf in leaves:
            parameter = facts.parameters.get(id(leaf))
            position = index[function]
            value = size.get(position)
            if parameter is None and value is None:
                parameter = self._tracer.parameter(leaf)
            if parameter is None:
                continue
            parameter.norm = value
            kind = "none" if value is None else "zero" if value == 0.0 else "tiny" if value < TINY else "ok"
            if kind == "ok" or walks >= _WALKS:
                if kind == "ok":
                    parameter.killers.clear()
                continue
            walks += 1
            hit = self._walk(kind, position, size, consumers)
            if hit is not None:
                hit.leaf = id(leaf)
                known = parameter.killers.get(kind)
                parameter.killers[kind] = (hit, 1 if known is None else known[1] + 1)
                facts.constants["suspects"].add(self._key(self._graph.nodes[hit.detail["position"]]))

    def _hit(self, kind: str, position: int, size: dict[int, float]) -> Hit:
        function = self._graph.nodes[position]
        return Hit(
            kind, function.name(), self._graph.site.get(function), size.get(position, 0.0),
            self._backward.generation, self._backward.step,
            detail={
                "position": position,
                "saved": self._saved.get(position, {}),
                "forward_class": getattr(type(function), "_forward_cls", None),
                "root": position < len(self._backward.roots),
            },
        )  # fmt: skip

    def _walk(self, kind: str, start: int, size: dict[int, float], consumers: dict[int, list[int]]) -> Hit | None:
        """Go from a leaf towards the loss until a gradient is there; what stands there swallowed it."""
        ran = set(self._order)
        queue = deque([start])
        seen = {start}
        while queue:
            position = queue.popleft()
            for above in consumers.get(position, ()):
                if above in seen:
                    continue
                seen.add(above)
                value = size.get(above)
                if kind == "none":
                    if above in ran and value is not None:
                        return self._hit(kind, above, size)
                elif value is not None and value > TINY:
                    return self._hit(kind, above, size)
                queue.append(above)
        return None

    def _find_nonfinite(self, size: dict[int, float], consumers: dict[int, list[int]]) -> None:
        facts = self._tracer.facts
        if any(hit.kind in ("nonfinite", "forward") for hit in facts.hits):
            return
        for position in self._order:
            value = size.get(position)
            if value is None or value - value == 0.0:
                continue
            above = [c for c in consumers.get(position, ()) if c in size and size[c] - size[c] == 0.0]
            forward = self._tracer.first_nan
            if forward is not None:
                facts.hits.append(
                    Hit("forward", forward[0].op, forward[0], value, self._backward.generation, self._backward.step)
                )
            elif above:
                above.sort(key=lambda c: (_singular(self._graph.nodes[c].name()), c))
                hit = self._hit("nonfinite", above[-1], size)
                hit.detail["largest"] = max((v for v in size.values() if v - v == 0.0), default=0.0)
                facts.hits.append(hit)
            else:
                hit = self._hit("nonfinite", position, size)
                hit.detail["from_root"] = True
                facts.hits.append(hit)
            return


def _singular(name: str) -> bool:
    return name.startswith(("Sqrt", "Rsqrt", "Div", "Log", "Pow", "Norm", "LinalgVectorNorm", "Softmax", "LogSoftmax", "Exp", "Acos", "Asin", "Atan2", "Reciprocal", "Cdist", "Std", "Var", "Where"))  # fmt: skip


def look_at_saved(function: Any) -> dict[str, Any]:
    """Return what is known of the tensors that a function has saved: by name, shape, share of zeros, the leaf's id."""
    found: dict[str, Any] = {}
    for name in dir(function):
        if not name.startswith("_saved_"):
            continue
        try:
            value = getattr(function, name)
        except (RuntimeError, AttributeError):
            continue
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type == "meta":
            if isinstance(value, (int, float)):
                found[name[7:]] = {"number": value}
            continue
        value = value.detach()
        numel = value.numel()
        found[name[7:]] = {
            "shape": tuple(value.shape),
            "zeros": 1.0 - float(torch.count_nonzero(value)) / numel if numel else 0.0,
            "min": float(value.min()) if numel and not value.is_complex() else 0.0,
            "max": float(value.max()) if numel and not value.is_complex() else 0.0,
            "pointer": value.data_ptr(),
        }
    return found
