"""What the engine is asked to do: the graph of each backward, what it freed, which leaves it reached."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradctl._lineage._breaks import GENERATIONS, note_breaks
from gradctl._lineage._edits import watch_edits
from gradctl._lineage._facts import BackwardFacts, DeadTerm, ErrorFacts
from gradctl._lineage._kept import find_kept
from gradctl._lineage._mode import HookMode
from gradctl._lineage._node import Node
from gradctl._lineage._numbers import sizes_of
from gradctl._lineage._probe import Probe
from gradctl._lineage._tracer import FREED, NODE, Tracer, grad_fn_of, open_regions
from gradctl._lineage._walk import ADDITIONS, meeting, sufficient_breaks, sum_of, upstream

_HISTORY_EVERY = 3
_HISTORY_LAST = 400
_GRAPH_TELLS = ("graph a second time", "inplace operation", "been used in the graph", "returned an in", "require grad")


class Graph:
    """The autograd nodes behind some outputs.

    Attributes:
        roots: the outputs that are tensors.
        nodes: every one of them, consumers before what they consume where that is known.
        site: for each, the node of the operation that made it, or that of its consumer.
    """

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.roots = [output for output in outputs if isinstance(output, Tensor)]
        self.nodes: list[Any] = []
        self.site: dict[Any, Node | None] = {}
        stack = [fn for output in outputs if (fn := _function_of(output)) is not None]
        site = self.site
        for function in stack:
            site[function] = function.metadata.get(NODE)
        seen = set(stack)
        while stack:
            function = stack.pop()
            self.nodes.append(function)
            own = site[function] = function.metadata.get(NODE) or site.get(function)
            for following, _ in function.next_functions:
                if following is None:
                    continue
                if site.get(following) is None:
                    site[following] = following.metadata.get(NODE) or own
                if following not in seen:
                    seen.add(following)
                    stack.append(following)

    def leaves(self) -> list[tuple[Any, Tensor]]:
        """Return the leaves that gradients accumulate into, with their functions."""
        return [(fn, leaf) for fn in self.nodes if (leaf := getattr(fn, "variable", None)) is not None]

    def executed_for(self, inputs: Sequence[Any]) -> set[Any]:
        """Return the functions that run when the gradient is wanted for `inputs` only."""
        wanted = {fn for tensor in inputs if (fn := _function_of(tensor)) is not None}
        leaves = {id(tensor) for tensor in inputs if isinstance(tensor, Tensor)}
        wanted |= {fn for fn, leaf in self.leaves() if id(leaf) in leaves}
        runs: set[Any] = set()
        consumers: dict[Any, list[Any]] = {}
        for function in self.nodes:
            for following, _ in function.next_functions:
                if following is not None:
                    consumers.setdefault(following, []).append(function)
        queue = list(wanted)
        while queue:
            function = queue.pop()
            if function in runs:
                continue
            runs.add(function)
            queue += consumers.get(function, [])
        return runs - wanted


def _function_of(output: Any) -> Any:
    if isinstance(output, Tensor):
        return grad_fn_of(output)
    return getattr(output, "node", None)  # a GradientEdge


def wrap(tracer: Tracer) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the wrap of the engine's `run_backward`."""
    hooks = HookMode(tracer)

    def around(inner: Callable[..., Any]) -> Callable[..., Any]:
        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            state = tracer.here
            if state.silent or tracer.blind():
                return inner(outputs, *args, **kwargs)
            call: _Call | None = None
            try:
                with torch._C.DisableTorchFunction():
                    call = _Call(tracer, outputs, args, kwargs)
            except Exception as fault:
                tracer.disable(fault)
                return inner(outputs, *args, **kwargs)
            state.silent += 1
            try:
                with hooks:
                    out = inner(outputs, *args, **kwargs)
            except Exception as error:
                _guarded(tracer, call.failed, error)
                raise
            finally:
                state.silent -= 1
                call.detach()
            _guarded(tracer, call.done, out)
            return out

        return run_backward

    return around


def _guarded(tracer: Tracer, act: Callable[[Any], None], value: Any) -> None:
    try:
        with torch._C.DisableTorchFunction():
            act(value)
    except Exception as fault:
        tracer.disable(fault)


class _Call:
    """One call of the engine, from before it runs until its facts are written."""

    def __init__(self, tracer: Tracer, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        facts = tracer.facts
        self.tracer = tracer
        self.roots = [output for output in outputs if isinstance(output, Tensor)]
        inputs = args[3] if len(args) > 3 and args[3] is not None else kwargs.get("inputs") or ()
        self.inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        self.graph = Graph(outputs)
        retain = bool(args[1]) if len(args) > 1 else bool(kwargs.get("keep_graph"))
        self.facts = BackwardFacts(
            generation=facts.generation,
            roots=tuple([tracer.node(root) for root in self.roots]),
            stack=tracer.frames.stack(),
            accumulates=bool(kwargs.get("accumulate_grad", True)),
            retain=retain,
            create_graph=bool(args[2]) if len(args) > 2 else bool(kwargs.get("create_graph")),
            inputs=tuple([tracer.node(tensor) for tensor in self.inputs if isinstance(tensor, Tensor)]),
            step=facts.steps,
            seq=tracer.seq(),
            thread=threading.get_ident(),
        )
        facts.backwards.append(self.facts)
        if self.inputs:
            facts.differentiated.update([id(tensor) for tensor in self.inputs if isinstance(tensor, Tensor)])
        self.edits = watch_edits(tracer, self.graph)
        self.probe = Probe(tracer, self.graph, self.facts)
        if tracer.numerics and self.facts.accumulates and not self.facts.create_graph:
            tracer.forward.settle()
            self.facts.root_sizes = sizes_of(self.roots)
            self.probe.attach()

    def detach(self) -> None:
        """Take all hooks back."""
        self.probe.detach()
        for handle in self.edits:
            handle.remove()

    def failed(self, error: BaseException) -> None:
        """Keep the graph where it tells why this failed, and until a backward succeeds: it holds what was saved."""
        self.facts.failed = True
        state = self.tracer.here
        if "does not require grad" in str(error):
            for node in upstream([*self.facts.roots, *(escape.node for escape in self.tracer.facts.escapes)]):
                tensor = node.tensor() if node.leaf else None
                if tensor is not None and (node.requires_grad or isinstance(tensor, Parameter)):
                    self.tracer.parameter(tensor)  # so that what lost its gradient can be named
        told = any(part in str(error) for part in _GRAPH_TELLS)
        self.tracer.facts.error = ErrorFacts(
            error, "backward", self.facts.roots, tuple([False] * len(self.facts.roots)), self.facts.stack,
            backward=self.facts, graph=self.graph if told else None, grad_enabled=torch.is_grad_enabled(),
            regions=open_regions(state),
        )  # fmt: skip

    def done(self, out: Any) -> None:
        """Write what this backward did."""
        tracer, facts, graph = self.tracer, self.tracer.facts, self.graph
        facts.error = None
        leaves = graph.leaves()
        mine = self.facts
        if not mine.retain:
            runs = graph.executed_for(self.inputs) if self.inputs else None
            mark = (facts.generation, mine.stack, mine.seq)
            for function in graph.nodes:
                if (runs is None or function in runs) and getattr(function, "variable", None) is None:
                    function.metadata[FREED] = mark
        if mine.accumulates:
            mine.leaves = frozenset([id(leaf) for _, leaf in leaves])
            for _, leaf in leaves:
                if leaf.grad is None:
                    continue
                parameter = tracer.parameter(leaf)
                parameter.reached += 1
                parameter.last_reached = facts.generation
                parameter.last_reached_seq = mine.seq
                if parameter.first_reached is None:
                    parameter.first_reached = facts.generation
                self._own_gradient(leaf)
            self._shared_gradients(leaves)
            for root in mine.roots:
                self._sum(root)
            self._derivatives()
            self._partial()
            if facts.generation < GENERATIONS:
                made = tracer.log.get(facts.generation, ())
                note_breaks(
                    facts.breaks, made, [e for e in facts.escapes if e.generation == facts.generation], mine.roots
                )
            self.probe.read(leaves)
            facts.step_at.append(facts.steps)
            facts.generation += 1
            while facts.escapes and facts.escapes[0].generation < facts.generation - 2:
                facts.escapes.popleft()
            if facts.generation % _HISTORY_EVERY == 0 and facts.generation < _HISTORY_LAST:
                find_kept(tracer)
        else:
            self._returned(out)

    def _shared_gradients(self, leaves: Sequence[tuple[Any, Tensor]]) -> None:
        """Note leaves whose `.grad` is one tensor: this backward has added the gradients of both into it."""
        owners: dict[int, Tensor] = {}
        for _, leaf in leaves:
            if leaf.grad is None:
                continue
            first = owners.setdefault(id(leaf.grad), leaf)
            if first is not leaf:
                counts = self.tracer.facts.accumulated_into_one
                pair = frozenset((id(first), id(leaf)))
                counts[pair] = counts.get(pair, 0) + 1

    def _own_gradient(self, leaf: Tensor) -> None:
        grad = leaf.grad
        assert grad is not None
        known = self.tracer.map.get(grad)
        if known is None:
            node = self.tracer.new("grad", ())
            node.extra = id(leaf)
            node.grads = {id(leaf): node.seq}
            node.ref = self.tracer.map.set(grad, node)

    def _returned(self, out: Any) -> None:
        tracer, mine = self.tracer, self.facts
        returned = list(out) if isinstance(out, (tuple, list)) else [out]
        mine.missing = tuple([position for position, value in enumerate(returned) if value is None])
        inputs = [tracer.node(tensor) for tensor in self.inputs if isinstance(tensor, Tensor)]
        nodes = [*mine.roots, *inputs]
        live = [node.requires_grad for node in nodes]
        for position, value in enumerate(returned):
            if isinstance(value, Tensor):
                node = tracer.made("autograd.grad", value, nodes, live, mine.stack)
                node.extra = mine
                node.grads = {id(self.inputs[position]): node.seq} if position < len(self.inputs) else None
                if not mine.create_graph:
                    node.cut = "constant"
                    tracer.constants_made = tracer.facts.generation

    def _sum(self, root: Node) -> None:
        """Note the terms of a loss that depend on parameters and carry no gradient to them, and plain numbers in it."""
        facts = self.tracer.facts
        joins, parts = sum_of(root)
        for part in parts if len(parts) > 1 else ():
            key = (part.op, part.stack[:1])
            entry = facts.dead_terms.get(key)
            if part.live:
                if entry is not None:
                    entry.live, entry.run = entry.live + 1, 0
                elif part.trainable:
                    facts.dead_terms[key] = DeadTerm(part, root, self.facts.step, live=1)
            elif part.trainable and part.inputs:
                if entry is None:
                    entry = facts.dead_terms[key] = DeadTerm(part, root, self.facts.step)
                if not entry.dead:
                    entry.part, entry.root, entry.step = part, root, self.facts.step
                entry.dead, entry.run = entry.dead + 1, entry.run + 1
        for join in joins:
            if join.op in ADDITIONS and any(type(value) is float and value for value in join.scalars):
                entry = facts.dead_numbers.setdefault(join.stack[:1], [join, root, 0, (), self.facts.step])
                entry[2] += 1
                if entry[2] <= 3 and facts.escapes:
                    entry[:] = [join, root, entry[2], tuple(facts.escapes)[-64:], self.facts.step]

    def _partial(self) -> None:
        """Note values that enter a loss as copies without history, and where they meet values that have one."""
        tracer = self.tracer
        copies = {id(node) for node in tracer.copies if node.generation == self.facts.generation}
        if not copies:
            return
        found = [node for node in sufficient_breaks(self.facts.roots) if id(node) in copies]
        if not found:
            return
        nodes = sorted(upstream(self.facts.roots), key=lambda node: node.seq)
        for copy in found:
            meets, words = meeting(copy, nodes)
            if meets is None:
                continue
            entry = tracer.facts.partial_cuts.setdefault(
                (copy.cut, copy.stack[:1]), [copy, self.facts, 0, meets, words]
            )
            entry[2] += 1

    def _derivatives(self) -> None:
        """Note derivatives without history in a loss that holds derivatives with history too."""
        tracer = self.tracer
        if tracer.constants_made < self.facts.generation:
            return
        nodes = upstream(self.facts.roots)
        with_history = [n for n in nodes if n.op == "autograd.grad" and n.extra.create_graph and n.live]
        for node in nodes:
            if node.op != "autograd.grad" or node.cut != "constant" or not node.trainable:
                continue
            mine: BackwardFacts = node.extra
            wanted = {id(n) for n in mine.inputs}
            related = [other for other in with_history if wanted & {id(n) for n in other.extra.inputs}]
            if related:
                key = node.stack[:1]
                entry = tracer.facts.lost_derivatives.setdefault(key, [node, self.facts.roots[0], 0, related[0]])
                entry[2] += 1
