"""Where a tensor or a layer hangs on a module without being registered, and the line that put it there."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from gradctl._lineage import Site, Stack, site

_DEPTH = 3
_WIDTH = 512


class Attribute(NamedTuple):
    """An attribute of a module that holds tensors which `parameters()` does not list.

    Args:
        owner: the module.
        name: the attribute.
        value: what it holds.
        tensors: the tensors found in it.
    """

    owner: Module
    name: str
    value: Any
    tensors: tuple[Tensor, ...]


def hidden_attributes(module: Module) -> Iterator[Attribute]:
    """Yield the attributes of a module that hold tensors, or layers, past its registration."""
    own = {name: value for name, value in vars(module).items() if name not in _REGISTERS and not name.startswith("__")}
    for name, buffer in module._buffers.items():
        if buffer is not None:
            own[name] = buffer
    for cls in type(module).__mro__:
        if cls is Module:
            break
        own |= {name: value for name, value in vars(cls).items() if isinstance(value, Tensor) and name not in own}
    for name, value in own.items():
        tensors = tuple(_tensors_in(value, 0))
        if tensors:
            yield Attribute(module, name, value, tensors)


_REGISTERS = frozenset(vars(Module())) - {"training"}


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Module):
        # A module directly in an attribute is there past registration too (object.__setattr__, __dict__).
        yield from value.parameters()
    elif depth < _DEPTH:
        items: Any = ()
        if isinstance(value, dict):
            items = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = list(value)
        elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
            items = list(vars(value).values())
        for item in items[:_WIDTH]:
            yield from _tensors_in(item, depth + 1)


def line_of(attribute: Attribute, stack: Stack) -> Site | None:
    """Return the line of the owner's class that made an attribute.

    Args:
        attribute: the attribute.
        stack: where what it holds was made; the frame in the owner's class is preferred where it is an assignment.
    """
    names = {f"{cls.__qualname__}." for cls in type(attribute.owner).__mro__}
    inside = [
        site(entry) for entry in stack if any(entry[0].co_qualname.startswith(name) for name in names)
    ]  # the frames of a listcomp and of the method around it
    assigned: list[Site] = []
    for cls in type(attribute.owner).__mro__:
        if cls is Module:
            break
        assigned += _assignments(cls, attribute.name)
    for place in inside:
        for line in assigned:
            if line.file == place.file and line.line == place.line:
                return place
    methods = {(line.file, line.function) for line in assigned}
    if inside and not any((place.file, place.function.partition(".<locals>")[0]) in methods for place in inside):
        return inside[-1]
    return assigned[0] if assigned else (inside[0] if inside else (site(stack[0]) if stack else None))


@functools.lru_cache(maxsize=256)
def _assignments(cls: type, name: str) -> list[Site]:
    """Return the statements of a class that assign `self.<name>`, those in `__init__` first."""
    module = sys.modules.get(cls.__module__)
    try:
        file = inspect.getsourcefile(cls) or getattr(module, "__file__", None)
        lines, first = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        return []
    if file is None:
        return []
    import textwrap

    try:
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError:
        return []
    found: list[Site] = []
    for method in ast.walk(tree):
        if not isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for statement in ast.walk(method):
            targets: list[ast.expr] = []
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                targets = [statement.target]
            for target in targets:
                parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
                if any(isinstance(p, ast.Attribute) and p.attr == name for p in parts):
                    found.append(Site(file, first + statement.lineno - 1, f"{cls.__qualname__}.{method.name}"))
    found.sort(key=lambda s: not s.function.endswith(".__init__"))
    return found
