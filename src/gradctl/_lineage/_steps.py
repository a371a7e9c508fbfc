"""What optimizers do: who is held, what state each gradient is in at the step, who cleared it and when."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl._lineage._census import note_strangers
from gradctl._lineage._facts import GradState, OptimizerFacts
from gradctl._lineage._frames import Stack
from gradctl._lineage._handover import CLEARS, COPIES, events_since, note_handover
from gradctl._lineage._numbers import read_sizes
from gradctl._lineage._tracer import Tracer
from gradctl._lineage._walk import Unreached

_EXPLAIN = 8
_REMEMBER = 50


def optimizer_facts(tracer: Tracer, optimizer: Any, stack: Stack) -> OptimizerFacts:
    """Return the facts of an optimizer; new ones when it was not seen before."""
    known = tracer.facts.optimizers.get(id(optimizer))
    if known is None or known.ref() is not optimizer:
        known = OptimizerFacts(weakref.ref(optimizer), stack, tracer.seq(), type(optimizer).__name__)
        tracer.facts.optimizers[id(optimizer)] = known
    return known


def held_by(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"] if isinstance(p, Tensor)]


def before_step(tracer: Tracer, optimizer: Any, stack: Stack) -> None:
    """Write the facts of a step that is about to use its gradients."""
    facts = tracer.facts
    mine = optimizer_facts(tracer, optimizer, stack)
    params = held_by(optimizer)
    mine.held = frozenset([id(p) for p in params])
    groups = getattr(optimizer, "param_groups", ())
    mine.empty_groups = tuple([number for number, group in enumerate(groups) if not group["params"]])
    states = _states(params)
    if "nonfinite" in states:
        facts.nonfinite = facts.nonfinite or facts.passed  # a finite microbatch after it had let it pass
        if facts.nonfinite is not None:
            facts.nonfinite.steps += 1
    elif facts.nonfinite is not None and not facts.nonfinite.leaves and mine.held & facts.nonfinite.backward.leaves:
        facts.nonfinite.steps += 1  # the loss was NaN, its gradients were not, and the step was taken
    backwards = [
        b
        for b in facts.backwards
        if b.accumulates and not b.failed and b.seq > mine.last_step_seq and not tracer.of_another_worker(b.thread)
    ]
    step = facts.steps
    unreached: Unreached | None = None
    with_grad: dict[int, int] = {}
    for p, state in zip(params, states, strict=True):
        if not p.requires_grad and p.grad is None:
            known = facts.parameters.get(id(p))
            if known is not None:
                known.requires_grad = False
            continue
        parameter = tracer.parameter(p)
        parameter.states.append((step, state))
        grad = p.grad
        if grad is None:
            if p.requires_grad and backwards and len(parameter.explained) < _EXPLAIN:
                if unreached is None:
                    roots = [root for b in backwards for root in b.roots]
                    log = [node for key in sorted(tracer.log) for node in tracer.log[key]]
                    unreached = Unreached(roots, tuple(facts.escapes), log)
                kind, evidence = unreached.why(parameter.node)
                parameter.explained.append((step, kind, evidence))
            continue
        with_grad[id(p)] = id(grad)
    if backwards:
        try:
            note_strangers(tracer, mine, {key for b in backwards for key in b.leaves})
        except Exception as fault:  # it looks at the program's own objects, which may answer anything
            facts.notes.append(f"who owns a parameter could not be asked: {type(fault).__name__}: {fault}")
    note_handover(tracer, mine, params, states, backwards, stack)
    same = {key for key, value in with_grad.items() if mine.last_grads.get(key) == value}
    same = {key for key in same if facts.parameters[key].last_reached_seq > mine.last_step_seq}
    if same and (left := same - _cleared_since(tracer, mine) - _buffers_cleared(tracer, mine, params)):
        mine.uncleared.append((mine.steps, stack, frozenset(left)))
        del mine.uncleared[:-_REMEMBER]
    mine.last_grads = with_grad
    mine.last_step_seq = tracer.seq()
    mine.last_step_stack = stack
    mine.last_step_generation = facts.generation
    mine.step_seqs.append(mine.last_step_seq)
    mine.steps += 1
    facts.steps += 1


def _states(params: list[Tensor]) -> list[GradState]:
    states: list[GradState] = ["none" if p.grad is None else "ok" for p in params]
    norms: list[Tensor] = []
    where: list[int] = []
    for position, p in enumerate(params):
        grad = p.grad
        if grad is None or type(grad) is not Tensor or grad.device.type == "meta":
            continue
        if grad.layout is torch.sparse_coo:
            grad = grad._values()
        if grad.layout is not torch.strided or not (grad.is_floating_point() or grad.is_complex()):
            continue
        if grad.numel() == 0:
            continue
        norms.append(grad)
        where.append(position)
    if not norms:
        return states
    with torch.no_grad():
        numbers = read_sizes(norms)
    for position, number in zip(where, numbers, strict=True):
        states[position] = "zero" if number == 0.0 else "ok" if number - number == 0.0 else "nonfinite"
    return states


def _cleared_since(tracer: Tracer, mine: OptimizerFacts) -> set[int]:
    """Return the leaves whose gradients were cleared, or written anew, after the last step."""
    found: set[int] = set()
    for event in events_since(tracer, mine.last_step_seq):
        if event.kind in ("zero_grad", "none", "set") or event.op in CLEARS or event.op in COPIES:
            found |= event.ids
    return found


def _buffers_cleared(tracer: Tracer, mine: OptimizerFacts, params: list[Tensor]) -> set[int]:
    """Return the leaves whose gradients lie in memory that was cleared as a whole: one buffer for all gradients."""
    storages: set[int] = set()
    for mutation in reversed(tracer.facts.mutations):
        if mutation.seq < mine.last_step_seq:
            break
        if mutation.op in CLEARS or mutation.op in COPIES:
            storages.add(mutation.storage)
    if not storages:
        return set()
    return {
        id(p)
        for p in params
        if p.grad is not None and p.grad.layout is torch.strided and p.grad.untyped_storage()._cdata in storages
    }


def wrap_zero_grad(tracer: Tracer) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the wrap of `Optimizer.zero_grad`, and of `Module.zero_grad`."""

    def around(inner: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            state = tracer.here
            if state.silent or tracer.blind():
                return inner(owner, *args, **kwargs)
            try:
                with torch._C.DisableTorchFunction():
                    params = held_by(owner) if hasattr(owner, "param_groups") else list(owner.parameters())
                    name = f"{type(owner).__name__}.zero_grad"
                    tracer.grad_event("zero_grad", [id(p) for p in params], name, tracer.frames.stack())
            except Exception as fault:
                tracer.disable(fault)
            state.silent += 1
            try:
                return inner(owner, *args, **kwargs)
            finally:
                state.silent -= 1

        return zero_grad

    return around
