"""What the variables of the running program hold, read without running any of its code."""

from __future__ import annotations

import dis
import sys
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._names._modules import own_attributes

_OBJECTS = 20_000
_SECONDS = 0.05
_DEPTH = 3
_WIDTH = 512
_FRAMES = 200
_NOT_THE_PROGRAM = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")
_PLAIN = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type}
    | {ModuleType, CodeType, FunctionType, BuiltinFunctionType}
)
_READS_ITS_LOCALS = frozenset({"locals", "vars", "dir", "eval", "exec"})
_CO_OPTIMIZED = 0x1


@dataclass(slots=True)
class Surroundings:
    """What the variables hold, a few levels deep, each under its shortest label (`trainer.model`, `weights.0`).

    Args:
        modules: every module met.
        labels: label of each module by id; one that is only `self` has none. `for net in nets:` leaves `net` behind, so
            a member of a list goes by the list, unless every member is a variable.
        variables: label of each tensor that is a variable, by id.
        held: label of each tensor that a container or an object holds, by id.
        optimized: ids of the tensors in the parameter groups of the optimizers met.
    """

    modules: list[Module] = field(default_factory=list[Module])
    labels: dict[int, str] = field(default_factory=dict[int, str])
    variables: dict[int, str] = field(default_factory=dict[int, str])
    held: dict[int, str] = field(default_factory=dict[int, str])
    optimized: set[int] = field(default_factory=set[int])


def look_around(frame: FrameType | None) -> Surroundings:
    """Look from `frame` outwards: variables of the functions, innermost first, then the globals of their files.

    Frames of torch and of gradctl are passed over. It ends after 20,000 objects or 50 ms.
    """
    look = Surroundings()
    functions: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    cleanups: list[Callable[[], None]] = []
    listed: dict[str, dict[int, str]] = {}
    try:
        for _ in range(_FRAMES):
            if frame is None:
                break
            if not frame.f_code.co_filename.startswith(_NOT_THE_PROGRAM):
                if frame.f_code.co_flags & _CO_OPTIMIZED:
                    functions.append(_locals_of(frame, cleanups))
                if all(frame.f_globals is not other for other in files):
                    files.append(frame.f_globals)
            frame = frame.f_back
        main = sys.modules.get("__main__")
        listed = _walk(look, [*functions, *files, vars(main) if main else {}])
    finally:
        functions.clear()
        for cleanup in cleanups:
            cleanup()
    for members in listed.values():
        if not all("." not in look.labels.get(key, ".") for key in members):
            look.labels.update(members)
    return look


def _locals_of(frame: FrameType, cleanups: list[Callable[[], None]]) -> dict[str, Any]:
    """Return the variables of a running function; what undoes having read them goes to `cleanups`.

    Up to Python 3.12 reading `f_locals` leaves a copy in the frame, which would keep every variable alive until the
    function returns: it is emptied again. A function that asks for its own variables may hold that very copy and
    would see it change: it is not read.
    """
    if sys.version_info >= (3, 13):
        return dict(frame.f_locals)
    if _asks_for_its_locals(frame.f_code):
        return {}
    copy: dict[str, Any] = frame.f_locals
    cleanups.append(copy.clear)
    return dict(copy)


def _asks_for_its_locals(code: CodeType) -> bool:
    if _READS_ITS_LOCALS.isdisjoint(code.co_names):
        return False
    # An attribute of such a name (`config.vars`) is nothing to fear.
    loads = (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return not _READS_ITS_LOCALS.isdisjoint(loads)


def _walk(look: Surroundings, spaces: Iterable[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Fill `look`; return the modules that lists hold, by the label of the list."""
    listed: dict[str, dict[int, str]] = {}
    queue: deque[tuple[str, Any, int]] = deque()
    for space in spaces:
        queue.extend((name, value, 0) for name, value in list(space.items()) if not name.startswith("__"))
    visited: set[int] = set()
    end = time.perf_counter() + _SECONDS
    while queue and len(visited) < _OBJECTS:
        label, value, depth = queue.popleft()
        kind: Any = type(value)
        if kind in _PLAIN:
            continue
        kinds = kind.__mro__
        if Tensor in kinds:
            # A tensor may be both a variable and a member: the caller chooses.
            (look.held if depth else look.variables).setdefault(id(value), label)
            continue
        if Module in kinds and depth and label.rpartition(".")[2].isdigit():
            listed.setdefault(label.rpartition(".")[0], {}).setdefault(id(value), label)
        if id(value) in visited:
            continue
        visited.add(id(value))
        if not len(visited) % 256 and time.perf_counter() > end:
            break
        if Optimizer in kinds:
            groups = own_attributes(value).get("param_groups") or ()
            look.optimized.update(id(param) for group in groups for param in group.get("params", ()))
            continue
        if Module in kinds:
            look.modules.append(value)
            if label != "self":
                look.labels[id(value)] = label
        if depth < _DEPTH:
            path = "" if label == "self" else f"{label}."
            queue.extend((path + name, inner, depth + 1) for name, inner in _members(value))
    return listed


def _members(value: Any) -> list[tuple[str, Any]]:
    """What a container or a plain object holds, by key, index or attribute."""
    kind: Any = type(value)
    if kind in (dict, OrderedDict, defaultdict):
        items = list(dict[Any, Any].items(value)) if len(value) <= _WIDTH else []
        return [(str(key), inner) for key, inner in items if type(key) in (str, int)]
    if kind in (list, tuple, deque):
        return [(str(index), inner) for index, inner in enumerate(list(value))] if len(value) <= _WIDTH else []
    if type in kind.__mro__:
        return []
    return [(name, inner) for name, inner in list(own_attributes(value).items())[:_WIDTH] if type(name) is str]
