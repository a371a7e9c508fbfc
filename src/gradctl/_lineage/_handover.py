"""What happens to gradients between the backward that brings them and the step that uses them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl._lineage._facts import BackwardFacts, GradEvent, GradState, OptimizerFacts, Shared, Taken
from gradctl._lineage._frames import Stack
from gradctl._lineage._tracer import Tracer

CLEARS = frozenset({"zero_", "fill_", "_foreach_zero_"})
COPIES = frozenset({"copy_", "_foreach_copy_", "data.__set__", "set_"})
_REMEMBER = 50
_OVERLAPS_EVERY = 16


def events_since(tracer: Tracer, seq: int) -> list[GradEvent]:
    """Return what touched gradients after an event, oldest first."""
    found: list[GradEvent] = []
    for event in reversed(tracer.facts.grad_events):
        if event.seq < seq:
            break
        if not tracer.of_another_worker(event.thread):
            found.append(event)
    found.reverse()
    return found


def note_handover(
    tracer: Tracer,
    mine: OptimizerFacts,
    params: Sequence[Tensor],
    states: Sequence[GradState],
    backwards: Sequence[BackwardFacts],
    stack: Stack,
) -> None:
    """Note which gradients of the last backward a step does not get, and what took them.

    Args:
        tracer: where the facts go.
        mine: the optimizer that is about to step.
        params: what it holds.
        states: in which state each gradient is.
        backwards: the backwards since its last step.
        stack: where it steps.
    """
    if not backwards:
        return
    by_leaf: dict[int, list[GradEvent]] = {}
    for event in events_since(tracer, mine.last_step_seq):
        for key in event.ids:
            by_leaf.setdefault(key, []).append(event)
    _note_shared(tracer, mine, params, by_leaf, stack)
    if tracer.facts.hooks:
        _note_hooked(tracer, mine, params, states, backwards, by_leaf)
    if not by_leaf:
        return
    _note_discarded(tracer, mine, by_leaf, backwards, stack)
    taken: dict[Any, tuple[str, GradEvent, set[int]]] = {}
    arrived = 0
    for p, state in zip(params, states, strict=True):
        key = id(p)
        last = max((b.seq for b in backwards if key in b.leaves), default=None)
        if last is None:
            continue
        arrived += 1
        if state == "nonfinite":
            continue
        events = [event for event in by_leaf.get(key, ()) if event.seq > last]
        if not events:
            continue
        kind, culprit = _judge(key, state, events, mine.last_step_seq)
        if kind == "zeroed" and not tracer.facts.parameters[key].norm:
            continue  # it was zero, or nobody knows
        if culprit is not None:
            taken.setdefault((kind, culprit.kind, culprit.op, culprit.stack[:1]), (kind, culprit, set()))[2].add(key)
    for name, (kind, culprit, keys) in taken.items():
        entry = tracer.facts.taken.get((*name, id(mine)))
        if entry is None or entry.optimizer is not mine:
            entry = tracer.facts.taken[(*name, id(mine))] = Taken(kind, culprit, mine, stack)
        entry.event = culprit
        entry.keys |= keys
        entry.count += 1
        entry.whole += len(keys) == arrived
        entry.foreign = entry.foreign or bool(culprit.sources and not keys & culprit.sources.keys())
        entry.at.append(mine.steps)
        del entry.at[:-_REMEMBER]


def _note_hooked(
    tracer: Tracer,
    mine: OptimizerFacts,
    params: Sequence[Tensor],
    states: Sequence[GradState],
    backwards: Sequence[BackwardFacts],
    by_leaf: dict[int, list[GradEvent]],
) -> None:
    """Note leaves with hooks at which a gradient arrived and zeros were accumulated."""
    hooked = {hook.tensor_id for hook in tracer.facts.hooks if not hook.after}
    for p, state in zip(params, states, strict=True):
        key = id(p)
        if key not in hooked or any(e.seq > backwards[-1].seq for e in by_leaf.get(key, ())):
            continue
        if state == "zero" and key in backwards[-1].leaves and tracer.facts.parameters[key].norm:
            at = tracer.facts.zeroed_by_hook.setdefault(key, (mine, []))[1]
            at.append(mine.steps)
            del at[:-_REMEMBER]


def _judge(key: int, state: GradState, events: Sequence[GradEvent], since: int) -> tuple[str, GradEvent | None]:
    """Go through what touched one gradient after its last backward; return what the step misses, and the event."""
    culprit: GradEvent | None = None
    kind = ""
    others = [event for event in events if not event.own]  # what a call of gradctl leaves there is meant
    for event in others:
        if event.kind in ("zero_grad", "none") or event.op in CLEARS:
            culprit, kind = event, "cleared"
        elif event.kind == "set" or event.op in COPIES:
            own = event.sources is None or event.sources.get(key, -1) > since
            culprit, kind = (None, "") if own else (event, "replaced")
        elif event.sources and event.sources.get(key, -1) > since:
            culprit = None
    if kind == "cleared" and culprit is not None and state == "ok":
        return "", None
    if culprit is None and state == "zero" and len(others) == len(events):
        return "zeroed", events[-1]
    return kind, culprit


def _note_discarded(
    tracer: Tracer,
    mine: OptimizerFacts,
    by_leaf: dict[int, list[GradEvent]],
    backwards: Sequence[BackwardFacts],
    stack: Stack,
) -> None:
    """Note gradients of the same backward line that were cleared before the next microbatch, and used by no step."""
    last = backwards[-1]
    same = [b for b in backwards if b.stack[:1] == last.stack[:1]]
    if len(same) < 2 or len(same) < len(backwards):
        return
    used = mine.held & last.leaves
    for key in sorted(used)[:1]:
        if key in tracer.facts.read_by_user:
            return
        for first, second in itertools.pairwise(same):
            between = [e for e in by_leaf.get(key, ()) if first.seq < e.seq < second.seq]
            cleared = next((e for e in between if e.kind in ("zero_grad", "none") or e.op in CLEARS), None)
            if cleared is None or any(e.kind in ("set", "edit") and e.op not in CLEARS for e in between):
                return
            where = ("discarded", cleared.stack[:1], id(mine))
            entry = tracer.facts.taken.get(where)
            if entry is None or entry.optimizer is not mine:
                entry = tracer.facts.taken[where] = Taken("discarded", cleared, mine, stack)
            entry.keys |= used
            entry.whole += 1
            if not entry.at or entry.at[-1] != mine.steps:
                entry.count += 1
                entry.at.append(mine.steps)
                del entry.at[:-_REMEMBER]


def _note_shared(
    tracer: Tracer, mine: OptimizerFacts, params: Sequence[Tensor], by_leaf: dict[int, list[GradEvent]], stack: Stack
) -> None:
    """Note parameters whose gradients lie in the same memory, who made them so, and who changed them since."""
    if not tracer.facts.generation:
        return
    at: dict[int, Tensor] = {}
    for p in params:
        grad = p.grad
        if grad is None or type(grad) is not Tensor or grad.layout is not torch.strided or grad.device.type == "meta":
            continue
        if not grad.numel():
            continue
        twin = at.setdefault(grad.data_ptr(), p)
        if twin is p or twin.grad is None or twin.grad.shape != grad.shape or twin.grad.stride() != grad.stride():
            continue
        pair = (id(twin), id(p))
        entry = tracer.facts.shared.get(pair)
        sets = sorted(
            (e for key in pair for e in by_leaf.get(key, ()) if e.kind == "set"), key=lambda e: e.seq, reverse=True
        )
        if entry is None:
            entry = tracer.facts.shared[pair] = Shared(mine, stack, None)
        elif not sets:
            entry.added += 1  # nobody set them anew: the backward added to both
        if sets:
            entry.setting = sets[0]
            edits = [e for key in pair for e in by_leaf.get(key, ()) if e.kind == "edit" and e.seq > sets[0].seq]
            if edits:
                entry.edit = max(edits, key=lambda e: e.seq)
                entry.edits += 1
        entry.count += 1
    if mine.steps < 3 or mine.steps % _OVERLAPS_EVERY == 0:
        _note_overlaps(tracer, mine, list(at.values()), stack)


def _note_overlaps(tracer: Tracer, mine: OptimizerFacts, params: Sequence[Tensor], stack: Stack) -> None:
    """Note parameters whose gradients share a part of their memory: slices of one buffer that are cut too short."""
    spans: list[tuple[int, int, Tensor]] = []
    for p in params:
        grad = p.grad
        if grad is not None and grad.is_contiguous():
            spans.append((grad.data_ptr(), grad.data_ptr() + grad.numel() * grad.element_size(), p))
    spans.sort(key=lambda span: span[:2])
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start >= end:
            continue
        pair = (id(first), id(second))
        entry = tracer.facts.shared.get(pair)
        if entry is None:
            entry = tracer.facts.shared[pair] = Shared(mine, stack, None)
            events = reversed(tracer.facts.grad_events)
            entry.setting = next((e for e in events if e.kind == "set" and id(second) in e.ids), None)
        entry.added += 1
        entry.count += 1
