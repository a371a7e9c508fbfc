"""Values whose graphs of past steps are still alive, and what holds them."""

from __future__ import annotations

import gc
import inspect
import sys
from collections import deque
from typing import Any

from torch import Tensor

from gradctl._lineage._facts import Held, Kept
from gradctl._lineage._frames import Frames, site
from gradctl._lineage._node import Node
from gradctl._lineage._tracer import Tracer

_FEWEST = 3
_SEARCHES = 6
_GARBAGE = 3  # a line whose graphs were garbage so often is not looked at again
_CONTAINERS = (list, dict, tuple, set, deque)


def find_kept(tracer: Tracer) -> None:
    """Note values whose graphs of several generations are still alive, by the line that made them."""
    lines = _alive(tracer)
    kept, garbage = tracer.facts.kept, tracer.facts.garbage
    doubled = [key for key, (_, gens, _) in lines.items() if len(gens) > 2 * (kept[key].count if key in kept else 0)]
    if doubled:
        # What only a cycle of references keeps (distributions that cache make such) is not held by the program.
        gc.collect()
        lines = _alive(tracer)
        for key in doubled:
            if key not in lines:
                garbage[key] = garbage.get(key, 0) + 1
    for key, (found, generations, chained) in lines.items():
        _note(tracer, key, found, generations, chained=chained)


def _alive(tracer: Tracer) -> dict[Any, tuple[dict[int, Node], set[int], bool]]:
    """Return lines with at least three generations alive: a node of each, the generations, whether in a chain."""
    groups: dict[Any, dict[int, Node]] = {}
    chains: dict[Any, set[int]] = {}
    for node in [entry[1] for entry in tracer.map.items()]:
        if not node.live or not node.stack or node.op == "grad":
            continue
        key = node.stack[:1]
        if tracer.facts.garbage.get(key, 0) >= _GARBAGE:
            continue
        groups.setdefault(key, {})[node.generation] = node
        behind = _behind(node)
        if len(behind) > len(chains.get(key, ())):
            chains[key] = behind
    lines: dict[Any, tuple[dict[int, Node], set[int], bool]] = {}
    for key, chain in chains.items():
        found = groups[key]
        generations = chain if len(chain) > len(found) else set(found)
        if len(generations) >= _FEWEST:
            lines[key] = found, generations, len(chain) > len(found)
    return lines


def _behind(node: Node) -> set[int]:
    """Return the generations of the same line that a value still reaches: a running sum, an average."""
    found = {node.generation}
    seen = {id(node)}
    queue = [node]
    while queue and len(found) < 1000:
        at = queue.pop()
        for parent, alive in zip(at.inputs, at.live_inputs, strict=False):
            if alive and id(parent) not in seen and _same_line(parent, node):
                seen.add(id(parent))
                found.add(parent.generation)
                queue.append(parent)
    return found


def _same_line(one: Node, other: Node) -> bool:
    if not one.stack or not other.stack or one.stack[0][0] is not other.stack[0][0]:
        return False
    return one.stack[0][1] == other.stack[0][1] or site(one.stack[0]).line == site(other.stack[0]).line


def _note(tracer: Tracer, key: Any, found: dict[int, Node], generations: set[int], *, chained: bool) -> None:
    facts, node = tracer.facts, found[max(found)]
    steps = {facts.step_at[g] for g in generations if g < len(facts.step_at)} if facts.steps else generations
    if len(steps) < _FEWEST:
        return
    kept = facts.kept.get(key)
    if kept is None:
        kept = facts.kept[key] = Kept(node, chained)
    elif min(generations) == kept.oldest and len(generations) > kept.count:
        kept.grown += 1
    elif min(generations) > kept.oldest:
        kept.grown = 0  # what is old is let go: a window
    kept.node, kept.chained = node, chained
    kept.count, kept.oldest, kept.seen_at = len(generations), min(generations), facts.generation
    if not chained and kept.held is None and facts.searches < _SEARCHES:
        facts.searches += 1
        tensor = found[min(found)].tensor()  # the newest may not have been stored yet
        if tensor is not None:
            try:
                kept.held = _holder(tensor, tracer.frames)
            except Exception as fault:  # it looks at the program's own objects, which may answer anything
                facts.notes.append(f"what holds a graph could not be asked: {type(fault).__name__}: {fault}")


def _holder(tensor: Tensor, frames: Frames) -> Held | None:
    """Return the container that holds a tensor, by the name that a frame, a module or an object has for it."""
    queue: list[tuple[Any, int]] = [(tensor, 0)]
    seen: set[int] = {id(queue)}
    stack = _user_frames(frames)
    while queue:
        held, depth = queue.pop(0)
        for referrer in gc.get_referrers(held):
            if id(referrer) in seen or not isinstance(referrer, _CONTAINERS) or referrer is stack:
                continue
            seen.add(id(referrer))
            if "__builtins__" in referrer:
                continue  # the globals of a module
            name = _name_of(referrer, stack)
            if name is not None:
                return name
            if depth < 2:
                queue.append((referrer, depth + 1))
    return None


def _user_frames(frames: Frames) -> list[tuple[Any, dict[str, Any]]]:
    found: list[tuple[Any, dict[str, Any]]] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frames.is_user(frame.f_code.co_filename):
            own = frame.f_locals
            found.append((frame.f_code, dict(own)))
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
                own.clear()  # the snapshot that asking made; it would hold what the function lets go
        frame = frame.f_back
    return found


def _name_of(container: Any, stack: list[tuple[Any, dict[str, Any]]]) -> Held | None:
    bounded = isinstance(container, deque) and container.maxlen is not None
    for code, local in stack:
        for name, value in local.items():
            if value is container:
                return Held(name, None, code, bounded)
    for referrer in gc.get_referrers(container):
        own = getattr(referrer, "__dict__", None)
        if type(referrer).__module__.startswith("gradctl."):
            return None
        if isinstance(own, dict) and not inspect.ismodule(referrer) and not isinstance(referrer, type):
            for name, value in own.items():
                if value is container:
                    return Held(f"self.{name}", type(referrer), None, bounded)
        if isinstance(referrer, dict):
            for owner in gc.get_referrers(referrer):
                if getattr(owner, "__dict__", None) is referrer and not isinstance(owner, type):
                    name = next((n for n, value in referrer.items() if value is container), None)
                    if name is not None and not inspect.ismodule(owner):
                        return Held(f"self.{name}", type(owner), None, bounded)
    return None
